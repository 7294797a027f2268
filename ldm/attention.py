"""The transformer blocks of the UNet (Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion").

Cross-attention splits into `kv` (depends on the text alone) and `forward` (depends on the latent), so that a sampler
can compute K and V once a prompt instead of once a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KV = tuple[Tensor, Tensor]


def match_batch(x: Tensor, batch: int) -> Tensor:
    """Repeat `x` (N, …) along its batch to `batch` = k·N rows: sample order is kept within each of the k groups."""
    return x if x.shape[0] == batch else x.repeat(batch // x.shape[0], *[1] * (x.dim() - 1))


M = TypeVar("M", bound=nn.Module)


def zero_module(module: M) -> M:
    """Set every parameter of a module to zero and return it (ControlNet's zero convolutions)."""
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    return module


class GEGLU(nn.Module):
    """Gated linear unit with GELU (Shazeer 2020, "GLU Variants Improve Transformer"): (…, C) → (…, D)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to 4·C, then back: (B, T, C) → (B, T, C)."""

    def __init__(self, dim: int, mult: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, dim * mult), nn.Identity(), nn.Linear(dim * mult, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, T, C) over K, V (B, S, C); without a context it is self-attention."""

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Identity())

    def kv(self, context: Tensor) -> KV:
        """Keys and values (B, S, C) of a context (B, S, D)."""
        return self.to_k(context), self.to_v(context)

    def forward(self, x: Tensor, kv: KV | None = None) -> Tensor:
        q, k, v = (self.split(t) for t in (self.to_q(x), *(kv or self.kv(x))))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, T, C / heads)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, heads, T, C / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each behind a LayerNorm and a residual: (B, T, C)."""

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, kv: KV) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        # Before the first cross-attention cond and uncond are the same numbers, so x may still be at batch N here.
        x = match_batch(x, kv[0].shape[0])
        x = self.attn2(self.norm2(x), kv) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """Transformer over the h·w positions of a feature map, conditioned on the text: (B, C, h, w) → (B, C, h, w)."""

    def __init__(self, channels: int, context_dim: int, heads: int, depth: int = 1) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, context_dim, heads) for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Conv2d(channels, channels, 1))

    def kv(self, context: Tensor) -> list[KV]:
        """Keys and values of every transformer block for a context (B, S, D)."""
        return [cast(BasicTransformerBlock, block).attn2.kv(context) for block in self.transformer_blocks]

    def forward(self, x: Tensor, kv: Iterator[KV]) -> Tensor:
        h, w = x.shape[2:]
        y = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, h·w, C)
        for block in self.transformer_blocks:
            y = block(y, next(kv))
        y = self.proj_out(y.transpose(1, 2).unflatten(2, (h, w)))
        return y + match_batch(x, y.shape[0])
