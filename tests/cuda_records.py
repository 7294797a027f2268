"""What the CUDA simulator keeps: pieces of work and their order, memory and who touched it, captured graphs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

GRAIN = 256
Clock = dict[str, int]


class Hazard(AssertionError):
    """Something that a GPU would get wrong some of the time."""


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorStreamCaptureUnjoined = 904
    cudaErrorStreamCaptureIsolation = 905


OK = Error.cudaSuccess


@dataclass
class Work:
    """A piece of work: what it does, and the ranges (address, size) that it reads and writes."""

    name: str
    do: Callable[[], None]
    reads: list[tuple[int, int]] = field(default_factory=list)
    writes: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Done:
    """Work that was enqueued: its place on its (virtual) stream and what it comes after."""

    name: str
    stream: str
    count: int
    clock: Clock


class Block:
    """An allocation: its bytes, and by pieces of 256 bytes the last write and each stream's last read."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size + GRAIN, 0xAB, np.uint8)
        self.address = -(-self.bytes.ctypes.data // GRAIN) * GRAIN  # as cudaMalloc gives
        self.size = size
        self.writes = np.full(-(-size // GRAIN), -1, np.int64)
        self.reads: dict[str, np.ndarray] = {}


class Stream(int):
    """A handle whose clock says what its next work comes after."""

    name: str
    clock: Clock
    capture: Capture | None


@dataclass
class Capture:
    """What a graph is recorded into: work, and the order between streams that events give it."""

    origin: Stream
    actions: list[tuple[str, str, Any]] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)


def replay(capture: Capture, begin: Clock, do: Callable[[str, Clock, Work], Any]) -> dict[str, Clock]:
    """Go through what was captured; the clocks in which its streams end; each counts its work."""
    clocks = {stream.name: dict(begin) for stream in capture.streams}
    tokens: dict[int, Clock] = {}
    for kind, name, what in capture.actions:
        if kind == "work":
            do(name, clocks[name], what)
            own = f"captured {name}"
            clocks[name][own] = clocks[name].get(own, 0) + 1
        elif kind == "record":
            tokens[what] = dict(clocks[name])
        else:
            join(clocks[name], tokens[what])
    return clocks


def join(clock: Clock, other: Clock) -> None:
    """Let a clock know what another knows."""
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)


def peek(address: int, size: int) -> np.ndarray:
    """A copy of the bytes at an address."""
    return np.frombuffer(ctypes.string_at(address, size), np.uint8).copy()


def poke(address: int, content: np.ndarray) -> None:
    """Write bytes to an address."""
    ctypes.memmove(address, content.ctypes.data, content.size)
