"""The layers of the networks as functions tensor → tensor, over the TensorRT network API.

Shapes are (B, C, h, w) for feature maps and (B, T, C) for tokens, as in the PyTorch blocks of the same names; where our
plugins serve, tokens stay the positions of a map. Weights are found by their checkpoint prefix, which is also the
layer's name: `net.at("in_layers.2")` is a step down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from plugins.load import (
    ADD,
    CONV,
    GROUP_NORM,
    LAYER_NORM,
    by_eights,
    conv_blocks,
    fold_norm,
    rounded,
    up_phases,
    up_taps,
)
from trt_builder.net import Net

if TYPE_CHECKING:
    import tensorrt as trt

LAYER_NORM_EPSILON = GROUP_NORM_EPSILON = 1e-5
GROUPS = 32

# -- arithmetic -------------------------------------------------------------------------------------------------------


def elementwise(net: Net, a: trt.ITensor, b: trt.ITensor, operation: str, what: str) -> trt.ITensor:
    """a and b of the same rank, each broadcast along its dimensions of one."""
    return net.add(net.network.add_elementwise(a, b, getattr(net.api.ElementWiseOperation, operation)), what)


def add(net: Net, a: trt.ITensor, b: trt.ITensor, what: str = "add") -> trt.ITensor:
    return elementwise(net, a, b, "SUM", what)


def sub(net: Net, a: trt.ITensor, b: trt.ITensor, what: str = "sub") -> trt.ITensor:
    return elementwise(net, a, b, "SUB", what)


def mul(net: Net, a: trt.ITensor, b: trt.ITensor, what: str = "mul") -> trt.ITensor:
    return elementwise(net, a, b, "PROD", what)


def scalar(net: Net, x: trt.ITensor, value: float) -> trt.ITensor:
    """A number that broadcasts over x."""
    return net.constant(np.full(1, value), [1] * len(x.shape), f"{value:.4g}")


def unary(net: Net, x: trt.ITensor, operation: str) -> trt.ITensor:
    return net.add(net.network.add_unary(x, getattr(net.api.UnaryOperation, operation)), operation.lower())


def sigmoid(net: Net, x: trt.ITensor) -> trt.ITensor:
    return net.add(net.network.add_activation(x, net.api.ActivationType.SIGMOID), "sigmoid")


def silu(net: Net, x: trt.ITensor) -> trt.ITensor:
    """x · sigmoid(x)."""
    return mul(net, x, sigmoid(net, x), "silu")


def quick_gelu(net: Net, x: trt.ITensor) -> trt.ITensor:
    """x · sigmoid(1.702 x)."""
    return mul(net, x, sigmoid(net, mul(net, x, scalar(net, x, 1.702))), "quick_gelu")


def gelu(net: Net, x: trt.ITensor) -> trt.ITensor:
    """x · Φ(x), with erf."""
    if net.flavour.gelu:
        return net.add(net.network.add_activation(x, net.api.ActivationType.GELU_ERF), "gelu")
    phi = add(net, unary(net, mul(net, x, scalar(net, x, 0.5**0.5)), "ERF"), scalar(net, x, 1.0))
    return mul(net, mul(net, x, scalar(net, x, 0.5)), phi, "gelu")


def clamp(net: Net, x: trt.ITensor, low: float, high: float) -> trt.ITensor:
    layer = net.network.add_activation(x, net.api.ActivationType.CLIP)
    layer.alpha, layer.beta = low, high
    return net.add(layer, "clamp")


# -- shape ------------------------------------------------------------------------------------------------------------


def reshape(net: Net, x: trt.ITensor, shape: Sequence[int], before: Sequence[int] = (), after: Sequence[int] = (),
            what: str = "reshape") -> trt.ITensor:  # fmt: skip
    """x permuted as `before`, then reshaped, then permuted as `after`."""
    layer = net.network.add_shuffle(x)
    if before:
        layer.first_transpose = tuple(before)
    layer.reshape_dims = tuple(shape)
    if after:
        layer.second_transpose = tuple(after)
    return net.add(layer, what)


def permute(net: Net, x: trt.ITensor, order: Sequence[int]) -> trt.ITensor:
    layer = net.network.add_shuffle(x)
    layer.first_transpose = tuple(order)
    return net.add(layer, "permute")


def chunk(net: Net, x: trt.ITensor, chunks: int, axis: int) -> list[trt.ITensor]:
    """x cut into equal parts along an axis."""
    shape = list(x.shape)
    size = shape[axis] // chunks
    shape[axis] = size
    starts = [[size * i if d == axis else 0 for d in range(len(shape))] for i in range(chunks)]
    return [net.add(net.network.add_slice(x, start, shape, [1] * len(shape)), f"chunk{i}")
            for i, start in enumerate(starts)]  # fmt: skip


def concat(net: Net, tensors: Sequence[trt.ITensor], axis: int, what: str = "concat") -> trt.ITensor:
    layer = net.network.add_concatenation(list(tensors))
    layer.axis = axis
    return net.add(layer, what)


def match_batch(net: Net, x: trt.ITensor, batch: int) -> trt.ITensor:
    """Repeat x (N, …) along its batch to `batch` = k·N rows: sample order is kept within each of the k groups."""
    if x.shape[0] == 1 < batch and len(x.shape) == 4:
        # A sum is one layer; to join two maps TensorRT 8.6 takes three.
        return add(net, x, net.constant(np.zeros(batch), (batch, 1, 1, 1), "zeros"), "match_batch")
    return x if x.shape[0] == batch else concat(net, [x] * (batch // x.shape[0]), 0, "match_batch")


# -- layers with weights ----------------------------------------------------------------------------------------------


def conv(
    net: Net, x: trt.ITensor, stride: int = 1, padding: tuple[int, int] | None = None,
    residual: trt.ITensor | None = None,
) -> trt.ITensor:  # fmt: skip
    """Convolution; `padding` is (before, after) on both axes, by default what keeps the size at stride 1.

    A residual is added to it (see `add_residual`).
    """
    weight, bias = net.weight(), net.weight("bias")
    if padding is None and takes_own_conv(net, x, weight.shape, stride):
        return own_conv(net, x, weight, bias, stride, residual)
    kernel = weight.shape[2:]
    layer = net.network.add_convolution_nd(x, weight.shape[0], kernel, weight, bias)
    before, after = padding or (kernel[0] // 2, kernel[0] // 2)
    layer.stride_nd, layer.pre_padding, layer.post_padding = (stride, stride), (before, before), (after, after)
    return add_residual(net, net.add(layer), residual)


def residual_conv(net: Net, last: Net, h: trt.ITensor, skip: Net, x: trt.ITensor) -> trt.ITensor:
    """The end of a ResBlock: its last convolution of h, and its input x, by `skip` where that has a weight."""
    if skip.has("weight") and takes_own_conv(last, h, last.shape(), second=x.shape[1]):
        bias = last.float32().weight("bias") + skip.float32().weight("bias")
        return own_conv(last, h, last.weight(), bias, second=[(x, skip.weight())])
    if takes_own_conv(last, h, last.shape()):
        return conv(last, h, residual=conv(skip, x) if skip.has("weight") else x)
    h = conv(last, h)
    if skip.has("weight"):
        return add(net, conv(skip, x), h)
    return own(net, ADD, [x, h], "add") if net.flavour.has_residual_plugins(net.options) else add(net, x, h)


def takes_own_conv(
    net: Net, x: trt.ITensor, weight: Sequence[int], stride: int = 1, second: int = 0, up: bool = False
) -> bool:  # fmt: skip
    """Whether a convolution of x by a weight of this shape, with a second map of so many channels, or of x doubled with
    `up`, is our plugin's.
    """
    return net.flavour.has_conv_plugin(x.shape, weight, stride, net.options, second, up)


def own_conv(
    net: Net, x: trt.ITensor, weight: np.ndarray, bias: np.ndarray | None, stride: int = 1,
    residual: trt.ITensor | None = None, what: str = "", norm: Net | None = None, gate: bool = False,
    second: Sequence[tuple[trt.ITensor, np.ndarray]] = (), up: bool = False,
) -> trt.ITensor:  # fmt: skip
    """Convolution by our plugin: weight (D, C, size, size), zeros around the map, the residual added in the kernel.

    norm: where the LayerNorm is that x goes through first, in the kernel, too. gate: a · GELU(b) of the result (a, b).
    second: another map of x's batch and size and its weight (D, E, 1, 1), or none; its products are added. up: of x
    doubled along both axes.
    """
    exact, name, sums = net.float32(), f"{what}." if what else "", []
    bias = np.zeros(len(weight)) if bias is None else bias
    weight, bias = (by_eights(weight), by_eights(bias)) if gate else (weight, bias)
    if norm:
        gamma, beta = (norm.float32().weight(one) for one in ("weight", "bias"))
        weight, bias, of_filters = fold_norm(weight, bias, gamma, beta)
        sums = [exact.constant(of_filters, of_filters.shape, f"{name}weight_sums")]
    by = rounded(up_phases(weight), net.dtype, sums_of_taps(net), "--conv builtin") if up else weight
    blocks = conv_blocks(by, *(of_map for _, of_map in second))
    w = net.constant(blocks, blocks.shape, f"{name}weight")
    b = exact.constant(bias, (len(weight),), f"{name}bias")
    inputs = [x, w, b, *sums, *(a_map for a_map, _ in second), *([] if residual is None else [residual])]
    fields = {"size": weight.shape[2], "stride": stride, "residual": int(residual is not None)}
    fields |= {"norm": int(norm is not None), "second": len(second), "gate": int(gate), "beside": int(net.beside)}
    fields |= {"up": int(up)}
    return own(net, CONV, inputs, what, **fields, epsilon=LAYER_NORM_EPSILON)


def linear(
    net: Net, x: trt.ITensor, parts: Sequence[str] = (), residual: trt.ITensor | None = None, norm: Net | None = None,
    gate: bool = False,
) -> trt.ITensor:  # fmt: skip
    """x (…, C) → (…, D) by the weight at this place, or by the weights of several places joined along D.

    Of tokens a matrix product, which TensorRT fuses with the attention and the normalisation around it; of a map
    (B, C, h, w) a 1×1 convolution. A residual is added to it (see `add_residual`). norm, gate: of `own_conv`.
    """
    names = [net.at(part) for part in parts] or [net]
    weight = net.weights.cast(tuple(one.key("weight") for one in names), net.dtype)  # (D, C)
    bias = net.weights.cast(tuple(one.key("bias") for one in names), net.dtype) if names[0].has("bias") else None
    what = "+".join(parts)
    if len(x.shape) == 4:
        weight = weight[:, :, None, None]
        if takes_own_conv(net, x, weight.shape):
            return own_conv(net, x, weight, bias, 1, residual, what, norm, gate)
        y = net.add(net.network.add_convolution_nd(x, len(weight), (1, 1), weight, bias), what)
        return add_residual(net, y, residual)
    lead = [1] * (len(x.shape) - 2)
    w = net.constant(weight, [*lead, *weight.shape], f"{what}.weight" if what else "weight")
    matrix = net.api.MatrixOperation
    y = net.add(net.network.add_matrix_multiply(x, matrix.NONE, w, matrix.TRANSPOSE), what)
    if bias is not None:
        y = add(net, y, net.constant(bias, [*lead, 1, len(bias)], f"{what}.bias" if what else "bias"), "add_bias")
    return add_residual(net, y, residual)


def linear_after(
    norm: Net, x: trt.ITensor, layers: Sequence[tuple[Net, Sequence[str]]], gate: bool = False
) -> list[trt.ITensor]:  # fmt: skip
    """LayerNorm, then each of these linear layers of it, given as `linear` takes them.

    With the option layer_norm "folded" our convolutions do both, where all of the layers are theirs.
    """
    if norm.options.layer_norm == "folded" and len(x.shape) == 4:
        shapes = [[place.shape() for place in [net.at(part) for part in parts] or [net]] for net, parts in layers]
        if all(takes_own_conv(norm, x, (sum(d for d, _ in each), each[0][1], 1, 1)) for each in shapes):
            return [linear(net, x, parts, norm=norm, gate=gate) for net, parts in layers]
    x = layer_norm(norm, x)
    return [linear(net, x, parts, gate=gate) for net, parts in layers]


def embedding(net: Net, ids: trt.ITensor) -> trt.ITensor:
    """Rows of the weight at this place: ids (B, T) → (B, T, C)."""
    weight = net.weight()
    return net.add(net.network.add_gather(net.constant(weight, weight.shape, "weight"), ids, 0))


def layer_norm(net: Net, x: trt.ITensor, eps: float = LAYER_NORM_EPSILON) -> trt.ITensor:
    """LayerNorm over the channels of tokens (B, T, C), or of a map (B, C, h, w), which our plugin does."""
    if len(x.shape) == 4:
        return own(net, LAYER_NORM, [x, *scale_and_bias(net, x.shape[1])], epsilon=eps)
    scale = net.constant(net.weight(), (1, 1, x.shape[2]), "weight")
    bias = net.constant(net.weight("bias"), (1, 1, x.shape[2]), "bias")
    layer = getattr(net.network, net.flavour.normalization)(x, scale, bias, 1 << 2)
    layer.epsilon = eps
    return net.add(layer)


def scale_and_bias(net: Net, channels: int) -> list[trt.ITensor]:
    """A normalisation's weight and bias as its plugin takes them: (C) in float32."""
    exact = net.float32()
    return [exact.constant(exact.weight(name), (channels,), name) for name in ("weight", "bias")]


