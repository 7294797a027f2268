"""What a pipeline holds of CUDA (memory, streams, events, graphs), freed as a whole however far it came."""

from __future__ import annotations

import ctypes
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from runtime.engine import check, cuda_runtime
from runtime.manifest import EngineError

ALIGNMENT = 256  # of every address that TensorRT is given

log = logging.getLogger(__name__)


def aligned(size: int) -> int:
    """The next multiple of 256, at least one."""
    return -(-max(1, size) // ALIGNMENT) * ALIGNMENT


class Layout:
    """Places for named pieces in one block of memory, each at a multiple of 256."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.offsets: dict[str, int] = {}
        self.nbytes = 0
        for name, size in sizes.items():
            self.offsets[name] = self.nbytes
            self.nbytes += aligned(size)


class Resources:
    """Owns what CUDA gives: the methods that make something remember it, and `close` frees all of it.

    Every method raises EngineError where CUDA fails, OutOfMemory where that is the reason.
    """

    def __init__(self) -> None:
        self.cuda = cuda_runtime()
        self._frees: list[tuple[Any, Any]] = []

    def _own(self, thing: Any, free: Any) -> Any:
        self._frees.append((free, thing))
        return thing

    def device(self, size: int, stream: Any) -> int:
        """The address of device memory, zero once `stream` gets there."""
        address = int(self._own(check(self.cuda.cudaMalloc(aligned(size))), self.cuda.cudaFree))
        check(self.cuda.cudaMemsetAsync(address, 0, aligned(size), stream))
        return address

    def pinned(self, size: int) -> np.ndarray:
        """Host memory that the GPU copies from and to by itself, as bytes."""
        address = int(self._own(check(self.cuda.cudaHostAlloc(aligned(size), 0)), self.cuda.cudaFreeHost))
        return np.ctypeslib.as_array((ctypes.c_uint8 * aligned(size)).from_address(address))

    def stream(self) -> Any:
        """A stream that does not wait for the default one."""
        make = self.cuda.cudaStreamCreateWithFlags
        return self._own(check(make(self.cuda.cudaStreamNonBlocking)), self.cuda.cudaStreamDestroy)

    def event(self, timing: bool = False) -> Any:
        """An event, with or without a time."""
        flags = self.cuda.cudaEventDefault if timing else self.cuda.cudaEventDisableTiming
        return self._own(check(self.cuda.cudaEventCreateWithFlags(flags)), self.cuda.cudaEventDestroy)

    def graph(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        """What `enqueue` puts on `stream`, and on streams that it forks from there and joins again, as one graph."""
        cuda = self.cuda
        # Relaxed: TensorRT may allocate inside.
        check(cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed))
        try:
            enqueue()
        except BaseException:
            _, graph = cuda.cudaStreamEndCapture(stream)  # fails, too, but the stream is of use again
            if graph is not None and int(graph):
                cuda.cudaGraphDestroy(graph)
            cuda.cudaGetLastError()
            raise
        graph = check(cuda.cudaStreamEndCapture(stream))
        try:
            return self._own(check(cuda.cudaGraphInstantiate(graph, 0)), cuda.cudaGraphExecDestroy)
        finally:
            check(cuda.cudaGraphDestroy(graph))

    def close(self) -> None:
        """Free everything, the latest first; what CUDA refuses to free (after a fault it refuses all) is logged."""
        failed = []
        while self._frees:
            free, thing = self._frees.pop()
            try:
                check(free(thing))
            except EngineError as error:
                failed.append(str(error))
        if failed:
            log.warning("%d of the pipeline's CUDA objects could not be freed: %s", len(failed), failed[0])

    def __enter__(self) -> Resources:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Closable(Protocol):
    """What `Recent` holds."""

    def close(self) -> None:
        """Free everything."""


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Closable)


class Recent(Generic[K, V]):
    """The `limit` values that were used last, by key; others are closed."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key, made where it is not there; the least recently used goes before the new one comes."""
        if key not in self._kept:
            while len(self._kept) >= self.limit:
                self._kept.popitem(last=False)[1].close()
            self._kept[key] = make()
        self._kept.move_to_end(key)
        return self._kept[key]

    def drop(self, key: K) -> None:
        """Close the value of a key."""
        if key in self._kept:
            self._kept.pop(key).close()

    def __iter__(self) -> Iterator[V]:
        return iter(self._kept.values())

    def close(self) -> None:
        """Close every value."""
        while self._kept:
            self._kept.popitem()[1].close()
