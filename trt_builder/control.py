"""ControlNet (twin: cldm/cldm.py; Zhang et al. 2023): the residuals, and the picture's way in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trt_builder.config import UNetConfig
from trt_builder.layers import conv
from trt_builder.net import Net
from trt_builder.unet import first_block, run_block

if TYPE_CHECKING:
    import tensorrt as trt

    from trt_builder.unet import KV


def residuals(
    net: Net, config: UNetConfig, x: trt.ITensor, hint: trt.ITensor, batch: int, rows: Iterator[trt.ITensor],
    kv: Iterator[KV],
) -> list[trt.ITensor]:  # fmt: skip
    """The residuals of x (N, 4, h, w), one per skip of the UNet and one for its middle block, of `batch` rows.

    `hint` holds the hint features (1, C, h, w) that the stage `hint` makes of a picture.
    """
    x, repeated = first_block(net, config, x, batch, hint)
    outs = [conv(net.at("zero_convs.0.0"), repeated)]
    for i, block in enumerate(config.input_blocks[1:], 1):
        x = run_block(net, config, block, x, rows, kv)
        outs.append(conv(net.at(f"zero_convs.{i}.0"), x))
    x = run_block(net, config, config.middle_block, x, rows, kv)
    return [*outs, conv(net.at("middle_block_out.0"), x)]
