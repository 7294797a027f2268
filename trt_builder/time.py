"""Time embeddings and the ResBlocks' time rows (twin: `embed_time` and `time_rows` in ldm/unet.py)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from trt_builder.config import Layer, UNetConfig
from trt_builder.layers import concat, linear, mul, reshape, silu, unary
from trt_builder.net import Net

if TYPE_CHECKING:
    import tensorrt as trt


def timestep_embedding(net: Net, timesteps: trt.ITensor, dim: int, max_period: int = 10000) -> trt.ITensor:
    """Sinusoidal embedding of timesteps (S,) → (S, dim), cosines first (Vaswani et al. 2017).

    In single precision: an angle reaches 999, where half precision counts in halves.
    """
    net = net.float32()
    half = dim // 2
    freqs = np.exp(-math.log(max_period) * np.arange(half, dtype=np.float32) / half)
    timesteps = net.cast(reshape(net, timesteps, (timesteps.shape[0], 1)))
    angles = mul(net, timesteps, net.constant(freqs, (1, half), "freqs"))
    return concat(net, [unary(net, angles, "COS"), unary(net, angles, "SIN")], 1)


def embed_time(net: Net, config: UNetConfig, timesteps: trt.ITensor) -> trt.ITensor:
    """Time embeddings (S, 4·model_channels) of timesteps (S,)."""
    emb = net.cast(timestep_embedding(net, timesteps, config.model_channels))
    return linear(net.at("time_embed.2"), silu(net.at("time_embed.1"), linear(net.at("time_embed.0"), emb)))


def time_rows(net: Net, layers: list[Layer], silu_emb: trt.ITensor) -> list[trt.ITensor]:
    """The time rows (S, D) of ResBlocks, of the time embeddings after their SiLU, which is the same for all."""
    return [linear(net.at(layer.prefix, "emb_layers.1"), silu_emb) for layer in layers]