def group_norm(
    net: Net, x: trt.ITensor, eps: float = GROUP_NORM_EPSILON, with_silu: bool = False, groups: int = GROUPS,
    row: trt.ITensor | None = None,
) -> trt.ITensor:  # fmt: skip
    """GroupNorm of x (B, C, h, w), to which a row (1, C) is added first, followed by SiLU or not (Wu & He 2018).

    One plugin, or TensorRT's own layers.
    """
    channels = x.shape[1]
    plugin = net.flavour.group_norm_plugin(channels, x.shape[0], net.options)
    if row is not None and plugin != "own":
        x, row = add(net, x, reshape(net, row, (1, channels, 1, 1), what="row"), "add_row"), None
    if plugin:
        inputs = [x, *scale_and_bias(net, channels)]
        if plugin == "builtin":
            return net.add(net.flavour.add_built_in(net.network, inputs, "/".join(net.path), eps, with_silu))
        inputs += [] if row is None else [row]
        return own(net, GROUP_NORM, inputs, groups=groups, silu=int(with_silu), row=int(row is not None), epsilon=eps)
    per_channel = net.flavour.normalization == "add_normalization_v2"
    scale = net.constant(net.weight(), (1, channels, 1, 1), "weight")
    bias = net.constant(net.weight("bias"), (1, channels, 1, 1), "bias")
    one = scale if per_channel else net.constant(np.ones(groups), (1, groups, 1, 1), "one")
    zero = bias if per_channel else net.constant(np.zeros(groups), (1, groups, 1, 1), "zero")
    layer = getattr(net.network, net.flavour.normalization)(x, one, zero, 1 << 2 | 1 << 3)
    layer.num_groups, layer.epsilon = groups, eps
    y = net.add(layer)
    if not per_channel:
        y = add(net, mul(net, y, scale, "scale"), bias, "shift")
    return silu(net, y) if with_silu else y


