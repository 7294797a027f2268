"""The pictures of a benchmark run: the contact sheet and the plot of PD against latency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bench.report import PD_LIMIT, PictureResult, show_time

INK, QUIET, FAINT, GOOD, BAD = "#1a1a1a", "#6b6b6b", "#d9d9d9", "#0b6e99", "#c0392b"
COLUMNS = 10  # pictures side by side
MOST = 50  # pictures on one sheet: more can be looked at in the folders
CELL, NAME, SCORE, LABEL, TITLE, GAP = 1.5, 0.22, 0.34, 1.05, 0.8, 0.06  # inches
DOTS = (110, 200)  # per inch, from small pictures to large


@dataclass(frozen=True)
class SheetColumn:
    """One picture on the contact sheet: named rows of (H, W, 3) uint8, and the results of rows that have one."""

    results: dict[str, PictureResult]
    rows: dict[str, NDArray[np.uint8]]


def contact_sheet(path: Path, columns: Sequence[SheetColumn], title: str, subtitle: str, total: int) -> None:
    """Draw every picture as a column (input, edges, reference, candidates) into a PNG file.

    PD stands below the column, or on the pictures where there are several candidates.
    The first 50 are shown, and where `total`, the number of all pictures, is larger, that is said.
    Raises OSError where the file cannot be written.
    """
    shown = columns[:MOST]
    bands = math.ceil(len(shown) / COLUMNS)
    across = math.ceil(len(shown) / bands)
    names = list(shown[0].rows)
    # One cell for the whole sheet, of the same area whatever its shape.
    ratio = max(image.shape[0] / image.shape[1] for column in shown for image in column.rows.values())
    ratio = min(max(ratio, 0.4), 2.5)
    wide, high = CELL / math.sqrt(ratio), CELL * math.sqrt(ratio)
    band = NAME + len(names) * (high + GAP) + SCORE
    width, height = LABEL + max(across * (wide + GAP), 6) + 0.15, TITLE + bands * band + 0.1
    largest = max(image.shape[1] for column in shown for image in column.rows.values())
    figure = Figure(figsize=(width, height), dpi=min(max(largest / wide, DOTS[0]), DOTS[1]), facecolor="white")
    if total > len(shown):
        title += f" · the first {len(shown)} of {total} pictures"
    _text(figure, 0.15 / width, 1 - 0.27 / height, title, size=13, weight="bold", color=INK, va="center")
    _text(figure, 0.15 / width, 1 - 0.41 / height, subtitle, size=8.5, color=QUIET, va="top")

    for index, column in enumerate(shown):
        left = LABEL + (index % across) * (wide + GAP)
        top = height - TITLE - (index // across) * band
        _centred(
            figure,
            left + wide / 2,
            top - NAME / 2,
            _short(next(iter(column.results.values())).name, wide),
            size=8,
            color=QUIET,
        )
        for row, (name, image) in enumerate(column.rows.items()):
            bottom = top - NAME - row * (high + GAP) - high
            if index % across == 0:
                _text(figure, 0.15 / width, (bottom + high / 2) / height, name, size=9, color=INK, va="center")
            axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
            axes.imshow(image, interpolation="lanczos")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set(color=FAINT, linewidth=0.6)
            if len(column.results) > 1 and name in column.results:
                result = column.results[name]
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
                style: dict[str, Any] = {"color": BAD if result.failed else GOOD, "weight": "bold", "bbox": box}
                axes.text(0.97, 0.04, f"{result.pd:.2f}", size=8, ha="right", transform=axes.transAxes, **style)
        if len(column.results) == 1:
            (result,) = column.results.values()
            text = f"PD {result.pd:.2f}" + (" failed" if result.failed else "")
            bottom, colour = top - band + SCORE / 2 + 0.04, BAD if result.failed else GOOD
            _centred(figure, left + wide / 2, bottom, text, size=9.5, weight="bold", color=colour)
    figure.savefig(path)


def _centred(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    width, height = figure.get_size_inches()
    _text(figure, x / width, y / height, text, ha="center", va="center", **style)


def _text(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    figure.text(x, y, _drawable(text), parse_math=False, **style)


def _drawable(text: str) -> str:
    """The text without the lone surrogates that stand for a file name's odd bytes: matplotlib does not take them."""
    return text.encode("utf-8", "replace").decode()


