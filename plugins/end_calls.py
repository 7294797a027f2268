"""The ends of a step, its first and its last convolution, called as in `plugins.call`."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from plugins.call import OnGpu
from plugins.load import first_blocks, last_rows
from runtime.engine import check, cuda_runtime

GUIDANCE = 7.3


class CannyFirst(ctypes.Structure):
    """The structure of the same name in ends/call.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "hint", "y", "repeated")),
        *((name, ctypes.c_int32) for name in ("samples", "channels", "height", "width", "filters")),
        *((name, ctypes.c_int32) for name in ("hint_batch", "repeat")),
    ]


class CannyLast(ctypes.Structure):
    """The structure of the same name in ends/call.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("h", "weight", "bias", "x", "guidance", "e1", "e2", "noise")),
        *((name, ctypes.c_void_p) for name in ("coefficients", "kept", "e", "difference", "x_next")),
        *((name, ctypes.c_int32) for name in ("samples", "channels", "height", "width", "filters")),
    ]


def conv3(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, dtype: Any) -> np.ndarray:
    """3×3 of x (B, C, h, w) by a weight (D, C, 3, 3) and a bias (D) within zeros, computed in a type."""
    h, w = x.shape[2:]
    padded = np.pad(x.astype(dtype), ((0, 0), (0, 0), (1, 1), (1, 1)))
    y = np.zeros((len(x), len(weight), h, w), dtype) + bias.astype(dtype)[:, None, None]
    for down in range(3):
        for right in range(3):
            part = padded[:, :, down : down + h, right : right + w]
            y += np.tensordot(weight[:, :, down, right].astype(dtype), part, (1, 1)).swapaxes(0, 1)
    return y


def channels_last(x: np.ndarray) -> np.ndarray:
    """A map (B, C, h, w) as it lies in memory."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


@dataclass(frozen=True)
class First:
    """The first convolution of x (samples, C, h, w) in float to D filters in half precision.

    hint_batch: 0 without a hint, else how many rows it has, 1 or as many as there are samples.
    repeat: how often y is in a second result, one after the other; 0 without one.
    """

    samples: int
    channels: int
    height: int
    width: int
    filters: int
    hint_batch: int = 0
    repeat: int = 0

    @property
    def results(self) -> tuple[str, ...]:
        """The names of what is made."""
        return ("y", "repeated") if self.repeat else ("y",)

    def arrays(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Random x, weight (D, C, 3, 3) and bias in float, and the hint (hint_batch, D, h, w) in half precision."""
        rng, size = np.random.default_rng(seed), (self.height, self.width)
        weight = rng.standard_normal((self.filters, self.channels, 3, 3), np.float32)
        made = {
            "x": rng.standard_normal((self.samples, self.channels, *size), np.float32),
            "weight": weight / np.float32(3 * self.channels**0.5),
            "bias": rng.standard_normal(self.filters, np.float32),
        }
        if self.hint_batch:
            hint = rng.standard_normal((self.hint_batch, self.filters, *size), np.float32)
            made["hint"] = hint.astype(np.float16)
        return made

    def expected(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """y (samples, D, h, w) in float64."""
        y = conv3(arrays["x"], arrays["weight"], arrays["bias"], np.float64)
        return y + arrays["hint"] if self.hint_batch else y

    def memory(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What lies in memory."""
        memory = {**arrays, "weight": first_blocks(arrays["weight"])}
        memory |= {"hint": channels_last(arrays["hint"])} if self.hint_batch else {}
        rows = {"y": self.samples, "repeated": self.repeat * self.samples}
        shape = self.height, self.width, self.filters
        return memory | {name: np.full((rows[name], *shape), np.nan, np.float16) for name in self.results}

    def call(self) -> CannyFirst:
        """The call, without addresses."""
        return CannyFirst(
            samples=self.samples, channels=self.channels, height=self.height, width=self.width, filters=self.filters,
            hint_batch=self.hint_batch, repeat=self.repeat,
        )  # fmt: skip


@dataclass(frozen=True)
class Last:
    """The last convolution of h (2·samples, C, h, w) in half precision to the channels of x, guidance and the update.

    cond: h is the prompt's half alone; the difference is kept.
    """

    samples: int
    channels: int
    height: int
    width: int
    filters: int = 4
    cond: bool = False

    @property
    def rows(self) -> int:
        """Of h."""
        return self.samples * (1 if self.cond else 2)

    @property
    def results(self) -> tuple[str, ...]:
        """The names of what is made."""
        return ("e", "x_next") if self.cond else ("e", "difference", "x_next")

    def arrays(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Random inputs of standard deviation 1, and a weight that keeps it."""
        rng, size = np.random.default_rng(seed), (self.height, self.width)
        names = ("x", "e1", "e2", "noise", *(("kept",) if self.cond else ()))
        weight = rng.standard_normal((self.filters, self.channels, 3, 3), np.float32)
        return {
            "h": rng.standard_normal((self.rows, self.channels, *size), np.float32).astype(np.float16),
            "weight": (weight / np.float32(3 * self.channels**0.5)).astype(np.float16),
            "bias": rng.standard_normal(self.filters, np.float32),
            **{name: rng.standard_normal((self.samples, self.filters, *size), np.float32) for name in names},
            "guidance": np.full(1, GUIDANCE, np.float32),
            "coefficients": rng.standard_normal(4, np.float32),
        }

    def expected(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """e, difference and x_next, (samples, filters, h, w) in float64."""
        both = conv3(arrays["h"], arrays["weight"], arrays["bias"], np.float64)
        guidance = float(arrays["guidance"][0])
        if self.cond:
            difference = arrays["kept"].astype(np.float64)
            e = both + (guidance - 1) * difference
        else:
            cond, uncond = np.split(both, 2)
            difference = cond - uncond
            e = uncond + guidance * difference
        a, b0, b1, b2 = arrays["coefficients"].astype(np.float64)
        x_next = a * arrays["x"] + b0 * e + b1 * arrays["e1"] + b2 * arrays["e2"] + arrays["noise"]
        return {"e": e, "difference": difference, "x_next": x_next}

    def memory(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What lies in memory."""
        packed = {"h": channels_last(arrays["h"]), "weight": last_rows(arrays["weight"])}
        return {**arrays, **packed, **{name: np.full_like(arrays["x"], np.nan) for name in self.results}}

    def call(self) -> CannyLast:
        """The call, without addresses."""
        return CannyLast(
            samples=self.samples, channels=self.channels, height=self.height, width=self.width, filters=self.filters
        )


def end_on_gpu(library: Any, what: First | Last, arrays: Mapping[str, np.ndarray]) -> OnGpu:
    """One of them on the GPU."""
    check(cuda_runtime().cudaFree(0))
    function = library.canny_first if isinstance(what, First) else library.canny_last
    return OnGpu(function, what.call(), what.memory(arrays), lambda y: y)
