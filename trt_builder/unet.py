"""The UNet's two halves, and the blocks that ControlNet shares with them (twins: ldm/unet.py, ldm/attention.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from trt_builder.attention import attention, attention_over_itself
from trt_builder.config import Block, UNetConfig
from trt_builder.layers import (
    Net,
    conv,
    geglu,
    group_norm,
    linear,
    linear_after,
    reshape,
    residual_conv,
    upsample_nearest,
)

if TYPE_CHECKING:
    import tensorrt as trt

    KV = tuple[trt.ITensor, trt.ITensor]
    Join = Callable[[Net, trt.ITensor], trt.ITensor]


def res_block(net: Net, x: trt.ITensor, row: trt.ITensor) -> trt.ITensor:
    """Two GroupNorm-SiLU-convolutions with the time row (1, D) added between them: (B, C, h, w) → (B, D, h, w)."""
    h = group_norm(net.at("in_layers.0"), x, with_silu=True)
    h = conv(net.at("in_layers.2"), h)
    h = group_norm(net.at("out_layers.0"), h, with_silu=True, row=row)
    return residual_conv(net, net.at("out_layers.3"), h, net.at("skip_connection"), x)


def feed_forward(net: Net, norm: Net, x: trt.ITensor) -> trt.ITensor:
    """x, and LayerNorm, gated linear unit with GELU to 4·C (Shazeer 2020), and back: (B, T, C) → (B, T, C)."""
    return linear(net.at("net.2"), geglu(net.at("net.0"), norm, x), residual=x)


def self_attention(net: Net, norm: Net, x: trt.ITensor, heads: int) -> trt.ITensor:
    """x, and LayerNorm and attention of x (B, T, C) over itself."""
    y = attention_over_itself(net, norm, x, heads, ("to_q", "to_k", "to_v"))
    return linear(net.at("to_out.0"), y, residual=x)


def cross_attention(net: Net, norm: Net, x: trt.ITensor, kv: KV, heads: int) -> trt.ITensor:
    """x, and LayerNorm and attention of x (B, T, C) over the K and V (B, S, C) that `clip` made of the text."""
    (q,) = linear_after(norm, x, [(net.at("to_q"), ())])
    return linear(net.at("to_out.0"), attention(net, q, *kv, heads), residual=x)


def transformer_block(net: Net, x: trt.ITensor, kv: KV, heads: int) -> trt.ITensor:
    """Self-attention, cross-attention and feed-forward, each behind a LayerNorm and a residual: (B, T, C)."""
    x = self_attention(net.at("attn1"), net.at("norm1"), x, heads)
    # Before the first cross-attention cond and uncond are the same numbers, so x may still be at batch N here.
    x = cross_attention(net.at("attn2"), net.at("norm2"), x, kv, heads)
    return feed_forward(net.at("ff"), net.at("norm3"), x)


def spatial_transformer(net: Net, x: trt.ITensor, kv: Iterator[KV], heads: int, depth: int) -> trt.ITensor:
    """Transformer over the h·w positions of a feature map, conditioned on the text: (B, C, h, w) → (B, C, h, w).

    Where our plugins serve, the positions of the map are the tokens as they lie in memory, and it stays a map.
    """
    batch, channels, h, w = x.shape
    y = conv(net.at("proj_in"), group_norm(net.at("norm"), x, eps=1e-6))
    maps = net.flavour.has_transformer_plugins(channels // heads, net.options)
    if not maps:
        y = reshape(net, y, (batch, h * w, channels), before=(0, 2, 3, 1), what="to_tokens")
    for i in range(depth):
        y = transformer_block(net.at(f"transformer_blocks.{i}"), y, next(kv), heads)
    if not maps:
        y = reshape(net, y, (y.shape[0], h, w, channels), after=(0, 3, 1, 2), what="to_map")
    return conv(net.at("proj_out"), y, residual=x)


def run_block(
    net: Net, config: UNetConfig, block: Block, x: trt.ITensor, rows: Iterator[trt.ITensor], kv: Iterator[KV]
) -> trt.ITensor:
    """One input, middle or output block, drawing rows and K/V in layer order."""
    for layer in block:
        at = net.at(layer.prefix)
        if layer.kind == "conv":
            x = conv(at, x)
        elif layer.kind == "res":
            x = res_block(at, x, next(rows))
        elif layer.kind == "transformer":
            x = spatial_transformer(at, x, kv, config.num_heads, config.transformer_depth)
        elif layer.kind == "down":
            x = conv(at.at("op"), x, stride=2)
        else:
            x = conv(at.at("conv"), upsample_nearest(at, x))
    return x


def encode(
    net: Net, config: UNetConfig, x: trt.ITensor, rows: Iterator[trt.ITensor], kv: Iterator[KV]
) -> tuple[list[trt.ITensor], trt.ITensor]:
    """The input half: the skips, one per input block, and the middle block's output."""
    skips = []
    for block in config.input_blocks:
        x = run_block(net, config, block, x, rows, kv)
        skips.append(x)
    return skips, run_block(net, config, config.middle_block, x, rows, kv)


def decode(
    net: Net, config: UNetConfig, joins: list[Join], middle: trt.ITensor, rows: Iterator[trt.ITensor],
    kv: Iterator[KV],
) -> trt.ITensor:  # fmt: skip
    """The output half → e (B, 4, h, w), from the middle block's output, and what puts each skip behind an x."""
    x = middle
    for block, join in zip(config.output_blocks, reversed(joins), strict=True):
        x = run_block(net, config, block, join(net.at(block[0].prefix), x), rows, kv)
    return conv(net.at("out.2"), group_norm(net.at("out.0"), x, with_silu=True))
