"""Search for step schedules that lose least for what they save, and show what was found as a frontier.

    python -m runtime.search_schedule --budget 6 8 10 12 --output searches/tiny

A budget is in evaluations: so many times what ControlNet and UNet cost for both halves of the batch. For each budget
and each family of rules, a beam of schedules is improved by moving evaluations and, in the family `mixed`, by making
some of them cheaper. What counts is the mean PD on one half of the pictures and seeds; what is reported, on the other.
Needs PyTorch. Every schedule tried is kept in tried.jsonl: a search that was stopped goes on, and one with more budgets
starts from what is known.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from runtime.candidates import (
    COSTS,
    FAMILIES,
    Candidate,
    Found,
    beam_search,
    cheapened,
    neighbours,
    starts,
    taken_over,
)
from runtime.command_line import sentence, stop
from runtime.manifest import write_whole
from runtime.rules import EVALUATIONS, ScheduleError, rule_of
from runtime.schedule import Schedule, ddim_timesteps

if TYPE_CHECKING:
    from bench.trials import Trial, Trials

# -- the workers ------------------------------------------------------------------------------------------------------

_trials: Trials  # of a worker process


def make_trials(settings: dict[str, Any], half: str) -> Trials:
    """The pictures and seeds of one half ("search" or "held out") with their references."""
    from bench.perceptual import InceptionFeatures
    from bench.trials import Trials
    from cldm.canny2image import load_model
    from runtime.images import read_image

    begin = 0 if half == "search" else 1
    paths, seeds = settings["pictures"][begin::2], settings["seeds"][begin::2]
    model = load_model(settings["model"], settings["weights"], settings["device"])
    items = [(read_image(path), seed) for path in paths for seed in seeds]
    return Trials(model, items, settings["given"], InceptionFeatures(settings["device"]))


def _begin(settings: dict[str, Any], threads: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    global _trials
    torch.set_num_threads(threads)
    _trials = make_trials(settings, "search")


def _end_with_parent() -> None:
    parent = parent_process()
    if parent:
        parent.join()  # a parent that is killed tells its workers nothing
        os._exit(1)


def _score(candidate: Candidate, steps: int) -> dict[str, Any]:
    trial = _trials.run(candidate.schedule("candidate", steps), candidate.fit)
    return record(candidate, trial)


def record(candidate: Candidate, trial: Trial) -> dict[str, Any]:
    """A line of tried.jsonl."""
    rules = [{rule.name: list(rule.weights)} if rule.weights else rule.name for rule in trial.schedule.rules]
    return {"key": candidate.key(), "rules": rules, "pd": np.round(trial.pd, 4).tolist(),
            "rms": np.round(trial.rms, 5).tolist()}  # fmt: skip


class Log:
    """tried.jsonl: what was tried under the same settings, and a place for what will be."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.known: dict[str, dict[str, Any]] = {}
        self.head = json.dumps({"settings": settings}, sort_keys=True)
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            if not lines or lines[0] != self.head:
                raise ScheduleError(f"{path} is of a search with other settings: take another --output.")
            for line in lines[1:]:
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the last line of a search that was killed
                    continue
                self.known[entry["key"]] = entry
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
        # Written anew, so that the next line begins at a line's begin whatever the last search was doing when it ended.
        whole = "\n".join([self.head, *map(json.dumps, self.known.values())]) + "\n"
        write_whole(path, whole.encode())

    def add(self, entry: dict[str, Any]) -> None:
        """Keep a result, on disk before anything else happens."""
        self.known[entry["key"]] = entry
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


