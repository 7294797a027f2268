"""The UNet's two halves, and the blocks that ControlNet shares with them (twins: ldm/unet.py, ldm/attention.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from plugins.load import FIRST, GEGLU, first_blocks, rounded
from trt_builder.attention import attention, attention_over_itself
from trt_builder.config import Block, UNetConfig
from trt_builder.layers import (
    add,
    chunk,
    conv,
    gelu,
    group_norm,
    linear,
    linear_after,
    mul,
    own,
    own_conv,
    own_outputs,
    reshape,
    residual_conv,
    takes_own_conv,
    upsample,
)
from trt_builder.net import Net
from trt_builder.text import folded_attention

if TYPE_CHECKING:
    import tensorrt as trt

    KV = tuple[trt.ITensor, ...]  # K and V (B, S, C), or the one map (B, P, 1, S) that trt_builder/text.py makes
    Join = Callable[[Net, trt.ITensor], tuple[trt.ITensor, trt.ITensor | None]]
    Out = tuple[Net, trt.ITensor]  # a 1×1 convolution behind a transformer, and the residual of what it makes


def res_block(net: Net, x: trt.ITensor, row: trt.ITensor, normed: trt.ITensor | None = None) -> trt.ITensor:
    """Two GroupNorm-SiLU-convolutions with the time row (1, D) added between them: (B, C, h, w) → (B, D, h, w).

    normed: what the first GroupNorm-SiLU makes of x, where that is done already.
    """
    h = group_norm(net.at("in_layers.0"), x, with_silu=True) if normed is None else normed
    h = conv(net.at("in_layers.2"), h)
    h = group_norm(net.at("out_layers.0"), h, with_silu=True, row=row)
    return residual_conv(net, net.at("out_layers.3"), h, net.at("skip_connection"), x)


def geglu(net: Net, norm: Net, x: trt.ITensor) -> trt.ITensor:
    """a · GELU(b) of (a, b), which a linear layer makes of x's LayerNorm (Shazeer 2020); of a map by our plugins."""
    proj = net.at("proj")
    gate = len(x.shape) == 4 and takes_own_conv(net, x, (*proj.shape(), 1, 1))
    (y,) = linear_after(norm, x, [(proj, ())], gate)
    if len(x.shape) == 4:
        return y if gate else own(net, GEGLU, [y])
    a, b = chunk(net, y, 2, 2)
    return mul(net, a, gelu(net, b))


def feed_forward(net: Net, norm: Net, x: trt.ITensor, out: Out | None = None) -> trt.ITensor:
    """x, and LayerNorm, gated linear unit with GELU to 4·C (Shazeer 2020), and back: (B, T, C) → (B, T, C).

    A map may go through `out`, too. Where our convolutions serve, that and the way back are one launch: what is linear
    in both is multiplied out.
    """
    gated, back = geglu(net.at("net.0"), norm, x), net.at("net.2")
    if out is None:
        return linear(back, gated, residual=x)
    last, residual = out
    if takes_own_conv(last, gated, (x.shape[1], gated.shape[1], 1, 1), second=x.shape[1]):
        weight, bias = one_after_the_other(back, last)
        return own_conv(last, gated, weight, bias, residual=residual, second=[(x, last.weight())])
    return conv(last, linear(back, gated, residual=x), residual=residual)


def one_after_the_other(first: Net, last: Net) -> tuple[np.ndarray, np.ndarray]:
    """The weight (D, C, 1, 1) and bias (D) of a linear layer and a 1×1 convolution of what it makes, as one of both.

    Multiplied in float32. Raises ValueError where a weight becomes too large for the type that layers compute in.
    """
    inner, outer = first.float32(), last.float32()
    by = outer.weight()[:, :, 0, 0]
    what = f"the weight of {'.'.join(last.path)} times that before it is"
    weight = rounded(by @ inner.weight(), last.dtype, what, "--conv builtin")
    return weight[:, :, None, None], by @ inner.weight("bias") + outer.weight("bias")


def self_attention(net: Net, norm: Net, x: trt.ITensor, heads: int) -> trt.ITensor:
    """x, and LayerNorm and attention of x (B, T, C) over itself."""
    y = attention_over_itself(net, norm, x, heads, ("to_q", "to_k", "to_v"))
    return linear(net.at("to_out.0"), y, residual=x)


def cross_attention(net: Net, norm: Net, x: trt.ITensor, kv: KV, heads: int) -> trt.ITensor:
    """x, and LayerNorm and attention of x (B, T, C) over what `clip` made of the text: K and V (B, S, C), or a map."""
    if len(kv) == 1:
        return folded_attention(net, x, kv[0], heads)
    (q,) = linear_after(norm, x, [(net.at("to_q"), ())])
    k, v = kv
    return linear(net.at("to_out.0"), attention(net, q, k, v, heads), residual=x)


