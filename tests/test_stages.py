"""The stages against the plain model, and the staged pipeline against the reference."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cldm.canny2image import Denoiser, Reference, Staged
from cldm.cldm import ControlLDM
from cldm.ddim_hacked import DDIMSampler
from cldm.model import create_model
from cldm.stages import STAGES
from runtime.images import read_image
from runtime.schedule import Schedule, control_scales

ROOT = Path(__file__).resolve().parents[1]
BIRD = ROOT / "pictures/owl.png"


@pytest.fixture(scope="module")
def model() -> ControlLDM:
    """The tiny model with random weights, none of them zero, so that every path is seen."""
    torch.manual_seed(1)
    made = create_model(ROOT / "models/tiny/tiny.yaml").requires_grad_(False)
    for p in made.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return made


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= 1e-5 * b.norm())


@pytest.mark.parametrize(("samples", "strength", "guess_mode"), [(1, 1.0, False), (3, 0.6, False), (2, 0.9, True)])
def test_a_step_equals_the_plain_model(model: ControlLDM, samples: int, strength: float, guess_mode: bool) -> None:
    torch.manual_seed(2)
    # Guidance multiplies what rounding leaves between the two halves: double precision shows that no more is there.
    model = copy.deepcopy(model).double()
    tokens = torch.randint(0, 49406, (2, 77))
    x, edges = torch.randn(samples, 4, 8, 16).double(), torch.rand(1, 3, 64, 128).round().double()
    t, guidance = 501, 7.5
    text = STAGES["clip"](model, {"tokens": tokens.repeat_interleave(samples, 0)})
    features = STAGES["hint"](model, {"edges": edges})
    rows = STAGES["time"](model, {"timesteps": torch.tensor([951, t])})

    denoiser = Denoiser(lambda *_: {}, text, features, rows, torch.empty(0), guidance)

    def own(stage: str, cond: bool = False) -> dict[str, Tensor]:
        return denoiser.inputs(stage, 1, samples if cond else 2 * samples)

    model.control_scales = control_scales(len(model.control_scales), strength, guess_mode)
    scales = torch.tensor(model.control_scales)[:, None].repeat(1, 2 * samples)
    if guess_mode:
        scales[:, samples:] = 0
    noise = torch.randn_like(x)
    state = STAGES["control"](model, {"x": x} | features | own("control"))
    state |= STAGES["unet_encoder"](model, {"x": x} | own("unet_encoder"))
    e1, e2 = torch.randn_like(x), torch.randn_like(x)
    constants = {"scales": scales, "guidance": torch.tensor([guidance]), "x": x, "noise": noise, "e1": e1, "e2": e2}
    constants["coefficients"] = torch.tensor([0.9, -0.2, 0.3, -0.1]).double()
    out = STAGES["unet_decoder"](model, state | constants | own("unet_decoder"))
    half = STAGES["control_cond"](model, {"x": x} | features | own("control", True))
    half |= STAGES["unet_encoder_cond"](model, {"x": x} | own("unet_encoder", True)) | constants
    half["difference"] = out["difference"]
    half = STAGES["unet_decoder_cond"](model, half | own("unet_decoder", True))

    times, hint = torch.full((samples,), t), [edges.expand(samples, -1, -1, -1)]
    context = text["context"]
    e_cond = model.apply_model(x, times, {"c_concat": hint, "c_crossattn": [context[:samples]]})
    uncond = {"c_concat": None if guess_mode else hint, "c_crossattn": [context[samples:]]}
    e_uncond = model.apply_model(x, times, uncond)
    e = e_uncond + guidance * (e_cond - e_uncond)
    assert close(out["e"], e)
    assert close(out["x_next"], 0.9 * x - 0.2 * e + 0.3 * e1 - 0.1 * e2 + noise)
    assert close(out["difference"], e_cond - e_uncond)
    assert close(half["e"], e) and close(half["x_next"], out["x_next"])
    assert not close(e_cond, e_uncond)


def test_clip_time_and_hint_equal_the_plain_model(model: ControlLDM) -> None:
    tokens = torch.randint(0, 49406, (2, 77), generator=torch.Generator().manual_seed(0))
    text = STAGES["clip"](model, {"tokens": tokens})
    context = model.cond_stage_model.transformer(input_ids=tokens).last_hidden_state
    attention: Any = model.unet.get_submodule("middle_block.1.transformer_blocks.0.attn2")
    last = max(int(name.rpartition("k")[2]) for name in text if name.startswith("unet_encoder.k"))
    assert close(text["context"], context)
    assert close(text[f"unet_encoder.k{last}"], attention.to_k(context))
    assert close(text[f"unet_encoder.v{last}"], attention.to_v(context))
    rows = STAGES["time"](model, {"timesteps": torch.tensor([1, 951])})
    block: Any = model.control_model.get_submodule("input_blocks.1.0")
    assert close(rows["control.row0"], block.emb_layers(model.control_model.embed_time(torch.tensor([1, 951]))))


def test_vae_stages_equal_the_plain_model(model: ControlLDM) -> None:
    x = 0.2 * torch.randn(2, 4, 8, 8)
    picture = STAGES["vae_decoder"](model, {"x": x})["picture"]
    plain = (model.decode_first_stage(x).permute(0, 2, 3, 1) * 127.5 + 127.5).numpy().clip(0, 255).astype(np.uint8)
    assert picture.dtype == torch.uint8 and np.array_equal(picture.numpy(), plain)
    back = STAGES["vae_encoder"](model, {"picture": picture})["x"]
    scaled = picture.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert close(back, model.first_stage_model.encode(scaled).mean * model.scale_factor)


ARGUMENTS: dict[str, Any] = {
    "prompt": "a bird", "a_prompt": "best quality", "n_prompt": "lowres", "num_samples": 1, "image_resolution": 64,
    "ddim_steps": 4, "guess_mode": False, "strength": 1.0, "scale": 9.0, "seed": 5, "eta": 0.0, "low_threshold": 50,
    "high_threshold": 150,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{}, {"num_samples": 3, "eta": 0.7}, {"guess_mode": True}, {"strength": 0.3, "scale": 2.0}, {"scale": 1.0}],
    ids=str,
)
def test_the_staged_pipeline_equals_the_reference(model: ControlLDM, change: dict) -> None:
    arguments = {"input_image": read_image(BIRD)} | ARGUMENTS | change
    expected = Reference(model).process(**arguments)
    found = Staged(model, Schedule.parse("full", 4)).process(**arguments)
    assert len(found) == len(expected) == arguments["num_samples"]
    for a, b in zip(found, expected, strict=True):
        # Truncation to whole numbers turns a rounding error into a step of one.
        assert a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 1 and b.std() > 5


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": 6}, {"prompt": "a cat"}, {"strength": 0.5}, {"eta": 0.5}, {"scale": 4.0}),
        *({"guess_mode": True}, {"ddim_steps": 5}, {"low_threshold": 10}),
    ],
    ids=str,
)
def test_every_parameter_matters(model: ControlLDM, change: dict) -> None:
    arguments = {"input_image": read_image(BIRD)} | ARGUMENTS
    first = Reference(model).process(**arguments)[0]
    assert np.array_equal(first, Reference(model).process(**arguments)[0])
    assert not np.array_equal(first, Reference(model).process(**arguments | change)[0])


def test_the_staged_pipeline_skips_steps_as_the_loop_does(model: ControlLDM) -> None:
    """A schedule with skipped steps equals the plain sampler that reuses the last e there."""

    class Skipping(DDIMSampler):
        kept: Tensor

        def guided(self, x: Tensor, t: Tensor, *rest) -> Tensor:  # type: ignore[no-untyped-def]
            if int(t[0]) in evaluated:
                self.kept = super().guided(x, t, *rest)
            return self.kept

    schedule = Schedule.parse("9,8,5,1", 10)
    evaluated = {u.evaluation.timestep for u in schedule.updates()}
    arguments = {"input_image": read_image(BIRD)} | ARGUMENTS | {"ddim_steps": 10, "eta": 0.4}
    reference = Reference(model)
    reference.sampler = Skipping(model)
    expected = reference.process(**arguments)[0].astype(int)
    assert np.abs(Staged(model, schedule).process(**arguments)[0] - expected).max() <= 1
    with pytest.raises(ValueError, match="10 steps, not 20"):
        Staged(model, schedule).process(**arguments | {"ddim_steps": 20})
