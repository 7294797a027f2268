"""Layers alone: how each is defined, what torch says of it, and the same layer with one attribute wrong."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

trt: Any = import_module("tensorrt_rtx")
MATRIX, ELEMENT, UNARY = trt.MatrixOperation, trt.ElementWiseOperation, trt.UnaryOperation
RNG = np.random.default_rng(0)


def randn(*shape: int) -> Tensor:
    return torch.from_numpy(RNG.standard_normal(shape, np.float32))


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32)


def setting(layer: Any, **attributes: Any) -> Any:
    """The layer with its attributes set."""
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def const(network: Any, values: np.ndarray) -> Any:
    return network.add_constant(values.shape, np.ascontiguousarray(values)).get_output(0)


def array_of(value: float) -> np.ndarray:
    return np.array([value], np.float32)


X = randn(2, 6, 5, 7)
Y = randn(2, 6, 7, 7)
POSITIVE = X.abs() + 0.1
UNIT = X.tanh() * 0.9
KERNEL, BIAS = array(9, 2, 3, 2), array(9)
GAIN, SHIFT = array(1, 6, 1, 1), array(1, 6, 1, 1)
GROUP_GAIN, GROUP_SHIFT = array(1, 3, 1, 1), array(1, 3, 1, 1)
LAST_GAIN, LAST_SHIFT = array(1, 1, 1, 7), array(1, 1, 1, 7)
T = torch.from_numpy
BIAS_TENSOR = T(BIAS)


def convolution(bias: np.ndarray | None = BIAS, **attributes: Any) -> Callable[..., Any]:
    settings = {"num_groups": 3, "stride_nd": (2, 1), "pre_padding": (0, 2), "post_padding": (1, 0)} | attributes
    return lambda n, x: setting(n.add_convolution_nd(x, 9, (3, 2), KERNEL, bias), **settings)


def convolved(
    bias: Tensor | None = BIAS_TENSOR,
    stride: tuple[int, int] = (2, 1),
    pads: tuple[int, ...] = (2, 0, 0, 1),
    dilation: int = 1,
) -> Tensor:
    return F.conv2d(F.pad(X, pads), T(KERNEL), bias, stride, groups=3, dilation=(dilation, 1))


def normalized(axes: tuple[int, ...], x: Tensor = X, eps: float = 1e-5) -> Tensor:
    mean = x.mean(axes, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(axes, keepdim=True) + eps).sqrt()


def group_norm(n: Any, x: Any, gain: np.ndarray = GAIN, groups: int = 3, epsilon: float = 0.1, axes: int = 12) -> Any:
    layer = n.add_normalization_v2(x, const(n, gain), const(n, SHIFT), axes)
    return setting(layer, num_groups=groups, epsilon=epsilon)


def shuffle(**attributes: Any) -> Callable[..., Any]:
    return lambda n, x: setting(n.add_shuffle(x), **attributes)


def resize(transformation: str, rounding: str, **attributes: Any) -> Callable[..., Any]:
    to, how = trt.ResizeCoordinateTransformation, trt.ResizeRoundMode
    modes = {"coordinate_transformation": getattr(to, transformation), "nearest_rounding": getattr(how, rounding)}
    return lambda n, x: setting(n.add_resize(x), **modes, **attributes)


def sliced(start: tuple, shape: tuple, stride: tuple, **attributes: Any) -> Callable[..., Any]:
    return lambda n, x: setting(n.add_slice(x, start, shape, stride), **attributes)


def matrix(op0: str, op1: str) -> Callable[..., Any]:
    return lambda n, a, b: n.add_matrix_multiply(a, getattr(MATRIX, op0), b, getattr(MATRIX, op1))


def reduced(op: str, axes: int, keep: bool) -> Callable[..., Any]:
    return lambda n, x: n.add_reduce(x, getattr(trt.ReduceOperation, op), axes, keep)


# name: the layer, its inputs, what torch says, and the same layer with one attribute wrong.
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], Tensor, Callable[..., Any]]] = {
    "convolution": (convolution(), (X,), convolved(), convolution(stride_nd=(1, 2))),
    "convolution, no bias": (convolution(None), (X,), convolved(None), convolution()),
    "convolution, padding": (
        convolution(pre_padding=(1, 1), post_padding=(0, 1)), (X,), convolved(pads=(1, 1, 1, 0)), convolution(),
    ),
    "convolution, symmetric": (
        lambda n, x: setting(n.add_convolution_nd(x, 9, (3, 2), KERNEL, BIAS), num_groups=3, padding_nd=(1, 2)), (X,),
        convolved(pads=(2, 2, 1, 1), stride=(1, 1)), convolution(pre_padding=(1, 2), post_padding=(1, 2)),
    ),
    "convolution, dilation": (
        convolution(dilation_nd=(2, 1)), (X,), convolved(dilation=2), convolution(dilation_nd=(1, 2)),
    ),
    "matrix": (matrix("NONE", "NONE"), (X, Y), X @ Y, matrix("NONE", "TRANSPOSE")),
    "matrix, second transposed": (matrix("NONE", "TRANSPOSE"), (X, X), X @ X.mT, matrix("TRANSPOSE", "NONE")),
    "matrix, first transposed": (matrix("TRANSPOSE", "NONE"), (X, X), X.mT @ X, matrix("NONE", "TRANSPOSE")),
    "matrix, broadcast": (matrix("NONE", "NONE"), (X, Y[:1, :1]), X @ Y[:1, :1], matrix("NONE", "TRANSPOSE")),
    "matrix, vectors": (matrix("VECTOR", "VECTOR"), (X, X), (X * X).sum(-1), matrix("NONE", "TRANSPOSE")),
    "matrix by vector": (
        matrix("NONE", "VECTOR"), (Y, X[:, :, 0]), (Y @ X[:, :, 0, :, None])[..., 0], matrix("TRANSPOSE", "VECTOR"),
    ),
    "vector by matrix": (
        matrix("VECTOR", "NONE"), (X[:, :, 0], Y), (X[:, :, :1] @ Y)[:, :, 0], matrix("VECTOR", "TRANSPOSE"),
    ),
    "einsum": (
        lambda n, a, b: n.add_einsum([a, b], "bhtc,bhsc->bths"), (X, X[:, :, :3]),
        torch.einsum("bhtc,bhsc->bths", X, X[:, :, :3]), lambda n, a, b: n.add_einsum([a, b], "bhtc,bhsc->bhts"),
    ),
    "constant": (
        lambda n, x: n.add_elementwise(x, const(n, GAIN), ELEMENT.PROD), (X,), X * T(GAIN),
        lambda n, x: n.add_elementwise(x, const(n, SHIFT), ELEMENT.PROD),
    ),
    "shuffle": (
        shuffle(first_transpose=(0, 2, 3, 1), reshape_dims=(0, -1, 3), second_transpose=(2, 0, 1)), (X,),
        X.permute(0, 2, 3, 1).reshape(2, -1, 3).permute(2, 0, 1),
        shuffle(first_transpose=(0, 3, 2, 1), reshape_dims=(0, -1, 3), second_transpose=(2, 0, 1)),
    ),
    "shuffle, second transpose": (
        shuffle(reshape_dims=(2, 6, 35), second_transpose=(0, 2, 1)), (X,), X.flatten(2).mT,
        shuffle(reshape_dims=(2, 6, 35)),
    ),
    "shuffle, transposed zero": (
        shuffle(first_transpose=(1, 0, 2, 3), reshape_dims=(0, 0, -1)), (X,), X.transpose(0, 1).flatten(2),
        shuffle(first_transpose=(0, 1, 2, 3), reshape_dims=(0, 0, -1)),
    ),
    "squeeze": (
        lambda n, x: n.add_squeeze(x, const(n, np.array([1, -1]))), (X[:, :1, :, :1],), X[:, 0, :, 0],
        lambda n, x: n.add_squeeze(x, const(n, np.array([1]))),
    ),
    "unsqueeze": (
        lambda n, x: n.add_unsqueeze(x, const(n, np.array([-1, 1]))), (X[0],), X[0][:, None, :, :, None],
        lambda n, x: n.add_unsqueeze(x, const(n, np.array([0, 1]))),
    ),
    "scale, uniform": (
        lambda n, x: n.add_scale_nd(x, trt.ScaleMode.UNIFORM, array_of(3.0), array_of(2.0), array_of(2.0), 1), (X,),
        (X * 2 + 3) ** 2,
        lambda n, x: n.add_scale_nd(x, trt.ScaleMode.UNIFORM, array_of(2.0), array_of(3.0), array_of(2.0), 1),
    ),
    "scale, channel": (
        lambda n, x: n.add_scale_nd(x, trt.ScaleMode.CHANNEL, SHIFT.ravel(), GAIN.ravel(), None, 1), (X,),
        X * T(GAIN) + T(SHIFT),
        lambda n, x: n.add_scale_nd(x, trt.ScaleMode.CHANNEL, GAIN.ravel(), GAIN.ravel(), None, 1),
    ),
    "softmax": (
        lambda n, x: setting(n.add_softmax(x), axes=8), (X,), X.softmax(3),
        lambda n, x: setting(n.add_softmax(x), axes=4),
    ),
    "softmax, default axis": (
        lambda n, x: n.add_softmax(x), (X,), X.softmax(1), lambda n, x: setting(n.add_softmax(x), axes=8),
    ),
    "reduce, mean": (reduced("AVG", 12, True), (X,), X.mean((2, 3), keepdim=True), reduced("AVG", 12, False)),
    "reduce, sum": (reduced("SUM", 5, False), (X,), X.sum((0, 2)), reduced("AVG", 5, False)),
    "reduce, max": (reduced("MAX", 8, False), (X,), X.amax(3), reduced("MIN", 8, False)),
    "reduce, min": (reduced("MIN", 2, True), (X,), X.amin(1, keepdim=True), reduced("MIN", 1, True)),
    "reduce, product": (reduced("PROD", 6, False), (X,), X.prod(2).prod(1), reduced("PROD", 12, False)),
    "group norm": (
        group_norm, (X,), F.group_norm(X, 3, T(GAIN).flatten(), T(SHIFT).flatten(), 0.1),
        lambda n, x: group_norm(n, x, groups=2),
    ),
    "group norm, epsilon": (
        lambda n, x: group_norm(n, x, epsilon=1e-5), (X,),
        F.group_norm(X, 3, T(GAIN).flatten(), T(SHIFT).flatten(), 1e-5), group_norm,
    ),
    "group norm, a gain per group": (
        lambda n, x: setting(n.add_normalization(x, const(n, GROUP_GAIN), const(n, GROUP_SHIFT), 12), num_groups=3),
        (X,),
        F.group_norm(X, 3, T(GROUP_GAIN).flatten().repeat_interleave(2), T(GROUP_SHIFT).flatten().repeat_interleave(2)),
        lambda n, x: setting(n.add_normalization(x, const(n, GROUP_SHIFT), const(n, GROUP_GAIN), 12), num_groups=3),
    ),
    "instance norm": (
        lambda n, x: group_norm(n, x, groups=1, epsilon=1e-5), (X,), normalized((2, 3)) * T(GAIN) + T(SHIFT),
        lambda n, x: group_norm(n, x, groups=3, epsilon=1e-5),
    ),
    "layer norm": (
        lambda n, x: n.add_normalization_v2(x, const(n, LAST_GAIN), const(n, LAST_SHIFT), 8), (X,),
        F.layer_norm(X, (7,), T(LAST_GAIN).flatten(), T(LAST_SHIFT).flatten()),
        lambda n, x: n.add_normalization_v2(x, const(n, LAST_GAIN), const(n, LAST_SHIFT), 4),
    ),
    "concatenation": (
        lambda n, a, b: setting(n.add_concatenation([a, b]), axis=0), (X, X[:1]), torch.cat([X, X[:1]]),
        lambda n, a, b: setting(n.add_concatenation([b, a]), axis=0),
    ),
    "concatenation, default axis": (
        lambda n, a, b: n.add_concatenation([a, b]), (X, X + 1), torch.cat([X, X + 1], 1),
        lambda n, a, b: setting(n.add_concatenation([a, b]), axis=2),
    ),
    "slice": (
        sliced((0, 1, 0, 6), (2, 3, 5, 2), (1, 2, 1, -3)), (X,), X[:, 1::2][..., [6, 3]],
        sliced((0, 0, 0, 6), (2, 3, 5, 2), (1, 2, 1, -3)),
    ),
    "slice, axes": (
        sliced((2,), (3,), (1,), axes=(3,)), (X,), X[..., 2:5], sliced((2,), (3,), (1,), axes=(1,)),
    ),
    "slice, zeros outside": (
        sliced((0, 0, -1, -2), (2, 6, 7, 8), (1, 1, 1, 1), mode=trt.SampleMode.FILL), (X,), F.pad(X, (2, -1, 1, 1)),
        sliced((0, 0, -1, -2), (2, 6, 7, 8), (1, 1, 1, 1), mode=trt.SampleMode.CLAMP),
    ),
    "slice, clamped": (
        sliced((0, 0, 0, -2), (2, 6, 5, 11), (1, 1, 1, 1), mode=trt.SampleMode.CLAMP), (X,),
        F.pad(X, (2, 2, 0, 0), mode="replicate"),
        sliced((0, 0, 0, -2), (2, 6, 5, 11), (1, 1, 1, 1), mode=trt.SampleMode.WRAP),
    ),
    "slice, wrapped": (
        sliced((0, 0, 0, -2), (4, 6, 5, 11), (1, 1, 1, 1), mode=trt.SampleMode.WRAP), (X,),
        F.pad(X.repeat(2, 1, 1, 1), (2, 2, 0, 0), mode="circular"),
        sliced((0, 0, 0, 0), (4, 6, 5, 11), (1, 1, 1, 1), mode=trt.SampleMode.WRAP),
    ),
    "slice, reflected": (
        sliced((0, 0, 0, -2), (2, 6, 5, 11), (1, 1, 1, 1), mode=trt.SampleMode.REFLECT), (X,),
        F.pad(X, (2, 2, 0, 0), mode="reflect"),
        sliced((0, 0, 0, -2), (2, 6, 5, 11), (1, 1, 1, 1), mode=trt.SampleMode.CLAMP),
    ),
    "padding": (
        lambda n, x: n.add_padding_nd(x, (1, 0), (-2, 3)), (X,), F.pad(X, (0, 3, 1, -2)),
        lambda n, x: n.add_padding_nd(x, (-2, 0), (1, 3)),
    ),
    "resize by scales": (
        resize("ASYMMETRIC", "FLOOR", scales=[1, 1, 2, 2]), (X,), F.interpolate(X, scale_factor=2, mode="nearest"),
        resize("ASYMMETRIC", "CEIL", scales=[1, 1, 2, 2]),
    ),
    "resize by shape": (
        resize("HALF_PIXEL", "HALF_DOWN", shape=(2, 6, 10, 3)), (X,),
        F.interpolate(X, (10, 3), mode="nearest-exact"), resize("ASYMMETRIC", "HALF_DOWN", shape=(2, 6, 10, 3)),
    ),
    "resize, corners": (
        resize("ALIGN_CORNERS", "FLOOR", shape=(2, 6, 5, 4)), (X,), X[..., [0, 2, 4, 6]],
        resize("ASYMMETRIC", "FLOOR", shape=(2, 6, 5, 4)),
    ),
    "gather": (
        lambda n, x: n.add_gather(x, const(n, np.array([[3, 1], [0, 3]], np.int32)), 2), (X,),
        X[:, :, [[3, 1], [0, 3]]], lambda n, x: n.add_gather(x, const(n, np.array([[3, 1], [0, 2]], np.int32)), 2),
    ),
    "gather, one": (
        lambda n, x: n.add_gather(x, const(n, np.array(4, np.int32)), 1), (X,), X[:, 4],
        lambda n, x: n.add_gather(x, const(n, np.array(4, np.int32)), 2),
    ),
    "gather, element": (
        lambda n, x, i: setting(n.add_gather_v2(x, i, trt.GatherMode.ELEMENT), axis=2), (X, X.int().abs()),
        X.gather(2, X.int().abs().long()),
        lambda n, x, i: setting(n.add_gather_v2(x, i, trt.GatherMode.ELEMENT), axis=3),
    ),
    "select": (
        lambda n, c, a, b: n.add_select(c, a, b), (X > 0, X, -2 * X), torch.where(X > 0, X, -2 * X),
        lambda n, c, a, b: n.add_select(c, b, a),
    ),
    "cast to uint8": (
        lambda n, x: n.add_cast(x, trt.uint8), (POSITIVE * 50,), (POSITIVE * 50).to(torch.uint8),
        lambda n, x: n.add_cast(n.add_unary(x, UNARY.ROUND).get_output(0), trt.uint8),
    ),
    "cast to int32": (
        lambda n, x: n.add_cast(x, trt.int32), (X * 50,), (X * 50).int(),
        lambda n, x: n.add_cast(n.add_unary(x, UNARY.FLOOR).get_output(0), trt.int32),
    ),
    "cast to half": (lambda n, x: n.add_cast(x, trt.float16), (X,), X, lambda n, x: n.add_cast(x, trt.int32)),
    "cast from uint8": (
        lambda n, x: n.add_cast(x, trt.float32), ((POSITIVE * 50).to(torch.uint8),), (POSITIVE * 50).trunc(),
        lambda n, x: n.add_cast(x, trt.int32),
    ),
    "identity": (lambda n, x: n.add_identity(x), (X,), X, lambda n, x: n.add_unary(x, UNARY.NEG)),
}  # fmt: skip
