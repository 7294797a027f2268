"""ControlNet (twin: cldm/cldm.py; Zhang et al. 2023): the residuals, and the picture's way in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trt_builder.config import UNetConfig
from trt_builder.layers import Net, add, conv
from trt_builder.unet import run_block

if TYPE_CHECKING:
    import tensorrt as trt

    from trt_builder.unet import KV


def residuals(
    net: Net, config: UNetConfig, x: trt.ITensor, hint: trt.ITensor, rows: Iterator[trt.ITensor], kv: Iterator[KV]
) -> list[trt.ITensor]:
    """The residuals of x (B, 4, h, w), one per skip of the UNet and one for its middle block.

    `hint` holds the hint features (1, C, h, w) that the stage `hint` makes of a picture.
    """
    outs: list[trt.ITensor] = []
    for i, block in enumerate(config.input_blocks):
        x = run_block(net, config, block, x, rows, kv)
        if not outs:
            x = add(net, x, hint, "add_hint")
        outs.append(conv(net.at(f"zero_convs.{i}.0"), x))
    x = run_block(net, config, config.middle_block, x, rows, kv)
    return [*outs, conv(net.at("middle_block_out.0"), x)]
