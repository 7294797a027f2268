"""Train the small model: autoencoder, then UNet with text encoder, then ControlNet. Needs a GPU; restartable.

    python models/tiny/train.py --data data --output runs/tiny

Each part is saved in the output folder every minute and when it ends; a run that was stopped goes on from there.
The last step writes tiny.safetensors, every weight in half precision.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cldm.cldm import ControlLDM
from cldm.ddim_hacked import DDIMSampler
from cldm.model import create_model, load_state_dict
from ldm.autoencoder import DiagonalGaussian
from models.tiny.captions import NEGATIVE_PROMPT
from models.tiny.data import Pool, evaluation_set, load_emoji, make_pool
from models.tiny.perceptual import LPIPS
from runtime.tokenizer import END, START, tokenize

log = logging.getLogger("train")
CONFIG = Path(__file__).with_name("tiny.yaml")


@dataclass(frozen=True)
class Part:
    """How one part is trained: AdamW under a warm-up and a cosine, EMA kept."""

    steps: int
    batch: int
    rate: float
    warm_up: int = 500
    ema: float = 0.999


PARTS = {
    "vae": Part(steps=14_000, batch=64, rate=8e-4),
    "unet": Part(steps=7_000, batch=512, rate=1.2e-3),
    "control": Part(steps=11_000, batch=512, rate=1e-3, ema=0.998),
}
PERCEPTUAL, KL = 0.7, 2e-4
# The sampler starts from pure noise, but at training's last steps a trace of the picture is left in x, from which a
# network reads the background's brightness. Half of the samples beyond this step therefore see pure noise.
PURE_NOISE_FROM = 940
SAVE_EVERY = 60  # seconds
NO_HINT = 0.15  # share of ControlNet's samples without a hint: the UNet's output half trains along and must do without
UNKNOWN = 0.1  # share of words replaced by an unknown one, so that the model makes do with what it does not know
NO_TEXT = 0.3  # share of ControlNet's samples without a prompt, so that it reads the hint (Zhang et al. 2023)


class Samples:
    """The training pool on the device: pictures, edges, latents' moments and token ids, drawn at random."""

    def __init__(self, pool: Pool, device: torch.device) -> None:
        self.device = device
        self.image = torch.from_numpy(pool.image).to(device)
        self.edges = torch.from_numpy(pool.edges).to(device)
        self.tokens = torch.from_numpy(tokenize(pool.caption)).to(device)
        self.no_text = torch.from_numpy(tokenize([""])).to(device)
        self.unseen = torch.ones(END + 1, dtype=torch.bool, device=device)
        self.unseen[self.tokens.unique().long()] = False
        self.unknown = self.unseen.nonzero()[0, 0]  # this token stands for all of them
        self.moments: tuple[Tensor, Tensor] | None = None

    def index(self, n: int) -> Tensor:
        return torch.randint(len(self.image), (n,), device=self.device)

    def pictures(self, i: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1]."""
        return self.image[i].permute(0, 3, 1, 2).float() / 127.5 - 1

    def hints(self, i: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1]."""
        return (self.edges[i].float() / 255)[:, None].expand(-1, 3, -1, -1)

    @torch.no_grad()
    def encode(self, model: ControlLDM) -> None:
        """Keep the posterior's moments of every picture."""
        parts = []
        for i in torch.arange(len(self.image), device=self.device).split(512):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                q = model.first_stage_model.encode(self.pictures(i))
            parts.append((q.mean.half(), q.logvar.half()))
        self.moments = torch.cat([m for m, _ in parts]), torch.cat([v for _, v in parts])

    def latents(self, i: Tensor, scale: float) -> Tensor:
        """A draw of the scaled latents (B, 4, h, w)."""
        assert self.moments is not None, "encode first"
        mean, logvar = (m[i].float() for m in self.moments)
        return scale * (mean + (0.5 * logvar).exp() * torch.randn_like(mean))


def vae_loss(work: ControlLDM, lpips: nn.Module, data: Samples, batch: int) -> Tensor:
    """L1 + LPIPS + a little KL, all means."""
    x = data.pictures(data.index(batch)).to(work.dtype)
    vae = work.first_stage_model
    mean, logvar = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
    q = DiagonalGaussian(mean.float(), logvar.float())
    y = vae.decode(q.sample().to(x.dtype))
    kl = 0.5 * (q.mean.square() + q.logvar.exp() - 1 - q.logvar).mean()
    return (y.float() - x.float()).abs().mean() + PERCEPTUAL * lpips(y, x).mean() + KL * kl


