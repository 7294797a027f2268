"""The denoising UNet of Stable Diffusion 1.x: blocks under their checkpoint names, and the plain model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.attention import KV, SpatialTransformer, zero_module


def timestep_embedding(timesteps: Tensor, dim: int, max_period: int = 10000) -> Tensor:
    """Sinusoidal embedding of timesteps (S,) → (S, dim), cosines first (Vaswani et al. 2017)."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Upsample(nn.Module):
    """Nearest ×2, then a 3×3 convolution: (B, C, h, w) → (B, C, 2h, 2w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    """3×3 convolution of stride 2: (B, C, h, w) → (B, C, h / 2, w / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """Two GroupNorm-SiLU-convolutions with the time row added between them: (B, C, h, w) → (B, D, h, w)."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Identity(),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def row(self, emb: Tensor) -> Tensor:
        """This block's time row (S, D) of time embeddings (S, E): the same for every picture of a step."""
        return self.emb_layers(emb)

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        h = self.in_layers(x) + row[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Block(nn.Sequential):
    """A step of the UNet: ResBlock, SpatialTransformer and resampling layers, drawing rows and K/V in layer order."""

    def forward(self, x: Tensor, rows: Iterator[Tensor], kv: Iterator[KV]) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, next(rows))
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, kv)
            else:
                x = layer(x)
        return x


def time_rows(blocks: Sequence[nn.Module], emb: Tensor) -> list[Tensor]:
    """The time rows (S, D) of every ResBlock in `blocks`, in the order in which they run."""
    return [m.row(emb) for block in blocks for m in block.modules() if isinstance(m, ResBlock)]


def cross_kv(blocks: Sequence[nn.Module], context: Tensor) -> list[KV]:
    """Keys and values (B, S, C) of every cross-attention in `blocks`, in the order in which they run."""
    transformers = [m for block in blocks for m in block.modules() if isinstance(m, SpatialTransformer)]
    return [kv for transformer in transformers for kv in transformer.kv(context)]


class UNetEncoder(nn.Module):
    """The half that UNet and ControlNet share: time embedding, input blocks and middle block.

    `channels` lists the skips' channels, one per input block.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[int],
        num_heads: int,
        context_dim: int,
        transformer_depth: int = 1,
    ) -> None:
        super().__init__()
        emb = model_channels * 4

        def transformer(channels: int) -> SpatialTransformer:
            return SpatialTransformer(channels, context_dim, num_heads, transformer_depth)

        self.model_channels = model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(in_channels, model_channels, 3, padding=1))])
        self.channels = [model_channels]
        ch, scale = model_channels, 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [ResBlock(ch, emb, mult * model_channels)]
                ch = mult * model_channels
                if scale in attention_resolutions:
                    layers.append(transformer(ch))
                self.input_blocks.append(Block(*layers))
                self.channels.append(ch)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(Block(Downsample(ch)))
                self.channels.append(ch)
                scale *= 2
        self.middle_block = Block(ResBlock(ch, emb, ch), transformer(ch), ResBlock(ch, emb, ch))

    @property
    def encoder_blocks(self) -> list[nn.Module]:
        """Input blocks and middle block, in the order in which they run."""
        return [*self.input_blocks, self.middle_block]

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Time embeddings (S, 4·model_channels) of timesteps (S,)."""
        emb = timestep_embedding(timesteps, self.model_channels)
        return self.time_embed(emb.to(next(self.parameters()).dtype))


class UNetModel(UNetEncoder):
    """The UNet that predicts the noise e of a latent x (B, 4, h, w) at timesteps (B,) given a context (B, S, D)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[int],
        num_heads: int,
        context_dim: int,
        transformer_depth: int = 1,
    ) -> None:
        super().__init__(
            in_channels, model_channels, num_res_blocks, attention_resolutions, channel_mult, num_heads, context_dim,
            transformer_depth,
        )  # fmt: skip
        emb = model_channels * 4
        skips = list(self.channels)
        ch = skips[-1]
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers: list[nn.Module] = [ResBlock(ch + skips.pop(), emb, mult * model_channels)]
                ch = mult * model_channels
                if 2**level in attention_resolutions:
                    layers.append(SpatialTransformer(ch, context_dim, num_heads, transformer_depth))
                if level and i == num_res_blocks:
                    layers.append(Upsample(ch))
                self.output_blocks.append(Block(*layers))
        self.out = nn.Sequential(
            nn.GroupNorm(32, ch), nn.SiLU(), zero_module(nn.Conv2d(ch, out_channels, 3, padding=1))
        )

    def encode(self, x: Tensor, rows: Iterator[Tensor], kv: Iterator[KV]) -> tuple[list[Tensor], Tensor]:
        """The input half: the skips, one per input block, and the middle block's output."""
        skips = []
        for block in self.input_blocks:
            x = block(x, rows, kv)
            skips.append(x)
        return skips, self.middle_block(x, rows, kv)

    def decode(self, skips: list[Tensor], middle: Tensor, rows: Iterator[Tensor], kv: Iterator[KV]) -> Tensor:
        """The output half: skips and the middle block's output → e (B, 4, h, w)."""
        x = middle
        for block, skip in zip(self.output_blocks, reversed(skips), strict=True):
            x = block(torch.cat([x, skip], dim=1), rows, kv)
        return self.out(x)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        blocks = [*self.encoder_blocks, *self.output_blocks]
        rows = iter(time_rows(blocks, self.embed_time(timesteps)))
        kv = iter(cross_kv(blocks, context))
        return self.decode(*self.encode(x, rows, kv), rows, kv)
