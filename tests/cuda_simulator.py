"""CUDA and TensorRT on the host's memory, which note what happens before what and refuse what a GPU would get wrong.

Work is done when it is enqueued (or, captured, when its graph is launched), but each piece of work knows which others
have certainly ended before it begins: those before it on its stream, those before an event that its stream waited for,
those that the host waited for. Memory remembers who wrote and read it last, by pieces of 256 bytes. Work that touches
what other work, not certainly ended, writes (or writes what it reads) is a `Hazard`, as is host memory that changes
while the GPU copies from it; what the GPU copies to the host arrives when the host waits for it, and is rubbish before.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda_records import GRAIN, OK, Block, Capture, Clock, Done, Error, Hazard, Stream, Work, join, peek, poke, replay


class Cuda:
    """What the runtime calls of cuda.bindings.runtime.

    fail: by function, after how many calls it answers with which error, once. ignore_waits: streams whose waits
    for events are ignored, a deliberate fault.
    """

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeRelaxed=2)
    cudaStreamNonBlocking, cudaEventDisableTiming, cudaEventDefault, cudaEventRecordExternal = 1, 2, 0, 1

    def __init__(self, memory: int = 2**40) -> None:
        self.free, self.total = memory, memory
        self.device: dict[int, Block] = {}
        self.pinned: dict[int, Block] = {}
        self.streams: dict[int, Stream] = {}
        self.events: dict[int, Clock | tuple[Capture, int] | None] = {}
        self.graphs: dict[int, Capture] = {}
        self.executables: dict[int, Capture] = {}
        self.host: Clock = {}
        self.done: list[Done] = []
        self.arriving: list[tuple[Done, int, np.ndarray]] = []  # copies to the host that it has not waited for
        self.leaving: list[tuple[Done, int, np.ndarray]] = []  # copies from the host, with what was copied
        self.calls: list[str] = []
        self.fail: dict[str, tuple[int, Error]] = {}
        self.broken: Error | None = None
        self.ignore_waits: set[int] = set()
        self.plans = 0
        self._handle = 0

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not callable(value):
            return value

        def call(*given: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            left, error = self.fail.get(name, (-1, OK))
            if name in self.fail:
                self.fail[name] = left - 1, error
                if left == 0:
                    del self.fail[name]
                    self.broken = error if error == Error.cudaErrorIllegalAddress else None
                    return error, None
            if self.broken and not name.startswith("cudaGet"):  # such an error stays until the process ends
                return self.broken, None
            result: tuple[Any, ...] = value(*given)
            return result

        return call

    def leaks(self) -> dict[str, int]:
        """How many of each kind were not freed."""
        kinds = ("device", "pinned", "streams", "events", "graphs", "executables")
        left = {kind: len(getattr(self, kind)) for kind in kinds} | {"plans": self.plans}
        return {kind: count for kind, count in left.items() if count}

    def _new(self) -> int:
        self._handle += 1
        return self._handle

    # -- who comes before whom ----------------------------------------------------------------------------------------

    def enqueue(self, stream: Any, work: Work) -> Error:
        """Do work on a stream, or record it where the stream is captured."""
        stream = self.streams[int(stream)]
        if stream.capture:
            stream.capture.actions.append(("work", stream.name, work))
        else:
            self._do(stream.name, stream.clock, work)
        return OK

    def _do(self, stream: str, clock: Clock, work: Work) -> Done:
        join(clock, self.host)
        clock[stream] = clock.get(stream, 0) + 1
        done = Done(work.name, stream, clock[stream], dict(clock))
        self.done.append(done)
        for address, size in work.reads:
            self._touch(done, address, size, write=False)
        for address, size in work.writes:
            self._touch(done, address, size, write=True)
        work.do()
        return done

    def _touch(self, done: Done, address: int, size: int, write: bool) -> None:
        block = self.block(address, size)
        piece = slice((address - block.address) // GRAIN, -(-(address + size - block.address) // GRAIN))
        if not write and (block.writes[piece] < 0).any():
            raise Hazard(f"{done.name} reads memory that was never written")
        before = [block.writes[piece]] + ([reads[piece] for reads in block.reads.values()] if write else [])
        for index in np.unique(np.concatenate(before)):
            other = self.done[index]
            if index >= 0 and other is not done and done.clock.get(other.stream, 0) < other.count:
                raise Hazard(f"{done.name} {'writes' if write else 'reads'} what {other.name} may still be using")
        index = len(self.done) - 1
        if write:
            block.writes[piece] = index
        else:
            key = done.stream.partition("@")[0]
            block.reads.setdefault(key, np.full_like(block.writes, -1))[piece] = index

    def block(self, address: int, size: int) -> Block:
        """The allocation that holds a range; a Hazard where none does."""
        for block in (*self.device.values(), *self.pinned.values()):
            if block.address <= address and address + size <= block.address + block.size:
                return block
        raise Hazard(f"{size} bytes at {address:#x} lie in no allocation")

    def _settle(self) -> None:
        """Once the host has waited: copies arrive, and what was copied from must not have changed before."""
        here = [copy for copy in self.arriving if self.host.get(copy[0].stream, 0) >= copy[0].count]
        self.arriving = [copy for copy in self.arriving if self.host.get(copy[0].stream, 0) < copy[0].count]
        for _, address, content in here:
            poke(address, content)
        changed = [copy for copy in self.leaving if not np.array_equal(peek(copy[1], copy[2].size), copy[2])]
        self.leaving = [copy for copy in self.leaving if self.host.get(copy[0].stream, 0) < copy[0].count]
        if changed:
            raise Hazard("host memory was changed while the GPU copied from it")

    # -- memory -------------------------------------------------------------------------------------------------------

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if size > self.free:
            return Error.cudaErrorMemoryAllocation, None
        self.free -= size
        block = Block(size)
        self.device[block.address] = block
        return OK, block.address

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        self.free += self.device.pop(address).size
        return (OK,)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        block = Block(size)
        self.pinned[block.address] = block
        return OK, block.address

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        del self.pinned[address]
        return (OK,)

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return OK, self.free, self.total

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: Stream) -> tuple[Any, ...]:
        def fill() -> None:
            ctypes.memset(address, value, size)

        return (self.enqueue(stream, Work("memset", fill, [], [(address, size)])),)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: Stream) -> tuple[Any, ...]:
        handle = self.streams[int(stream)]
        assert handle.capture is None, "copies from and to the host are not simulated within a graph"
        assert (to in self.pinned or source in self.pinned) and kind in (1, 2), "the copy would wait for the host"
        content = peek(source, size)
        if kind == 1:
            done = self._do(handle.name, handle.clock, Work("upload", lambda: poke(to, content), [], [(to, size)]))
            self.leaving.append((done, source, content))
        else:
            done = self._do(handle.name, handle.clock, Work("download", lambda: None, [(source, size)], []))
            poke(to, np.full(size, 0xCD, np.uint8))
            self.arriving.append((done, to, content))
        return (OK,)

    def cudaMemcpy(self, to: int, source: int, size: int, kind: int) -> tuple[Any, ...]:
        handle = self.block(source, size)
        assert kind == 2 and all(self.host.get(self.done[i].stream, 0) >= self.done[i].count for i in handle.writes)
        ctypes.memmove(to, source, size)
        return (OK,)

    def cudaMemcpy2DAsync(
        self, to: int, pitch: int, source: int, source_pitch: int, width: int, rows: int, kind: int, stream: Stream
    ) -> tuple[Any, ...]:
        def copy() -> None:
            for row in range(rows):
                ctypes.memmove(to + row * pitch, source + row * source_pitch, width)

        assert kind == 3
        reads, writes = [(source, rows * source_pitch)], [(to + row * pitch, width) for row in range(rows)]
        return (self.enqueue(stream, Work("copy rows", copy, reads, writes)),)

    # -- streams and events -------------------------------------------------------------------------------------------

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        stream = Stream(self._new())
        stream.name, stream.clock, stream.capture = f"stream{int(stream)}", {}, None
        self.streams[int(stream)] = stream
        return OK, stream

    def cudaStreamDestroy(self, stream: Stream) -> tuple[Any, ...]:
        if stream.capture:
            raise Hazard("a stream is destroyed while it is captured")
        del self.streams[int(stream)]
        return (OK,)

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[Any, ...]:
        if stream.capture:
            return (Error.cudaErrorStreamCaptureUnsupported,)
        join(self.host, stream.clock)
        self._settle()
        return (OK,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        event = self._new()
        self.events[event] = None
        return OK, event

    def cudaEventDestroy(self, event: int) -> tuple[Any, ...]:
        del self.events[event]
        return (OK,)

    def cudaEventRecord(self, event: int, stream: Stream) -> tuple[Any, ...]:
        if stream.capture:
            token = self._new()
            stream.capture.actions.append(("record", stream.name, token))
            self.events[event] = stream.capture, token
        else:
            self.events[event] = dict(stream.clock)
        return (OK,)

    def cudaEventRecordWithFlags(self, event: int, stream: Stream, flags: int) -> tuple[Any, ...]:
        assert flags == self.cudaEventRecordExternal and stream.capture, "only marks within a graph are simulated"
        return (OK,)

    def cudaStreamWaitEvent(self, stream: Stream, event: int, flags: int) -> tuple[Any, ...]:
        recorded = self.events[event]
        if recorded is None or (int(stream) in self.ignore_waits and not isinstance(recorded, tuple)):
            return (OK,)
        if isinstance(recorded, tuple):
            capture, token = recorded
            if stream.capture not in (None, capture):
                return (Error.cudaErrorStreamCaptureIsolation,)
            if stream.capture is None:
                stream.capture = capture
                capture.streams.append(stream)
            if int(stream) not in self.ignore_waits:
                capture.actions.append(("wait", stream.name, token))
        elif stream.capture:
            return (Error.cudaErrorStreamCaptureIsolation,)
        else:
            join(stream.clock, recorded)
        return (OK,)

    def cudaEventSynchronize(self, event: int) -> tuple[Any, ...]:
        recorded = self.events[event]
        assert isinstance(recorded, dict)
        join(self.host, recorded)
        self._settle()
        return (OK,)

    def cudaEventElapsedTime(self, begin: int, end: int) -> tuple[Any, ...]:
        return OK, 0.25

    # -- graphs -------------------------------------------------------------------------------------------------------

    def cudaStreamBeginCapture(self, stream: Stream, mode: int) -> tuple[Any, ...]:
        stream.capture = Capture(stream, streams=[stream])
        return (OK,)

    def cudaStreamEndCapture(self, stream: Stream) -> tuple[Any, ...]:
        capture = stream.capture
        assert capture is not None and capture.origin is stream
        for captured in capture.streams:
            captured.capture = None
        clocks = replay(capture, {}, lambda *_: None)
        origin = clocks[stream.name]
        unjoined = any(origin.get(s, 0) < clock.get(s, 0) for s, clock in clocks.items())
        if unjoined and not self.ignore_waits:
            return Error.cudaErrorStreamCaptureUnjoined, None
        graph = self._new()
        self.graphs[graph] = capture
        return OK, graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        executable = self._new()
        self.executables[executable] = self.graphs[graph]
        return OK, executable

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        del self.graphs[graph]
        return (OK,)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[Any, ...]:
        del self.executables[executable]
        return (OK,)

    def cudaGraphLaunch(self, executable: int, stream: Stream) -> tuple[Any, ...]:
        capture, launch = self.executables[executable], self._new()
        join(stream.clock, self.host)

        def do(name: str, clock: Clock, work: Work) -> None:
            self._do(f"{name}@{launch}", clock, work)

        # Before a forked stream's first wait nothing orders it but the launch itself.
        clocks = replay(capture, stream.clock, do)
        for clock in clocks.values():
            join(stream.clock, clock)
        stream.clock[stream.name] = stream.clock.get(stream.name, 0) + 1
        return (OK,)

    # -- errors -------------------------------------------------------------------------------------------------------

    def cudaGetErrorString(self, error: Error) -> tuple[Any, ...]:
        texts = {Error.cudaErrorMemoryAllocation: b"out of memory"}
        return OK, texts.get(error, b"an illegal memory access was encountered")

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return (OK,)