def noise_loss(work: ControlLDM, acp: Tensor, data: Samples, batch: int, control: bool) -> Tensor:
    """Squared error of e under min-SNR weights (Hang et al. 2023, γ = 5); `acp` is ᾱ of every timestep."""
    i = data.index(batch)
    x0 = data.latents(i, work.scale_factor)
    t = torch.randint(len(acp), (batch,), device=data.device)
    noise = torch.randn_like(x0)
    a = acp[t][:, None, None, None]
    x = a.sqrt() * x0 + (1 - a).sqrt() * noise
    pure = (t >= PURE_NOISE_FROM) & (torch.rand(batch, device=data.device) < 0.5)
    x = torch.where(pure[:, None, None, None], noise, x)
    target = (x - a.sqrt() * x0) / (1 - a).sqrt()  # the noise, unless x is nothing but noise
    x = x.to(work.dtype)
    tokens = data.tokens[i]
    hide = (torch.rand(tokens.shape, device=data.device) < UNKNOWN) & (tokens < START)
    tokens = torch.where(hide, data.unknown.to(tokens.dtype), tokens)
    if control:
        drop = torch.rand(batch, 1, device=data.device) < NO_TEXT
        tokens = torch.where(drop, data.no_text, tokens)
    context = work.cond_stage_model.transformer(input_ids=tokens).last_hidden_state
    hint = data.hints(i).to(x.dtype)
    residuals = None
    if control:
        keep = (torch.rand(batch, 1, 1, 1, device=data.device) >= NO_HINT).to(x.dtype)
        residuals = [r * keep for r in work.control_model(x=x, hint=hint, timesteps=t, context=context)]
    e = work.unet(x, t, context, residuals)
    weight = (5 * (1 - a) / a).clamp(max=1)
    return (weight * (e.float() - target).square()).mean()


def fit(name: str, part: Part, modules: list[nn.Module], copies: list[nn.Module], loss: Callable[[], Tensor],
        check: Callable[[], Tensor], output: Path, minutes: float | None = None) -> None:  # fmt: skip
    """Train `modules` on `loss`, which runs their half-precision `copies`; goes on where it was stopped.

    With `minutes` the number of steps is what fits in them on this machine.

    Afterwards the moving average is in both. On a GPU the whole step, optimiser included, is one CUDA graph: networks
    this small are bound by launches otherwise.
    """
    params: list[Tensor] = [p for m in modules for p in m.parameters()]
    mirror: list[Tensor] = [p.requires_grad_(True) for m in copies for p in m.parameters()]
    device = params[0].device
    grads = [torch.zeros_like(p) for p in params]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    rate = torch.zeros((), device=device)
    gpu = device.type == "cuda"
    optimiser = torch.optim.AdamW(params, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=gpu, capturable=gpu)
    ema = [p.detach().clone() for p in params]
    path = output / f"{name}.pt"
    first = restore(path, params, ema, optimiser, device)
    with torch.no_grad():
        torch._foreach_copy_(mirror, params)
    if first < part.steps or minutes:
        log.info("%s: %.2f M weights from step %d", name, sum(p.numel() for p in params) / 1e6, first)
        value = torch.zeros((), device=device)

        def step() -> None:
            for p in mirror:
                p.grad = None
            total = loss()
            total.backward()
            torch._foreach_copy_(grads, [p.grad for p in mirror if p.grad is not None])
            nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
            optimiser.step()
            with torch.no_grad():
                torch._foreach_copy_(mirror, params)
                torch._foreach_lerp_(ema, params, 1 - part.ema)
                value.copy_(total)

        run = captured(step) if gpu else step
        if minutes:
            part = replace(part, steps=first + int(60 * minutes / measured(run, device)))
        saved = time.monotonic()
        with tqdm(range(first, part.steps), initial=first, total=part.steps, desc=name, mininterval=5) as bar:
            for i in bar:
                warm, cosine = min(1.0, (i + 1) / part.warm_up), 0.5 * (1 + math.cos(math.pi * i / part.steps))
                rate.fill_(part.rate * warm * max(cosine, 0.01))
                run()
                if i % 500 == 499:
                    bar.set_postfix(loss=f"{value.item():.4f}", held_out=f"{check().item():.4f}")
                if time.monotonic() - saved > SAVE_EVERY:
                    save(path, i + 1, ema, params, optimiser)
                    saved = time.monotonic()
        save(path, part.steps, ema)
    with torch.no_grad():
        torch._foreach_copy_(params, ema)
        torch._foreach_copy_(mirror, ema)
    for p in [*params, *mirror]:
        p.requires_grad_(False)
        p.grad = None


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph, after three plain ones on a side stream (at rate 0) that set up every library."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def measured(run: Callable[[], None], device: torch.device, times: int = 20) -> float:
    """Seconds that one step takes; the rate is still 0, so these steps change nothing."""
    start = time.monotonic()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.monotonic() - start) / times


