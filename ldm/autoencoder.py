"""The autoencoder of latent diffusion (Rombach et al. 2022): pictures to latents an eighth as wide, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two GroupNorm-SiLU-convolutions and a shortcut: (B, C, h, w) → (B, D, h, w)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention with one head over all positions: (B, C, h, w) → (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (conv(y).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, h·w, C)
        return x + self.proj_out(y.transpose(1, 2).view_as(x))


class Downsample(nn.Module):
    """3×3 convolution of stride 2, padded on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest ×2, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Mid(nn.Module):
    """ResnetBlock, attention, ResnetBlock at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The ResnetBlocks of one resolution and, if there is a next one, the way to it."""

    def __init__(self, channels: int, out_channels: int, blocks: int, resample: nn.Module | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(channels if i == 0 else out_channels, out_channels) for i in range(blocks)
        )
        if resample is not None:
            self.add_module("downsample" if isinstance(resample, Downsample) else "upsample", resample)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for name, resample in self.named_children():
            x = x if name == "block" else resample(x)
        return x


class Encoder(nn.Module):
    """Picture (B, 3, H, W) → moments before `quant_conv` (B, 2·z, h, w)."""

    def __init__(self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, in_channels: int, z_channels: int) -> None:
        super().__init__()
        widths = [ch, *(ch * m for m in ch_mult)]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        steps = [*(Downsample(width) for width in widths[1:-1]), None]
        self.down = nn.ModuleList(
            Level(a, b, num_res_blocks, step) for a, b, step in zip(widths[:-1], widths[1:], steps, strict=True)
        )
        self.mid = Mid(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latent after `post_quant_conv` (B, z, h, w) → picture (B, 3, H, W) in about [-1, 1]."""

    def __init__(self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, out_ch: int, z_channels: int) -> None:
        super().__init__()
        widths = [*(ch * m for m in ch_mult), ch * ch_mult[-1]]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1])
        # up[0] is the full resolution and runs last, as in the checkpoint.
        steps = [None, *(Upsample(width) for width in widths[1:-1])]
        self.up = nn.ModuleList(
            Level(b, a, num_res_blocks + 1, step) for a, b, step in zip(widths[:-1], widths[1:], steps, strict=True)
        )
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


@dataclass(frozen=True)
class DiagonalGaussian:
    """The posterior q(z|x) of a picture: mean and log-variance, each (B, z, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self) -> Tensor:
        """A draw of z (B, z, h, w)."""
        return self.mean + (0.5 * self.logvar).exp() * torch.randn_like(self.mean)

    def mode(self) -> Tensor:
        """The most likely z: the mean."""
        return self.mean


class AutoencoderKL(nn.Module):
    """KL-regularised autoencoder; `ddconfig` and `embed_dim` are those of the checkpoint's yaml."""

    def __init__(self, ddconfig: dict, embed_dim: int) -> None:
        super().__init__()
        z, blocks = ddconfig["z_channels"], ddconfig["num_res_blocks"]
        ch, ch_mult = ddconfig["ch"], list(ddconfig["ch_mult"])
        self.encoder = Encoder(ch, ch_mult, blocks, ddconfig["in_channels"], z)
        self.decoder = Decoder(ch, ch_mult, blocks, ddconfig["out_ch"], z)
        self.quant_conv = nn.Conv2d(2 * z, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z, 1)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Posterior of pictures (B, 3, H, W) in [-1, 1]."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in about [-1, 1] of latents (B, z, h, w)."""
        return self.decoder(self.post_quant_conv(z))
