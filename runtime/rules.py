"""What one step of a schedule does, and how a YAML file says so.

Every step needs an e, the UNet's estimate of the noise. A rule says where it comes from: from the networks, whole or in
part, or from the e of the evaluations before. Whatever the rule, a step's e is a weighted sum of the last three
evaluations' e, so that a run of steps is one linear update.

    evaluate             ControlNet and UNet, for the prompt and for the negative prompt
    evaluate-unet        the UNet, with ControlNet's last residuals
    evaluate-cond        ControlNet and UNet for the prompt alone, with the last difference that guidance amplifies
    evaluate-cond-unet   the UNet for the prompt alone, with the last residuals and the last difference
    reuse                what the step before used
    extrapolate-2, -3    the polynomial through the last two or three evaluations, where this step begins
    adams-bashforth-2, -3   the same polynomial's mean from where this step begins to where it ends

`evaluate…` and `reuse` may carry weights of their own, the latest evaluation's first: `evaluate: [1.3, -0.4, 0.1]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from yaml.constructor import SafeConstructor

HISTORY = 3  # evaluations whose e is kept
EVALUATIONS = {  # name: whether ControlNet runs, whether both halves of the batch do
    "evaluate": (True, True),
    "evaluate-unet": (False, True),
    "evaluate-cond": (True, False),
    "evaluate-cond-unet": (False, False),
}
POLYNOMIALS = {f"{kind}-{order}": order for kind in ("extrapolate", "adams-bashforth") for order in (2, 3)}
RULES = (*EVALUATIONS, "reuse", *POLYNOMIALS)


class ScheduleError(ValueError):
    """A schedule or a number of steps that cannot be used; the text is one sentence.

    `at` is the index of the rule or step that is wrong, -1 where their number is, None where neither is.
    """

    def __init__(self, text: str, at: int | None = None) -> None:
        super().__init__(text)
        self.at = at


@dataclass(frozen=True)
class Rule:
    """What one step does; `weights` are those of the last evaluations' e, the latest first, () for the rule's own.

    Raises ScheduleError for an unknown name, and for weights that the rule does not take or that are no one to three
    finite numbers.
    """

    name: str
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ScheduleError(f"there is no rule {self.name!r}: take one of {', '.join(RULES)}.")
        if self.weights and self.name in POLYNOMIALS:
            raise ScheduleError(f"the rule {self.name} finds its weights by itself, but was given some.")
        if len(self.weights) > HISTORY or not all(map(math.isfinite, self.weights)):
            raise ScheduleError(f"the rule {self.name} takes one to {HISTORY} finite weights, not {self.weights}.")

    @property
    def evaluates(self) -> bool:
        """Whether networks run."""
        return self.name in EVALUATIONS

    @property
    def control(self) -> bool:
        """Whether ControlNet runs."""
        return EVALUATIONS.get(self.name, (False, False))[0]

    @property
    def both(self) -> bool:
        """Whether the networks run for the negative prompt, too."""
        return EVALUATIONS.get(self.name, (False, False))[1]


def problem(rules: Sequence[Rule], i: int) -> str | None:
    """What keeps the i-th rule from being carried out after those before it, as the end of a sentence, or None."""
    rule, before = rules[i], [r for r in rules[:i] if r.evaluates]
    if not before and rule.name != "evaluate":
        return f"{rule.name} needs what an earlier step has evaluated, but none has: begin with evaluate."
    wanted = POLYNOMIALS.get(rule.name, len(rule.weights))
    have = len(before) + rule.evaluates
    if wanted > have:
        return f"{rule.name} needs {wanted} evaluations, but there were {have} so far."
    return None


def polynomial_weights(name: str, at: Sequence[float], begin: float, end: float) -> tuple[float, ...]:
    """Weights of the e at the points `at` (the latest first) by the rule `name`, for a step from `begin` to `end`.

    Lagrange's polynomial through as many points as the rule takes, at `begin` or averaged over the step. DDIM visits
    the last training step twice where its steps end beyond it: a point that comes again weighs nothing.
    """
    points = at[: POLYNOMIALS[name]]
    if name.startswith("extrapolate"):
        where, share = np.array([begin]), np.ones(1)
    else:
        nodes, shares = np.polynomial.legendre.leggauss(2)  # exact for cubics, and these are quadratic at most
        where, share = begin + (end - begin) * (nodes + 1) / 2, shares / 2
    weights = [0.0] * len(points)
    for p in dict.fromkeys(points):
        others = [(where - q) / (p - q) for q in dict.fromkeys(points) if q != p]
        weights[points.index(p)] = float(share @ np.prod([np.ones_like(where), *others], axis=0))
    return tuple(weights)


def read_rules(path: Path) -> tuple[str, int, list[Rule] | list[int], list[int]]:
    """Name, number of steps, rules or evaluated steps of a YAML file, and the line of each, the list's own line last.

    Raises ScheduleError, with the line where there is one, for what is no such file.
    """
    root = _compose(path)
    fields: dict[str, yaml.Node] = {}
    if isinstance(root, yaml.MappingNode):
        fields = {str(key.value): value for key, value in root.value}
    kind = "rules" if "rules" in fields else "evaluate"
    if set(fields) != {"name", "steps", kind}:
        raise ScheduleError(f"{path} must hold the keys name, steps, and either evaluate or rules, and no others.")
    steps, entries = _plain(path, fields["steps"]), fields[kind]
    if type(steps) is not int:
        raise ScheduleError(f"{path}, line {_line(fields['steps'])}: steps must be a whole number, not {steps!r}.")
    if not isinstance(entries, yaml.SequenceNode):
        raise ScheduleError(f"{path}, line {_line(entries)}: {kind} must be a list.")
    read: list[Any] = []
    for node in entries.value:
        entry = _plain(path, node)
        try:
            read.append(rule_of(entry) if kind == "rules" else _whole(entry))
        except ScheduleError as error:
            raise ScheduleError(f"{path}, line {_line(node)}: {error}") from error
    return str(_plain(path, fields["name"])), steps, read, [*map(_line, entries.value), _line(entries)]


def _compose(path: Path) -> yaml.Node | None:
    try:
        return yaml.compose(path.read_bytes(), yaml.SafeLoader)
    except OSError as error:
        raise ScheduleError(f"{path} cannot be read: {error.strerror}.") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ScheduleError(f"{path}{line} is not valid YAML: {error.problem}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ScheduleError(f"{path} is not a YAML text file.") from error


def _plain(path: Path, node: yaml.Node) -> Any:
    """What a node holds, as Python's own types."""
    try:
        return SafeConstructor().construct_document(node)
    # What a value's type does not take, as 2026-99-99, and what PyYAML lets through of its tags.
    except (yaml.MarkedYAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ScheduleError(f"{path}, line {_line(node)}: this value cannot be read: {error}") from error


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _whole(entry: Any) -> int:
    if type(entry) is not int:
        raise ScheduleError(f"evaluate must list whole numbers, not {entry!r}.")
    return entry


def rule_of(entry: Any) -> Rule:
    """A rule as YAML and JSON have it: its name, or its name with a list of weights; raises ScheduleError."""
    if isinstance(entry, str):
        return Rule(entry)
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ScheduleError(f"a rule is a name, or a name with weights as evaluate: [1.5, -0.5], not {entry!r}.")
    name, weights = next(iter(entry.items()))
    if not isinstance(weights, list) or not weights or any(type(w) not in (int, float) for w in weights):
        raise ScheduleError(f"the weights of {name} must be a list of numbers, not {weights!r}.")
    return Rule(str(name), tuple(float(w) for w in weights))
