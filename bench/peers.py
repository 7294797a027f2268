"""`python bench/peers.py --ours ours.json`: PyTorch on the same GPU, weights and numbers, and one table with ours.

Runs where torch sees a GPU; `python -m bench.ours` writes the other side, where TensorRT is, in the same session.
Each peer makes whole pictures: text, edges, every evaluated step, decoding, and the copy to the host. No TF32.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python bench/peers.py`

import torch  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.ours import SCHEDULES, arguments, spread, timed  # noqa: E402
from cldm.canny2image import Staged  # noqa: E402
from cldm.cldm import ControlLDM  # noqa: E402
from runtime.images import canny_hint, resize_image  # noqa: E402
from runtime.manifest import Manifest  # noqa: E402
from runtime.noise import cuda_randn  # noqa: E402
from runtime.rules import HISTORY  # noqa: E402
from runtime.schedule import Schedule  # noqa: E402
from runtime.tokenizer import tokenize  # noqa: E402
from trt_builder.terminal import output  # noqa: E402
from trt_builder.verify import load_twin  # noqa: E402

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Peer:
    """A way to run the networks in PyTorch: precision, cond and uncond in one batch or apart, and what launches it."""

    name: str
    dtype: torch.dtype
    batched: bool
    launch: str


PEERS = [
    Peer("PyTorch fp32 eager, cond and uncond apart", torch.float32, False, "eager"),
    Peer("PyTorch fp16, batch 2, CUDA graph", torch.float16, True, "graph"),
    Peer("PyTorch fp16, batch 2, torch.compile(reduce-overhead)", torch.float16, True, "compile"),
]


def graphed(function: Function) -> Function:
    """The function as a CUDA graph of its own, captured at the first call; always the same shapes."""
    held: dict[str, Any] = {}

    def call(*given: Tensor) -> Tensor:
        if not held:
            held["in"] = [tensor.clone() for tensor in given]
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):
                    function(*held["in"])
            torch.cuda.current_stream().wait_stream(aside)
            held["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(held["graph"]):
                held["out"] = function(*held["in"])
        for mine, tensor in zip(held["in"], given, strict=True):
            mine.copy_(tensor)
        held["graph"].replay()
        return held["out"]  # type: ignore[no-any-return]

    return call


class Pipeline:
    """Pictures by one peer."""

    def __init__(self, peer: Peer, model: ControlLDM, given: dict[str, Any]) -> None:
        self.model, self.given, self.dtype, self.device = model, given, peer.dtype, model.device
        launch: Callable[[Function], Function] = {
            "eager": lambda function: function,
            "graph": graphed,
            "compile": lambda function: torch.compile(function, mode="reduce-overhead"),
        }[peer.launch]
        self.text = launch(self._text)
        self.noise = launch(self._batched if peer.batched else self._apart)
        self.decode = launch(self._decode)
        self.latent = torch.empty(0)

    def _text(self, tokens: Tensor) -> Tensor:
        return self.model.cond_stage_model.transformer(input_ids=tokens).last_hidden_state  # type: ignore[no-any-return]

    def _batched(self, x: Tensor, t: Tensor, context: Tensor, edges: Tensor) -> Tensor:
        b = len(context)
        cond = {"c_concat": [edges.expand(b, -1, -1, -1)], "c_crossattn": [context]}
        both = self.model.apply_model(torch.cat([x, x]).to(self.dtype), t.repeat(b), cond)
        return self._guided(*both.float().chunk(2))

    def _apart(self, x: Tensor, t: Tensor, context: Tensor, edges: Tensor) -> Tensor:
        n, hint = len(x), [edges.expand(len(x), -1, -1, -1)]
        cond, uncond = (
            self.model.apply_model(x.to(self.dtype), t.repeat(n), {"c_concat": hint, "c_crossattn": [part]}).float()
            for part in context.chunk(2)
        )
        return self._guided(cond, uncond)

    def _guided(self, cond: Tensor, uncond: Tensor) -> Tensor:
        return uncond + self.given["scale"] * (cond - uncond)

    def _decode(self, x: Tensor) -> Tensor:
        y = self.model.decode_first_stage(x.to(self.dtype)).float()
        return (y * 127.5 + 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, edges and the first x, from the picture and the prompts."""
        g = self.given
        tokens = np.repeat(tokenize([f"{g['prompt']}, {g['a_prompt']}", g["n_prompt"]]), g["num_samples"], axis=0)
        image = resize_image(g["input_image"], g["image_resolution"])
        hint = canny_hint(image, g["low_threshold"], g["high_threshold"])
        edges = torch.from_numpy(hint).to(self.device).permute(2, 0, 1)[None].to(self.dtype) / 255
        shape = (g["num_samples"], 4, hint.shape[0] // 8, hint.shape[1] // 8)
        x = torch.from_numpy(cuda_randn(g["seed"], shape)).to(self.device)
        return torch.from_numpy(tokens).to(self.device), edges, x

    @torch.inference_mode()
    def process(self, schedule: Schedule) -> np.ndarray:
        """A picture (N, H, W, 3) uint8, on the host."""
        tokens, edges, x = self.inputs()
        context = self.text(tokens).clone()  # a graph's output is overwritten by its next replay
        last: list[Tensor] = []
        for u in schedule.updates(self.given["eta"]):
            torch.compiler.cudagraph_mark_step_begin()
            e = self.noise(x, torch.tensor([u.evaluation.timestep], device=self.device), context, edges)
            last = [e.clone(), *last[: HISTORY - 1]]
            x = u.a * x + sum(b * e for b, e in zip(u.b, last, strict=False))
        self.latent = x
        return self.decode(x).cpu().numpy()

    @torch.inference_mode()
    def step_ms(self, runs: int) -> list[float]:
        """Milliseconds of each step, by events."""
        tokens, edges, x = self.inputs()
        context, t = self.text(tokens).clone(), torch.tensor([501], device="cuda")
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def once() -> float:
            torch.compiler.cudagraph_mark_step_begin()
            begin.record()
            self.noise(x, t, context, edges)
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end))

        return [once() for _ in range(runs + 5)][5:]


