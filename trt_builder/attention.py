"""Attention as functions tensor → tensor, as trt_builder/layers.py has the other layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from plugins.load import ATTENTION
from trt_builder.layers import add, chunk, layer_norm, linear, linear_after, match_batch, mul, own, reshape, scalar
from trt_builder.net import Net

if TYPE_CHECKING:
    import tensorrt as trt

# Far below any attention score, and finite in half precision: -inf would become NaN where it is subtracted from itself.
MASKED = -1e4


def attention(
    net: Net, q: trt.ITensor, k: trt.ITensor, v: trt.ITensor, heads: int, causal: bool = False
) -> trt.ITensor:
    """Multi-head attention of q (B, T, C) over k, v (k·B, S, C) → (k·B, T, C), under a causal mask or not.

    Heads may have any width; those of the UNet and of CLIP (40 to 160) become one kernel in half precision, the single
    head of the autoencoder (512) does not. A map q (B, C, h, w) gives a map, by our plugin; k and v may be maps, too.
    """
    if len(q.shape) == 4:
        return own_attention(net, [q, k, v], heads, q.shape[1] // heads, causal)
    q = match_batch(net, q, k.shape[0])
    tokens, keys, channels = q.shape[1], k.shape[1], q.shape[2]
    q, k, v = (split_heads(net, t, heads, what) for t, what in ((q, "q"), (k, "k"), (v, "v")))  # (B, heads, T, d)
    mask = None
    if causal:
        mask = net.constant(np.triu(np.full((tokens, keys), MASKED), 1), (1, 1, tokens, keys), "mask")
    scale = (channels // heads) ** -0.5
    if net.options.attention != "plain" and net.flavour.attention:
        y = net.add(net.flavour.add_attention(net.network, mul(net, q, scalar(net, q, scale), "scale"), k, v, mask))
    else:
        y = plain_attention(net, q, k, v, scale, mask)
    return reshape(net, y, (y.shape[0], tokens, channels), before=(0, 2, 1, 3), what="merge_heads")


def attention_over_itself(
    net: Net, norm: Net, x: trt.ITensor, heads: int, parts: tuple[str, str, str], causal: bool = False
) -> trt.ITensor:  # fmt: skip
    """Multi-head attention of x, tokens (B, T, C) or a map, over itself, Q, K, V by linear layers of its LayerNorm."""
    if len(x.shape) != 4:
        q, k, v = self_qkv(net, layer_norm(norm, x), parts)
        return attention(net, q, k, v, heads, causal)
    joined = net.options.qkv == "joined"
    inputs = linear_after(norm, x, [(net, parts)] if joined else [(net.at(part), ()) for part in parts])
    return own_attention(net, inputs, heads, x.shape[1] // heads, causal)


def own_attention(net: Net, inputs: Sequence[trt.ITensor], heads: int, width: int, causal: bool) -> trt.ITensor:
    """Attention by our plugin of heads of this width: of Q, K and V, or of one map (B, 3·C, h, w) that has all."""
    fields: dict[str, float] = {"heads": heads, "joined": int(len(inputs) == 1), "causal": int(causal)}
    return own(net, ATTENTION, inputs, "attention", **fields, scale=width**-0.5)


def plain_attention(
    net: Net, q: trt.ITensor, k: trt.ITensor, v: trt.ITensor, scale: float, mask: trt.ITensor | None
) -> trt.ITensor:
    """softmax(q·kᵀ·scale + mask)·v of (B, heads, T, d), in the form that TensorRT recognises and fuses."""
    matrix = net.api.MatrixOperation
    # A head too wide for the fused kernel leaves its scores in memory, where half precision needs them scaled.
    scale_scores = net.flavour.scale_scores and q.shape[3] <= 256
    if not scale_scores:
        q = mul(net, q, scalar(net, q, scale), "scale")
    scores = net.add(net.network.add_matrix_multiply(q, matrix.NONE, k, matrix.TRANSPOSE), "scores")
    if scale_scores:
        scores = mul(net, scores, scalar(net, scores, scale), "scale")
    if mask is not None:
        scores = add(net, scores, mask, "add_mask")
    layer = net.network.add_softmax(scores)
    layer.axes = 1 << 3
    return net.add(net.network.add_matrix_multiply(net.add(layer, "softmax"), matrix.NONE, v, matrix.NONE), "values")


def split_heads(net: Net, x: trt.ITensor, heads: int, what: str) -> trt.ITensor:
    """(B, T, C) → (B, heads, T, C / heads)."""
    batch, tokens, channels = x.shape
    return reshape(net, x, (batch, tokens, heads, channels // heads), after=(0, 2, 1, 3), what=f"{what}_heads")


def self_qkv(net: Net, x: trt.ITensor, parts: tuple[str, str, str]) -> list[trt.ITensor]:
    """Q, K and V (B, T, C) of x (B, T, C) by the linear layers named, in one matrix product or in three."""
    if net.options.qkv == "joined":
        return chunk(net, linear(net, x, parts), 3, 2)
    return [linear(net.at(part), x) for part in parts]
