"""The hint block of ControlNet (twin: `input_hint_block` in cldm/cldm.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trt_builder.config import ModelConfig
from trt_builder.layers import conv, silu
from trt_builder.net import Net

if TYPE_CHECKING:
    import tensorrt as trt


def hint_block(net: Net, config: ModelConfig, x: trt.ITensor) -> trt.ITensor:
    """Edges (1, 3, H, W) in [0, 1] → hint features (1, C, h, w)."""
    for i in range(len(config.hint_block_channels)):
        # Every second convolution after the first halves the picture: three halvings to the latent's size.
        x = conv(net.at(f"input_hint_block.{2 * i}"), x, stride=2 if i in (2, 4, 6) else 1)
        x = silu(net.at(f"input_hint_block.{2 * i + 1}"), x)
    return conv(net.at(f"input_hint_block.{2 * len(config.hint_block_channels)}"), x)