def transformer_block(net: Net, x: trt.ITensor, kv: KV, heads: int, out: Out | None = None) -> trt.ITensor:
    """Self-attention, cross-attention and feed-forward, each behind a LayerNorm and a residual: (B, T, C).

    out: as `feed_forward` has it.
    """
    x = self_attention(net.at("attn1"), net.at("norm1"), x, heads)
    # Before the first cross-attention cond and uncond are the same numbers, so x may still be at batch N here.
    x = cross_attention(net.at("attn2"), net.at("norm2"), x, kv, heads)
    return feed_forward(net.at("ff"), net.at("norm3"), x, out)


def spatial_transformer(net: Net, x: trt.ITensor, kv: Iterator[KV], heads: int, depth: int) -> trt.ITensor:
    """Transformer over the h·w positions of a feature map, conditioned on the text: (B, C, h, w) → (B, C, h, w).

    Where our plugins serve, the positions of the map are the tokens as they lie in memory, and it stays a map.
    """
    batch, channels, h, w = x.shape
    y, out = conv(net.at("proj_in"), group_norm(net.at("norm"), x, eps=1e-6)), net.at("proj_out")
    maps = net.flavour.has_transformer_plugins(channels // heads, net.options)
    if not maps:
        y = reshape(net, y, (batch, h * w, channels), before=(0, 2, 3, 1), what="to_tokens")
    for i in range(depth):
        last = maps and i == depth - 1
        y = transformer_block(net.at(f"transformer_blocks.{i}"), y, next(kv), heads, (out, x) if last else None)
    if maps:
        return y
    y = reshape(net, y, (y.shape[0], h, w, channels), after=(0, 3, 1, 2), what="to_map")
    return conv(out, y, residual=x)


def run_block(
    net: Net, config: UNetConfig, block: Block, x: trt.ITensor, rows: Iterator[trt.ITensor], kv: Iterator[KV],
    normed: trt.ITensor | None = None,
) -> trt.ITensor:  # fmt: skip
    """One input block but the first, middle or output block, drawing rows and K/V in layer order; its first ResBlock
    takes `normed`.
    """
    for layer in block:
        at = net.at(layer.prefix)
        if layer.kind == "res":
            x, normed = res_block(at, x, next(rows), normed), None
        elif layer.kind == "transformer":
            x = spatial_transformer(at, x, kv, config.num_heads, config.transformer_depth)
        elif layer.kind == "down":
            x = conv(at.at("op"), x, stride=2)
        else:
            x = upsample(at, x)
    return x


def first_block(
    net: Net, config: UNetConfig, x: trt.ITensor, batch: int, hint: trt.ITensor | None = None
) -> tuple[trt.ITensor, trt.ITensor]:
    """The first input block, a convolution of x (N, 4, h, w) in float32, and a hint (1, C, h, w): (N, C, h, w) twice.

    Our plugin repeats the second one to `batch` rows, for whoever wants all of them.
    """
    (layer,) = config.input_blocks[0]
    at = net.at(layer.prefix)
    if not net.flavour.has_end_plugins(at.shape(), net.options):
        y = conv(at, net.cast(x))
        y = y if hint is None else add(net, y, hint, "add_hint")
        return y, y
    exact, repeat = at.float32(), batch // x.shape[0]
    blocks, bias = first_blocks(exact.weight()), exact.weight("bias")
    inputs = [x, exact.constant(blocks, blocks.shape, "weight"), exact.constant(bias, bias.shape, "bias")]
    inputs += [] if hint is None else [hint]
    count = 2 if repeat > 1 else 1
    made = own_outputs(at, FIRST, inputs, count, hint=int(hint is not None), repeat=repeat if count == 2 else 0)
    return made[0], made[-1]


def encode(
    net: Net, config: UNetConfig, x: trt.ITensor, batch: int, rows: Iterator[trt.ITensor], kv: Iterator[KV]
) -> tuple[list[trt.ITensor], trt.ITensor]:
    """The input half: the skips, one per input block, and the middle block's output, of `batch` rows."""
    x, skip = first_block(net, config, x, batch)
    skips = [skip]
    for block in config.input_blocks[1:]:
        x = run_block(net, config, block, x, rows, kv)
        skips.append(x)
    return skips, run_block(net, config, config.middle_block, x, rows, kv)


def decode(
    net: Net, config: UNetConfig, joins: list[Join], middle: trt.ITensor, rows: Iterator[trt.ITensor],
    kv: Iterator[KV],
) -> trt.ITensor:  # fmt: skip
    """The output half but for its last convolution: (B, C, h, w), from the middle block's output, and what puts each
    skip behind an x.

    Such a join may also do the GroupNorm-SiLU that its block begins with.
    """
    x = middle
    for block, join in zip(config.output_blocks, reversed(joins), strict=True):
        x, normed = join(net.at(block[0].prefix), x)
        x = run_block(net, config, block, x, rows, kv, normed)
    return group_norm(net.at("out.0"), x, with_silu=True)
