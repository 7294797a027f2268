"""Every network of the pipeline, layer by layer against the TensorRT network API."""
