"""The engines of one shape with their memory, streams and graphs: what a picture is once its inputs are numbers.

Every buffer is allocated once, and a stage's outputs are the next stage's inputs by address. What changes between
pictures (tokens, edges, noise, scales, guidance, coefficients) is read from device memory, what changes between steps
(time rows, coefficients, noise, x) lies at an address of its own for each step: so that a captured graph serves for all
pictures of its schedule.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from runtime.engine import Binding, Flavour, Plan, check
from runtime.manifest import EngineError, Manifest
from runtime.memory import Layout, Recent, Resources, aligned
from runtime.rules import HISTORY
from runtime.schedule import Evaluation
from runtime.steps import COND, STEP, Steps

STAGES = ("clip", "hint", "time", *STEP, "vae_decoder")
UPLOAD = ("scales", "guidance", "x", "edges")  # what a picture brings besides its text, in one copy
LATENTS = ("x", "x_next", "e", "e1", "e2", "difference", "noise")  # all of one shape, in float32
WARM_UP = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PipelineOptions:
    """How a picture is launched; each is a switch so that its gain can be measured.

    graph: the whole picture as one CUDA graph, each step as one, or none.
    two_streams: `control` and `unet_encoder` at the same time.
    hoist: `hint` and `time` once, and not again in every evaluated step.
    skip_text: `clip` only where the prompts are not those of the picture before.
    overlap: launch `clip` on its own first, so that it runs while the host resizes and looks for edges.
    share_memory: one activation memory for all engines that do not run at the same time.
    shapes, schedules: how many shapes stay loaded, and for each how many schedules; the least recently used go.
    """

    graph: Literal["picture", "step", "none"] = "picture"
    two_streams: bool = True
    hoist: bool = True
    skip_text: bool = True
    overlap: bool = True
    share_memory: bool = True
    shapes: int = 2
    schedules: int = 4

    def __post_init__(self) -> None:
        if self.graph not in ("picture", "step", "none"):
            raise ValueError(f"the option graph is {self.graph!r}, but must be picture, step or none.")
        for name in ("shapes", "schedules"):
            if getattr(self, name) < 1:
                raise ValueError(f"the option {name} is {getattr(self, name)}, but must be at least 1.")


def buffer_name(stage: str, tensor: str) -> str:
    """The buffer that a stage's input or output lies in: what is made of the text is named as `clip` names it."""
    return f"{stage.removesuffix('_cond')}.{tensor}" if re.fullmatch(r"(k|v|text)\d+", tensor) else tensor


def per_step(stage: str, tensor: str) -> bool:
    """Whether a tensor lies elsewhere in every step."""
    once = ("x", "x_next", "e", "e1", "e2", "noise", "coefficients")
    return tensor in once or (stage in (*STEP, *COND) and tensor.startswith("row"))


def activation_places(sizes: Mapping[str, int], share: bool) -> dict[str, int]:
    """The offset of each stage's activation memory: 0 for all but `unet_encoder`, which runs beside `control`."""
    if not share:
        return Layout(sizes).offsets
    beside = {"unet_encoder": "control", "unet_encoder_cond": "control_cond"}
    return {stage: aligned(sizes[beside[stage]]) if stage in beside else 0 for stage in sizes}


