"""canny2image in PyTorch: the plain reference, and the staged pipeline that TensorRT follows.

Both take the arguments of the competition's `process` and return the same kind of pictures; see `Reference.process`.
"""

from __future__ import annotations

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
from runtime.schedule import Schedule, control_scales
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
        device, dtype = self.model.device, self.model.dtype
        picture = canny_hint(resize_image(input_image, image_resolution), low_threshold, high_threshold)
        n, shape = num_samples, (num_samples, 4, picture.shape[0] // 8, picture.shape[1] // 8)
        seed = random_seed(seed)
        updates = self.schedule.updates(eta, self.model.alphas_cumprod.double().cpu().numpy())

        tokens = np.repeat(tokenize([f"{prompt}, {a_prompt}", n_prompt]), n, axis=0)
        text = self.stage("clip", {"tokens": torch.from_numpy(tokens).to(device)})
        features = self.stage("hint", {"edges": edge_tensor(picture, self.model)})
        times = self.stage("time", {"timesteps": torch.tensor([u.timestep for u in updates], device=device)})
        scales = torch.tensor(control_scales(len(self.model.control_scales), strength, guess_mode), device=device)
        scales = scales[:, None].repeat(1, 2 * n)
        if guess_mode:
            scales[:, n:] = 0.0

        x = torch.from_numpy(cuda_randn(seed, shape)).to(device)
        for i, u in enumerate(updates):
            noise = sum((c * cuda_randn(seed, shape, draw) for draw, c in u.noise), np.zeros(shape, np.float32))
            step = {"x": x.to(dtype)} | features
            state = self.stage("control", step | self.inputs("control", text, times, i))
            state |= self.stage("unet_encoder", step | self.inputs("unet_encoder", text, times, i))
            state |= {
                "x": x,
                "noise": torch.from_numpy(noise).to(device),
                "coefficients": torch.tensor([u.a, u.b], dtype=torch.float32, device=device),
                "guidance": torch.tensor([scale], dtype=torch.float32, device=device),
                "scales": scales,
            }
            x = self.stage("unet_decoder", state | self.inputs("unet_decoder", text, times, i))["x_next"]
        return list(self.stage("vae_decoder", {"x": x.to(dtype)})["picture"].cpu().numpy())

    @staticmethod
    def inputs(stage: str, text: Tensors, times: Tensors, step: int) -> Tensors:
        """A stage's own K/V and the time rows of one step, under the names that the stage knows."""
        kv = {k.partition(".")[2]: v for k, v in text.items() if k.startswith(f"{stage}.")}
        rows = {k.partition(".")[2]: v[step : step + 1] for k, v in times.items() if k.startswith(f"{stage}.")}
        return kv | rows


def edge_tensor(edges: np.ndarray, model: ControlLDM) -> Tensor:
    """An edge map (H, W, 3) uint8 as the ControlNet's hint (1, 3, H, W) in [0, 1]."""
    hint = torch.from_numpy(edges).to(model.device).permute(2, 0, 1)[None]
    return hint.to(model.dtype) / 255.0
