"""DDIM (Song et al. 2021) with classifier-free guidance as ControlNet samples: cond and uncond one after the other.

This is the plain reference; `cldm.stages` is the same arithmetic hoisted and batched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cldm.cldm import ControlLDM
from runtime.schedule import ddim_timesteps


class DDIMSampler:
    """Samples latents of a ControlLDM."""

    def __init__(self, model: ControlLDM) -> None:
        self.model = model

    def make_schedule(self, ddim_num_steps: int, ddim_eta: float = 0.0) -> None:
        """Timesteps, ᾱ, ᾱ_prev and σ of each step, ascending, in float64 (Song et al. 2021, eq. 16)."""
        acp = self.model.alphas_cumprod.double().cpu().numpy()
        self.ddim_timesteps = ddim_timesteps(ddim_num_steps, len(acp))
        self.ddim_alphas = acp[self.ddim_timesteps]
        self.ddim_alphas_prev = np.append(acp[0], acp[self.ddim_timesteps[:-1]])
        a, prev = self.ddim_alphas, self.ddim_alphas_prev
        self.ddim_sigmas = ddim_eta * np.sqrt((1 - prev) / (1 - a) * (1 - a / prev))

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Mapping[str, Any],
        verbose: bool = False,
        eta: float = 0.0,
        x_T: Tensor | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Mapping[str, Any] | None = None,
        noise: Callable[[int], Tensor] | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Latents (B, *shape) after S steps, and the intermediates {"x_inter", "pred_x0"}.

        `x_T` is the initial noise (drawn by torch if left out); `noise(k)` gives the k-th step's noise where eta > 0;
        `callback(i, x)` is called after each step.
        """
        model = self.model
        self.make_schedule(S, eta)
        x = torch.randn((batch_size, *shape), device=model.device) if x_T is None else x_T.to(model.device)
        intermediates: dict[str, list[Tensor]] = {"x_inter": [x], "pred_x0": [x]}
        steps = len(self.ddim_timesteps)
        for i in tqdm(range(steps), desc="DDIM", disable=not verbose):
            index = steps - 1 - i
            t = torch.full((batch_size,), int(self.ddim_timesteps[index]), device=x.device, dtype=torch.long)
            e = self.guided(x, t, conditioning, unconditional_guidance_scale, unconditional_conditioning)
            sigma = float(self.ddim_sigmas[index])
            n = torch.zeros_like(x) if sigma == 0 else torch.randn_like(x) if noise is None else noise(i).to(x)
            a, prev = float(self.ddim_alphas[index]), float(self.ddim_alphas_prev[index])
            pred_x0 = (x - (1 - a) ** 0.5 * e) / a**0.5
            x = prev**0.5 * pred_x0 + (1 - prev - sigma**2) ** 0.5 * e + sigma * n
            intermediates["x_inter"].append(x)
            intermediates["pred_x0"].append(pred_x0)
            if callback is not None:
                callback(i, x)
        return x, intermediates

    def guided(
        self, x: Tensor, t: Tensor, cond: Mapping[str, Any], scale: float, uncond: Mapping[str, Any] | None
    ) -> Tensor:
        """e after classifier-free guidance (Ho & Salimans 2022): e_u + scale · (e_c − e_u)."""
        e_cond = self.model.apply_model(x, t, cond)
        if uncond is None or scale == 1.0:
            return e_cond
        e_uncond = self.model.apply_model(x, t, uncond)
        return e_uncond + scale * (e_cond - e_uncond)
