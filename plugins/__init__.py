"""TensorRT plugins in CUDA C++: `python -m plugins build` compiles them, `plugins.load` gives them to TensorRT."""
