"""How each layer of TensorRT is evaluated: functions (layer, inputs) → output, registered by the layer's type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# TensorRT names its binding classes differently from one flavour to the next, so nothing here imports them: `Layer`
# stands for any ILayer.
Layer = Any
Handler = Callable[[Layer, list[Tensor]], Tensor]

FLOATS = {"FLOAT", "HALF", "BF16"}
WHOLE = {"INT32": torch.int32, "INT64": torch.int64, "INT8": torch.int8, "UINT8": torch.uint8, "BOOL": torch.bool}
HANDLERS: dict[str, tuple[str, Handler]] = {}


def handles(layer_type: str, class_name: str) -> Callable[[Handler], Handler]:
    """Register the function that evaluates layers of a type, and the binding class that shows their attributes."""

    def register(handler: Handler) -> Handler:
        HANDLERS[layer_type] = (class_name, handler)
        return handler

    return register


def refuse(layer: Layer, what: str) -> NoReturn:
    raise NotImplementedError(f"layer {layer.name!r} ({type(layer).__name__}): the interpreter does not know {what}")


def check_inputs(layer: Layer, xs: list[Tensor], most: int) -> None:
    """Refuse the layer's optional inputs, through which TensorRT takes what else would be attributes."""
    if len(xs) > most:
        refuse(layer, f"{len(xs)} inputs, only up to {most}")


def weights_of(array: Any, shape: Iterable[int], like: Tensor | None = None) -> Tensor:
    """Weights, flat in the layer object, as a tensor of `shape`, in the type of `like` where there is one."""
    tensor = torch.tensor(np.asarray(array)).reshape(tuple(shape))
    return tensor if like is None else tensor.to(like.dtype)


def bits(mask: int) -> list[int]:
    """The axes of a bit mask."""
    return [axis for axis in range(mask.bit_length()) if mask >> axis & 1]


def both_paddings(before: Iterable[int], after: Iterable[int]) -> list[int]:
    """Paddings of the last axes in the order of F.pad: last axis first, before and after."""
    return [p for pair in zip(reversed(tuple(before)), reversed(tuple(after)), strict=True) for p in pair]


