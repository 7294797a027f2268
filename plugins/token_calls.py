"""What lies between convolutions and products, called as in `plugins.call`."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from plugins.call import GroupNorm, OnGpu
from runtime.engine import check, cuda_runtime


class CannyLayerNorm(ctypes.Structure):
    """The structure of the same name in tokens/call.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "gamma", "beta", "y")),
        *((name, ctypes.c_int32) for name in ("tokens", "channels")),
        ("epsilon", ctypes.c_float),
    ]


class CannyGeglu(ctypes.Structure):
    """The structure of the same name in tokens/call.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, ctypes.c_int32) for name in ("tokens", "channels")),
    ]


class CannyAdd(ctypes.Structure):
    """The structure of the same name in tokens/call.h."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("a", "b", "y")), ("count", ctypes.c_int64)]


class CannyJoin(ctypes.Structure):
    """The structure of the same name in tokens/call.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "skip", "residual", "scales", "x_residual", "x_scales", "y")),
        *((name, ctypes.c_int32) for name in ("batch", "positions", "first", "second")),
    ]


class CannyJoinNorm(ctypes.Structure):
    """The structure of the same name in group_norm/call.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "skip", "residual", "scales", "x_residual", "x_scales", "joined")),
        *((name, ctypes.c_void_p) for name in ("gamma", "beta", "y", "workspace")),
        *((name, ctypes.c_int32) for name in ("batch", "positions", "first", "second", "groups", "silu")),
        ("epsilon", ctypes.c_float),
        ("max_cluster", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class LayerNorm:
    """One LayerNorm of x (tokens, channels) in half precision."""

    tokens: int
    channels: int
    epsilon: float = 1e-5

    function = "canny_layer_norm"

    def arrays(self, mean: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
        """Random x of a mean and standard deviation 1, gamma and beta (channels)."""
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((self.tokens, self.channels), np.float32) + np.float32(mean)
        gamma, beta = rng.standard_normal((2, self.channels), np.float32)
        return {"x": x.astype(np.float16), "gamma": gamma, "beta": beta}

    def expected(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """y (tokens, channels) in float64."""
        x = arrays["x"].astype(np.float64)
        x -= x.mean(axis=1, keepdims=True)
        return x / np.sqrt(x.var(axis=1, keepdims=True) + self.epsilon) * arrays["gamma"] + arrays["beta"]

    def call(self) -> CannyLayerNorm:
        """The call, without addresses."""
        return CannyLayerNorm(tokens=self.tokens, channels=self.channels, epsilon=self.epsilon)


@dataclass(frozen=True)
class Geglu:
    """The gate of one GEGLU: x (tokens, 2·channels) → (tokens, channels), in half precision."""

    tokens: int
    channels: int

    function = "canny_geglu"

    def arrays(self, mean: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
        """Random x of a mean and standard deviation 1."""
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((self.tokens, 2 * self.channels), np.float32) + np.float32(mean)
        return {"x": x.astype(np.float16)}

    def expected(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """y (tokens, channels) in float64."""
        a, b = np.split(arrays["x"].astype(np.float64), 2, axis=1)
        return a * b * 0.5 * (1 + np.vectorize(math.erf)(b * 0.5**0.5))

    def call(self) -> CannyGeglu:
        """The call, without addresses."""
        return CannyGeglu(tokens=self.tokens, channels=self.channels)


@dataclass(frozen=True)
class Sum:
    """One sum of a and b (tokens, channels), in half precision."""

    tokens: int
    channels: int

    function = "canny_add"

    def arrays(self, mean: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
        """Random a of a mean, b of mean 0, both of standard deviation 1."""
        rng = np.random.default_rng(seed)
        a, b = rng.standard_normal((2, self.tokens, self.channels), np.float32)
        return {"a": (a + np.float32(mean)).astype(np.float16), "b": b.astype(np.float16)}

    def expected(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """y (tokens, channels) in float64."""
        return arrays["a"].astype(np.float64) + arrays["b"]

    def call(self) -> CannyAdd:
        """The call, without addresses."""
        return CannyAdd(count=self.tokens * self.channels)


@dataclass(frozen=True)
class Join:
    """x (batch, positions, first) and behind it skip + scale·residual (batch, positions, second), in half precision.

    both: whether x has a residual with scales, too.
    """

    batch: int
    positions: int
    first: int
    second: int
    both: bool = False

    function = "canny_join"

    @property
    def tokens(self) -> int:
        """Positions of all rows of the batch."""
        return self.batch * self.positions

    @property
    def channels(self) -> int:
        """Of the result."""
        return self.first + self.second

    def arrays(self, mean: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
        """Random x of a mean, skip, residuals and their scales (batch), of standard deviation 1."""
        rng = np.random.default_rng(seed)
        widths = {"x": self.first, "skip": self.second, "residual": self.second}
        widths |= {"x_residual": self.first} if self.both else {}
        made = {name: rng.standard_normal((self.tokens, width), np.float32) for name, width in widths.items()}
        made["x"] += np.float32(mean)
        names = ("scales", "x_scales") if self.both else ("scales",)
        scales = {name: rng.standard_normal(self.batch, np.float32) for name in names}
        return {name: array.astype(np.float16) for name, array in made.items()} | scales

    def expected(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """y (tokens, channels) in float64."""
        x, y = (arrays[name].astype(np.float64) for name in ("x", "skip"))
        y += np.repeat(arrays["scales"], self.positions)[:, None] * arrays["residual"]
        if self.both:
            x += np.repeat(arrays["x_scales"], self.positions)[:, None] * arrays["x_residual"]
        return np.concatenate([x, y], axis=1)

    def call(self) -> CannyJoin:
        """The call, without addresses."""
        return CannyJoin(batch=self.batch, positions=self.positions, first=self.first, second=self.second)


@dataclass(frozen=True)
class JoinNorm:
    """A join, and GroupNorm with SiLU after it or not of what it makes."""

    join: Join
    groups: int = 32
    silu: bool = True
    epsilon: float = 1e-5

    @property
    def norm(self) -> GroupNorm:
        """The GroupNorm, of a map one position wide."""
        join = self.join
        return GroupNorm(join.batch, join.channels, join.positions, 1, self.groups, self.epsilon, self.silu)

    def arrays(self, mean: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
        """Those of the join, gamma and beta."""
        norm = self.norm.arrays(seed=seed)
        return self.join.arrays(mean, seed) | {name: norm[name] for name in ("gamma", "beta")}

    def expected(self, arrays: Mapping[str, np.ndarray], joined: np.ndarray) -> np.ndarray:
        """y (tokens, channels) in float64, of what was joined."""
        x = joined.reshape(self.join.batch, self.join.positions, -1).transpose(0, 2, 1)[..., None]
        y = self.norm.expected({**arrays, "x": x})
        return y[..., 0].transpose(0, 2, 1).reshape(self.join.tokens, self.join.channels)

    def memory(self, library: Any, arrays: Mapping[str, np.ndarray], call: CannyJoinNorm) -> dict[str, np.ndarray]:
        """What lies in memory: the arrays, `joined`, y and the workspace."""
        empty = np.full((self.join.tokens, self.join.channels), np.nan, np.float16)
        library.canny_join_norm_workspace.restype = ctypes.c_uint64
        workspace = np.full(int(library.canny_join_norm_workspace(ctypes.byref(call))), 255, np.uint8)
        return {**arrays, "joined": empty, "y": empty.copy(), "workspace": workspace}

    def call(self, max_cluster: int) -> CannyJoinNorm:
        """The call, without addresses."""
        join = self.join
        return CannyJoinNorm(
            batch=join.batch, positions=join.positions, first=join.first, second=join.second, groups=self.groups,
            silu=self.silu, epsilon=self.epsilon, max_cluster=max_cluster,
        )  # fmt: skip


def join_norm_on_gpu(library: Any, what: JoinNorm, arrays: Mapping[str, np.ndarray]) -> OnGpu:
    """A join and its GroupNorm on the GPU."""
    check(cuda_runtime().cudaFree(0))
    call = what.call(library.canny_max_cluster())
    return OnGpu(library.canny_join_norm, call, what.memory(library, arrays, call), lambda y: y)


def tokens_on_gpu(library: Any, what: LayerNorm | Geglu | Sum | Join, arrays: Mapping[str, np.ndarray]) -> OnGpu:
    """One of them on the GPU."""
    check(cuda_runtime().cudaFree(0))
    memory = {**arrays, "y": np.full((what.tokens, what.channels), np.nan, np.float16)}
    return OnGpu(getattr(library, what.function), what.call(), memory, lambda y: y)