def measure(peer: Peer, weights: ControlLDM, given: dict[str, Any], runs: int) -> tuple[dict, dict]:
    """A peer's numbers, and its latents and pictures by schedule."""
    torch.cuda.reset_peak_memory_stats()
    pipeline = Pipeline(peer, deepcopy(weights).to("cuda", peer.dtype), given)
    found: dict[str, Any] = {"pictures": {}}
    arrays = {}
    for name in SCHEDULES:
        schedule = Schedule.parse(name, given["ddim_steps"])
        found["pictures"][name] = spread(timed(partial(pipeline.process, schedule), runs))
        arrays[f"picture/{name}"] = pipeline.process(schedule)[0]
        arrays[f"latent/{name}"] = pipeline.latent.cpu().numpy()
    found["step"] = spread(pipeline.step_ms(runs))
    found["peak_bytes"] = torch.cuda.max_memory_reserved()
    return found, arrays


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """‖a − b‖ / ‖b‖."""
    b = b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


class Watched(Staged):
    """The stages in PyTorch, which keep the latent that a picture is decoded from."""

    latent: Tensor

    def stage(self, name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if name == "vae_decoder":
            self.latent = inputs["x"]
        return super().stage(name, inputs)


def by_schedule(
    ours: dict[str, Any], arrays: dict[str, np.ndarray], weights: ControlLDM, given: dict[str, Any],
    device: str = "cuda",
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Of every schedule that ours ran: its milliseconds, and how far its latent and fp16's are from fp32's."""
    latents: dict[torch.dtype, dict[str, np.ndarray]] = {}
    for dtype in (torch.float32, torch.float16):
        model, latents[dtype] = deepcopy(weights).to(device, dtype), {}
        for name in ours["pictures"]:
            staged = Watched(model, Schedule.parse(name, given["ddim_steps"]))
            staged.process(**given)
            latents[dtype][name] = staged.latent.float().cpu().numpy()
    exact, half = latents[torch.float32], latents[torch.float16]
    return {
        name: {
            "ms": time["median"],
            "off": distance(arrays[f"latent/{name}"], exact[name]),
            "off_fp16": distance(half[name], exact[name]),
        }
        for name, time in ours["pictures"].items()
    }


def schedule_table(found: dict[str, dict[str, Any]]) -> Table:
    """One line a schedule."""
    view = Table("schedule", "ms a picture", "latent off, ours", "latent off, PyTorch fp16")
    for name, one in found.items():
        view.add_row(name, f"{one['ms']:.2f}", f"{one['off']:.2e}", f"{one['off_fp16']:.2e}")
    return view


def table(found: dict[str, dict[str, Any]], ours: str | None) -> Table:
    """One line a pipeline."""
    view = Table(title="full-size weights, one GPU, medians")
    columns = "ms a step", "×", "20 steps, ms", "×", "hackathon-10, ms", "×", "peak GiB", "latent off", "picture off"
    view.add_column("")
    for column in columns:
        view.add_column(column, justify="right")

    def times(one: dict[str, Any]) -> list[float]:
        values = [one["step"], *(one["pictures"][name] for name in SCHEDULES)]
        return [float(value["median"] if isinstance(value, dict) else value) for value in values]

    for name, one in found.items():
        cells = []
        for value, mine in zip(times(one), times(found[ours]) if ours else times(one), strict=True):
            cells += [f"{value:.2f}", f"{value / mine:.2f}" if ours else ""]
        cells += [f"{one['peak_bytes'] / 2**30:.2f}", *(f"{one['off'][kind]:.2e}" for kind in ("latent", "picture"))]
        view.add_row(name, *cells)
    return view


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; 2 where torch sees no GPU."""
    parser = argparse.ArgumentParser(prog="bench/peers.py", description=__doc__)
    parser.add_argument("--model", default="sd15", help="sd15, tiny or a .yaml file (%(default)s)")
    parser.add_argument("--seed", default="0", help="of the random weights: that of the engines (%(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=[256, 384], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--runs", type=int, default=50, help="pictures a median is of (%(default)s)")
    parser.add_argument("--ours", type=Path, help="what `python -m bench.ours` wrote")
    parser.add_argument("--output", type=Path, default=Path("peers.json"), help="(%(default)s)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench/peers.py: torch sees no NVIDIA GPU here, and a CPU's times would mean nothing.", file=sys.stderr)
        return 2
    manifest = Manifest(options.model, "", "", None, None, [], f"random:{options.seed}", "", {}, {})
    ours, content = None, {}
    if options.ours:
        content = json.loads(options.ours.read_text())
        ours = f"ours, {content['flavour']} {content['version']}"
        if (content["model"], content["weights"]) != (options.model, manifest.weights):
            print(f"bench/peers.py: {options.ours} is of {content['model']} {content['weights']}.", file=sys.stderr)
            return 2
    weights = load_twin(manifest, "cpu")  # on the host, from where each peer takes a copy
    given = arguments(*options.size)
    found: dict[str, Any] = {}
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for peer in PEERS:
        print(peer.name, file=sys.stderr, flush=True)
        found[peer.name], arrays[peer.name] = measure(peer, weights, given, options.runs)
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    if options.ours and ours:
        found[ours], arrays[ours] = content, dict(np.load(options.ours.with_suffix(".npz")))
    exact = arrays[PEERS[0].name]
    for name in found:
        found[name]["off"] = {k: distance(arrays[name][f"{k}/full"], exact[f"{k}/full"]) for k in ("latent", "picture")}
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "size": options.size}
    schedules = by_schedule(content, arrays[ours], weights, given) if ours else {}
    content = {**facts, "found": found, "schedules": schedules}
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    console = output()
    console.print(table(found, ours))
    if schedules:
        console.print(schedule_table(schedules))
    return 0


if __name__ == "__main__":
    sys.exit(main())
