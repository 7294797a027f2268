"""Solvers from the literature that need few evaluations, to compare step schedules with: one sampler, one function.

Symbols of the papers: x0 the picture that e implies, λ = log(α/σ) half the log signal-to-noise ratio, h a step in λ.
All end, as DDIM does here, at training step 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Denoise = Callable[[Tensor, int], Tensor]  # x and a training step → e


def even_timesteps(count: int, train_steps: int = 1000) -> list[int]:
    """`count` training steps from the last to above 0, evenly spaced, as the papers' authors sample; descending."""
    return np.linspace(0, train_steps - 1, count + 1).round().astype(int)[:0:-1].tolist()


def _constants(timesteps: Sequence[int], alphas: np.ndarray) -> tuple[list[float], list[float], list[float]]:
    """α, σ and λ at every timestep and, last, at training step 0."""
    abar = np.asarray(alphas, np.float64)[[*timesteps, 0]]
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    return alpha.tolist(), sigma.tolist(), np.log(alpha / sigma).tolist()


def ddim(denoise: Denoise, x: Tensor, timesteps: Sequence[int], alphas: np.ndarray) -> Tensor:
    """x (N, 4, h, w) after deterministic DDIM, one evaluation a timestep (descending); Song et al. 2021."""
    alpha, sigma, _ = _constants(timesteps, alphas)
    for i, t in enumerate(timesteps):
        e = denoise(x, t)
        x = alpha[i + 1] * (x - sigma[i] * e) / alpha[i] + sigma[i + 1] * e
    return x


def dpm_solver_pp_2m(denoise: Denoise, x: Tensor, timesteps: Sequence[int], alphas: np.ndarray) -> Tensor:
    """x (N, 4, h, w) after DPM-Solver++(2M), one evaluation a timestep (descending).

    The first step is of first order, the last one, too, where there are fewer than 15 steps.
    Source: algorithm 2 of Lu et al. 2022, "DPM-Solver++".
    """
    alpha, sigma, lam = _constants(timesteps, alphas)
    before = None
    for i, t in enumerate(timesteps):
        x0 = (x - sigma[i] * denoise(x, t)) / alpha[i]
        h = lam[i + 1] - lam[i]
        d = x0
        if before is not None and not (i + 1 == len(timesteps) < 15):
            r = (lam[i] - lam[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * d
        before = x0
    return x


def unipc(denoise: Denoise, x: Tensor, timesteps: Sequence[int], alphas: np.ndarray) -> Tensor:
    """x (N, 4, h, w) after UniPC-2 with B₂(h) = exp(h) - 1 on x0, one evaluation a timestep (descending).

    Each evaluation first corrects the step that led to it, then predicts the next; the last step is of first order.
    Source: algorithms 5 to 8 of Zhao et al. 2023, "UniPC".
    """
    alpha, sigma, lam = _constants(timesteps, alphas)
    points: list[tuple[float, Tensor]] = []  # λ and x0 of the evaluations, the latest first
    x_before = x
    for i, t in enumerate(timesteps):
        x0 = (x - sigma[i] * denoise(x, t)) / alpha[i]
        if points:  # UniC: the step from i - 1 to here once more, now that its end is known
            x = _unipc_step(x_before, points, (alpha[i], sigma[i - 1], sigma[i], lam[i]), x0)
        points = [(lam[i], x0), *points[:1]]
        x_before = x
        known = points if i + 1 < len(timesteps) else points[:1]
        x = _unipc_step(x_before, known, (alpha[i + 1], sigma[i], sigma[i + 1], lam[i + 1]))
    return x


def _unipc_step(
    x: Tensor, points: list[tuple[float, Tensor]], end: tuple[float, float, float, float], x0_end: Tensor | None = None
) -> Tensor:
    """x one step on, by the differences of x0 to the step's begin: predicted, or corrected by the x0 at its end."""
    alpha, sigma_begin, sigma_end, lam_end = end
    (lam, x0), *older = points
    h = lam_end - lam
    ratios = [(other - lam) / h for other, _ in older] + [1.0] * (x0_end is not None)
    differences = [other - x0 for _, other in older] + ([x0_end - x0] if x0_end is not None else [])
    b = math.expm1(-h)
    x = sigma_end / sigma_begin * x - alpha * b * x0
    if not ratios:
        return x
    if len(ratios) == 1:
        weights = [0.5]  # what the system below tends to, and what the authors take for order two
    else:
        phi_1 = b / -h - 1  # h φ of the paper, divided by -h each time
        phi_2 = phi_1 / -h - 0.5
        system = np.array([[1.0] * len(ratios), ratios])
        weights = np.linalg.solve(system, np.array([phi_1, 2 * phi_2]) / b).tolist()
    total = sum((w / r * d for w, r, d in zip(weights, ratios, differences, strict=True)), torch.zeros_like(x))
    return x - alpha * b * total
