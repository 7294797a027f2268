"""Step schedules to try: where a search begins, where it goes from there, and the beam that decides."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtime.rules import EVALUATIONS, POLYNOMIALS, Rule, problem
from runtime.schedule import Schedule

FAMILIES = ("reuse", "extrapolate", "fitted", "mixed")
# Shares of SD 1.5's arithmetic: 96 GFLOP a row of the batch for ControlNet, 274 for the UNet.
COSTS = {"evaluate": 1.0, "evaluate-unet": 0.74, "evaluate-cond": 0.5, "evaluate-cond-unet": 0.37}
# The winner's pattern (hackathon-10): where among the steps its evaluations lie, 1 the first and 0 past the last.
WINNER = [19, 18, 17, 16, 15, 14, 13, 11, 8, 4]


@dataclass(frozen=True)
class Candidate:
    """A schedule being tried: by step, the first one first, an evaluation's rule or "" where there is none.

    fill: the rule of the steps without one. fit: whether evaluations get fitted weights, which those steps reuse.
    """

    kinds: tuple[str, ...]
    fill: str = "reuse"
    fit: bool = False

    def cost(self, costs: dict[str, float]) -> float:
        """What it costs, in evaluations."""
        return sum(costs[kind] for kind in self.kinds if kind)

    def schedule(self, name: str, steps: int) -> Schedule:
        """As a schedule; where too little was evaluated for the fill, the last e is reused."""
        rules: list[Rule] = []
        for kind in self.kinds:
            rules.append(Rule(kind or self.fill))
            if problem(rules, len(rules) - 1):
                rules[-1] = Rule("reuse")
        return Schedule(name, steps, tuple(rules))

    def key(self) -> str:
        """What it is known by in tried.jsonl."""
        return " ".join([*(kind or "-" for kind in self.kinds), self.fill, "fitted" if self.fit else "plain"])


@dataclass(frozen=True)
class Found:
    """A candidate and how it did on the search's half: mean PD, and the schedule with its weights."""

    candidate: Candidate
    pd: float
    schedule: Schedule


def spaced(positions: Sequence[float], count: int) -> list[int]:
    """Indices of about so many different steps near `positions` in 0..1, the first step among them."""
    return sorted({0, *(min(count - 1, int(round(p * count))) for p in positions)})


def starts(family: str, budget: float, count: int) -> list[Candidate]:
    """Schedules to begin with: evaluations evenly spaced, denser at the begin, denser at the end, as the winner's."""
    n = int(budget)
    even = np.arange(n) / n
    winner = 1 - (np.interp(even, np.linspace(0, 1, len(WINNER)), WINNER) + 1) / 20
    made = []
    for positions in (even, even**1.4, 1 - (1 - even) ** 1.4, winner):
        chosen = spaced(positions.tolist(), count)
        free = [i for i in range(count) if i not in chosen]
        chosen = sorted([*chosen, *free[: n - len(chosen)]])[:n]
        kinds = tuple("evaluate" if i in chosen else "" for i in range(count))
        fills = ("extrapolate-2", "adams-bashforth-2", "extrapolate-3") if family == "extrapolate" else ("reuse",)
        made += [Candidate(kinds, fill, family in ("fitted", "mixed")) for fill in fills]
    return list(dict.fromkeys(made))


def taken_over(schedule: Schedule, budget: float, costs: dict[str, float]) -> list[Candidate]:
    """The evaluations of a known schedule, to be given weights anew; none where they do not fit the budget."""
    kinds = tuple(rule.name if rule.evaluates else "" for rule in schedule.rules)
    made = Candidate(kinds, fit=True)
    return [made] if budget - 0.5 < made.cost(costs) <= budget + 1e-9 else []


def cheapened(c: Candidate, kind: str, budget: float, costs: dict[str, float]) -> Candidate | None:
    """The candidate with its last evaluations made cheaper until it fits the budget; None if that is not enough.

    The first two stay: what later evaluations leave out, they have to bring.
    """
    kinds = list(c.kinds)
    for i in [i for i, old in enumerate(kinds) if old][:1:-1]:
        if Candidate(tuple(kinds)).cost(costs) <= budget + 1e-9:
            break
        kinds[i] = kind
    made = replace(c, kinds=tuple(kinds))
    return made if made.cost(costs) <= budget + 1e-9 else None


def neighbours(c: Candidate, family: str, budget: float, costs: dict[str, float]) -> Iterator[Candidate]:
    """Every schedule one change away that fits the budget: an evaluation moved, made cheaper or dearer, or added."""

    def put(changes: dict[int, str]) -> Candidate:
        return replace(c, kinds=tuple(changes.get(i, kind) for i, kind in enumerate(c.kinds)))

    made = []
    for i, kind in enumerate(c.kinds[1:], 1):
        free = [j for j in (i - 2, i - 1, i + 1, i + 2) if 0 < j < len(c.kinds) and not c.kinds[j]]
        made += [put({i: "", j: kind}) for j in free if kind]
        if family == "mixed":
            made += [put({i: other}) for other in (*EVALUATIONS, "") if other != kind]
            # Two cheaper evaluations for the price of a whole one.
            made += [put({i: "evaluate-cond", j: "evaluate-cond"}) for j in free[:2] if kind == "evaluate"]
    if family == "extrapolate":
        made += [replace(c, fill=fill) for fill in POLYNOMIALS if fill != c.fill]
    for candidate in dict.fromkeys(made):
        if budget - 0.5 < candidate.cost(costs) <= budget + 1e-9:
            yield candidate


def beam_search(
    score: Callable[[list[Candidate]], list[Found]], begin: Iterable[Candidate],
    near: Callable[[Candidate], Iterable[Candidate]], width: int, rounds: int, tries: int, seed: int,
) -> list[Found]:  # fmt: skip
    """Keep the `width` best, try up to `tries` of their neighbours in each round; all that were tried, best first."""
    draw = random.Random(seed)
    found = {f.candidate: f for f in score(list(begin))}
    for _ in range(rounds):
        beam = sorted(found.values(), key=lambda f: f.pd)[:width]
        fresh = list(dict.fromkeys(n for f in beam for n in near(f.candidate) if n not in found))
        if not fresh:
            break
        found |= {f.candidate: f for f in score(draw.sample(fresh, min(tries, len(fresh))))}
    return sorted(found.values(), key=lambda f: f.pd)