@contextmanager
def workers(settings: dict[str, Any], count: int) -> Iterator[Executor]:
    """Processes that each hold the search's half, the cores shared out among them."""
    threads = max(1, (os.cpu_count() or 1) // count)
    pool = ProcessPoolExecutor(count, get_context("spawn"), _begin, (settings, threads))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def from_others(
    family: str, budget: float, best: dict[tuple[float, str], Found], costs: dict[str, float]
) -> list[Candidate]:
    """What was found by simpler rules, in this family's form: a good place to begin."""
    if family == "fitted":
        plain = [best[budget, other].candidate for other in FAMILIES[:2] if (budget, other) in best]
        return [replace(candidate, fill="reuse", fit=True) for candidate in plain]
    if family == "mixed":
        fitted = [found.candidate for (other, kind), found in best.items() if kind == "fitted" and other >= budget]
        made = (cheapened(c, kind, budget, costs) for c in fitted for kind in list(EVALUATIONS)[1:])
        return [candidate for candidate in made if candidate]
    return []


def search(
    settings: dict[str, Any], options: argparse.Namespace, tried: Log, tell: Callable[[str, int], None]
) -> dict[tuple[float, str], Found]:
    """The best schedule of every budget and family on the search's half."""
    steps, count = settings["given"]["ddim_steps"], len(ddim_timesteps(settings["given"]["ddim_steps"]))
    best: dict[tuple[float, str], Found] = {}
    with workers(settings, options.workers) as pool:

        def score(candidates: list[Candidate]) -> list[Found]:
            fresh = [c for c in candidates if c.key() not in tried.known]
            for entry in pool.map(_score, fresh, [steps] * len(fresh)):
                tried.add(entry)
                tell("", 1)
            made = []
            for c in candidates:
                entry = tried.known[c.key()]
                schedule = Schedule("found", steps, tuple(map(rule_of, entry["rules"])))
                made.append(Found(c, float(np.mean(entry["pd"])), schedule))
            return made

        for family in sorted(options.families, key=FAMILIES.index):
            for budget in sorted(options.budget):
                begin = [*starts(family, budget, count), *from_others(family, budget, best, options.costs)]
                if family == "fitted":
                    begin += [c for s in options.begin for c in taken_over(s, budget, options.costs)]
                found = beam_search(
                    score, dict.fromkeys(begin), lambda c, f=family, b=budget: neighbours(c, f, b, options.costs),  # type: ignore[misc]
                    options.beam, options.rounds, options.tries, options.seed,
                )  # fmt: skip
                best[budget, family] = found[0]
                tell(f"{budget:g} evaluations, {family}: PD {found[0].pd:.2f} of {len(found)} tried", 0)
    return best


# -- the command ------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Every option; what is drawn has the defaults of compute_score.py."""
    import compute_score

    usual = compute_score.parser().parse_args([])
    make = argparse.ArgumentParser(
        prog="search_schedule", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = make.add_argument_group("what to search").add_argument
    add("--budget", nargs="+", type=float, default=[10.0], help="evaluations that a picture may cost (10)")
    add("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="(all four)")
    add("--costs", type=costs, default=COSTS, metavar="RULE=COST,…", help=f"of a partial evaluation ({text_of(COSTS)})")
    add("--begin", nargs="+", default=[], metavar="SCHEDULE", help="known ones, to be given weights anew (none)")
    add("--beam", type=int, default=3, help="schedules that are improved at once (%(default)s)")
    add("--rounds", type=int, default=4, help="of improvement (%(default)s)")
    add("--tries", type=int, default=12, help="neighbours tried in each round (%(default)s)")
    add("--seed", type=int, default=0, help="of the choice among neighbours (%(default)s)")
    add = make.add_argument_group("on what").add_argument
    add("--model", default="tiny", help="tiny, sd15 or a .yaml file (%(default)s)")
    add("--weights", type=Path, help="the model's weights (its usual place)")
    add("--images", nargs="+", type=Path, default=usual.images, help="pictures or folders of them (pictures/)")
    add("--seeds", nargs="+", type=int, default=list(range(6)), help="of the noise; every other is held out (0 to 5)")
    add("--prompt", default=usual.prompt, help="(%(default)s)")
    add("--steps", type=int, default=20, help="DDIM steps of the reference (%(default)s)")
    add("--scale", type=float, default=usual.scale, help="of the guidance (%(default)s)")
    add("--resolution", type=int, help="pixels of the short side (128 for tiny, 256 for others)")
    add = make.add_argument_group("how and where to").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    add("--workers", type=int, default=0, help="processes (one a core, at most 8; one on a GPU)")
    add("--output", type=Path, default=Path("searches"), help="folder for what is tried and found (%(default)s)")
    add("--save", type=Path, metavar="DIR", help="also write the best of each budget there, as frontier-<budget>.yaml")
    return make


def costs(text: str) -> dict[str, float]:
    """Costs of rules as evaluate-unet=0.74,evaluate-cond=0.5; those left out keep the usual ones."""
    made = dict(COSTS)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in made or not value.replace(".", "", 1).isdigit() or not 0 < float(value) <= 1:
            raise argparse.ArgumentTypeError(f"{part!r} is no cost: write one of {', '.join(COSTS)} = 0 to 1")
        made[name] = float(value)
    return made


def text_of(values: dict[str, float]) -> str:
    """Costs as the command line has them."""
    return ",".join(f"{name}={value:g}" for name, value in values.items())


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What decides the result of a trial; raises ScheduleError, ValueError or OSError for what cannot be used."""
    import compute_score
    from bench.perceptual import weights_path

    usual = vars(compute_score.parser().parse_args([]))
    weights_path()  # that PD can be measured is worth knowing first
    if min(options.budget) < 2 or max(options.budget) > options.steps:
        raise ScheduleError(f"--budget must lie between 2 and the {options.steps} steps.")
    for name in ("beam", "rounds", "tries"):
        if getattr(options, name) < 1:
            raise ScheduleError(f"--{name} is {getattr(options, name)}, but must be at least 1.")
    pictures = [str(path) for path in compute_score.find_pictures(options.images)]
    if len(pictures) < 2 or len(set(options.seeds)) < 2:
        raise ScheduleError("a search needs two pictures and two seeds at least, half of each to report on.")
    ddim_timesteps(options.steps)
    given = {
        "prompt": options.prompt, "a_prompt": usual["added_prompt"], "n_prompt": usual["negative_prompt"],
        "image_resolution": options.resolution or compute_score.RESOLUTIONS.get(options.model, 256),
        "ddim_steps": options.steps, "guess_mode": False, "strength": usual["strength"], "scale": options.scale,
        "low_threshold": usual["low_threshold"], "high_threshold": usual["high_threshold"],
    }  # fmt: skip
    weights = str(options.weights) if options.weights else None
    return {
        "model": options.model, "weights": weights, "pictures": pictures, "given": given, "device": options.device,
        "seeds": list(dict.fromkeys(options.seeds)),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Search, report; 0, 2 for bad input, 130 when stopped."""
    import compute_score

    options = parser().parse_args(argv)
    try:
        options.device = compute_score.choose_device(options)
        options.workers = options.workers or (1 if options.device == "cuda" else min(8, os.cpu_count() or 1))
        settings = settings_of(options)
        options.begin = [Schedule.parse(text, options.steps) for text in options.begin]
        tried = Log(options.output / "tried.jsonl", settings)
        columns = SpinnerColumn(), TextColumn("{task.completed} schedules tried"), TimeElapsedColumn()
        with Progress(*columns) as bar:
            task = bar.add_task("", total=None)

            def tell(text: str, advance: int) -> None:
                bar.update(task, advance=advance)
                if text:
                    bar.console.print(text)

            best = search(settings, options, tried, tell)
        from bench.frontier import report  # matplotlib and more, which a mistyped option need not wait for

        report(settings, best, options.costs, options.output, options.save)
        return 0
    except KeyboardInterrupt:
        print("search_schedule: stopped; what was tried is kept and the next search goes on.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"search_schedule: {sentence(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main())
