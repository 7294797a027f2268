"""Cross-attention over a text that is multiplied out: one map of each text, once a picture, and two launches a step.

Of x + softmax(LN(x)·Wqᵀ·kᵀ)·v·Woᵀ all but x and the softmax is known as soon as the text is: for each head h and word s
there is a column Wqᵀ·k that LN(x) is multiplied by, and a column Wo·v that the word's weight is multiplied by. Both are
linear in the context, so that `clip` makes them by one linear layer, whose weight is multiplied out here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from plugins.load import CROSS, rounded, text_columns
from trt_builder.config import ModelConfig, Shape
from trt_builder.layers import LAYER_NORM_EPSILON, own, own_conv, reshape, takes_own_conv
from trt_builder.net import Net
from trt_builder.plugin_layers import cross_fits

if TYPE_CHECKING:
    import tensorrt as trt

    from trt_builder.config import Options


@dataclass(frozen=True)
class CrossAttention:
    """A cross-attention: its transformer block's prefix, channels, heads, and by what its map is smaller than x."""

    block: str
    channels: int
    heads: int
    scale: int

    def size(self, shape: Shape) -> tuple[int, int, int, int]:
        """The map (B, C, h, w) that it makes of both halves of the batch."""
        return shape.batch, self.channels, shape.h // self.scale, shape.w // self.scale


def cross_attentions(config: ModelConfig, stage: str) -> list[CrossAttention]:
    """Those of a stage, in the order in which they run."""
    unet = config.control if stage == "control" else config.unet
    found = list[CrossAttention]()
    for layer, scale, _ in unet.walk(config.consumers()[stage]):
        if layer.kind == "transformer":
            blocks = [f"{layer.prefix}.transformer_blocks.{i}" for i in range(unet.transformer_depth)]
            found += [CrossAttention(block, layer.channels, unet.num_heads, scale) for block in blocks]
    return found


def folded_texts(stage: str, config: ModelConfig, shape: Shape, options: Options) -> dict[str, tuple[str, int]]:
    """The consuming stage and the cross-attention's number of each text<i> that a stage takes or `clip` makes, by name.

    By the options alone: whether the plugins can be had is not asked.
    """
    found = {}
    for consumer in config.consumers():
        if stage in ("clip", consumer, f"{consumer}_cond"):
            for i, one in enumerate(cross_attentions(config, consumer)):
                if cross_fits(one.size(shape), one.heads, config.clip.max_length, options):
                    found[f"{consumer}.text{i}" if stage == "clip" else f"text{i}"] = consumer, i
    return found


def as_map(net: Net, context: trt.ITensor) -> trt.ITensor:
    """A context (B, S, D) as a map (B, D, 1, S)."""
    batch, words, width = context.shape
    return reshape(net, context, (batch, 1, words, width), after=(0, 3, 1, 2), what="context_to_map")


def text_map(block: Net, context: trt.ITensor, heads: int) -> trt.ITensor:
    """What the cross-attention of a transformer block has of a context (B, D, 1, S): (B, P, 1, S), as `text_weight`."""
    attn = block.at("attn2")
    weight = text_weight(attn, block.at("norm2"), heads)
    if takes_own_conv(attn, context, weight.shape):
        return own_conv(attn, context, weight, None, what="text")
    weight = attn.weights.keep(weight)
    return attn.add(attn.network.add_convolution_nd(context, len(weight), (1, 1), weight, None), "text")


def text_weight(attn: Net, norm: Net, heads: int) -> np.ndarray:
    """The weight (P, D, 1, 1) that makes a text's map of a context; P is `plugins.load.text_columns`.

    Row h·C + c makes what channel c of LN(x), before its scale, is multiplied by for the score of head h, in powers of
    two, less its mean over c: so the mean of x needs not be taken away. Row (heads + h)·C + c makes what head h adds to
    channel c for a word, row 2·heads·C + h the part of its score that comes of the LayerNorm's bias; the rest is zeros.
    Multiplied in float32. Raises ValueError where a weight becomes too large for the type that layers compute in.
    """
    exact = attn.float32()
    to_q, to_k, to_v, to_out = (exact.at(name).weight() for name in ("to_q", "to_k", "to_v", "to_out.0"))
    gamma, beta = (norm.float32().weight(name) for name in ("weight", "bias"))
    channels, depth = to_k.shape
    width = channels // heads
    scale = width**-0.5 * math.log2(math.e)
    scores = to_q.reshape(heads, width, channels).swapaxes(1, 2) @ (scale * to_k).reshape(heads, width, depth)
    keys = scores * gamma[:, None]  # (heads, C, D)
    keys -= keys.mean(1, keepdims=True)
    values = to_out.reshape(channels, heads, width).swapaxes(0, 1) @ to_v.reshape(heads, width, depth)
    rows = np.concatenate([keys.reshape(-1, depth), values.reshape(-1, depth), beta @ scores])
    weight = np.zeros((text_columns(heads, channels), depth, 1, 1), attn.dtype)
    what = f"the weights of {'.'.join(attn.path)} times each other are"
    weight[: len(rows), :, 0, 0] = rounded(rows, attn.dtype, what, "--cross-attention apart")
    return weight


def folded_attention(net: Net, x: trt.ITensor, text: trt.ITensor, heads: int) -> trt.ITensor:
    """x, and LayerNorm and attention of x (b, C, h, w) over a text's map (B, P, 1, S): (B, C, h, w) by our plugin.

    Two launches: the words' weights for each head (B, heads·80, h, w), then what they make of the words' values.
    """
    fields: dict[str, Any] = {"heads": heads, "beside": int(net.beside), "epsilon": LAYER_NORM_EPSILON}
    weights = own(net, CROSS, [x, text], "weights", values=0, **fields)
    out = net.at("to_out.0")
    bias = out.float32().constant(out.float32().weight("bias"), (x.shape[1],), "bias")
    return own(out, CROSS, [weights, text, bias, x], values=1, **fields)
