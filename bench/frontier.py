"""What a search for step schedules found, beside others of as many evaluations, on pictures that it did not see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from bench.figures import FAINT, QUIET
from bench.ours import timed
from bench.report import machine, write_json
from bench.trials import Trials
from cldm.canny2image import Memory
from cldm.samplers import ddim, dpm_solver_pp_2m, even_timesteps, unipc
from runtime.rules import EVALUATIONS
from runtime.schedule import Evaluation, Schedule, Update, ddim_timesteps

if TYPE_CHECKING:
    from runtime.candidates import Found

SOLVERS: dict[str, Callable[..., Any]] = {"DPM++ 2M": dpm_solver_pp_2m, "UniPC": unipc}
TITLES = {
    "reuse": "reuse", "extrapolate": "extrapolate", "fitted": "fitted weights", "mixed": "partial too",
}  # fmt: skip
COLOURS = ["#999999", "#cc6677", "#ddaa33", "#4477aa", "#aa77bb", "#117733", "#66ccaa", "#000000"]
Row = dict[str, Any]


def report(
    settings: dict[str, Any], best: Mapping[tuple[float, str], Found], costs: Mapping[str, float], output: Path,
    save: Path | None,
) -> None:  # fmt: skip
    """Measure everything on the held-out half; write frontier.json, frontier.png and the schedules, print a table."""
    from runtime.search_schedule import make_trials

    trials = make_trials(settings, "held out")
    seeds = len(settings["seeds"][1::2])
    ms = milliseconds(trials)
    rows: list[Row] = []

    def add(family: str, evaluations: float, kinds: list[str], scores: tuple[NDArray[Any], NDArray[Any]]) -> None:
        pd, rms = scores
        by_seed = pd.reshape(-1, seeds).mean(0)
        rows.append({
            "family": family, "evaluations": evaluations, "pd": float(pd.mean()), "pd_by_seed": by_seed.tolist(),
            "rms": float(rms.mean()), "ms": ms["rest"] + sum(ms[kind] for kind in kinds),
        })  # fmt: skip

    budgets = sorted({budget for budget, _ in best})
    for n in sorted({int(budget) for budget in budgets}):
        evaluations = ["evaluate"] * n
        steps = next((s for s in range(n, 0, -1) if len(ddim_timesteps(s)) == n), None)
        if steps:
            add("fewer steps", n, evaluations, trials.solve(ddim, ddim_timesteps(steps)[::-1].tolist()))
        for name, solver in SOLVERS.items():
            add(name, n, evaluations, trials.solve(solver, even_timesteps(n)))
    output.mkdir(parents=True, exist_ok=True)
    for (budget, family), found in sorted(best.items(), key=lambda item: (list(TITLES).index(item[0][1]), item[0][0])):
        trial = trials.run(found.schedule)
        kinds = [kind for kind in found.candidate.kinds if kind]
        add(TITLES[family], found.candidate.cost(dict(costs)), kinds, (trial.pd, trial.rms))
        rows[-1] |= {"budget": budget, "searched_pd": found.pd, "rules": found.candidate.key()}
        (output / f"{family}-{budget:g}.yaml").write_text(yaml_of(found, f"{family}-{budget:g}", rows[-1], settings))
    named = Schedule.parse("hackathon-10", settings["given"]["ddim_steps"]) if trials.steps == 20 else None
    if named:
        trial = trials.run(named)
        add("hackathon-10", 10, ["evaluate"] * 10, (trial.pd, trial.rms))
    content = {"settings": settings, "costs": dict(costs), "milliseconds": ms, "machine": machine(), "rows": rows}
    write_json(output / "frontier.json", content)
    draw(rows, output / "frontier.png", settings)
    if save:
        for budget in budgets:
            name = f"frontier-{budget:g}"
            chosen = min((best[b, f] for b, f in best if b == budget), key=lambda found: found.pd)
            row = next(r for r in rows if r.get("rules") == chosen.candidate.key())
            save.mkdir(parents=True, exist_ok=True)
            (save / f"{name}.yaml").write_text(yaml_of(chosen, name, row, settings))
    Console().print(table(rows))
    print(f"written to {output}: frontier.json, frontier.png, a .yaml for each schedule")


def yaml_of(found: Found, name: str, row: Row, settings: Mapping[str, Any]) -> str:
    """A schedule's file, which says where it comes from."""
    comment = (
        f"Found by `python -m runtime.search_schedule` for the model {settings['model']} at guidance "
        f"{settings['given']['scale']:g}:\n{row['evaluations']:.3g} evaluations' cost, mean PD {row['pd']:.2f} to all "
        f"{settings['given']['ddim_steps']} steps on pictures and seeds that the search\ndid not see.\n"
        "Steps stand in the order in which they are taken, their numbers behind them; the rules: runtime/rules.py."
    )
    return Schedule(name, found.schedule.steps, found.schedule.rules).to_yaml(comment)


