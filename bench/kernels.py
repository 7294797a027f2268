"""`python -m bench.kernels ENGINES`: every kernel of a step as it really runs, on two streams and with early launches.

Needs what bench.ours needs and NVIDIA's CUPTI: `pip install cupti-python==13.0.1`, with the directory of libcupti.so.13
(of the CUDA toolkit) on LD_LIBRARY_PATH. Three steps are one CUDA graph, and the middle one is shown.

A kernel that begins early waits in its time for the one before it, and others run beside it: the sum of the times is
more than the step. What a kernel adds, as if there were one stream, is its `exposed` time: from the end of the kernel
that ended before it to its own end. Those of all kernels add up to the step.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.ours import COMPETITION, WARM_UP, arguments
from runtime.engine import check, gpu
from runtime.manifest import EngineError, Manifest
from runtime.memory import Resources
from runtime.pipeline import Canny2Image
from runtime.session import Session
from runtime.steps import Steps
from trt_builder.terminal import short

STEPS = 3  # the middle one has others on both sides; how one meets the next is part of a picture of them
BUFFER = 8 << 20  # bytes that CUPTI writes its records into at a time
INSTALL = "run `pip install cupti-python==13.0.1` and put the directory of libcupti.so.13 on LD_LIBRARY_PATH"


class Record(NamedTuple):
    """One run of a kernel: begin and end in nanoseconds, shared memory of a block in bytes."""

    launch: int
    node: int
    begin: int
    end: int
    name: str
    grid: tuple[int, int, int]
    threads: int
    cluster: int
    registers: int
    shared: int
    stream: int


# -- on the GPU -------------------------------------------------------------------------------------------------------


def measure(folder: Path, runs: int) -> dict[str, Any]:
    """Every kernel of three steps in one graph, medians of `runs` launches, and the milliseconds a step meanwhile.

    Raises EngineError without CUPTI, and what Canny2Image and `whole` raise.
    """
    cupti = open_cupti()
    shape = Manifest.load(folder).shape
    with Canny2Image(folder, "full", COMPETITION) as pipeline:
        given = arguments(shape["height"], shape["width"])
        pipeline.process(**given | {"num_samples": shape["samples"]})
        found, times = record(cupti, *pipeline.last_used(), runs)
    launches = whole(found)
    here = gpu()
    return {
        "gpu": here.name if here else None, "engines": folder.name, "launches": len(launches),
        "traced_ms": float(np.median(times)) / STEPS, "rows": rows_of(launches),
    }  # fmt: skip


def open_cupti() -> Any:
    """The module of cupti-python; raises EngineError where it is missing."""
    try:
        with warnings.catch_warnings():  # of its own names, one for each
            warnings.simplefilter("ignore", DeprecationWarning)
            from cupti import cupti
    except ImportError as error:
        raise EngineError(f"kernels are recorded with NVIDIA's cupti-python ({error}): {INSTALL}.") from None
    return cupti


def watch(cupti: Any, found: list[Record]) -> None:
    """Have CUPTI record every kernel from now on; raises EngineError where it cannot."""

    def completed(activities: Iterable[Any]) -> None:  # they are gone after it
        found.extend(map(record_of, activities))

    try:
        cupti.activity_register_callbacks(lambda: (BUFFER, 0), completed)
        cupti.activity_enable(cupti.ActivityKind.CONCURRENT_KERNEL)
    except (RuntimeError, cupti.cuptiError) as error:
        raise EngineError(f"CUPTI does not record kernels here ({error}): {INSTALL}.") from None


def record_of(one: Any) -> Record:
    """What is kept of CUPTI's record of a kernel."""
    return Record(
        one.correlation_id, one.graph_node_id, one.start, one.end, one.name, (one.grid_x, one.grid_y, one.grid_z),
        one.block_x, one.cluster_x, one.registers_per_thread,
        one.dynamic_shared_memory + one.static_shared_memory, one.stream_id,
    )  # fmt: skip


def record(cupti: Any, session: Session, steps: Steps, runs: int) -> tuple[list[Record], list[float]]:
    """Kernels of all launches of a graph of `STEPS` steps; milliseconds of each but the first few."""

    def enqueue() -> None:
        for i in range(STEPS):
            session.step(steps, i)

    found: list[Record] = []
    times = []
    watch(cupti, found)
    with Resources() as own:
        cuda, begin, end = own.cuda, own.event(timing=True), own.event(timing=True)
        graph = own.graph(session.main, enqueue)
        for _ in range(WARM_UP + runs):
            check(cuda.cudaEventRecord(begin, session.main))
            check(cuda.cudaGraphLaunch(graph, session.main))
            check(cuda.cudaEventRecord(end, session.main))
            session.wait()
            times.append(check(cuda.cudaEventElapsedTime(begin, end)))
        cupti.activity_flush_all(1)
    return found, times[WARM_UP:]


# -- what was recorded ------------------------------------------------------------------------------------------------


def whole(found: Iterable[Record]) -> list[list[Record]]:
    """Launches of which every kernel was recorded, without the first few, their kernels in the order of the capture.

    Raises ValueError where there is none.
    """
    launches: dict[int, dict[int, Record]] = {}
    for one in found:
        if one.node:  # others are of no graph
            launches.setdefault(one.launch, {})[one.node] = one
    nodes = sorted({node for kernels in launches.values() for node in kernels})
    made = [launches[i] for i in sorted(launches)[WARM_UP:] if len(launches[i]) == len(nodes)]
    if not made:
        what = f"CUPTI recorded all kernels of none of {len(launches)} launches, of which {WARM_UP} do not count"
        raise ValueError(f"{what}: take more --runs.")
    return [[kernels[node] for node in nodes] for kernels in made]


