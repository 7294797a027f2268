"""Convolutions of small maps without TensorRT; as `plugins.call`."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from plugins.call import OnGpu
from plugins.load import by_eights, conv_blocks, fold_norm, up_phases
from runtime.engine import check, cuda_runtime


class CannyConv(ctypes.Structure):
    """The structure of the same name in conv/call.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "residual", "weight_sums", "second", "y")),
        *((name, ctypes.c_int32) for name in ("batch", "height", "width", "channels", "filters", "size", "stride")),
        *((name, ctypes.c_int32) for name in ("residual_batch", "second_channels", "cluster", "high", "wide")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("gate", "beside", "cross", "x_batch", "words", "text_pitch", "up")),
    ]


@dataclass(frozen=True)
class ConvPlan:
    """How a call is cut: rows and filters of a tile, the blocks that share it, all blocks, places in shared memory for
    x and for weights, its bytes, and the time predicted on an H200.
    """

    high: int
    wide: int
    cluster: int
    blocks: int
    x_places: int
    places: int
    shared: int
    predicted_us: float


@dataclass(frozen=True)
class Conv:
    """One convolution of x (B, C, h, w) to D filters, all channels-last in half precision; sides are rounded up.

    residual_batch: 0 without a residual, else how many rows of the batch it has, taken in turn.
    norm: whether x goes through a LayerNorm of this epsilon first, for 1×1 only.
    second: channels of a second map, whose products by a 1×1 weight are added, for stride 1 only; 0 without one.
    gate: whether y is a · GELU(b), D / 2 wide, of (a, b) side by side, for 1×1 without a residual only.
    up: whether x is doubled along both axes first, for 3×3 of stride 1 alone.
    beside: whether kernels of another stream are to run beside it.
    cluster, high, wide: how it is cut, blocks that share a tile, its rows and filters; 0 leaves it to the kernel.
    """

    batch: int
    channels: int
    height: int
    width: int
    filters: int
    size: int = 3
    stride: int = 1
    residual_batch: int = 0
    norm: bool = False
    second: int = 0
    cluster: int = 0
    high: int = 0
    wide: int = 0
    epsilon: float = 1e-5
    gate: bool = False
    beside: bool = False
    up: bool = False

    @property
    def out(self) -> tuple[int, int, int, int]:
        """The shape of y in memory, (B, h, w, D or D / 2)."""
        height, width = (-(-side * (1 + self.up) // self.stride) for side in (self.height, self.width))
        return self.batch, height, width, self.filters // (1 + self.gate)

    @property
    def rows(self) -> int:
        """B·h·w of y."""
        return self.out[0] * self.out[1] * self.out[2]

    @property
    def weights(self) -> int:
        """Bytes of the weights, the least that must be read."""
        return 2 * self.filters * ((16 if self.up else self.size**2) * self.channels + self.second)

    @property
    def flop(self) -> int:
        """Multiplications and additions."""
        return self.rows * self.weights // (4 if self.up else 1)

    def arrays(self, seed: int = 0, mean: float = 0.0) -> dict[str, np.ndarray]:
        """Random x (B, h, w, C) of a mean and deviation 1, weight (D, C, size, size) that keeps its deviation, bias
        (D), the residual, the second map (B, h, w, E) and its weight (D, E, 1, 1), and the LayerNorm's gamma and
        beta (C).
        """
        rng = np.random.default_rng(seed)
        shapes = {"x": (self.batch, self.height, self.width, self.channels)}
        shapes["weight"] = (self.filters, self.channels, self.size, self.size)
        if self.residual_batch:
            shapes["residual"] = (self.residual_batch, *self.out[1:])
        if self.second:
            shapes["second"], shapes["second_weight"] = (*self.out[:3], self.second), (self.filters, self.second, 1, 1)
        made = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        made["x"] += np.float32(mean)
        for name in {"weight", "second_weight"} & made.keys():
            made[name] *= np.float32(made[name][0].size ** -0.5)
        sizes = {"bias": self.filters} | (dict.fromkeys(("gamma", "beta"), self.channels) if self.norm else {})
        exact = {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}
        return {name: array.astype(np.float16) for name, array in made.items()} | exact

    def expected(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """y (B, h, w, D or D / 2) in float64."""
        border, (_, h, w, _) = self.size // 2, self.out
        x = arrays["x"].astype(np.float64)
        if self.norm:
            mean, variance = (f(x, axis=3, keepdims=True) for f in (np.mean, np.var))
            x = (x - mean) / np.sqrt(variance + self.epsilon) * arrays["gamma"] + arrays["beta"]
        if self.up:
            x = x.repeat(2, axis=1).repeat(2, axis=2)
        x = np.pad(x, [(0, 0), (border, border), (border, border), (0, 0)])
        y = np.zeros((*self.out[:3], self.filters)) + arrays["bias"]
        for i, j in np.ndindex(self.size, self.size):
            part = x[:, i :: self.stride, j :: self.stride][:, :h, :w]
            y += part @ arrays["weight"][:, :, i, j].astype(np.float64).T
        if self.second:
            y += arrays["second"].astype(np.float64) @ arrays["second_weight"][:, :, 0, 0].astype(np.float64).T
        if self.residual_batch:
            y += np.concatenate([arrays["residual"].astype(np.float64)] * (self.batch // self.residual_batch))
        if self.gate:
            a, b = np.split(y, 2, axis=3)
            y = a * b * 0.5 * (1 + np.vectorize(math.erf)(b * 0.5**0.5))
        return y

    def memory(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What lies in memory: the weights as the kernel reads them, with the LayerNorm's in them, and y."""
        made = dict(arrays)
        if self.gate:
            made |= {name: by_eights(made[name]) for name in ("weight", "bias")}
        if self.up:
            made["weight"] = up_phases(made["weight"]).astype(np.float16)
        if self.norm:
            folded = fold_norm(*(made.pop(name) for name in ("weight", "bias", "gamma", "beta")))
            made |= zip(("weight", "bias", "weight_sums"), folded, strict=True)
        weights = [made.pop(name) for name in ("weight", "second_weight") if name in made]
        return {**made, "weight": conv_blocks(*weights), "y": np.full(self.out, np.nan, np.float16)}

    def call(self) -> CannyConv:
        """The call, without addresses."""
        names = {field[0] for field in CannyConv._fields_ if field[1] is not ctypes.c_void_p}
        numbers = {name: value for name, value in vars(self).items() if name in names}
        return CannyConv(**numbers, second_channels=self.second)

    def plan(self, library: Any) -> ConvPlan | None:
        """How the call is cut; None where there is no kernel for it."""
        out = (ctypes.c_int32 * 8)()
        call: Any = self.call()
        call.weight_sums = 1 if self.norm else None  # any address: whether there is one
        library.canny_conv_plan(ctypes.byref(call), out)
        groups, wide, cluster, blocks, x_places, places, shared, ns = out
        return ConvPlan(64 * groups, wide, cluster, blocks, x_places, places, shared, ns / 1000) if groups else None


def conv_on_gpu(library: Any, conv: Conv, arrays: Mapping[str, np.ndarray]) -> OnGpu:
    """A convolution on the GPU."""
    check(cuda_runtime().cudaFree(0))
    return OnGpu(library.canny_conv, conv.call(), conv.memory(arrays), lambda y: y)