def save(path: Path, step: int, ema: list[Tensor], params: list[Tensor] | None = None,
         optimiser: torch.optim.Optimizer | None = None) -> None:  # fmt: skip
    """Write a checkpoint, whole or not at all; a finished part needs only its average."""
    state: dict = {"step": step, "ema": ema}
    if params is not None and optimiser is not None:
        state |= {"params": [p.detach() for p in params], "optimiser": optimiser.state_dict()}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def restore(path: Path, params: list[Tensor], ema: list[Tensor], optimiser: torch.optim.Optimizer,
            device: torch.device) -> int:  # fmt: skip
    """Load what `save` wrote, if it is there; returns the step to go on from."""
    if not path.is_file():
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    with torch.no_grad():
        for mine, theirs in zip([*ema, *params], [*state["ema"], *state.get("params", state["ema"])], strict=True):
            mine.copy_(theirs)
    if "optimiser" not in state:
        return state["step"]
    rate = optimiser.param_groups[0]["lr"]
    optimiser.load_state_dict(state["optimiser"])
    optimiser.param_groups[0]["lr"] = rate
    return state["step"]


@torch.no_grad()
def normalise_latents(model: ControlLDM, data: Samples) -> None:
    """Fold each latent channel's mean and deviation into quant_conv and post_quant_conv.

    Afterwards the latents have mean 0 and, times the scale factor of Stable Diffusion, deviation 1.
    """
    into, out = model.first_stage_model.quant_conv, model.first_stage_model.post_quant_conv
    data.encode(model)
    assert data.moments is not None and into.bias is not None and out.bias is not None
    z = data.moments[0].float()
    mean, deviation = z.mean((0, 2, 3)), z.std((0, 2, 3)) * model.scale_factor
    n = len(mean)
    into.weight[:n] /= deviation[:, None, None, None]
    into.bias[:n] = (into.bias[:n] - mean) / deviation
    into.bias[n:] -= 2 * deviation.log()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= deviation[None, :, None, None]


