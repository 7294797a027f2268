"""canny2image in PyTorch: the plain reference, and the staged pipeline that TensorRT follows.

Both take the arguments of the competition's `process` and return the same kind of pictures; see `Reference.process`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cldm.cldm import ControlLDM
from cldm.ddim_hacked import DDIMSampler
from cldm.model import create_model, load_state_dict
from cldm.stages import STAGES, Tensors
from models import description, find_weights
from runtime.images import canny_hint, resize_image
from runtime.noise import cuda_randn, random_seed
from runtime.rules import HISTORY
from runtime.schedule import Schedule, Update, batch_scales, control_scales
from runtime.tokenizer import tokenize


def load_model(
    model: str | Path,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ControlLDM:
    """A model, "tiny", "sd15" or a yaml's path, with its weights on a device.

    Raises FileNotFoundError where the description or the weights are not there, ValueError (WeightsError) where they
    do not fit.
    """
    path = find_weights(model, weights)
    loaded = create_model(description(model), "meta")
    loaded.load_state_dict(load_state_dict(path, device), assign=True)
    return loaded.to(dtype).requires_grad_(False)


class Reference:
    """PyTorch as the original does it, cond and uncond one after the other, every step: what PD is measured to."""

    def __init__(self, model: ControlLDM) -> None:
        self.model = model
        self.sampler = DDIMSampler(model)

    # Convolutions would round to TF32 on a GPU by default, and this is what everything is measured against.
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    @torch.inference_mode()
    def process(
        self,
        input_image: np.ndarray,
        prompt: str,
        a_prompt: str,
        n_prompt: str,
        num_samples: int,
        image_resolution: int,
        ddim_steps: int,
        guess_mode: bool,
        strength: float,
        scale: float,
        seed: int,
        eta: float,
        low_threshold: int,
        high_threshold: int,
    ) -> list[np.ndarray]:
        """`num_samples` pictures (H, W, 3) uint8 along the edges of `input_image` (any size, 3) uint8 RGB.

        The short side becomes `image_resolution`, both sides multiples of 64. `strength` weighs the control, `scale`
        is the guidance, `seed` -1 draws one. In guess mode only the prompt's half is controlled.
        Raises ValueError for a picture, a number of steps or thresholds out of range.
        """
        model = self.model
        hint = canny_hint(resize_image(input_image, image_resolution), low_threshold, high_threshold)
        shape = (4, hint.shape[0] // 8, hint.shape[1] // 8)
        seed = random_seed(seed)
        edges = edge_tensor(hint, model).expand(num_samples, -1, -1, -1)
        prompts = [f"{prompt}, {a_prompt}"] * num_samples
        cond = {"c_concat": [edges], "c_crossattn": [model.get_learned_conditioning(prompts)]}
        uncond = {
            "c_concat": None if guess_mode else [edges],
            "c_crossattn": [model.get_learned_conditioning([n_prompt] * num_samples)],
        }
        model.control_scales = control_scales(len(model.control_scales), strength, guess_mode)
        x, _ = self.sampler.sample(
            ddim_steps,
            num_samples,
            shape,
            cond,
            eta=eta,
            x_T=torch.from_numpy(cuda_randn(seed, (num_samples, *shape))),
            unconditional_guidance_scale=scale,
            unconditional_conditioning=uncond,
            noise=lambda k: torch.from_numpy(cuda_randn(seed, (num_samples, *shape), k + 1)),
        )
        return list(STAGES["vae_decoder"](model, {"x": x})["picture"].cpu().numpy())


@dataclass(frozen=True)
class Memory:
    """What evaluated steps leave for those after them: the last e (the latest first), difference and residuals."""

    e: tuple[Tensor, ...] = ()
    difference: Tensor | None = None
    residuals: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Denoiser:
    """The evaluated steps of N samples: what they share is made once, `step` takes x from one to the next.

    text: what the stage `clip` makes of their tokens (2·N, 77); features: of `hint`, for all or one a sample; times:
    of `time`, a row for each evaluated step; scales: (residuals, 2·N); guidance: a number.
    """

    stage: Callable[[str, Tensors], Tensors]
    text: Tensors
    features: Tensors
    times: Tensors
    scales: Tensor
    guidance: float

    def step(self, x: Tensor, row: int, u: Update, noise: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """x (N, 4, h, w) float32 after the update u, whose time rows are the `row`-th, and what it leaves.

        `noise` (N, 4, h, w) is added. Rows of residuals that an evaluation does not make stay as they were.
        """
        n, dtype = len(x), self.text["context"].dtype
        half, kind = (2 * n, "") if u.evaluation.both else (n, "_cond")
        given = {"x": x.to(dtype)} | self.features
        residuals = memory.residuals
        if u.evaluation.control:
            made = self.stage(f"control{kind}", given | self.inputs("control", row, half))
            residuals = {k: torch.cat([r, residuals[k][half:]]) if residuals else r for k, r in made.items()}
        state = {k: r[:half] for k, r in residuals.items()}
        state |= self.stage(f"unet_encoder{kind}", given | self.inputs("unet_encoder", row, half))
        e1, e2 = (*memory.e, *[torch.zeros_like(x)] * 2)[:2]
        state |= {"x": x, "noise": noise, "scales": self.scales, "e1": e1, "e2": e2}
        state["coefficients"] = torch.tensor([u.a, *u.b], dtype=torch.float32, device=x.device)
        state["guidance"] = torch.tensor([self.guidance], dtype=torch.float32, device=x.device)
        if not u.evaluation.both and memory.difference is not None:
            state["difference"] = memory.difference
        out = self.stage(f"unet_decoder{kind}", state | self.inputs("unet_decoder", row, half))
        kept = Memory((out["e"], *memory.e)[: HISTORY - 1], out.get("difference", memory.difference), residuals)
        return out["x_next"], kept

    def inputs(self, stage: str, row: int, half: int) -> Tensors:
        """A stage's own K/V, of as many rows of the batch, and the time rows of one step, as the stage names them."""
        kv = {k.partition(".")[2]: v[:half] for k, v in self.text.items() if k.startswith(f"{stage}.")}
        rows = {k.partition(".")[2]: v[row : row + 1] for k, v in self.times.items() if k.startswith(f"{stage}.")}
        return kv | rows


