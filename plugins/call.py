"""The kernels without TensorRT, called through the C functions of the library, for tests and measurements."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from plugins.load import PluginError
from runtime.engine import check, cuda_runtime
from runtime.manifest import EngineError

PATHS = ("none", "one launch", "two launches", "linear")


class CannyGroupNorm(ctypes.Structure):
    """The structure of the same name in group_norm/call.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "gamma", "beta", "row", "y", "workspace")),
        *((name, ctypes.c_int32) for name in ("batch", "channels", "positions", "groups", "row_batch")),
        *((name, ctypes.c_int32) for name in ("half", "channels_last", "silu")),
        ("epsilon", ctypes.c_float),
        ("max_cluster", ctypes.c_int32),
        ("force", ctypes.c_int32),
        ("overlap", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class Plan:
    """How a call is cut into blocks: its path, threads a block, the grid, positions a thread holds, shared memory."""

    path: str
    threads: int
    grid: tuple[int, int, int]
    held: int
    shared: int


@dataclass(frozen=True)
class GroupNorm:
    """One GroupNorm of x (B, C, h, w); `row_batch` is 0 without a row that is added before, else 1 or B."""

    batch: int
    channels: int
    height: int
    width: int
    groups: int = 32
    epsilon: float = 1e-5
    silu: bool = True
    row_batch: int = 0
    half: bool = True
    channels_last: bool = True

    @property
    def dtype(self) -> Any:
        """The type of x, row and y."""
        return np.float16 if self.half else np.float32

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, C, h, w)."""
        return self.batch, self.channels, self.height, self.width

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in memory: channels-last in half precision they are padded to a multiple of 8."""
        if not self.channels_last:
            return self.shape
        pad = 8 if self.half else 1
        return self.batch, self.height, self.width, -(-self.channels // pad) * pad

    @property
    def moved(self) -> int:
        """Bytes that are read and written if each is moved once."""
        return 2 * int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def arrays(self, mean: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
        """Random x (B, C, h, w) of a mean and standard deviation 1, gamma, beta (C), and the row where there is one."""
        rng = np.random.default_rng(seed)
        made = {
            "x": (rng.standard_normal(self.shape, np.float32) + np.float32(mean)).astype(self.dtype),
            "gamma": rng.standard_normal(self.channels, np.float32),
            "beta": rng.standard_normal(self.channels, np.float32),
        }
        if self.row_batch:
            made["row"] = rng.standard_normal((self.row_batch, self.channels), np.float32).astype(self.dtype)
        return made

    def expected(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """y (B, C, h, w) in float64."""
        x = arrays["x"].astype(np.float64)
        if self.row_batch:
            x += arrays["row"].astype(np.float64)[:, :, None, None]
        grouped = x.reshape(self.batch, self.groups, -1)
        mean, variance = (f(grouped, axis=2, keepdims=True) for f in (np.mean, np.var))
        y = ((grouped - mean) / np.sqrt(variance + self.epsilon)).reshape(self.shape)
        y = y * arrays["gamma"][:, None, None] + arrays["beta"][:, None, None]
        return y / (1 + np.exp(-y)) if self.silu else y

    def pack(self, x: np.ndarray, padding: float = np.nan) -> np.ndarray:
        """x (B, C, h, w) as it lies in memory."""
        if not self.channels_last:
            return np.ascontiguousarray(x)
        stored = np.full(self.stored_shape, padding, self.dtype)
        stored[..., : self.channels] = x.transpose(0, 2, 3, 1)
        return stored

    def unpack(self, stored: np.ndarray) -> np.ndarray:
        """y (B, C, h, w) of what lies in memory."""
        return stored[..., : self.channels].transpose(0, 3, 1, 2) if self.channels_last else stored

    def call(self, max_cluster: int, force: int = 0, overlap: bool = False) -> CannyGroupNorm:
        """The call, without addresses.

        force: 0 chooses, N is one launch of clusters of N, -1 two launches. overlap: it may start before its turn.
        """
        return CannyGroupNorm(
            batch=self.batch, channels=self.channels, positions=self.height * self.width, groups=self.groups,
            row_batch=self.row_batch, half=self.half, channels_last=self.channels_last, silu=self.silu,
            epsilon=self.epsilon, max_cluster=max_cluster, force=force, overlap=overlap,
        )  # fmt: skip


def error(y: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference from float64, relative to the largest expected value."""
    return float(np.abs(y.astype(np.float64) - expected).max() / np.abs(expected).max())


def open_library(path: Path) -> Any:
    """The C functions of a library; raises PluginError where it cannot be loaded."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as why:
        raise PluginError(f"{path} cannot be loaded: {why}.") from None
    if hasattr(library, "canny_group_norm_workspace"):
        library.canny_group_norm_workspace.restype = ctypes.c_uint64
    return library


def plan(library: Any, call: CannyGroupNorm) -> Plan:
    """How a call is cut."""
    out = (ctypes.c_int32 * 7)()
    library.canny_group_norm_plan(ctypes.byref(call), out)
    path, threads, x, y, z, held, shared = out
    return Plan(PATHS[path], threads, (x, y, z), held, shared)


class OnGpu:
    """A call whose arrays lie on the GPU until its `with` block ends; `launch` it as often as you like."""

    def __init__(
        self, function: Any, call: ctypes.Structure, memory: Mapping[str, np.ndarray], unpack: Callable[..., np.ndarray]
    ) -> None:
        self.call, self._function, self._unpack, self._cuda = call, function, unpack, cuda_runtime()
        self._held: list[int] = []
        self._memory = memory
        try:
            for name, array in memory.items():
                address = int(check(self._cuda.cudaMalloc(max(16, array.nbytes))))
                self._held.append(address)
                kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
                check(self._cuda.cudaMemcpy(address, np.ascontiguousarray(array).ctypes.data, array.nbytes, kind))
                setattr(call, name, address)
        except EngineError:
            self.close()
            raise

    def launch(self, stream: Any = 0) -> None:
        """Enqueue it once. Raises PluginError with CUDA's error number where that fails."""
        number = self._function(ctypes.byref(self.call), ctypes.c_void_p(int(stream)))
        if number:
            raise PluginError(f"the kernel was not launched: CUDA's error {number}.")

    def result(self, name: str = "y") -> np.ndarray:
        """y, or another of the arrays, once the GPU is done."""
        check(self._cuda.cudaDeviceSynchronize())
        stored = np.empty_like(self._memory[name])
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(self._cuda.cudaMemcpy(stored.ctypes.data, getattr(self.call, name), stored.nbytes, kind))
        return self._unpack(stored) if name == "y" else stored

    def close(self) -> None:
        """Free the memory."""
        for address in self._held:
            check(self._cuda.cudaFree(address))
        self._held.clear()

    def __enter__(self) -> OnGpu:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def group_norm_on_gpu(
    library: Any, norm: GroupNorm, arrays: Mapping[str, np.ndarray], force: int = 0, overlap: bool = False
) -> OnGpu:
    """A GroupNorm on the GPU; `force` and `overlap` as in `GroupNorm.call`."""
    check(cuda_runtime().cudaFree(0))  # so that there is a context before the library asks for the GPU
    call = norm.call(library.canny_max_cluster(), force, overlap)
    memory = {name: norm.pack(array) if name == "x" else array for name, array in arrays.items()}
    memory["y"] = np.full_like(memory["x"], np.nan)
    memory["workspace"] = np.full(int(library.canny_group_norm_workspace(ctypes.byref(call))), 255, np.uint8)
    return OnGpu(library.canny_group_norm, call, memory, norm.unpack)


# -- attention --------------------------------------------------------------------------------------------------------


class CannyAttention(ctypes.Structure):
    """The structure of the same name in attention/call.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "y")),
        *((name, ctypes.c_int32) for name in ("batch", "query_batch", "heads", "tokens", "keys", "width")),
        *((name, ctypes.c_int32) for name in ("q_stride", "kv_stride", "y_stride")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("warps", "groups", "causal")),
    ]


@dataclass(frozen=True)
class Attention:
    """One attention of q (B / repeat, T, C) over k, v (B, S, C), C = heads·width, in half precision.

    joined: Q, K and V lie side by side in one array (B, T, 3·C), as one matrix product makes them; then S is T.
    repeat: how often the queries serve, one batch of k and v after the other.
    causal: query i has keys 0 to i alone; heads 64 wide, and S is T.
    warps, groups: how a block is cut, as in attention/call.h; 0 leaves it to the kernel.
    """

    batch: int
    heads: int
    tokens: int
    keys: int
    width: int
    joined: bool = False
    repeat: int = 1
    causal: bool = False
    warps: int = 0
    groups: int = 0

    @property
    def channels(self) -> int:
        """C."""
        return self.heads * self.width

    @property
    def flop(self) -> int:
        """Multiplications and additions of both matrix products."""
        return 4 * self.batch * self.tokens * self.keys * self.channels

    def arrays(self, deviation: float = 1.0, seed: int = 0) -> dict[str, np.ndarray]:
        """Random q, k and v (B, tokens, C) of this standard deviation."""
        rng = np.random.default_rng(seed)
        sizes = {"q": (self.batch // self.repeat, self.tokens), "k": (self.batch, self.keys)}
        sizes["v"] = sizes["k"]
        return {
            name: (deviation * rng.standard_normal((*size, self.channels), np.float32)).astype(np.float16)
            for name, size in sizes.items()
        }

    def expected(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """y (B, T, C) in float64."""
        q, k, v = (
            arrays[name].astype(np.float64).reshape(len(arrays[name]), -1, self.heads, self.width).transpose(0, 2, 1, 3)
            for name in "qkv"
        )
        q = np.concatenate([q] * self.repeat)
        scores = q @ k.transpose(0, 1, 3, 2) * self.width**-0.5
        if self.causal:
            scores[..., ~np.tri(self.tokens, self.keys, dtype=bool)] = -np.inf
        weights = np.exp(scores - scores.max(axis=3, keepdims=True))
        y = weights / weights.sum(axis=3, keepdims=True) @ v
        return y.transpose(0, 2, 1, 3).reshape(self.batch, self.tokens, self.channels)

    def memory(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What lies in memory: q, k, v and y, or all of them in q, and y."""
        y = np.full((self.batch, self.tokens, self.channels), np.nan, np.float16)
        return (
            {"q": np.concatenate([arrays[name] for name in "qkv"], axis=2), "y": y}
            if self.joined
            else {**arrays, "y": y}
        )

    def call(self) -> CannyAttention:
        """The call, without addresses."""
        stride = self.channels * (3 if self.joined else 1)
        return CannyAttention(
            batch=self.batch, query_batch=self.batch // self.repeat, heads=self.heads, tokens=self.tokens,
            keys=self.keys, width=self.width, q_stride=stride, kv_stride=stride, y_stride=self.channels,
            scale=self.width**-0.5, warps=self.warps, groups=self.groups, causal=self.causal,
        )  # fmt: skip

    def place(self, call: CannyAttention) -> None:
        """Where K and V lie, once it is known where Q does."""
        if self.joined:
            call.k, call.v = (call.q + part * self.channels * 2 for part in (1, 2))


def attention_on_gpu(library: Any, attention: Attention, arrays: Mapping[str, np.ndarray]) -> OnGpu:
    """An attention on the GPU."""
    check(cuda_runtime().cudaFree(0))
    call = attention.call()
    on_gpu = OnGpu(library.canny_attention, call, attention.memory(arrays), lambda y: y)
    attention.place(call)
    return on_gpu