@torch.no_grad()
def preview(model: ControlLDM, data: Samples, captions: list[str], path: Path, strengths: tuple[float, ...]) -> None:
    """A sheet of held-out pictures: truth, autoencoder, hint, then a sample for each strength."""
    n = min(12, len(data.image))
    i = torch.arange(n, device=data.device)
    truth = data.pictures(i)
    rows = [truth, model.decode_first_stage(model.encode_first_stage(truth)), data.hints(i) * 2 - 1]
    cond = model.get_learned_conditioning(captions[:n])
    uncond = model.get_learned_conditioning([NEGATIVE_PROMPT] * n)
    for strength in strengths:
        model.control_scales = [strength] * len(model.control_scales)
        hint = [data.hints(i)] if strength else None
        x, _ = DDIMSampler(model).sample(
            20, n, (4, truth.shape[2] // 8, truth.shape[3] // 8), {"c_concat": hint, "c_crossattn": [cond]},
            x_T=torch.randn(n, 4, truth.shape[2] // 8, truth.shape[3] // 8,
                            generator=torch.Generator().manual_seed(0)),
            unconditional_guidance_scale=3.0, unconditional_conditioning={"c_concat": hint, "c_crossattn": [uncond]},
        )  # fmt: skip
        rows.append(model.decode_first_stage(x))
    sheet = torch.cat([torch.cat(list(row.float().clamp(-1, 1)), 2) for row in rows], 1)
    cv2.imwrite(str(path), ((sheet.permute(1, 2, 0).cpu().numpy() + 1) * 127.5).astype(np.uint8)[..., ::-1])


def train(options: argparse.Namespace) -> None:
    """The three parts in their order."""
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    torch.backends.cudnn.benchmark = True
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    parts = {
        name: replace(p, steps=steps or p.steps, batch=options.batch or p.batch, rate=options.rate or p.rate)
        for (name, p), steps in zip(PARTS.items(), options.steps, strict=True)
    }

    emojis = load_emoji(options.data)
    data = Samples(make_pool(emojis, options.samples, options.seed, options.workers, vary=options.vary), device)
    few = max(options.samples // 100, 16)
    held = Samples(make_pool(emojis, few, options.seed + 1, options.workers, held_out=True), device)
    held.unknown = data.unknown
    shown = evaluation_set(emojis)[:12]
    sheet = Samples(Pool(np.stack([s.image for s in shown]), np.stack([s.edges for s in shown]),
                         [s.caption for s in shown], np.arange(len(shown))), device)  # fmt: skip
    model = create_model(CONFIG).to(device).requires_grad_(False)
    embeddings = model.cond_stage_model.transformer.text_model.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.2)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.05)
    if options.start:
        model.load_state_dict(load_state_dict(options.start, device))
    unet, vae, text, control = model.unet, model.first_stage_model, model.cond_stage_model, model.control_model
    acp = model.alphas_cumprod
    work = copy.deepcopy(model).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    lpips = LPIPS(options.perceptual).to(device, work.dtype) if "vae" in options.parts else nn.Identity()
    if device.type == "cuda" and not options.no_compile:
        for network in (work.first_stage_model.encoder, work.first_stage_model.decoder, lpips, work.unet,
                        work.control_model, work.cond_stage_model.transformer):  # fmt: skip
            network.compile(dynamic=False)

    def part(name: str, modules: list[nn.Module], copies: list[nn.Module], loss: Callable[[Samples, int], Tensor],
             strengths: tuple[float, ...]) -> None:  # fmt: skip
        batch = parts[name].batch
        if name in options.parts:
            fit(name, parts[name], modules, copies, lambda: loss(data, batch), lambda: loss(held, batch).detach(),
                output, options.minutes)  # fmt: skip
            if name == "unet":
                embeddings.token_embedding.weight[data.unseen] = embeddings.token_embedding.weight[data.unknown].clone()
        if name == "vae" and name in options.parts:
            normalise_latents(model, data)
            work.first_stage_model.load_state_dict(vae.state_dict())
        if name == "vae":
            data.encode(model)
            held.encode(model)
        if name in options.parts:
            preview(model, sheet, [s.caption for s in shown], output / f"{name}.png", strengths)

    part("vae", [vae], [work.first_stage_model], lambda d, n: vae_loss(work, lpips, d, n), ())
    part("unet", [unet, text], [work.unet, work.cond_stage_model],
         lambda d, n: noise_loss(work, acp, d, n, False), (0.0,))  # fmt: skip
    if "unet" in options.parts:
        control.load_state_dict({k: v for k, v in unet.state_dict().items() if k in control.state_dict()}, strict=False)
    # With the output half of the UNet unlocked (the original's sd_locked=False), edges are followed far better.
    part("control", [control, unet.output_blocks, unet.out],
         [work.control_model, work.unet.output_blocks, work.unet.out],
         lambda d, n: noise_loss(work, acp, d, n, True), (1.0, 0.0))  # fmt: skip
    weights = {k: v.half().contiguous().cpu() for k, v in model.state_dict().items()}
    save_file(weights, output / "tiny.safetensors", {"format": "pt"})
    (output / "tiny.safetensors").chmod(0o644)
    log.info("wrote %s", output / "tiny.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the npm tarballs (default: data)")
    parser.add_argument("--output", type=Path, default=Path("runs/tiny"), help="folder for checkpoints and the result")
    parser.add_argument("--samples", type=int, default=200_000, help="size of the pool of training samples")
    parser.add_argument("--steps", type=int, nargs=3, default=[0, 0, 0], metavar=("VAE", "UNET", "CONTROL"),
                        help="steps of each part, 0 for the default")  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to train (all)")
    parser.add_argument("--start", type=Path, help="weights to start from, for the parts that are not trained too")
    parser.add_argument("--minutes", type=float, help="train each part for so long instead of a number of steps")
    parser.add_argument("--batch", type=int, default=0, help="samples a step, 0 for each part's default")
    parser.add_argument("--vary", type=float, default=1.0, help="how far the samples are changed (default: 1)")
    parser.add_argument("--rate", type=float, default=0, help="learning rate, 0 for each part's default")
    parser.add_argument("--workers", type=int, help="processes that make samples (default: all cores)")
    parser.add_argument("--perceptual", type=Path, help="weights file of stlpips-pytorch (default: the installed one)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("train: no GPU here; training needs one (--device cpu is for a smoke test)")
    train(options)


if __name__ == "__main__":
    main()
