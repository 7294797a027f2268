"""What the command line shows: progress and tables."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from runtime.manifest import Manifest
from runtime.steps import STEP
from trt_builder.build import Built, Show
from trt_builder.inspect import Layer, Report, Timed, condensed
from trt_builder.verify import Comparison

ERRORS = Console(stderr=True)
FILE_WIDTH = 180  # of tables in a file or a pipe


class Bar(Show):
    """Progress on stderr: a bar where TensorRT reports its progress, else one that swings; lines where it is a file."""

    def __init__(self, stages: Sequence[str]) -> None:
        parts = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"), TimeElapsedColumn())
        self.bar = Progress(*parts, console=ERRORS, transient=True, disable=not ERRORS.is_terminal)
        self.task: Any = None
        self.stages = list(stages)

    def say(self, text: str) -> None:
        ERRORS.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, stage: str, measured: bool) -> None:
        where = f" ({self.stages.index(stage) + 1} of {len(self.stages)})" if stage in self.stages else ""
        if not ERRORS.is_terminal:
            self.say(f"{stage}{where}")
        self.bar.start()
        self.task = self.bar.add_task(f"{stage}{where}", total=1.0 if measured else None, what="")

    def step(self, done: float, what: str) -> None:
        if self.task is not None:
            self.bar.update(self.task, completed=done, what=escape(what[:40]))

    def end(self) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None
        self.bar.stop()


def output() -> Console:
    """Where tables go: standard output, as it is now."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False)


def table(title: str, *columns: str, left: Sequence[str] = ()) -> Table:
    """An empty table; the first column and those in `left` are left-justified."""
    made = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if not i or column in left else "right", overflow="fold")
    return made


def show_size(count: int) -> str:
    """Bytes as a reader wants them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count} B"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"


def build_table(manifest: Manifest, rows: Sequence[Built]) -> Table:
    """What a build did, stage by stage."""
    made = table(f"{manifest.folder}", "stage", "seconds", "plan", "warnings", "", left=[""])
    for row in rows:
        warnings = str(row.warnings) if not row.kept else ""
        made.add_row(row.stage, f"{row.seconds:.1f}", show_size(row.bytes), warnings, "kept" if row.kept else "built")
    made.add_section()
    spent = sum(row.seconds for row in rows if not row.kept)
    made.add_row("all", f"{spent:.1f}", show_size(sum(row.bytes for row in rows)), "", "")
    return made


def inspect_table(manifest: Manifest, reports: Mapping[str, Report | None]) -> Table:
    """One row a stage: its attentions, by what became of them, and layers that should not be many."""
    columns = ["attention", "one kernel", "in regions", "spelt out", "reformats", "fp32 convs"]
    made = table(heading(manifest), "stage", "plan", "layers", *columns)
    for stage, plan in manifest.stages.items():
        report = reports[stage]
        cells = [stage, show_size(plan.bytes)]
        if report is None:
            cells += ["not recorded"]
        elif not report.layers:
            cells += ["unknown", str(len(report.attentions))]
        else:
            attentions = [len(report.attentions), report.fused, report.in_regions, report.spelt_out]
            cells += map(str, [len(report.layers), *attentions, report.reformats, report.fp32_convolutions])
        made.add_row(*cells)
    return made


def kinds_table(timed: Sequence[Timed]) -> Table:
    """Microseconds by kind of layer, one row a stage; the kinds that take the most come first."""
    by_kind, by_stage = defaultdict[str, float](float), dict[str, defaultdict[str, float]]()
    for one in timed:
        by_kind[one.layer.kind] += one.ms
        by_stage.setdefault(one.stage, defaultdict(float))[one.layer.kind] += one.ms
    kinds = sorted((kind for kind, ms in by_kind.items() if ms), key=lambda kind: -by_kind[kind])
    made = table("µs by kind of layer, each timed by itself", "stage", "all", *kinds)
    for stage, times in by_stage.items():
        made.add_row(stage, *(micro(ms) for ms in (sum(times.values()), *(times[kind] for kind in kinds))))
    if all(stage in by_stage for stage in STEP):
        sums = [sum(by_stage[stage][kind] for stage in STEP) for kind in kinds]
        made.add_section()
        made.add_row("one step", *(micro(ms) for ms in (sum(sums), *sums)))
    return made


def slowest_table(timed: Sequence[Timed], count: int) -> Table:
    """The layers that take the longest, of all stages."""
    slowest = sorted(timed, key=lambda one: -one.ms)[:count]
    made = table(f"the {len(slowest)} slowest layers", "µs", "stage", "kind", "layer", "tactic",
                 left=["stage", "kind", "layer", "tactic"])  # fmt: skip
    for one in slowest:
        name = one.layer.name.replace(f"{one.stage}/", "").replace(f"{one.stage}:", ":")
        made.add_row(micro(one.ms), *map(escape, (one.stage, one.layer.kind, name, short(one.layer.tactic))))
    return made


def micro(ms: float) -> str:
    """Milliseconds as microseconds; nothing for nothing."""
    return f"{1000 * ms:.1f}" if ms else ""


def short(tactic: str, most: int = 60) -> str:
    """The part of a kernel's name that tells it from others: without types, layouts and warps; its first characters."""
    return re.sub(r"_(bf16|tf32|[fi]\d+)\w*?(?=_tilesize)|_warp.*", "", tactic)[:most]


