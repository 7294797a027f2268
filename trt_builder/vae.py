"""The autoencoder's two halves (twin: ldm/autoencoder.py; Rombach et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trt_builder.attention import attention
from trt_builder.config import VAEConfig
from trt_builder.layers import conv, group_norm, reshape, residual_conv, upsample
from trt_builder.net import Net

if TYPE_CHECKING:
    import tensorrt as trt


def norm(net: Net, x: trt.ITensor, with_silu: bool = False) -> trt.ITensor:
    return group_norm(net, x, eps=1e-6, with_silu=with_silu)


def resnet_block(net: Net, x: trt.ITensor) -> trt.ITensor:
    """Two GroupNorm-SiLU-convolutions and a shortcut: (B, C, h, w) → (B, D, h, w)."""
    h = conv(net.at("conv1"), norm(net.at("norm1"), x, with_silu=True))
    h = norm(net.at("norm2"), h, with_silu=True)
    return residual_conv(net, net.at("conv2"), h, net.at("nin_shortcut"), x)


def attn_block(net: Net, x: trt.ITensor) -> trt.ITensor:
    """Self-attention with one head over all positions: (B, C, h, w) → (B, C, h, w)."""
    batch, channels, h, w = x.shape
    y = norm(net.at("norm"), x)
    q, k, v = (
        reshape(net.at(name), conv(net.at(name), y), (batch, h * w, channels), before=(0, 2, 3, 1), what="to_tokens")
        for name in ("q", "k", "v")
    )
    y = attention(net, q, k, v, heads=1)  # (B, h·w, C)
    y = reshape(net, y, (batch, h, w, channels), after=(0, 3, 1, 2), what="to_map")
    return conv(net.at("proj_out"), y, residual=x)


def downsample(net: Net, x: trt.ITensor) -> trt.ITensor:
    """3×3 convolution of stride 2, padded on the right and below only."""
    return conv(net.at("conv"), x, stride=2, padding=(0, 1))


def mid(net: Net, x: trt.ITensor) -> trt.ITensor:
    """ResnetBlock, attention, ResnetBlock at the lowest resolution."""
    return resnet_block(net.at("block_2"), attn_block(net.at("attn_1"), resnet_block(net.at("block_1"), x)))


def level(net: Net, x: trt.ITensor, blocks: int) -> trt.ITensor:
    """The ResnetBlocks of one resolution."""
    for i in range(blocks):
        x = resnet_block(net.at(f"block.{i}"), x)
    return x


def encoder(net: Net, config: VAEConfig, x: trt.ITensor) -> trt.ITensor:
    """Picture (B, 3, H, W) → moments before `quant_conv` (B, 2·z, h, w)."""
    x = conv(net.at("conv_in"), x)
    for i in range(len(config.ch_mult)):
        x = level(net.at(f"down.{i}"), x, config.num_res_blocks)
        if i < len(config.ch_mult) - 1:
            x = downsample(net.at(f"down.{i}.downsample"), x)
    return conv(net.at("conv_out"), norm(net.at("norm_out"), mid(net.at("mid"), x), with_silu=True))


def decoder(net: Net, config: VAEConfig, z: trt.ITensor) -> trt.ITensor:
    """Latent after `post_quant_conv` (B, z, h, w) → picture (B, 3, H, W) in about [-1, 1]."""
    x = mid(net.at("mid"), conv(net.at("conv_in"), z))
    # up[0] is the full resolution and runs last, as in the checkpoint.
    for i in reversed(range(len(config.ch_mult))):
        x = level(net.at(f"up.{i}"), x, config.num_res_blocks + 1)
        if i:
            x = upsample(net.at(f"up.{i}.upsample"), x)
    return conv(net.at("conv_out"), norm(net.at("norm_out"), x, with_silu=True))