def add_residual(net: Net, y: trt.ITensor, x: trt.ITensor | None) -> trt.ITensor:
    """y + x, where y may have k·N rows to the N of x (a single one broadcasts); y where there is no x."""
    if x is None:
        return y
    return add(net, y, x if x.shape[0] == 1 else match_batch(net, x, y.shape[0]))


def own(net: Net, plugin: str, inputs: Sequence[trt.ITensor], what: str = "", **fields: float) -> trt.ITensor:
    """One of the plugins of plugins/, with its fields."""
    return own_outputs(net, plugin, inputs, 1, what, **fields)[0]


def own_outputs(
    net: Net, plugin: str, inputs: Sequence[trt.ITensor], count: int, what: str = "", **fields: float
) -> list[trt.ITensor]:  # fmt: skip
    """The same of a plugin that has `count` outputs."""
    layer = net.flavour.add_own(net.network, plugin, inputs, "/".join(net.path), **fields)
    return [net.add(layer, what), *(layer.get_output(i) for i in range(1, count))]


def sums_of_taps(net: Net) -> str:
    """What an error calls what upsampling makes of the weight at this place."""
    return f"sums of taps of {'.'.join(net.path)} are"


def upsample(net: Net, x: trt.ITensor) -> trt.ITensor:
    """Nearest neighbours, then a 3×3 convolution: (B, C, h, w) → (B, D, 2h, 2w). Our plugin makes no map between."""
    after = net.at("conv")
    if takes_own_conv(after, x, after.shape(), up=True):
        exact = after.float32()
        return own_conv(after, x, exact.weight(), exact.weight("bias"), up=True)
    if net.options.upsample == "folded":
        taps = rounded(up_taps(after.float32().weight()), net.dtype, sums_of_taps(after), "--upsample apart")
        layer = net.network.add_deconvolution_nd(x, taps.shape[1], (4, 4), net.weights.keep(taps), after.weight("bias"))
        layer.stride_nd, layer.padding_nd = (2, 2), (1, 1)
        return after.add(layer)
    layer = net.network.add_resize(x)
    layer.resize_mode, layer.scales = net.api.InterpolationMode.NEAREST, (1, 1, 2, 2)
    return conv(after, net.add(layer, "nearest"))
