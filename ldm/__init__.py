"""Latent diffusion in PyTorch: UNet blocks, attention, autoencoder, CLIP text encoder, diffusion constants."""