def tensors_text(stage: str, report: Report) -> str:
    """A stage's inputs and outputs, a family of tensors a line."""
    lines = [f"{stage}"]
    for what, tensors in (("in ", report.inputs), ("out", report.outputs)):
        lines += [f"  {what}  {line}" for line in condensed(tensors)]
    return "\n".join(lines)


def attentions_text(report: Report) -> str:
    """The attentions of a stage by what became of them, and of each that lies in a compiled region, in which."""
    counts = f"{report.fused} one kernel, {report.in_regions} in regions, {report.spelt_out} spelt out"
    lines = [f"  {len(report.attentions)} attentions: {counts}"]
    return "\n".join(lines + [f"    {x.name}  in {x.region}" for x in report.attentions if x.region])


def layer_table(stage: str, layers: Sequence[Layer], times: Mapping[str, float]) -> Table:
    """Every layer of a stage with its tactic and, where it was timed, its share."""
    made = table(f"{stage}: {len(layers)} layers", "layer", "type", "tactic", "out", *(["µs"] if times else []),
                 left=["type", "tactic", "out"])  # fmt: skip
    for layer in layers:
        out = layer.outputs[0] if layer.outputs else None
        size = f"{'×'.join(map(str, out.shape))} {out.dtype.lower()}" if out else ""
        cells = [layer.name, f"{layer.type} {layer.plugin}".rstrip(), layer.tactic, size]
        made.add_row(*map(escape, cells), *([f"{1000 * times.get(layer.name, 0.0):.1f}"] if times else []))
    return made


def verify_table(manifest: Manifest, rows: Sequence[Comparison]) -> Table:
    """Every output against the twin."""
    made = table(heading(manifest), "output", "‖a−b‖/‖b‖", "max", "mean", "cosine", "NaN", "", left=[""])
    for row in rows:
        numbers = [f"{row.error:.2e}", f"{row.largest:.2e}", f"{row.mean:.2e}", f"{row.cosine:.6f}", str(row.bad)]
        made.add_row(f"{row.stage}.{row.output}", *numbers, "ok" if row.passed else "[red]over")
    return made


def timings_table(manifest: Manifest, content: Mapping[str, Any]) -> Table:
    """The time of every stage, and of one step of the loop."""
    made = table(heading(manifest), "stage", "median ms", "p90 ms")
    for stage, t in content["stages"].items():
        made.add_row(stage, f"{t['median_ms']:.3f}", f"{t['p90_ms']:.3f}")
    if all(stage in content["stages"] for stage in STEP):
        made.add_section()
        made.add_row("one step", f"{sum(content['stages'][stage]['median_ms'] for stage in STEP):.3f}", "")
    return made


def heading(manifest: Manifest) -> str:
    """What an engine folder holds, in a line."""
    built_for = ", ".join(manifest.targets) or f"{manifest.gpu}"
    return f"{manifest.folder} · {manifest.flavour} {manifest.version} · {built_for}"
