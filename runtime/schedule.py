"""DDIM in numpy: which steps are taken, which of them are evaluated, and the coefficients of every update.

Symbols as in "Denoising Diffusion Implicit Models" (Song et al., 2021): alphas_cumprod is its alpha, e the noise that
the UNet estimates, eta the share of fresh noise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

TRAIN_STEPS = 1000
NAMED = {path.stem: path for path in sorted(Path(__file__).with_name("schedules").glob("*.yaml"))}


class ScheduleError(ValueError):
    """A schedule or a number of steps that cannot be used; the text is one sentence."""


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


@dataclass(frozen=True)
class Update:
    """One evaluated step and the skipped ones after it: x becomes a x + b e + the sum of coefficient * noise[draw].

    `step` counts down to 0 as the sampler does, `timestep` is the training step that the networks are given.
    Draw 0 is the initial x; draw 1 belongs to the first step taken, draw 2 to the second, and so on.
    """

    step: int
    timestep: int
    a: float
    b: float
    noise: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Schedule:
    """The steps at which the networks run; the others reuse the last e.

    `steps` is the number asked of DDIM, `evaluated` counts as the sampler does: from the noisiest, the number of steps
    taken less one, down to 0 at most. Raises ScheduleError where the steps are not in that order, are not among the
    steps taken, or leave out the first, which has no earlier e to reuse.
    """

    name: str
    steps: int
    evaluated: tuple[int, ...]

    def __post_init__(self) -> None:
        first = len(ddim_timesteps(self.steps)) - 1
        if not self.evaluated:
            raise ScheduleError(f"The schedule {self.name!r} evaluates no step: it needs at least step {first}.")
        for step in self.evaluated:
            if not 0 <= step <= first:
                raise ScheduleError(f"The schedule {self.name!r} names step {step}, but the steps are {first} to 0.")
            if self.evaluated.count(step) > 1:
                raise ScheduleError(f"The schedule {self.name!r} names step {step} more than once.")
        if self.evaluated[0] != first:
            raise ScheduleError(f"The schedule {self.name!r} must begin with the first step, {first}.")
        for step, following in zip(self.evaluated, self.evaluated[1:], strict=False):
            if following > step:
                raise ScheduleError(f"The schedule {self.name!r} names {following} after {step}: steps must descend.")

    @staticmethod
    def parse(text_or_path: str | os.PathLike[str], steps: int) -> Schedule:
        """The schedule that a user names, for `steps` DDIM steps.

        Either "full", the name of a file in `schedules/` ("hackathon-10"), steps as "19, 18, 4", or a path that ends in
        .yaml or .yml, to a mapping of `name`, `steps` and `evaluate`. Raises ScheduleError for anything else, for
        another number of steps than the file's, and for what `Schedule` refuses.
        """
        text = os.fspath(text_or_path).strip()
        if text == "full":
            return Schedule("full", steps, tuple(reversed(range(len(ddim_timesteps(steps))))))
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
        return Schedule(",".join(map(str, evaluated)), steps, evaluated)

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
        b = np.sqrt(1 - before - sigma**2) - a * np.sqrt(1 - at)

        updates = []
        for step, following in zip(self.evaluated, [*self.evaluated[1:], -1], strict=True):
            a_run, b_run = 1.0, 0.0
            noise: dict[int, float] = {}
            for i in range(step, following, -1):
                a_run, b_run = a[i] * a_run, a[i] * b_run + b[i]
                noise = {draw: a[i] * s for draw, s in noise.items()} | {len(timesteps) - i: sigma[i]}
            kept = tuple((draw, float(s)) for draw, s in noise.items() if s > 0)
            updates.append(Update(step, int(timesteps[step]), float(a_run), float(b_run), kept))
        return updates


def control_scales(count: int, strength: float, guess_mode: bool) -> list[float]:
    """The weight of each of `count` residuals: `strength`, in guess mode falling by 0.825 from the middle block up."""
    return [strength * (0.825 ** (count - 1 - i) if guess_mode else 1.0) for i in range(count)]


def _load(path: Path) -> Schedule:
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ScheduleError(f"{path} cannot be read: {error.strerror}.") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ScheduleError(f"{path}{line} is not valid YAML: {error.problem}.") from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ScheduleError(f"{path} is not a YAML text file.") from error  # PyYAML lets through what its tags make
    if not isinstance(content, dict) or set(content) != {"name", "steps", "evaluate"}:
        raise ScheduleError(f"{path} must hold the three keys name, steps and evaluate, and no others.")
    name, steps, evaluate = content["name"], content["steps"], content["evaluate"]
    if type(steps) is not int or not isinstance(evaluate, list) or any(type(step) is not int for step in evaluate):
        raise ScheduleError(f"{path} must give steps as a whole number and evaluate as a list of whole numbers.")
    return Schedule(str(name), steps, tuple(evaluate))