def _short(name: str, inches: float) -> str:
    letters = int(inches * 12)
    return name if len(name) <= letters else name[: letters - 1] + "…"


def score_plot(path: Path, results: Sequence[PictureResult], title: str, subtitle: str, medians: bool = True) -> None:
    """Plot PD against the latency of the candidate, one point a picture and the `medians`, into a PNG file.

    All results must be timed. Raises OSError where the file cannot be written.
    """
    times = np.array([result.candidate_ms for result in results], dtype=float)
    scores = np.array([result.pd for result in results])
    seconds = float(np.median(times)) >= 1000
    times = times / 1000 if seconds else times
    figure = Figure(figsize=(8, 4.8), dpi=DOTS[1], facecolor="white")
    axes = figure.add_axes((0.075, 0.115, 0.765, 0.68))
    _text(figure, 0.075, 0.95, title, size=12, weight="bold", color=INK, va="center")
    _text(figure, 0.075, 0.925, subtitle, size=8.5, color=QUIET, va="top")

    spread = max(np.ptp(times), 0.04 * times.max())  # a spread of nothing but jitter is not blown up
    middle = (times.max() + times.min()) / 2
    axes.set_xlim(middle - 0.62 * spread, middle + 0.62 * spread)
    near = scores.max() > 0.6 * PD_LIMIT
    axes.set_ylim(0, max(1.12 * scores.max(), 1.08 * PD_LIMIT if near else 0, 0.1))
    if near:
        axes.axhline(PD_LIMIT, color=BAD, linewidth=1, zorder=1)
        axes.annotate(
            f"PD {PD_LIMIT:g}: failed above", (0, PD_LIMIT), (4, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", size=8, color=BAD,
        )  # fmt: skip
    if medians:
        _mark_median(axes, float(np.median(times)), float(np.median(scores)), seconds)
    axes.scatter(times, scores, s=34, c=[BAD if r.failed else GOOD for r in results], edgecolors="white", zorder=3)
    if len(results) <= 16:
        _name_points(axes, times, scores, [result.name for result in results])
    axes.set_xlabel(f"latency of the candidate, {'s' if seconds else 'ms'} a picture", size=9, color=QUIET)
    axes.set_ylabel("PD to the reference", size=9, color=QUIET)
    axes.ticklabel_format(useOffset=False)
    axes.tick_params(colors=QUIET, labelsize=8)
    axes.grid(color="#eeeeee", zorder=0)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    figure.savefig(path)


def _mark_median(axes: Axes, time: float, score: float, seconds: bool) -> None:
    axes.axvline(time, color=QUIET, linewidth=0.8, linestyle="--", zorder=1)
    axes.axhline(score, color=QUIET, linewidth=0.8, linestyle="--", zorder=1)
    text = f"median {show_time(time * 1000 if seconds else time)}, PD {score:.2f}"
    axes.annotate(
        text, (time, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points", size=8, color=QUIET,
        ha="center",
    )  # fmt: skip


def _name_points(axes: Axes, times: NDArray[np.float64], scores: NDArray[np.float64], names: Sequence[str]) -> None:
    """Write the names in a column right of the plot, spread so that none covers another, each led to its point."""
    low, high = axes.get_ylim()
    step = (high - low) * 0.042
    order = np.argsort(scores)
    places = scores[order].copy()
    for index in range(1, len(places)):  # push upwards, then the whole pile back below the top
        places[index] = max(places[index], places[index - 1] + step)
    ceiling = high
    for index in reversed(range(len(places))):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - step
    for place, index in zip(places, order, strict=True):
        axes.annotate(
            _drawable(_short(names[index], 1.3)), (times[index], scores[index]), (1.02, place), va="center",
            parse_math=False, textcoords=axes.get_yaxis_transform(), size=8, color=INK, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkB": 4},
        )  # fmt: skip