@handles("CONVOLUTION", "IConvolutionLayer")
def convolution(layer: Layer, xs: list[Tensor]) -> Tensor:
    check_inputs(layer, xs, 1)
    if layer.padding_mode.name != "EXPLICIT_ROUND_DOWN":
        refuse(layer, f"padding mode {layer.padding_mode.name}")
    (x,) = xs
    out, groups = layer.num_output_maps, layer.num_groups
    kernel = weights_of(layer.kernel, (out, x.shape[1] // groups, *layer.kernel_size_nd), x)
    bias = weights_of(layer.bias, (out,), x) if layer.bias.size else None
    padded = F.pad(x, both_paddings(layer.pre_padding, layer.post_padding))
    conv = F.conv3d if len(layer.kernel_size_nd) == 3 else F.conv2d
    return conv(padded, kernel, bias, tuple(layer.stride_nd), 0, tuple(layer.dilation_nd), groups)


@handles("DECONVOLUTION", "IDeconvolutionLayer")
def deconvolution(layer: Layer, xs: list[Tensor]) -> Tensor:
    check_inputs(layer, xs, 1)
    if layer.padding_mode.name != "EXPLICIT_ROUND_DOWN" or tuple(layer.pre_padding) != tuple(layer.post_padding):
        refuse(layer, "its padding")
    (x,) = xs
    out, groups = layer.num_output_maps, layer.num_groups
    kernel = weights_of(layer.kernel, (x.shape[1], out // groups, *layer.kernel_size_nd), x)
    bias = weights_of(layer.bias, (out,), x) if layer.bias.size else None
    padding, dilation = tuple(layer.pre_padding), tuple(layer.dilation_nd)
    return F.conv_transpose2d(x, kernel, bias, tuple(layer.stride_nd), padding, 0, groups, dilation)


@handles("MATRIX_MULTIPLY", "IMatrixMultiplyLayer")
def matrix_multiply(layer: Layer, xs: list[Tensor]) -> Tensor:
    a, b = xs
    first, second = layer.op0.name, layer.op1.name
    a = {"NONE": a, "TRANSPOSE": a.mT, "VECTOR": a.unsqueeze(-2)}[first]
    b = {"NONE": b, "TRANSPOSE": b.mT, "VECTOR": b.unsqueeze(-1)}[second]
    y = a @ b
    y = y.squeeze(-1) if second == "VECTOR" else y
    return y.squeeze(-1 if second == "VECTOR" else -2) if first == "VECTOR" else y


@handles("EINSUM", "IEinsumLayer")
def einsum(layer: Layer, xs: list[Tensor]) -> Tensor:
    return torch.einsum(layer.equation, *xs)


@handles("CONSTANT", "IConstantLayer")
def constant(layer: Layer, xs: list[Tensor]) -> Tensor:
    return weights_of(layer.weights, layer.shape)


@handles("SHUFFLE", "IShuffleLayer")
def shuffle(layer: Layer, xs: list[Tensor]) -> Tensor:
    check_inputs(layer, xs, 1)
    x = xs[0].permute(list(layer.first_transpose)[: xs[0].dim()])
    if layer.reshape_dims is not None:
        dims = tuple(layer.reshape_dims)
        if layer.zero_is_placeholder:
            dims = tuple(x.shape[i] if d == 0 else d for i, d in enumerate(dims))
        x = x.reshape(dims)
    return x.permute(list(layer.second_transpose)[: x.dim()])


@handles("SQUEEZE", "ISqueezeLayer")
def squeeze(layer: Layer, xs: list[Tensor]) -> Tensor:
    x, axes = xs
    return x.squeeze(axes.tolist())


@handles("UNSQUEEZE", "IUnsqueezeLayer")
def unsqueeze(layer: Layer, xs: list[Tensor]) -> Tensor:
    x, axes = xs
    rank = x.dim() + axes.numel()
    for axis in sorted(int(a) % rank for a in axes.flatten()):
        x = x.unsqueeze(axis)
    return x


def divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add, "PROD": torch.mul, "MAX": torch.maximum, "MIN": torch.minimum, "SUB": torch.sub, "DIV": divide,
    "POW": torch.pow, "FLOOR_DIV": torch.floor_divide, "AND": torch.logical_and, "OR": torch.logical_or,
    "XOR": torch.logical_xor, "EQUAL": torch.eq, "GREATER": torch.gt, "LESS": torch.lt,
}  # fmt: skip


@handles("ELEMENTWISE", "IElementWiseLayer")
def elementwise(layer: Layer, xs: list[Tensor]) -> Tensor:
    return ELEMENTWISE[layer.op.name](*xs)


# Each takes x, alpha and beta.
ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "RELU": lambda x, a, b: x.relu(),
    "SIGMOID": lambda x, a, b: x.sigmoid(),
    "TANH": lambda x, a, b: x.tanh(),
    "LEAKY_RELU": lambda x, a, b: torch.where(x >= 0, x, a * x),
    "ELU": lambda x, a, b: torch.where(x >= 0, x, a * x.expm1()),
    "SELU": lambda x, a, b: b * torch.where(x > 0, x, a * x.exp() - a),
    "SOFTSIGN": lambda x, a, b: x / (1 + x.abs()),
    "SOFTPLUS": lambda x, a, b: a * torch.log1p((b * x).exp()),
    "CLIP": lambda x, a, b: x.clamp(a, b),
    "HARD_SIGMOID": lambda x, a, b: (a * x + b).clamp(0, 1),
    "SCALED_TANH": lambda x, a, b: a * (b * x).tanh(),
    "THRESHOLDED_RELU": lambda x, a, b: torch.where(x > a, x, torch.zeros_like(x)),
    "GELU_ERF": lambda x, a, b: F.gelu(x),
    "GELU_TANH": lambda x, a, b: F.gelu(x, approximate="tanh"),
}


@handles("ACTIVATION", "IActivationLayer")
def activation(layer: Layer, xs: list[Tensor]) -> Tensor:
    return ACTIVATIONS[layer.type.name](xs[0], layer.alpha, layer.beta)


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "EXP": torch.exp, "LOG": torch.log, "SQRT": torch.sqrt, "RECIP": torch.reciprocal, "ABS": torch.abs,
    "NEG": torch.neg, "SIN": torch.sin, "COS": torch.cos, "TAN": torch.tan, "SINH": torch.sinh, "COSH": torch.cosh,
    "ASIN": torch.asin, "ACOS": torch.acos, "ATAN": torch.atan, "ASINH": torch.asinh, "ACOSH": torch.acosh,
    "ATANH": torch.atanh, "CEIL": torch.ceil, "FLOOR": torch.floor, "ERF": torch.erf, "NOT": torch.logical_not,
    "SIGN": torch.sign, "ROUND": torch.round, "ISINF": torch.isinf, "ISNAN": torch.isnan,
}  # fmt: skip


@handles("UNARY", "IUnaryLayer")
def unary(layer: Layer, xs: list[Tensor]) -> Tensor:
    return UNARY[layer.op.name](xs[0])


@handles("SCALE", "IScaleLayer")
def scale(layer: Layer, xs: list[Tensor]) -> Tensor:
    (x,) = xs
    shape = {"UNIFORM": [1] * x.dim(), "CHANNEL": [1] * x.dim(), "ELEMENTWISE": list(x.shape)}[layer.mode.name]
    if layer.mode.name == "CHANNEL":
        shape[layer.channel_axis] = x.shape[layer.channel_axis]
    y = x * weights_of(layer.scale, shape, x) if layer.scale.size else x
    y = y + weights_of(layer.shift, shape, x) if layer.shift.size else y
    return y ** weights_of(layer.power, shape, x) if layer.power.size else y


@handles("SOFTMAX", "ISoftMaxLayer")
def softmax(layer: Layer, xs: list[Tensor]) -> Tensor:
    axes = bits(layer.axes)
    if len(axes) != 1:
        refuse(layer, f"softmax over axes {axes}")
    return xs[0].softmax(axes[0])


@handles("REDUCE", "IReduceLayer")
def reduce(layer: Layer, xs: list[Tensor]) -> Tensor:
    x, op, axes, keep = xs[0], layer.op.name, bits(layer.axes), layer.keep_dims
    if op == "SUM":
        return x.sum(axes, keep, dtype=x.dtype)
    if op == "AVG" and x.is_floating_point():
        return x.mean(axes, keep)
    if op in ("MAX", "MIN"):
        return (x.amax if op == "MAX" else x.amin)(axes, keep)
    if op == "PROD":
        for axis in reversed(axes):
            x = x.prod(axis, keep, dtype=x.dtype)
        return x
    refuse(layer, f"reduction {op} of {x.dtype}")


@handles("NORMALIZATION", "INormalizationLayer")
def normalization(layer: Layer, xs: list[Tensor]) -> Tensor:
    """With groups, scale and bias are one a group in the first form of the layer and one a channel in the second."""
    x, gain, bias = xs
    axes, groups = bits(layer.axes), layer.num_groups
    per_group = groups > 1 and not getattr(layer, "is_v2", False)
    if groups > 1:
        if axes != list(range(2, x.dim())):
            refuse(layer, f"groups with axes {axes}")
        if per_group and gain.shape[1] != groups:
            refuse(layer, f"{gain.shape[1]} scales for {groups} groups")
        x, shape = x.unflatten(1, (groups, -1)), x.shape
        axes = list(range(2, x.dim()))
    y = (x - x.mean(axes, True)) / (x.var(axes, correction=0, keepdim=True) + layer.epsilon).sqrt()
    if groups > 1 and not per_group:
        y = y.reshape(shape)
    if per_group:
        return (y * gain.unsqueeze(2) + bias.unsqueeze(2)).reshape(shape)
    return y * gain + bias


@handles("CONCATENATION", "IConcatenationLayer")
def concatenation(layer: Layer, xs: list[Tensor]) -> Tensor:
    return torch.cat(xs, layer.axis)


@handles("SLICE", "ISliceLayer")
def slice_(layer: Layer, xs: list[Tensor]) -> Tensor:
    mode = layer.mode.name
    check_inputs(layer, xs, 1)
    x = xs[0]
    axes = range(x.dim()) if getattr(layer, "axes", None) is None else layer.axes
    for axis, start, size, stride in zip(axes, layer.start, layer.shape, layer.stride, strict=True):
        n = x.shape[axis]
        index = start + stride * torch.arange(size)
        inside = (index >= 0) & (index < n)
        if mode in ("STRICT_BOUNDS", "DEFAULT") and not inside.all():
            raise ValueError(f"layer {layer.name!r} slices {index.tolist()} of an axis of {n}")
        if mode == "WRAP":
            index = index % n
        if mode == "REFLECT":
            period = max(2 * (n - 1), 1)
            index = torch.minimum(index % period, period - index % period)
        x = x.index_select(axis, index.clamp(0, n - 1))
        if mode == "FILL":
            outside = ~inside.view(-1, *[1] * (x.dim() - axis - 1))
            x = x.masked_fill(outside, 0)
    return x


@handles("PADDING", "IPaddingLayer")
def padding(layer: Layer, xs: list[Tensor]) -> Tensor:
    """Zeros around the last two axes; a negative padding crops."""
    return F.pad(xs[0], both_paddings(layer.pre_padding_nd, layer.post_padding_nd))


ROUNDING: dict[str, Callable[[Tensor], Tensor]] = {
    "HALF_UP": lambda x: (x + 0.5).floor(),
    "HALF_DOWN": lambda x: (x - 0.5).ceil(),
    "FLOOR": torch.floor,
    "CEIL": torch.ceil,
}


@handles("RESIZE", "IResizeLayer")
def resize(layer: Layer, xs: list[Tensor]) -> Tensor:
    """Nearest neighbour, in the three ways to find an output position's place in the input."""
    check_inputs(layer, xs, 1)
    transformation, x = layer.coordinate_transformation.name, xs[0]
    if layer.resize_mode.name != "NEAREST":
        refuse(layer, f"interpolation {layer.resize_mode.name}")
    if layer.selector_for_single_pixel.name != "FORMULA":
        refuse(layer, f"selector {layer.selector_for_single_pixel.name}")
    scales = list(layer.scales) or [out / n for out, n in zip(layer.shape, x.shape, strict=True)]
    for axis, factor in enumerate(scales):
        n, out = x.shape[axis], math.floor(x.shape[axis] * factor)
        at = torch.arange(out, dtype=torch.float64)
        if transformation == "ALIGN_CORNERS":
            at = at * (n - 1) / max(out - 1, 1)
        else:
            at = (at + 0.5) / factor - 0.5 if transformation == "HALF_PIXEL" else at / factor
        x = x.index_select(axis, ROUNDING[layer.nearest_rounding.name](at).long().clamp(0, n - 1))
    return x


@handles("GATHER", "IGatherLayer")
def gather(layer: Layer, xs: list[Tensor]) -> Tensor:
    x, index = xs
    if layer.mode.name == "ELEMENT":
        return x.gather(layer.axis, index.long())
    if layer.mode.name != "DEFAULT" or layer.num_elementwise_dims:
        refuse(layer, f"gather mode {layer.mode.name} with {layer.num_elementwise_dims} element-wise dimensions")
    rows = x.index_select(layer.axis, index.flatten())
    return rows.reshape(*x.shape[: layer.axis], *index.shape, *x.shape[layer.axis + 1 :])


@handles("SELECT", "ISelectLayer")
def select(layer: Layer, xs: list[Tensor]) -> Tensor:
    condition, a, b = xs
    return torch.where(condition, a, b)


@handles("CAST", "ICastLayer")
@handles("IDENTITY", "IIdentityLayer")
def cast(layer: Layer, xs: list[Tensor]) -> Tensor:
    """To the type of the output; an identity casts where a weakly typed network has set another type for its output."""
    x, to = xs[0], layer.get_output(0).dtype.name
    if to not in WHOLE:
        return x if x.is_floating_point() else x.to(torch.float64)
    target = WHOLE[to]
    if x.is_floating_point() and target != torch.bool:
        x, limits = x.trunc(), torch.iinfo(target)
        if not ((x >= limits.min) & (x <= limits.max)).all():
            raise ValueError(f"layer {layer.name!r} casts values to {to} that it cannot hold")
    return x.to(target)


@handles("ATTENTION_INPUT", "IAttentionInputLayer")
def attention(layer: Layer, xs: list[Tensor]) -> Tensor:
    """softmax(q kᵀ + mask) v of (B, heads, T, C), not scaled: TensorRT leaves that to the network.

    A mask of truth values says where to attend, one of floats is added.
    """
    settings = layer.attention
    for name in ("query_form", "key_value_form"):
        if getattr(settings, name, None) is not None and getattr(settings, name).name != "PADDED_BHND":
            refuse(layer, f"{name} {getattr(settings, name).name}")
    check_inputs(layer, xs, 3 if settings.mask is None else 4)
    if settings.norm_op.name != "SOFTMAX":
        refuse(layer, f"normalization {settings.norm_op.name}")
    q, k, v = xs[:3]
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT
    if settings.causal:
        lower_right = hasattr(settings, "causal_kind") and settings.causal_kind.name == "LOWER_RIGHT"
        ahead = k.shape[2] - q.shape[2] if lower_right else 0
        scores = scores.masked_fill(torch.ones_like(scores).triu(ahead + 1).bool(), -math.inf)
    if settings.mask is not None:
        scores = scores + xs[3] if xs[3].is_floating_point() else scores.masked_fill(~xs[3], -math.inf)
    return scores.softmax(-1) @ v


@handles("ATTENTION_OUTPUT", "IAttentionOutputLayer")
def attention_output(layer: Layer, xs: list[Tensor]) -> Tensor:
    """The other end of an attention, which the layer of its inputs has evaluated already."""
    return xs[0]
