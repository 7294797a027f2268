"""CLIP's text encoder (twin: ldm/clip.py; Radford et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trt_builder.attention import attention, self_qkv
from trt_builder.config import CLIPConfig
from trt_builder.layers import Net, add, embedding, layer_norm, linear, quick_gelu

if TYPE_CHECKING:
    import tensorrt as trt


def clip_attention(net: Net, x: trt.ITensor, heads: int) -> trt.ITensor:
    """Multi-head self-attention under a causal mask: (B, T, C) → (B, T, C)."""
    q, k, v = self_qkv(net, x, ("q_proj", "k_proj", "v_proj"))
    return linear(net.at("out_proj"), attention(net, q, k, v, heads, causal=True))


def clip_mlp(net: Net, x: trt.ITensor) -> trt.ITensor:
    """Linear, quick GELU, linear."""
    x = linear(net.at("fc1"), x)
    return linear(net.at("fc2"), quick_gelu(net, x))


def encoder_layer(net: Net, x: trt.ITensor, heads: int) -> trt.ITensor:
    """Attention and MLP, each behind a LayerNorm and a residual."""
    x = add(net, x, clip_attention(net.at("self_attn"), layer_norm(net.at("layer_norm1"), x), heads), "add1")
    return add(net, x, clip_mlp(net.at("mlp"), layer_norm(net.at("layer_norm2"), x)), "add2")


def embeddings(net: Net, ids: trt.ITensor) -> trt.ITensor:
    """Token plus position embeddings: ids (B, T) → (B, T, C)."""
    x = embedding(net.at("token_embedding"), ids)
    position = net.at("position_embedding")
    weight = position.weight()[: ids.shape[1]]
    return add(net, x, position.constant(weight, (1, *weight.shape), "weight"))


def text_transformer(net: Net, config: CLIPConfig, ids: trt.ITensor) -> trt.ITensor:
    """Embeddings, encoder and final LayerNorm: ids (B, T) → (B, T, C)."""
    x = embeddings(net.at("embeddings"), ids)
    for i in range(config.layers):
        x = encoder_layer(net.at(f"encoder.layers.{i}"), x, config.heads)
    return layer_norm(net.at("final_layer_norm"), x)
