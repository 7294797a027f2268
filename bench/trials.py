"""Step schedules tried out on many pictures at once: how far each leads from the reference, in latents and in PD.

All pictures of a set are one batch, what schedules begin with alike is evaluated once, and weights can be fitted.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.perceptual import InceptionFeatures, pd_score
from cldm.canny2image import Denoiser, Memory, edge_tensor
from cldm.cldm import ControlLDM
from cldm.stages import STAGES, Tensors
from runtime.images import canny_hint, resize_image
from runtime.noise import cuda_randn
from runtime.rules import HISTORY, Rule
from runtime.schedule import Evaluation, Schedule, Update, batch_scales, ddim_timesteps
from runtime.tokenizer import END, tokenize

KEPT = 100  # evaluations that are remembered, a few megabytes each
RIDGE = 1e-4  # how strongly fitted weights hold to those of plain DDIM, relative to the data


@dataclass(frozen=True)
class Trial:
    """How a schedule did: its rules with the weights they had, PD and latent RMS difference of every picture."""

    schedule: Schedule
    pd: NDArray[np.float64]
    rms: NDArray[np.float64]


class Trials:
    """A set of pictures (image, seed), all of one size after resizing, and their reference by every step of DDIM.

    given: the arguments of `process` but for the picture and the seed; eta must be 0. Raises ValueError where the
    pictures differ in size.
    """

    @torch.inference_mode()
    def __init__(
        self, model: ControlLDM, items: Sequence[tuple[np.ndarray, int]], given: dict[str, Any],
        inception: InceptionFeatures,
    ) -> None:  # fmt: skip
        self.model, self.inception, self.steps = model, inception, given["ddim_steps"]
        self.alphas = model.alphas_cumprod.double().cpu().numpy()
        edges = [
            canny_hint(resize_image(image, given["image_resolution"]), given["low_threshold"], given["high_threshold"])
            for image, _ in items
        ]
        if len({edge.shape for edge in edges}) > 1:
            raise ValueError("the pictures differ in size after resizing, but are tried out in one batch.")
        n, shape = len(items), (1, 4, edges[0].shape[0] // 8, edges[0].shape[1] // 8)
        tokens = tokenize([f"{given['prompt']}, {given['a_prompt']}", given["n_prompt"]])
        text = self._stage("clip", {"tokens": torch.from_numpy(tokens).to(model.device)})
        text = {name: tensor.repeat_interleave(n, 0) for name, tensor in text.items()}
        hints = [self._stage("hint", {"edges": edge_tensor(edge, model)})["hint"] for edge in edges]
        self.edges = edge_tensor(edges[0], model)
        self.timesteps = ddim_timesteps(self.steps)
        times = self._stage("time", {"timesteps": torch.from_numpy(self.timesteps.copy()).to(model.device)})
        scales = batch_scales(len(model.control_scales), n, given["strength"], given["guess_mode"])
        both = torch.from_numpy(scales).to(model.device)
        self.denoiser = Denoiser(self._stage, text, {"hint": torch.cat(hints)}, times, both, given["scale"])
        self.x = torch.from_numpy(np.concatenate([cuda_randn(seed, shape) for _, seed in items])).to(model.device)
        self._evaluations: OrderedDict[Any, tuple[tuple[Tensor, ...], Memory]] = OrderedDict()
        self.path = self._reference()
        self.features = self._features(self.path[-1])

    def once(self) -> None:
        """What a picture takes besides its steps: text, hint, time rows, decoding."""
        tokens = torch.full((2, 77), END, dtype=torch.long, device=self.model.device)
        self._stage("clip", {"tokens": tokens})
        self._stage("hint", {"edges": self.edges})
        self._stage("time", {"timesteps": torch.from_numpy(self.timesteps.copy()).to(self.model.device)})
        self._stage("vae_decoder", {"x": self.x[:1].to(self.model.dtype)})

    def wait(self) -> None:
        """Until the device has done all of it."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def only_first(self) -> Trials:
        """The same of the first picture alone, to take times of."""
        n, one, d = len(self.x), copy.copy(self), self.denoiser
        both = [0, n]
        one.x = self.x[:1]
        one.denoiser = Denoiser(
            self._stage, {k: v[both] for k, v in d.text.items()}, {k: v[:1] for k, v in d.features.items()}, d.times,
            d.scales[:, both], d.guidance,
        )  # fmt: skip
        return one

    def _stage(self, name: str, inputs: Tensors) -> Tensors:
        return STAGES[name](self.model, inputs)

    def _reference(self) -> dict[int, Tensor]:
        """x after the steps before each step, by every step of DDIM; -1 is the end."""
        path, memory = {}, Memory()
        x = self.x
        for u in Schedule.parse("full", self.steps).updates(0.0, self.alphas):
            path[u.step] = x
            x, memory = self.denoiser.step(x, u.step, u, torch.zeros_like(x), memory)
        return path | {-1: x}

    def _features(self, x: Tensor) -> NDArray[np.float32]:
        pictures = [self._stage("vae_decoder", {"x": part})["picture"] for part in x.to(self.model.dtype).split(16)]
        return self.inception.features(list(torch.cat(pictures).cpu().numpy()))

    def score(self, x: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """PD and latent RMS difference of each picture that x (N, 4, h, w) decodes to."""
        rms = (x - self.path[-1]).square().mean((1, 2, 3)).sqrt()
        return pd_score(self._features(x), self.features), rms.double().cpu().numpy()

    @torch.inference_mode()
    def run(self, schedule: Schedule, fit: bool = False) -> Trial:
        """Try a schedule.

        With `fit`, every evaluation after the first gets weights of its own, those with which the steps up to the next
        evaluation come nearest to the reference (least squares); the steps between reuse them.
        """
        x = self.x
        es: tuple[Tensor, ...] = ()
        rules, memory = list(schedule.rules), Memory()
        updates = schedule.updates(0.0, self.alphas)
        history: tuple[Any, ...] = ()
        for u, following in zip(updates, [*(v.step for v in updates[1:]), -1], strict=True):
            i = len(rules) - 1 - u.step
            history = (*history, (u.step, u.evaluation))
            es, memory = self._evaluate(history, x, u.step, u.evaluation, es, memory)
            b: tuple[float, ...] = u.b
            if fit:
                weights = self._fitted(x, es, u.a, u.b[0] + u.b[1] + u.b[2], self.path[following])
                rules[i] = Rule(rules[i].name, weights)
                b = tuple(w * sum(u.b) for w in weights)
            x = u.a * x
            for w, e in zip(b, es, strict=False):
                x = x + w * e
            history = (*history, tuple(round(w, 12) for w in b))
        pd, rms = self.score(x)
        return Trial(Schedule(schedule.name, schedule.steps, tuple(rules)), pd, rms)

    def _evaluate(
        self, history: tuple[Any, ...], x: Tensor, step: int, evaluation: Evaluation, es: tuple[Tensor, ...],
        memory: Memory,
    ) -> tuple[tuple[Tensor, ...], Memory]:  # fmt: skip
        """The last e with this step's, and what the evaluation leaves, from memory where it was done before."""
        if history not in self._evaluations:
            nothing = Update(step, evaluation, 0.0, (0.0, 0.0, 0.0), ())
            _, left = self.denoiser.step(x, step, nothing, torch.zeros_like(x), memory)
            self._evaluations[history] = (left.e[0], *es)[:HISTORY], left
            while len(self._evaluations) > KEPT:
                self._evaluations.popitem(last=False)
        self._evaluations.move_to_end(history)
        return self._evaluations[history]

    @staticmethod
    def _fitted(x: Tensor, es: Sequence[Tensor], a: float, b: float, target: Tensor) -> tuple[float, ...]:
        """The weights w that bring a·x + b·Σ w·e nearest to the target, held to (1, 0, 0) a little."""
        columns = torch.stack([b * e.flatten().double() for e in es], 1)
        wanted = target.flatten().double() - a * x.flatten().double()
        square = columns.T @ columns
        ridge = RIDGE * square[0, 0]
        plain = torch.eye(len(es), dtype=square.dtype, device=square.device)
        solved = torch.linalg.solve(square + ridge * plain, columns.T @ wanted + ridge * plain[0])
        return tuple(round(float(w), 4) for w in solved)

    @torch.inference_mode()
    def solve(self, solver: Callable[..., Tensor], timesteps: Sequence[int]) -> tuple[Any, Any]:
        """PD and latent RMS difference by one of `cldm.samplers`, or DDIM at other timesteps."""
        times = self._stage("time", {"timesteps": torch.tensor(timesteps, device=self.model.device)})
        denoiser = Denoiser(
            self._stage, self.denoiser.text, self.denoiser.features, times, self.denoiser.scales, self.denoiser.guidance
        )
        rows = {t: row for row, t in enumerate(timesteps)}

        def denoise(x: Tensor, t: int) -> Tensor:
            nothing = Update(0, Evaluation(t), 0.0, (0.0, 0.0, 0.0), ())
            return denoiser.step(x, rows[t], nothing, torch.zeros_like(x), Memory())[1].e[0]

        return self.score(solver(denoise, self.x, timesteps, self.alphas))
