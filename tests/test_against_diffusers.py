"""The PyTorch networks and the sampler against Hugging Face's: CLIP, autoencoder, UNet, ControlNet and DDIM.

`transformers` and `diffusers` were written by others for the same checkpoints. Weights are random and none is zero, and
diffusers' own converter of SD 1.x checkpoints names them. All runs in float64, where a slip as small as a wrong epsilon
in a GroupNorm shows; what diffusers itself holds in float32, the noise schedule, is compared to float32's precision.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cldm.cldm import ControlLDM, ControlledUnetModel, ControlNet
from cldm.ddim_hacked import DDIMSampler
from cldm.samplers import dpm_solver_pp_2m, even_timesteps, unipc
from ldm.autoencoder import AutoencoderKL
from ldm.clip import FrozenCLIPEmbedder
from runtime.schedule import alphas_cumprod, ddim_timesteps

# transformers 4 cannot make CLIP's causal mask in float64.
transformers = pytest.importorskip("transformers", "5", "transformers 5 is not installed: pip install -e .[peers]")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e .[peers]")

from diffusers.loaders import single_file_utils as convert  # noqa: E402

TOLERANCE = 1e-10  # of what is computed in float64
FLOAT32 = 1e-5  # of what diffusers holds in float32
WIDTHS, VOCAB, TOKENS, CONTEXT = [32, 64, 128, 128], 500, 77, 24


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@lru_cache(maxsize=1)
def ours() -> ControlLDM:
    """SD 1.5 + ControlNet a tenth as wide, with random weights, those that start at zero included."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "in_channels": 4, "model_channels": 32, "num_res_blocks": 2, "attention_resolutions": [4, 2, 1],
        "channel_mult": [1, 2, 4, 4], "num_heads": 8, "context_dim": CONTEXT,
    }  # fmt: skip
    ddconfig = {"z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    model = ControlLDM(
        ControlNet(hint_channels=3, **sizes),
        ControlledUnetModel(out_channels=4, **sizes),
        AutoencoderKL(ddconfig, embed_dim=4),
        FrozenCLIPEmbedder(width=CONTEXT, layers=3, heads=4, max_length=TOKENS, vocab=VOCAB),
    )
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.normal_(0, module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.weight.normal_(1, 0.2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.2)
    return model.double().eval()


@lru_cache(maxsize=1)
def theirs() -> SimpleNamespace:
    """Their networks with our weights, every one of them and no others."""
    config = transformers.CLIPTextConfig(
        vocab_size=VOCAB, hidden_size=CONTEXT, intermediate_size=4 * CONTEXT, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    clip = transformers.CLIPTextModel(config)
    vae = diffusers.AutoencoderKL(
        block_out_channels=WIDTHS, layers_per_block=2, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    # `attention_head_dim` is a misnomer that diffusers keeps: in SD 1.5's config.json it is the number of heads.
    sizes: dict[str, Any] = {"block_out_channels": WIDTHS, "cross_attention_dim": CONTEXT, "attention_head_dim": 8}
    unet, control = diffusers.UNet2DConditionModel(**sizes), diffusers.ControlNetModel(**sizes)
    weights = ours().state_dict()
    vae.load_state_dict(convert.convert_ldm_vae_checkpoint(weights, vae.config))
    unet.load_state_dict(convert.convert_ldm_unet_checkpoint(weights, unet.config))
    control.load_state_dict(convert.convert_controlnet_checkpoint(weights, control.config))
    clip.load_state_dict(ours().cond_stage_model.transformer.text_model.state_dict())
    for network in (clip, vae, unet, control):
        network.double().eval()
    return SimpleNamespace(clip=clip, vae=vae, unet=unet, control=control)


def error(result: Tensor, expected: Tensor) -> float:
    """‖a − b‖ / ‖b‖ of tensors of one shape."""
    assert result.shape == expected.shape
    return float((result.double() - expected.double()).norm() / expected.double().norm())


@lru_cache(maxsize=1)
def case() -> SimpleNamespace:
    """Inputs of the networks: a batch of 3, not square, each sample at a timestep of its own."""
    torch.manual_seed(1)
    x, context = torch.randn(3, 4, 16, 24).double(), torch.randn(3, TOKENS, CONTEXT).double()
    hint = (torch.rand(3, 3, 128, 192) > 0.8).double()
    return SimpleNamespace(x=x, t=torch.tensor([1, 501, 981]), context=context, hint=hint)


# -- the networks -----------------------------------------------------------------------------------------------------


def test_text_encoder() -> None:
    ids = torch.randint(0, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(2))
    result = ours().cond_stage_model.transformer(input_ids=ids).last_hidden_state
    assert error(result, theirs().clip(input_ids=ids).last_hidden_state) < TOLERANCE


def test_autoencoder() -> None:
    picture, z, peer = case().hint[:2] * 2 - 1, case().x[:2], theirs().vae
    result, expected = ours().first_stage_model.encode(picture), peer.encode(picture).latent_dist
    assert error(result.mean, expected.mean) < TOLERANCE
    assert error(result.logvar, expected.logvar) < TOLERANCE
    assert error(ours().first_stage_model.decode(z), peer.decode(z).sample) < TOLERANCE
    assert ours().scale_factor == peer.config.scaling_factor


def test_time_embedding() -> None:
    t, peer = torch.arange(1000), theirs().unet
    assert error(ours().unet.embed_time(t), peer.time_embedding(peer.time_proj(t).double())) < TOLERANCE


def test_unet_without_control() -> None:
    c = case()
    expected = theirs().unet(c.x, c.t, c.context).sample
    assert error(ours().unet(c.x, c.t, c.context), expected) < TOLERANCE
    assert error(ours().apply_model(c.x, c.t, {"c_concat": None, "c_crossattn": [c.context]}), expected) < TOLERANCE


def their_residuals(scale: float) -> list[Tensor]:
    """The residuals of the skips and, last, of the middle block."""
    c = case()
    down, middle = theirs().control(c.x, c.t, c.context, c.hint, conditioning_scale=scale, return_dict=False)
    return [*down, middle]


def test_controlnet_residuals() -> None:
    c = case()
    result = ours().control_model(x=c.x, hint=c.hint, timesteps=c.t, context=c.context)
    errors = [error(a, b) for a, b in zip(result, their_residuals(1.0), strict=True)]
    assert len(errors) == 13 and max(errors) < TOLERANCE, errors


@pytest.mark.parametrize("only_mid", [False, True])
@pytest.mark.parametrize("scales", [[0.6] * 13, [0.3 + 0.1 * i for i in range(13)]], ids=["one", "each"])
def test_unet_with_control(scales: list[float], only_mid: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    c, model = case(), ours()
    monkeypatch.setattr(model, "control_scales", scales)
    monkeypatch.setattr(model, "only_mid_control", only_mid)
    # diffusers knows one scale for all: what each has beyond the first is multiplied in here.
    *down, middle = [r * (scale / scales[0]) for r, scale in zip(their_residuals(scales[0]), scales, strict=True)]
    control = {
        "down_block_additional_residuals": [torch.zeros_like(r) if only_mid else r for r in down],
        "mid_block_additional_residual": middle,
    }
    result = model.apply_model(c.x, c.t, {"c_concat": [c.hint], "c_crossattn": [c.context]})
    assert error(result, theirs().unet(c.x, c.t, c.context, **control).sample) < TOLERANCE
    assert error(result, model.unet(c.x, c.t, c.context)) > 0.01  # the control counts


# -- the sampler ------------------------------------------------------------------------------------------------------


def scheduler(steps: int) -> Any:
    """diffusers' DDIM as SD 1.5's scheduler_config.json sets it, made to take the steps of ControlNet's code."""
    made = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.0120, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False,
        clip_sample=False, timestep_spacing="leading",
    )  # fmt: skip
    made.set_timesteps(steps)
    made.timesteps = torch.from_numpy(ddim_timesteps(steps)[::-1].copy())
    return made


def test_noise_schedule() -> None:
    """The checkpoint's is multiplied up in float64 and rounded once; diffusers' is multiplied up in float32."""
    for alphas in (ours().alphas_cumprod, torch.from_numpy(alphas_cumprod())):
        assert float((alphas / scheduler(20).alphas_cumprod - 1).abs().max()) < FLOAT32


def test_timesteps() -> None:
    """diffusers takes as many steps as asked for, ControlNet's code one at every stride: 8 where 7 are asked for."""
    peer = scheduler(20)
    for steps in range(1, 1001):
        peer.set_timesteps(steps)
        result, expected = ddim_timesteps(steps), peer.timesteps.numpy()[::-1]
        assert np.array_equal(result[:steps], np.minimum(expected, 999)), steps
        assert len(result) == -(-1000 // (1000 // steps)), steps
    assert len(ddim_timesteps(20)) == 20 and len(ddim_timesteps(7)) == 8


def toy(x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """An e that depends on all three, and not linearly."""
    return torch.sin(x + t.view(-1, 1, 1, 1) / 300) + 0.3 * x.roll(1, -1) + 0.1 * cond["c_crossattn"][0]


@pytest.mark.parametrize("tolerance", [TOLERANCE, FLOAT32], ids=["our-alphas", "their-alphas"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("guidance", [1.0, 9.0])
@pytest.mark.parametrize("steps", [20, 7])
def test_ddim(steps: int, guidance: float, eta: float, tolerance: float) -> None:
    """The whole trajectory: x and the predicted x_0 of every step."""
    torch.manual_seed(4)
    peer, alphas = scheduler(steps), ours().alphas_cumprod
    if tolerance == TOLERANCE:
        peer.alphas_cumprod, peer.final_alpha_cumprod = alphas, alphas[0]
    x, noise = torch.randn(2, 4, 8, 8).double(), torch.randn(len(peer.timesteps), 2, 4, 8, 8).double()
    model: Any = SimpleNamespace(alphas_cumprod=alphas, device=torch.device("cpu"), apply_model=toy)
    cond, uncond = ({"c_crossattn": [torch.randn(2, 4, 8, 8).double()]} for _ in range(2))
    _, result = DDIMSampler(model).sample(
        steps, 2, x.shape[1:], cond, eta=eta, x_T=x, unconditional_guidance_scale=guidance,
        unconditional_conditioning=uncond, noise=lambda k: noise[k],
    )  # fmt: skip
    assert len(result["x_inter"]) == len(result["pred_x0"]) == len(peer.timesteps) + 1
    for i, t in enumerate(peer.timesteps):
        e = toy(x, t[None], uncond)
        e = e + guidance * (toy(x, t[None], cond) - e)
        step = peer.step(e, int(t), x, eta=eta, variance_noise=noise[i] if eta else None)
        x = step.prev_sample
        assert error(result["x_inter"][i + 1], x) < tolerance, i
        assert error(result["pred_x0"][i + 1], step.pred_original_sample) < tolerance, i


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_few_step_solvers(name: str, steps: int) -> None:
    """Where both end at training step 0, the whole trajectories of x are equal."""
    torch.manual_seed(4)
    ours_by_name = {"DPMSolverMultistepScheduler": dpm_solver_pp_2m, "UniPCMultistepScheduler": unipc}
    peer = getattr(diffusers, name)(
        beta_start=0.00085, beta_end=0.0120, beta_schedule="scaled_linear", timestep_spacing="linspace",
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    peer.set_timesteps(steps)
    assert even_timesteps(steps) == peer.timesteps.tolist()
    x, cond = torch.randn(2, 4, 8, 8).double(), {"c_crossattn": [torch.randn(2, 4, 8, 8).double()]}

    def denoise(x: Tensor, t: int) -> Tensor:
        return toy(x, torch.tensor([t]), cond)

    result = ours_by_name[name](denoise, x, even_timesteps(steps), alphas_cumprod())
    for t in peer.timesteps:
        x = peer.step(denoise(x, int(t)), t, x).prev_sample
    assert error(result, x) < 10 * FLOAT32  # their constants are in float32


def test_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything together, their pipeline and ours: from the text's context and the initial noise to the picture."""
    c, model, peer, ddim = case(), ours(), theirs(), scheduler(5)
    monkeypatch.setattr(model, "control_scales", [0.8] * 13)
    ddim.alphas_cumprod, ddim.final_alpha_cumprod = model.alphas_cumprod, model.alphas_cumprod[0]
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        peer.vae, peer.clip, None, peer.unet, peer.control, ddim, None, None, requires_safety_checker=False
    )
    x, hint, prompt, negative = c.x[:1], c.hint[:1], c.context[:1], c.context[1:2]
    expected = pipeline(
        image=hint, num_inference_steps=5, guidance_scale=3.0, controlnet_conditioning_scale=0.8, latents=x,
        prompt_embeds=prompt, negative_prompt_embeds=negative, output_type="pt",
    ).images  # fmt: skip
    cond, uncond = ({"c_concat": [hint], "c_crossattn": [context]} for context in (prompt, negative))
    z, _ = DDIMSampler(model).sample(
        5, 1, x.shape[1:], cond, x_T=x, unconditional_guidance_scale=3.0, unconditional_conditioning=uncond
    )
    picture = (model.decode_first_stage(z) / 2 + 0.5).clamp(0, 1)
    assert float(expected.std()) > 0.1 and error(picture, expected) < TOLERANCE
