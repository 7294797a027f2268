"""DDIM in numpy: which steps are taken, what each of them does, and the coefficients of every update.

Symbols as in "Denoising Diffusion Implicit Models" (Song et al., 2021): alphas_cumprod is its alpha, e the noise that
the UNet estimates, eta the share of fresh noise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.rules import HISTORY, Rule, ScheduleError, polynomial_weights, problem, read_rules

TRAIN_STEPS = 1000
NAMED = {path.stem: path for path in sorted(Path(__file__).with_name("schedules").glob("*.yaml"))}


def alphas_cumprod(
    linear_start: float = 0.00085, linear_end: float = 0.0120, timesteps: int = TRAIN_STEPS
) -> np.ndarray:
    """The share of the picture left at each training step: (timesteps,) float64, falling.

    The betas are linear in their square roots, from `linear_start` to `linear_end` (Stable Diffusion's "linear").
    """
    betas = np.linspace(linear_start**0.5, linear_end**0.5, timesteps) ** 2
    return np.cumprod(1 - betas)


def noise_schedule(
    linear_start: float = 0.00085, linear_end: float = 0.0120, timesteps: int = TRAIN_STEPS
) -> dict[str, np.ndarray]:
    """Every schedule constant of the checkpoint, each (timesteps,) float64, by its checkpoint name (Ho et al. 2020)."""
    acp = alphas_cumprod(linear_start, linear_end, timesteps)
    prev = np.append(1.0, acp[:-1])
    alphas = acp / prev
    betas = 1.0 - alphas
    variance = betas * (1.0 - prev) / (1.0 - acp)
    return {
        "betas": betas,
        "alphas_cumprod": acp,
        "alphas_cumprod_prev": prev,
        "sqrt_alphas_cumprod": np.sqrt(acp),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - acp),
        "log_one_minus_alphas_cumprod": np.log(1.0 - acp),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / acp),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / acp - 1.0),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(prev) / (1.0 - acp),
        "posterior_mean_coef2": (1.0 - prev) * np.sqrt(alphas) / (1.0 - acp),
        "logvar": np.zeros(timesteps),
    }


def ddim_timesteps(steps: int, train_steps: int = TRAIN_STEPS) -> np.ndarray:
    """The training steps that DDIM visits, ascending; sampling takes them from the last to the first.

    The stride is `train_steps // steps`, so more steps than asked for come out where that does not divide: 30 give 31.
    The number of steps taken is the result's length. Some counts (of 1000: 3, 9, 27, 36, 37, 101 to 111, 251 to 333,
    501 and more) end one past the last training step, which the source answers with an index error; here they end on
    it. Raises ScheduleError for `steps` outside 1..train_steps.
    Source: `make_ddim_timesteps` of the ControlNet repository, method "uniform".
    """
    if not 1 <= steps <= train_steps:
        raise ScheduleError(f"The number of steps is {steps}, but must lie between 1 and {train_steps}.")
    return np.minimum(np.arange(0, train_steps, train_steps // steps) + 1, train_steps - 1)


class Evaluation(NamedTuple):
    """Which networks run, for what: the training step, whether ControlNet does, whether both halves of the batch do."""

    timestep: int
    control: bool = True
    both: bool = True


@dataclass(frozen=True)
class Update:
    """One evaluated step and the skipped ones after it: x becomes a·x + Σ b[j]·e[j] + Σ coefficient·noise[draw].

    `step` counts down to 0 as the sampler does. e[0] is this evaluation's, e[1] and e[2] those of the two before it.
    Draw 0 is the initial x; draw 1 belongs to the first step taken, draw 2 to the second, and so on.
    """

    step: int
    evaluation: Evaluation
    a: float
    b: tuple[float, float, float]
    noise: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Schedule:
    """What each DDIM step does, one rule a step from the noisiest to the last; see `runtime.rules`.

    `steps` is the number asked of DDIM, which may take more (`ddim_timesteps`). Steps count as the sampler does: from
    the number of steps taken less one down to 0. Raises ScheduleError for a number of rules that is not the number of
    steps taken, and for a rule that asks for what no step before it has made.
    """

    name: str
    steps: int
    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        taken = len(ddim_timesteps(self.steps))
        for i in range(min(len(self.rules), taken)):
            wrong = problem(self.rules, i)
            if wrong:
                raise ScheduleError(f"The schedule {self.name!r}, step {taken - 1 - i}: {wrong}", i)
        if len(self.rules) != taken:
            raise ScheduleError(f"The schedule {self.name!r} has {len(self.rules)} rules, but {taken} steps.", -1)

    @staticmethod
    def of(name: str, steps: int, evaluated: Sequence[int]) -> Schedule:
        """The schedule that evaluates these steps, in descending order, and reuses the last e at the others.

        Raises ScheduleError where steps are not in that order, not among those taken, or leave out the first.
        """
        first = len(ddim_timesteps(steps)) - 1
        if not len(evaluated):
            raise ScheduleError(f"The schedule {name!r} evaluates no step: it needs at least step {first}.")
        for i, step in enumerate(evaluated):
            if not 0 <= step <= first:
                raise ScheduleError(f"The schedule {name!r} names step {step}, but the steps are {first} to 0.", i)
            if step in evaluated[:i]:
                raise ScheduleError(f"The schedule {name!r} names step {step} more than once.", i)
            if evaluated[0] != first:
                raise ScheduleError(f"The schedule {name!r} must begin with the first step, {first}.", 0)
            if i and step > evaluated[i - 1]:
                before = evaluated[i - 1]
                raise ScheduleError(f"The schedule {name!r} names {step} after {before}: steps must descend.", i)
        rules = (Rule("evaluate" if step in evaluated else "reuse") for step in range(first, -1, -1))
        return Schedule(name, steps, tuple(rules))

    @staticmethod
    def parse(text_or_path: str | os.PathLike[str], steps: int) -> Schedule:
        """The schedule that a user names, for `steps` DDIM steps.

        Either "full", the name of a file in `schedules/` ("hackathon-10"), steps as "19, 18, 4", or a path that ends in
        .yaml or .yml, to a mapping of `name`, `steps` and either `evaluate` (a list of steps) or `rules` (one for each
        step). Raises ScheduleError for anything else, for another number of steps than the file's, and for what
        `Schedule` refuses, with the file's line.
        """
        text = os.fspath(text_or_path).strip()
        if text == "full":
            return Schedule.of("full", steps, range(len(ddim_timesteps(steps)) - 1, -1, -1))
        if text in NAMED or text.lower().endswith((".yaml", ".yml")):
            schedule = _load(NAMED.get(text, Path(text)))
            if schedule.steps != steps:
                raise ScheduleError(f"The schedule {schedule.name!r} is for {schedule.steps} steps, not {steps}.")
            return schedule
        if not re.fullmatch(r"[-\d\s,]*", text):
            known = ", ".join(["full", *NAMED])
            raise ScheduleError(
                f"There is no schedule {text!r}: take one of {known}, a list of steps as 19,18,4 or a .yaml file."
            )
        try:
            evaluated = tuple(int(word) for word in re.split(r"[\s,]+", text) if word)
        except ValueError:
            raise ScheduleError(f"The schedule {text!r} is no list of steps as 19,18,4.") from None
        return Schedule.of(",".join(map(str, evaluated)), steps, evaluated)

    def to_yaml(self, comment: str = "") -> str:
        """The file that `parse` reads this schedule from."""
        lines = [f"# {line}" for line in comment.splitlines()]
        lines += [f"name: {self.name}", f"steps: {self.steps}", "rules:"]
        for i, rule in enumerate(self.rules):
            text = f"{rule.name}: [{', '.join(map(repr, rule.weights))}]" if rule.weights else rule.name
            lines.append(f"- {text:<40} # {len(self.rules) - 1 - i}")
        return "\n".join(lines) + "\n"

    @property
    def evaluated(self) -> tuple[int, ...]:
        """The steps at which networks run, descending."""
        return tuple(len(self.rules) - 1 - i for i, rule in enumerate(self.rules) if rule.evaluates)

    def weights(self, alphas: np.ndarray) -> np.ndarray:
        """What each step makes its e of: (steps taken, 3) float64, weights of the last three evaluations' e.

        `alphas` as in `updates`. The polynomials are in sqrt(1/alpha - 1), in which DDIM is Euler's method (equation 14
        of the DDIM paper).
        """
        timesteps = ddim_timesteps(self.steps)[::-1]
        sigma = np.append(np.sqrt(1 / alphas[timesteps] - 1), np.sqrt(1 / alphas[0] - 1))
        weights = np.zeros((len(timesteps), HISTORY))
        at: list[float] = []  # where the last evaluations were, the latest first
        for i, rule in enumerate(self.rules):
            if rule.evaluates:
                at = [float(sigma[i]), *at][:HISTORY]
                row: Sequence[float] = rule.weights or (1.0,)
            elif rule.name == "reuse":
                row = rule.weights or tuple(weights[i - 1])
            else:
                row = polynomial_weights(rule.name, at, float(sigma[i]), float(sigma[i + 1]))
            weights[i, : len(row)] = row
        return weights

    def updates(self, eta: float = 0.0, alphas: Sequence[float] | np.ndarray | None = None) -> list[Update]:
        """One linear update of (x, e) for each evaluated step, the skipped steps after it folded in.

        alphas: the model's `alphas_cumprod`, (1000,), by default Stable Diffusion's. Raises ScheduleError for an eta
        outside 0..1. Source: equations 12 and 16 of the DDIM paper; the last step ends at training step 0.
        """
        if not 0 <= eta <= 1:
            raise ScheduleError(f"eta is {eta}, but must lie between 0 (deterministic) and 1 (DDPM).")
        timesteps = ddim_timesteps(self.steps)
        abar = np.asarray(alphas_cumprod() if alphas is None else alphas, np.float64)
        if abar.shape != (TRAIN_STEPS,):
            raise ScheduleError(f"alphas has the shape {abar.shape}, not ({TRAIN_STEPS},).")
        at, before = abar[timesteps], abar[np.append(0, timesteps[:-1])]
        sigma = eta * np.sqrt((1 - before) / (1 - at) * (1 - at / before))
        a = np.sqrt(before / at)
        b = (np.sqrt(1 - before - sigma**2) - a * np.sqrt(1 - at))[:, None] * self.weights(abar)[::-1]

        updates = []
        for step, following in zip(self.evaluated, [*self.evaluated[1:], -1], strict=True):
            a_run, b_run = 1.0, np.zeros(HISTORY)
            noise: dict[int, float] = {}
            for i in range(step, following, -1):
                a_run, b_run = a[i] * a_run, a[i] * b_run + b[i]
                noise = {draw: a[i] * s for draw, s in noise.items()} | {len(timesteps) - i: sigma[i]}
            kept = tuple((draw, float(s)) for draw, s in noise.items() if s > 0)
            rule = self.rules[len(timesteps) - 1 - step]
            b0, b1, b2 = b_run.tolist()
            evaluation = Evaluation(int(timesteps[step]), rule.control, rule.both)
            updates.append(Update(step, evaluation, float(a_run), (b0, b1, b2), kept))
        return updates


def every_schedule(steps: int) -> list[Schedule]:
    """All that have a name and are for this number of steps, the most evaluations first."""
    loaded = [Schedule.parse("full", steps), *map(_load, NAMED.values())]
    return sorted((s for s in loaded if s.steps == steps), key=lambda s: -len(s.evaluated))


def control_scales(count: int, strength: float, guess_mode: bool) -> list[float]:
    """The weight of each of `count` residuals: `strength`, in guess mode falling by 0.825 from the middle block up."""
    return [strength * (0.825 ** (count - 1 - i) if guess_mode else 1.0) for i in range(count)]


def batch_scales(count: int, samples: int, strength: float, guess_mode: bool) -> np.ndarray:
    """`control_scales` for every row of the batch, (count, 2·samples) float32; in guess mode the negative row has 0."""
    column = np.array(control_scales(count, strength, guess_mode), np.float32)[:, None]
    negative = np.zeros_like(column) if guess_mode else column
    return np.repeat(np.concatenate([column, negative], 1), samples, axis=1)


def _load(path: Path) -> Schedule:
    """The schedule of a YAML file; every ScheduleError names the line that is wrong."""
    name, steps, rules, lines = read_rules(path)
    try:
        if rules and isinstance(rules[0], Rule):
            return Schedule(name, steps, tuple(r for r in rules if isinstance(r, Rule)))
        return Schedule.of(name, steps, [r for r in rules if isinstance(r, int)])
    except ScheduleError as error:
        at = lines[error.at] if error.at is not None else lines[-1]
        raise ScheduleError(f"{path}, line {at}: {error}") from error