class Session:
    """The engines of one folder, loaded; `prepare` a schedule, `start` the text, fill `host`, then `run` and `wait`.

    Raises EngineError where a plan is missing, is not what the manifest vouches for, or does not fit the others, and
    OutOfMemory where the GPU's memory does not suffice; either way everything is given back.
    """

    def __init__(self, manifest: Manifest, flavour: Flavour, options: PipelineOptions) -> None:
        self.manifest, self.options = manifest, options
        self.plans: dict[str, Plan] = {}
        self.steps: Recent[tuple[Evaluation, ...], Steps] = Recent(options.schedules)
        self.captures = 0
        self._text: bytes | None = None  # the tokens of the text that is on the GPU
        self.resources = Resources()
        try:
            self.main, self.side = self.resources.stream(), self.resources.stream()
            self._forked, self._joined = self.resources.event(), self.resources.event()
            for stage in (*STAGES, *(COND if set(COND) <= manifest.stages.keys() else ())):
                self.plans[stage] = Plan(manifest.plan_bytes(stage), flavour, own_memory=False)
            self._place_activations()
            self._place_buffers()
            self.wait()
        except BaseException:
            self.close()
            raise

    # -- memory -------------------------------------------------------------------------------------------------------

    def _place_activations(self) -> None:
        sizes = {stage: plan.activation_bytes for stage, plan in self.plans.items()}
        places = activation_places(sizes, self.options.share_memory)
        size = max(places[stage] + aligned(sizes[stage]) for stage in sizes)
        block = self.resources.device(size, self.main)
        for stage, plan in self.plans.items():
            plan.set_activation_memory(block + places[stage], aligned(sizes[stage]))
        self.memory = {"activation": size, "activation_apart": sum(map(aligned, sizes.values()))}
        log.info(
            "%s: the engines share %.0f MiB of activation memory instead of %.0f MiB.",
            self.manifest.folder, size / 2**20, self.memory["activation_apart"] / 2**20,
        )  # fmt: skip

    def _place_buffers(self) -> None:
        bindings: dict[str, Binding] = {}
        latent = self.plans["control"].inputs["x"]
        for stage, plan in self.plans.items():
            for tensor, binding in (plan.inputs | plan.outputs).items():
                name = buffer_name(stage, tensor)
                theirs = latent if tensor in LATENTS else bindings.get(name)
                if per_step(stage, tensor) and tensor.startswith("row"):  # of which `time` makes several at once
                    theirs = replace(bindings[f"{stage.removesuffix('_cond')}.{tensor}"], shape=binding.shape)
                self._agree(stage, binding, theirs)
                if not per_step(stage, tensor):
                    bindings.setdefault(name, binding)
        self.bindings = bindings | {"x": latent}
        sizes = {name: b.nbytes for name, b in self.bindings.items()}
        first = {name: sizes[name] for name in UPLOAD}
        self._upload = Layout(first)
        others = ["x_next", "nothing", *(f"estimate{i}" for i in range(HISTORY))]
        layout = Layout(first | sizes | dict.fromkeys(others, latent.nbytes))  # those to upload at the block's begin
        block = self.resources.device(layout.nbytes, self.main)
        self.at = {name: block + offset for name, offset in layout.offsets.items()}
        self.latents = self.at["x"], self.at["x_next"]
        self.estimates = [self.at[f"estimate{i}"] for i in range(HISTORY)]
        self._pinned = self.resources.pinned(self._upload.nbytes)
        self.host = {name: self._view(self._pinned, name, self._upload.offsets[name]) for name in UPLOAD}
        for name in ("tokens", "timesteps", "picture"):
            self.host[name] = self._view(self.resources.pinned(sizes[name]), name)
        self.memory |= {
            "buffers": layout.nbytes,
            "plans": sum(self.manifest.stages[stage].bytes for stage in self.plans),
        }
        for stage, plan in self.plans.items():
            names = (name for name in (*plan.inputs, *plan.outputs) if not per_step(stage, name))
            plan.bind({name: self.at[buffer_name(stage, name)] for name in names})

    def _agree(self, stage: str, mine: Binding, theirs: Binding | None) -> None:
        """Raise EngineError unless two stages see a tensor alike, or one of them its first half."""
        halves = {mine.shape, (2 * mine.shape[0], *mine.shape[1:])} if stage in COND else {mine.shape}
        if theirs and (theirs.shape not in halves or (mine.dtype, mine.format) != (theirs.dtype, theirs.format)):
            what = f"{stage} has {mine.name} as {mine.dtype} {mine.shape} {mine.format}"
            other = f"another stage as {theirs.dtype} {theirs.shape} {theirs.format}"
            raise EngineError(f"{self.manifest.folder}: {what}, {other}: run {self.manifest.command()}.")

    def _view(self, pinned: np.ndarray, name: str, offset: int = 0) -> np.ndarray:
        binding = self.bindings[name]
        if binding.format != "LINEAR":
            raise EngineError(f"{self.manifest.folder}: {name} has the format {binding.format} instead of LINEAR.")
        return pinned[offset : offset + binding.nbytes].view(binding.dtype).reshape(binding.shape)

    def _copy(self, to: int, source: int, size: int, up: bool = True) -> None:
        kinds = self.resources.cuda.cudaMemcpyKind
        kind = kinds.cudaMemcpyHostToDevice if up else kinds.cudaMemcpyDeviceToHost
        check(self.resources.cuda.cudaMemcpyAsync(to, source, size, kind, self.main))

    # -- what is enqueued ---------------------------------------------------------------------------------------------

    def stage(self, name: str, stream: Any, addresses: Mapping[str, int] | None = None) -> None:
        """Enqueue one stage."""
        if addresses:
            self.plans[name].bind(addresses)
        self.plans[name].execute(stream)

    def step(self, steps: Steps, i: int) -> None:
        """Enqueue the i-th evaluated step."""
        cuda, at, evaluation = self.resources.cuda, steps.addresses[i], steps.evaluations[i]
        control, encoder, decoder = STEP if evaluation.both else COND
        apart = self.options.two_streams and evaluation.control
        side = self.side if apart else self.main
        for name in () if self.options.hoist else ("hint", "time"):
            self.stage(name, self.main)
        if apart:
            check(cuda.cudaEventRecord(self._forked, self.main))
            check(cuda.cudaStreamWaitEvent(side, self._forked, 0))
        if evaluation.control:
            self.stage(control, self.main, at["control"])
        self.stage(encoder, side, at["unet_encoder"])
        if apart:
            check(cuda.cudaEventRecord(self._joined, side))
            check(cuda.cudaStreamWaitEvent(self.main, self._joined, 0))
        self.stage(decoder, self.main, at["unet_decoder"])

    def decode(self, steps: Steps) -> None:
        """Enqueue what makes the picture of the last step's x."""
        self.stage("vae_decoder", self.main, {"x": self.latents[len(steps.evaluations) % 2]})

    def picture(self, steps: Steps, text: bool) -> None:
        """Enqueue a whole picture, `clip` included where `text`."""
        if text:
            self.stage("clip", self.main)
        self.stage("hint", self.main)
        for i in range(len(steps.evaluations)):
            self.step(steps, i)
        self.decode(steps)

    # -- a schedule ---------------------------------------------------------------------------------------------------

    def prepare(self, evaluations: tuple[Evaluation, ...]) -> Steps:
        """The rows and graphs of a schedule's evaluated steps, kept from the time before where they were.

        Raises EngineError where it needs engines that are not there.
        """
        if not all(evaluation.both for evaluation in evaluations) and COND[0] not in self.plans:
            what = "the schedule evaluates steps for the prompt alone, and there are no engines for that"
            raise EngineError(f"{self.manifest.folder}: {what}: run {self.manifest.command()} with --cond.")
        return self.steps.get(evaluations, lambda: self._prepare(evaluations))

    def _prepare(self, evaluations: tuple[Evaluation, ...]) -> Steps:
        steps = Steps(self, evaluations)
        try:
            self._embed(steps)
            self.picture(steps, text=True)  # TensorRT allocates in first runs, which a capture forbids
            self.wait()
            self._capture(steps)
        except BaseException:
            self.wait(quiet=True)
            steps.close()
            raise
        return steps

    def _embed(self, steps: Steps) -> None:
        """The time rows of every step, as many at a time as the engine embeds."""
        cuda, plan, host = self.resources.cuda, self.plans["time"], self.host["timesteps"]
        kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        timesteps = [evaluation.timestep for evaluation in steps.evaluations]
        for begin in range(0, len(timesteps), host.size):
            part = timesteps[begin : begin + host.size]
            host[:] = part[-1]
            host[: len(part)] = part
            self._copy(self.at["timesteps"], host.ctypes.data, host.nbytes)
            self.stage("time", self.main)
            for name, binding in plan.outputs.items():
                place, pitch = steps.table[name]
                width = binding.nbytes // host.size
                to, source = place + begin * pitch, self.at[name]
                check(cuda.cudaMemcpy2DAsync(to, pitch, source, width, width, len(part), kind, self.main))
            self.wait()

    def _capture(self, steps: Steps) -> None:
        options = self.options
        parts: dict[str, Callable[[], None]] = {}
        if options.graph == "step":
            parts = {f"step{i}": partial(self.step, steps, i) for i in range(len(steps.evaluations))}
        elif options.graph == "picture":
            if options.overlap or options.skip_text:
                parts["picture"] = lambda: self.picture(steps, text=False)
            if options.overlap:
                parts["text"] = lambda: self.stage("clip", self.main)
            else:
                parts["text and picture"] = lambda: self.picture(steps, text=True)
        for name, enqueue in parts.items():
            steps.graphs[name] = steps.resources.graph(self.main, enqueue)
            self.captures += 1

    # -- a picture ----------------------------------------------------------------------------------------------------

    def start(self, steps: Steps, tokens: np.ndarray) -> bool:
        """Upload the tokens (B, 77) and launch `clip`, unless its results are there; whether `run` must launch it."""
        if self.options.skip_text and self._text == tokens.tobytes():
            return False
        self._text = None  # whatever becomes of this picture
        self.host["tokens"][:] = tokens
        self._copy(self.at["tokens"], self.host["tokens"].ctypes.data, self.host["tokens"].nbytes)
        if not self.options.overlap:
            return True
        self._launch(steps, "text", lambda: self.stage("clip", self.main))
        self._text = tokens.tobytes()
        return False

    def run(self, steps: Steps, text: bool, noisy: bool) -> None:
        """Upload what `host` and `steps` hold, launch the picture and its download."""
        cuda, n = self.resources.cuda, len(steps.evaluations)
        self._copy(self.at["scales"], self._pinned.ctypes.data, self._upload.nbytes)
        for name in ("coefficients", "noise")[: 1 + (noisy or steps.noisy)]:
            self._copy(steps.table[name][0], steps.uploads[name].ctypes.data, steps.uploads[name].nbytes)
        steps.noisy = noisy
        if self.options.graph == "step":
            if text:
                self.stage("clip", self.main)
            self.stage("hint", self.main)
            for i in range(n):
                check(cuda.cudaGraphLaunch(steps.graphs[f"step{i}"], self.main))
            self.decode(steps)
        else:
            self._launch(steps, "text and picture" if text else "picture", lambda: self.picture(steps, text))
        if text:
            self._text = self.host["tokens"].tobytes()
        picture = self.host["picture"]
        self._copy(picture.ctypes.data, self.at["picture"], picture.nbytes, up=False)

    def _launch(self, steps: Steps, graph: str, enqueue: Callable[[], None]) -> None:
        """Launch a graph, or enqueue what it would hold where there is none."""
        if graph in steps.graphs:
            check(self.resources.cuda.cudaGraphLaunch(steps.graphs[graph], self.main))
        else:
            enqueue()

    def wait(self, quiet: bool = False) -> None:
        """Wait for everything that was launched; `quiet` where an error is on its way already."""
        for stream in (self.main, self.side):
            result = self.resources.cuda.cudaStreamSynchronize(stream)
            if not quiet:
                check(result)

    def profile(self, steps: Steps, runs: int) -> dict[str, list[float]]:
        """Milliseconds of `runs` replays of each stage as a graph of its own, of a step and of a picture with text."""
        at = steps.addresses[0]
        parts: dict[str, Callable[[], None]] = {
            name: partial(self.stage, name, self.main, at.get(name.removesuffix("_cond"))) for name in self.plans
        }
        parts |= {"vae_decoder": lambda: self.decode(steps), "step": lambda: self.step(steps, 0)}
        parts["picture"] = lambda: self.picture(steps, text=True)
        times = {}
        for name, enqueue in parts.items():
            with Resources() as own:
                graph = own.graph(self.main, enqueue)
                begin, end = own.event(timing=True), own.event(timing=True)
                times[name] = [self._time(graph, begin, end) for _ in range(WARM_UP + runs)][WARM_UP:]
        return times

    def _time(self, graph: Any, begin: Any, end: Any) -> float:
        cuda = self.resources.cuda
        check(cuda.cudaEventRecord(begin, self.main))
        check(cuda.cudaGraphLaunch(graph, self.main))
        check(cuda.cudaEventRecord(end, self.main))
        check(cuda.cudaEventSynchronize(end))
        return float(check(cuda.cudaEventElapsedTime(begin, end)))

    def latent(self, steps: Steps) -> np.ndarray:
        """The last step's x (N, 4, h, w), for comparisons."""
        x = np.empty(self.host["x"].shape, np.float32)
        kind = self.resources.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        source = self.latents[len(steps.evaluations) % 2]
        check(self.resources.cuda.cudaMemcpy(x.ctypes.data, source, x.nbytes, kind))
        return x

    def close(self) -> None:
        """Free everything."""
        if self.plans:
            self.wait(quiet=True)
        self.steps.close()
        for plan in self.plans.values():
            plan.release()
        self.plans.clear()
        self.resources.close()
