"""How the UNet's output half gets the encoder's skips, to which ControlNet's residuals are added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from plugins.load import JOIN, JOIN_NORM
from trt_builder.layers import GROUP_NORM_EPSILON, GROUPS, chunk, concat, mul, own, own_outputs, reshape, scale_and_bias
from trt_builder.net import Net

if TYPE_CHECKING:
    import tensorrt as trt


def join(skip: trt.ITensor, net: Net, x: trt.ITensor) -> tuple[trt.ITensor, None]:
    """x (B, C, h, w) and a skip (B, D, h, w) behind it: (B, C + D, h, w)."""
    return concat(net, [x, skip], 1), None


def own_join(
    i: int, skip: trt.ITensor, residuals: Sequence[trt.ITensor], scales: trt.ITensor, net: Net, x: trt.ITensor
) -> tuple[trt.ITensor, trt.ITensor | None]:  # fmt: skip
    """`join` by our plugin, which adds line i of scales (residuals, B) times residual i (B, D, h, w) to the skip.

    The last skip is put behind the middle block's output, to which the plugin adds the last residual likewise. Where
    our GroupNorm serves, the one that the block begins with, and its SiLU, are done by the same plugin.
    """
    last = len(residuals) - 1
    of_x, x_index = (residuals[last:], last) if i == last - 1 else ([], -1)
    inputs, channels = [x, skip, residuals[i], scales, *of_x], x.shape[1] + skip.shape[1]
    if net.flavour.group_norm_plugin(channels, x.shape[0], net.options) != "own":
        return own(net, JOIN, inputs, "concat", index=i, x_index=x_index), None
    norm = net.at("in_layers.0")
    joined, normed = own_outputs(
        norm, JOIN_NORM, [*inputs, *scale_and_bias(norm, channels)], 2, "concat", index=i, x_index=x_index,
        groups=GROUPS, silu=1, epsilon=GROUP_NORM_EPSILON,
    )  # fmt: skip
    return joined, normed


def scale_rows(net: Net, tensors: list[trt.ITensor], scales: trt.ITensor) -> list[trt.ITensor]:
    """Each tensor (B, C, h, w) times its line of `scales`: one factor per row of the batch."""
    count, batch = scales.shape
    factors = chunk(net, reshape(net, net.cast(scales), (count * batch, 1, 1, 1), what="scales"), count, 0)
    return [mul(net, t, f, f"scale{i}") for i, (t, f) in enumerate(zip(tensors, factors, strict=True))]
