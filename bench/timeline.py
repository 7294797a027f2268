"""One step on two streams as a picture: `measure` where TensorRT is, `draw` where matplotlib is.

python -m bench.timeline measure ENGINES timeline.json
python -m bench.timeline draw timeline.json timeline.png
python -m bench.timeline draw kernels.json timeline.png      of what `python -m bench.kernels` has recorded
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.kernels import STEPS, steps_of
from bench.ours import COMPETITION, WARM_UP, arguments
from runtime.engine import check, gpu
from runtime.manifest import EngineError, Manifest
from runtime.memory import Resources
from runtime.pipeline import Canny2Image
from runtime.session import Session
from runtime.steps import Steps


def measure(folder: Path, runs: int) -> dict[str, Any]:
    """When each stage of a few steps begins and ends, in milliseconds: medians of `runs` launches of one graph."""
    shape = Manifest.load(folder).shape
    with Canny2Image(folder, "full", COMPETITION) as pipeline:
        given = arguments(shape["height"], shape["width"])
        pipeline.process(**given | {"num_samples": shape["samples"]})
        return {"gpu": getattr(gpu(), "name", None), "spans": spans(*pipeline.last_used(), runs)}


def spans(session: Session, steps: Steps, runs: int) -> list[dict[str, Any]]:
    """Stage, stream and times of everything that a graph of `STEPS` steps runs."""
    found: list[dict[str, Any]] = []
    with Resources() as own:
        cuda = own.cuda
        origin = own.event(timing=True)

        def mark(event: Any, stream: Any) -> None:  # external: an event of a graph that the host may ask for its time
            check(cuda.cudaEventRecordWithFlags(event, stream, cuda.cudaEventRecordExternal))

        plain: Callable[..., None] = session.stage

        def marked(name: str, stream: Any, addresses: Any = None) -> None:
            begin, end = own.event(timing=True), own.event(timing=True)
            found.append({"stage": name, "side": stream is session.side, "events": (begin, end)})
            mark(begin, stream)
            plain(name, stream, addresses)
            mark(end, stream)

        def enqueue() -> None:
            mark(origin, session.main)
            for i in range(min(STEPS, len(steps.evaluations))):
                session.step(steps, i)

        session.stage = marked  # type: ignore[method-assign]
        try:
            graph = own.graph(session.main, enqueue)
        finally:
            del session.stage  # type: ignore[method-assign]
        times = []
        for _ in range(WARM_UP + runs):
            check(cuda.cudaGraphLaunch(graph, session.main))
            session.wait()
            times.append([[check(cuda.cudaEventElapsedTime(origin, e)) for e in one["events"]] for one in found])
        medians = np.median(times[WARM_UP:], axis=0)
        return [
            {"stage": one["stage"], "side": one["side"], "begin": float(begin), "end": float(end)}
            for one, (begin, end) in zip(found, medians, strict=True)
        ]


def spans_of_kernels(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stage, stream and times of the steps that these kernels are of, but for the first, during which the graph is
    still launched. The decoder begins where our plugin joins a skip, in the stream that ControlNet is in, too.

    Raises ValueError where the steps are not equal, or nothing is joined.
    """

    def joins(row: dict[str, Any]) -> bool:
        return "JoinParams" in row["name"] or "CannyJoin" in row["name"]

    if not any(map(joins, rows)):
        raise ValueError("no kernel of these joins a skip: where the decoder begins is not known.")
    found, main = [], rows[-1]["stream"]
    _, *later = steps_of(rows)
    start = min(row["begin"] for row in later[0])
    for step in later:
        of_main, side = ([row for row in step if (row["stream"] == main) == own] for own in (True, False))
        decoder = [*map(joins, of_main)].index(True)
        parts = {"control": of_main[:decoder], "unet_encoder": side, "unet_decoder": of_main[decoder:]}
        for stage, kernels in parts.items():
            begin, end = min(row["begin"] for row in kernels) - start, max(row["end"] for row in kernels) - start
            found.append({"stage": stage, "side": kernels is side, "begin": begin / 1000, "end": end / 1000})
    return found


def draw(content: dict[str, Any], path: Path) -> None:
    """A bar for each stage, a line for each stream."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.2), layout="constrained")
    axes = figure.subplots()
    colours = {"control": "#4477aa", "unet_encoder": "#66ccee", "unet_decoder": "#228833"}
    for span in content.get("spans") or spans_of_kernels(content.get("rows", [])):
        line, length = int(span["side"]), span["end"] - span["begin"]
        axes.barh(line, length, left=span["begin"], height=0.7, color=colours[span["stage"]], edgecolor="white")
        text = f"{span['stage']}\n{length:.2f} ms"
        axes.text(span["begin"] + length / 2, line, text, ha="center", va="center", fontsize=7)
    axes.set_yticks([0, 1], ["main stream", "side stream"])
    axes.invert_yaxis()
    traced = "" if "spans" in content else ", recorded kernel by kernel"
    axes.set_xlabel(f"milliseconds · {content['gpu']}{traced}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=160)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure or draw; 2 where it cannot be done."""
    parser = argparse.ArgumentParser(prog="bench.timeline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("measure", "draw"))
    parser.add_argument("source", type=Path, help="an engine folder, or what measure wrote")
    parser.add_argument("output", type=Path)
    parser.add_argument("--runs", type=int, default=50, help="launches a median is of (%(default)s)")
    options = parser.parse_args(argv)
    try:
        if options.what == "draw":
            draw(json.loads(options.source.read_text()), options.output)
        else:
            options.output.write_text(json.dumps(measure(options.source, options.runs), indent=1) + "\n")
    except (EngineError, OSError, ValueError) as error:
        print(f"bench.timeline: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