def rows_of(launches: Sequence[Sequence[Record]]) -> list[dict[str, Any]]:
    """A row for each kernel: what it is, and medians of its begin and end in µs after its launch's first kernel began.

    launches: as `whole` makes them.
    """
    # Integers until a launch's begin is gone: nanoseconds since 1970 are a multiple of 256 in a double.
    times = np.array([[(one.begin, one.end) for one in kernels] for kernels in launches], np.int64)
    times -= times[:, :, 0].min(axis=1)[:, None, None]
    medians = np.median(times, axis=0) / 1e3
    facts = ("node", "name", "grid", "threads", "cluster", "registers", "shared", "stream")
    return [
        dict(zip(facts, attrgetter(*facts)(one), strict=True)) | {"begin": float(begin), "end": float(end)}
        for one, (begin, end) in zip(launches[0], medians, strict=True)
    ]


def steps_of(rows: Sequence[dict[str, Any]]) -> list[Sequence[dict[str, Any]]]:
    """The rows of each step, in the order of the capture. Raises ValueError where the steps are not equal."""
    size = len(rows) // STEPS
    names = [row["name"] for row in rows]
    if names != names[:size] * STEPS:
        raise ValueError(f"the {len(rows)} kernels of a launch are not {STEPS} equal steps: nothing is known of one.")
    return [rows[i * size : (i + 1) * size] for i in range(STEPS)]


def middle_step(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the middle one of three equal steps in order of their ends, with `kind` and `exposed` time (µs).

    It lasts from the end of the last kernel of the step before, so that this is what `exposed` adds up to. rows: in the
    order of the capture. Raises ValueError where the steps are not equal.
    """
    before, middle, _ = steps_of(rows)
    step = sorted(middle, key=itemgetter("end"))
    ends = [before[-1]["end"], *(row["end"] for row in step)]
    return [row | {"kind": kind_of(row["name"]), "exposed": row["end"] - ends[i]} for i, row in enumerate(step)]


def by_kind(step: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many kernels of each kind there are, the sums of their durations and exposed times in µs; longest first."""
    kinds: dict[str, dict[str, Any]] = {}
    for row in step:
        kind = kinds.setdefault(row["kind"], {"kind": row["kind"], "count": 0, "duration": 0.0, "exposed": 0.0})
        kind["count"] += 1
        kind["duration"] += row["end"] - row["begin"]
        kind["exposed"] += row["exposed"]
    return sorted(kinds.values(), key=lambda kind: -kind["exposed"])


def kind_of(name: str) -> str:
    """A kernel's name for people: ours as conv<2,128,1>, with the numbers of the template; TensorRT's with the tile."""
    path, rest = identifiers(name)
    if path and path[0] == "canny":
        numbers = ",".join(re.findall(r"L[a-z](\d+)E", rest))
        return path[-1] + (f"<{numbers}>" if numbers else "")
    return "::".join(path) or short(name, len(name))


def identifiers(name: str) -> tuple[list[str], str]:
    """Namespaces and name of a mangled function, and what follows them; nothing where it is not mangled.

    By the Itanium C++ ABI: each identifier after its length. Anonymous namespaces are left out.
    """
    path: list[str] = []
    rest = re.sub(r"^_ZN?", "", name)
    while rest != name and (length := re.match(r"\d+", rest)):
        end = length.end() + int(length[0])
        path.append(rest[length.end() : end])
        rest = rest[end:]
    return [one for one in path if not one.startswith("_GLOBAL__N")], rest


# -- the command ------------------------------------------------------------------------------------------------------


def table(name: str, kinds: Sequence[dict[str, Any]]) -> Table:
    """A step's kernels by kind, for people; name: of the GPU."""
    view = Table(title=f"Kernels of a step, µs: {name}", show_footer=True)
    count, duration, exposed = (sum(kind[what] for kind in kinds) for what in ("count", "duration", "exposed"))
    view.add_column("kernel", "sum", overflow="fold")
    for what, total in (("count", f"{count}"), ("duration", f"{duration:.1f}"), ("exposed", f"{exposed:.1f}")):
        view.add_column(what, total, justify="right")
    for kind in kinds:
        view.add_row(kind["kind"], str(kind["count"]), f"{kind['duration']:.1f}", f"{kind['exposed']:.1f}")
    return view


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and show; 2 where it cannot be done."""
    parser = argparse.ArgumentParser(
        prog="bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engines", type=Path, help="an engine folder")
    parser.add_argument("--runs", type=int, default=40, help="launches a median is of (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("kernels.json"), help="every kernel's row (%(default)s)")
    options = parser.parse_args(argv)
    try:
        if options.runs < 1:
            raise ValueError(f"--runs is {options.runs}, but must be at least 1.")
        content = measure(options.engines, options.runs)
        options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        kinds = by_kind(middle_step(content["rows"]))
    except (EngineError, OSError, ValueError) as error:
        print(f"bench.kernels: {error}", file=sys.stderr)
        return 2
    Console(width=140).print(table(content["gpu"], kinds))
    print(f"{content['traced_ms']:.3f} ms a step while recorded, with a third of the graph's launch.")
    print(f"Medians of {content['launches']} launches, of {options.runs}; every kernel's row is in {options.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