def milliseconds(trials: Trials, runs: int = 7) -> dict[str, float]:
    """Median milliseconds of each kind of evaluation of one picture on this machine, and of all the rest of it."""
    one = trials.only_first()
    x = one.x
    zeros, memory = x * 0, Memory()
    times: dict[str, float] = {}

    def median(call: Callable[[], Any]) -> float:
        def whole() -> None:
            call()
            trials.wait()

        return float(np.median(timed(whole, runs)))

    for name, (control, both) in EVALUATIONS.items():
        update = Update(0, Evaluation(1, control, both), 1.0, (0.0, 0.0, 0.0), ())
        if name == "evaluate":
            _, memory = one.denoiser.step(x, 0, update, zeros, memory)
        times[name] = median(partial(one.denoiser.step, x, 0, update, zeros, memory))
    times["rest"] = median(one.once)
    return times


def draw(rows: list[Row], path: Path, settings: Mapping[str, Any]) -> None:
    """PD against milliseconds, a line for each family, into a PNG file."""
    figure = Figure(figsize=(9.2, 5.2), dpi=160, facecolor="white")
    axes = figure.add_axes((0.07, 0.11, 0.7, 0.76))
    families = list(dict.fromkeys(row["family"] for row in rows))
    for family, colour in zip(families, COLOURS, strict=False):
        points = sorted((r["ms"], r["pd"], float(np.std(r["pd_by_seed"]))) for r in rows if r["family"] == family)
        x, y, spread = zip(*points, strict=True)
        style = {"marker": "*", "markersize": 13, "linestyle": ""} if len(points) == 1 else {"marker": "o"}
        axes.errorbar(x, y, spread, color=colour, label=family, markersize=style.pop("markersize", 4), linewidth=1.4,
                      elinewidth=0.7, capsize=2, **style)  # fmt: skip
    axes.set_ylim(0, None)
    axes.set_xlabel("milliseconds a picture on this machine", size=9, color=QUIET)
    axes.set_ylabel("mean PD to all steps, held-out pictures and seeds", size=9, color=QUIET)
    axes.grid(color="#eeeeee")
    axes.tick_params(colors=QUIET, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    given = settings["given"]
    figure.text(0.07, 0.945, f"Step schedules · {settings['model']} · {given['ddim_steps']} DDIM steps, guidance "
                f"{given['scale']:g}", size=12, weight="bold")  # fmt: skip
    figure.text(0.07, 0.905, "one point a number of evaluations; bars: deviation over seeds", size=8.5, color=QUIET)
    figure.savefig(path)


def table(rows: list[Row]) -> Table:
    """PD by evaluations and family."""
    families = list(dict.fromkeys(row["family"] for row in rows if row["family"] != "hackathon-10"))
    made = Table(title="Mean PD to all steps on held-out pictures and seeds", box=box.SIMPLE_HEAD)
    made.add_column("cost", justify="right")
    for family in families:
        made.add_column(family, justify="right")
    columns = {id(row): row.get("budget") or row["evaluations"] for row in rows}
    for n in sorted(set(columns.values())):
        cells = []
        for family in families:
            here = [r for r in rows if r["family"] == family and columns[id(r)] == n]
            cells.append(f"{here[0]['pd']:.2f}" if here else "–")
        made.add_row(f"{n:g}", *cells)
    for row in (r for r in rows if r["family"] == "hackathon-10"):
        made.caption = f"hackathon-10: {row['pd']:.2f} ± {np.std(row['pd_by_seed']):.2f}"
    return made