class Staged:
    """The pipeline as stages: cond and uncond in one batch, text, hint and time hoisted, steps by a schedule."""

    def __init__(self, model: ControlLDM, schedule: Schedule) -> None:
        self.model = model
        self.schedule = schedule

    def stage(self, name: str, inputs: Tensors) -> Tensors:
        """Run one stage."""
        return STAGES[name](self.model, inputs)

    @torch.inference_mode()
    def process(
        self,
        input_image: np.ndarray,
        prompt: str,
        a_prompt: str,
        n_prompt: str,
        num_samples: int,
        image_resolution: int,
        ddim_steps: int,
        guess_mode: bool,
        strength: float,
        scale: float,
        seed: int,
        eta: float,
        low_threshold: int,
        high_threshold: int,
    ) -> list[np.ndarray]:
        """As `Reference.process`; `ddim_steps` must be the schedule's."""
        if ddim_steps != self.schedule.steps:
            raise ValueError(f"schedule {self.schedule.name} is for {self.schedule.steps} steps, not {ddim_steps}")
        device = self.model.device
        picture = canny_hint(resize_image(input_image, image_resolution), low_threshold, high_threshold)
        n, shape = num_samples, (num_samples, 4, picture.shape[0] // 8, picture.shape[1] // 8)
        seed = random_seed(seed)
        updates = self.schedule.updates(eta, self.model.alphas_cumprod.double().cpu().numpy())

        tokens = np.repeat(tokenize([f"{prompt}, {a_prompt}", n_prompt]), n, axis=0)
        text = self.stage("clip", {"tokens": torch.from_numpy(tokens).to(device)})
        features = self.stage("hint", {"edges": edge_tensor(picture, self.model)})
        times = self.stage("time", {"timesteps": torch.tensor([u.evaluation.timestep for u in updates], device=device)})
        scales = torch.from_numpy(batch_scales(len(self.model.control_scales), n, strength, guess_mode)).to(device)

        denoiser = Denoiser(self.stage, text, features, times, scales, scale)
        x, memory = torch.from_numpy(cuda_randn(seed, shape)).to(device), Memory()
        for i, u in enumerate(updates):
            noise = sum((c * cuda_randn(seed, shape, draw) for draw, c in u.noise), np.zeros(shape, np.float32))
            x, memory = denoiser.step(x, i, u, torch.from_numpy(noise).to(device), memory)
        return list(self.stage("vae_decoder", {"x": x.to(self.model.dtype)})["picture"].cpu().numpy())


def edge_tensor(edges: np.ndarray, model: ControlLDM) -> Tensor:
    """An edge map (H, W, 3) uint8 as the ControlNet's hint (1, 3, H, W) in [0, 1]."""
    hint = torch.from_numpy(edges).to(model.device).permute(2, 0, 1)[None]
    return hint.to(model.dtype) / 255.0
