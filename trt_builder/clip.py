"""CLIP's text encoder (twin: ldm/clip.py; Radford et al. 2021).

Where our plugins serve it is over a map (B, C, 1, T), whose positions are the tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trt_builder.attention import attention_over_itself
from trt_builder.config import CLIPConfig
from trt_builder.layers import add, embedding, layer_norm, linear, linear_after, quick_gelu, reshape
from trt_builder.net import Net

if TYPE_CHECKING:
    import tensorrt as trt


def clip_attention(net: Net, norm: Net, x: trt.ITensor, heads: int) -> trt.ITensor:
    """x, and LayerNorm and multi-head self-attention of x (B, T, C) under a causal mask."""
    y = attention_over_itself(net, norm, x, heads, ("q_proj", "k_proj", "v_proj"), causal=True)
    return linear(net.at("out_proj"), y, residual=x)


def clip_mlp(net: Net, norm: Net, x: trt.ITensor) -> trt.ITensor:
    """x, and LayerNorm, linear, quick GELU, linear."""
    (y,) = linear_after(norm, x, [(net.at("fc1"), ())])
    return linear(net.at("fc2"), quick_gelu(net, y), residual=x)


def encoder_layer(net: Net, x: trt.ITensor, heads: int) -> trt.ITensor:
    """Attention and MLP, each behind a LayerNorm and a residual."""
    x = clip_attention(net.at("self_attn"), net.at("layer_norm1"), x, heads)
    return clip_mlp(net.at("mlp"), net.at("layer_norm2"), x)


def embeddings(net: Net, ids: trt.ITensor) -> trt.ITensor:
    """Token plus position embeddings: ids (B, T) → (B, T, C)."""
    x = embedding(net.at("token_embedding"), ids)
    position = net.at("position_embedding")
    weight = position.weight()[: ids.shape[1]]
    return add(net, x, position.constant(weight, (1, *weight.shape), "weight"))


def text_transformer(net: Net, config: CLIPConfig, ids: trt.ITensor) -> trt.ITensor:
    """Embeddings, encoder and final LayerNorm: ids (B, T) → (B, T, C), or a map (B, C, 1, T) by our plugins."""
    x = embeddings(net.at("embeddings"), ids)
    batch, tokens, width = x.shape
    if has_own_encoder(net, config, (batch, width, 1, tokens)):
        x = reshape(net, x, (batch, 1, tokens, width), after=(0, 3, 1, 2), what="to_map")
    for i in range(config.layers):
        x = encoder_layer(net.at(f"encoder.layers.{i}"), x, config.heads)
    return layer_norm(net.at("final_layer_norm"), x)


def has_own_encoder(net: Net, config: CLIPConfig, shape: tuple[int, int, int, int]) -> bool:
    """Whether our plugins serve every layer of the encoder over a map of this shape (B, C, 1, T), by the options.

    Of Q, K and V joined there are fewer filters than the MLP's first layer has.
    """
    if not net.flavour.has_transformer_plugins(config.width // config.heads, net.options, causal=True):
        return False
    layer = net.at("encoder.layers.0")
    weights = [layer.at(name).shape() for name in ("self_attn.out_proj", "mlp.fc1", "mlp.fc2")]
    return all(net.flavour.has_conv_plugin(shape, (*weight, 1, 1), 1, net.options) for weight in weights)


def as_tokens(net: Net, x: trt.ITensor) -> trt.ITensor:
    """Tokens (B, T, C) of what `text_transformer` made."""
    if len(x.shape) == 3:
        return x
    batch, width, _, tokens = x.shape
    return reshape(net, x, (batch, tokens, width), before=(0, 2, 3, 1), what="to_tokens")
