"""The diffusion process: noise schedule constants, first stage, conditioning (Ho et al. 2020; Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.autoencoder import AutoencoderKL
from ldm.clip import FrozenCLIPEmbedder
from runtime.schedule import noise_schedule


class DiffusionWrapper(nn.Module):
    """Holds the UNet under the checkpoint's name `model.diffusion_model`."""

    diffusion_model: Any

    def __init__(self, diffusion_model: Any) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model


class LatentDiffusion(nn.Module):
    """UNet, autoencoder and text encoder with the constants of the noise schedule; the UNet predicts e."""

    betas: Tensor
    alphas_cumprod: Tensor
    first_stage_model: AutoencoderKL
    cond_stage_model: FrozenCLIPEmbedder

    def __init__(
        self,
        unet: Any,
        first_stage: AutoencoderKL,
        cond_stage: FrozenCLIPEmbedder,
        linear_start: float = 0.00085,
        linear_end: float = 0.0120,
        timesteps: int = 1000,
        scale_factor: float = 0.18215,
    ) -> None:
        super().__init__()
        for name, value in noise_schedule(linear_start, linear_end, timesteps).items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))
        self.num_timesteps = timesteps
        self.scale_factor = scale_factor
        self.model = DiffusionWrapper(unet)
        self.first_stage_model = first_stage
        self.cond_stage_model = cond_stage

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.betas.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.betas.dtype

    def get_learned_conditioning(self, prompts: Sequence[str]) -> Tensor:
        """Context (B, 77, C) of B prompts."""
        return self.cond_stage_model(prompts)

    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, 8h, 8w) in about [-1, 1] of scaled latents (B, 4, h, w)."""
        return self.first_stage_model.decode(z / self.scale_factor)

    def encode_first_stage(self, x: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w), the posterior's mean, of pictures (B, 3, H, W) in [-1, 1]."""
        return self.first_stage_model.encode(x).mean * self.scale_factor
