"""ControlNet in PyTorch (Zhang et al. 2023): the model, its DDIM sampler, its stages and the canny2image pipeline."""
