"""Plans for every stage of a model, one after the other: a killed build is continued, only what changed is rebuilt."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from plugins.load import text_columns
from runtime.manifest import EngineError, Manifest, StagePlan, write_whole
from runtime.steps import COND
from trt_builder.config import ModelConfig, Options, Shape
from trt_builder.flavour import Flavour
from trt_builder.inspect import report_path, write_report
from trt_builder.stages import define
from trt_builder.text import cross_attentions
from trt_builder.weights import Weights, expected_shapes

THREAD = "tensorrt-build"
# TensorRT 8.6.0 does not read back the timing cache that it wrote, calls that an error, and goes on without.
CACHE_REFUSED = ("myelinCache.h::deserializeFromBuffer", "The timing cache will not be used!")
LOG = "build.log"
TIMING_CACHE = "timing.cache"
TIMINGS = "timings.json"  # that verify --time took
NOT_DEFINITION = {
    "__main__.py", "build.py", "convert.py", "inspect.py", "verify.py", "random_weights.py", "terminal.py",
}  # fmt: skip
SPARE = 64 << 20  # bytes of disk beyond the plans, for reports, log and timing cache

# Which weights a stage holds, for the estimate of its plan's size.
CROSS_KV = r"attn2\.to_[kv]\."
STAGE_WEIGHTS = {
    "clip": rf"^cond_stage_model\.|{CROSS_KV}",
    "hint": r"\.input_hint_block\.",
    "time": r"\.time_embed\.|\.emb_layers\.",
    "control": r"^control_model\.",
    "unet_encoder": r"^model\.diffusion_model\.(input|middle)",
    "unet_decoder": r"^model\.diffusion_model\.out",
    "vae_decoder": r"^first_stage_model\.(decoder|post_quant)",
    "vae_encoder": r"^first_stage_model\.(encoder|quant)",
}
STAGE_WEIGHTS |= {name: STAGE_WEIGHTS[name.removesuffix("_cond")] for name in COND}


class BuildError(ValueError):
    """A build that cannot be done; the text is one sentence."""


@dataclass(frozen=True)
class Request:
    """What to build: `manifest` has the facts of all stages and no stages; `load` gives the weights when needed."""

    manifest: Manifest
    config: ModelConfig
    shape: Shape
    options: Options
    flavour: Flavour
    stages: tuple[str, ...]
    load: Callable[[], Weights]


@dataclass(frozen=True)
class Built:
    """One stage of a build: seconds, bytes of the plan, TensorRT's warnings, and whether an earlier plan was kept."""

    stage: str
    seconds: float
    bytes: int
    kept: bool
    warnings: int = 0


class Show:
    """Where a build tells what it does; this one keeps silent."""

    def say(self, text: str) -> None:
        """A sentence for the user."""

    def begin(self, stage: str, measured: bool) -> None:
        """A stage begins; `measured` says whether `step` will be called."""

    def step(self, done: float, what: str) -> None:
        """The share of the stage that is done, 0 to 1, and what TensorRT is doing."""

    def end(self) -> None:
        """The stage is over, well or not."""


@dataclass
class BuildLog:
    """TensorRT's messages of one stage: in the log file but for the verbose ones, warnings counted."""

    file: TextIO
    warnings: int = 0
    error: str = ""
    cache_refused: bool = False  # TensorRT did not take the timing cache that it was given, and built all the same
    full: OSError | None = None  # why the file could not be written to
    layers: str = ""  # TensorRT-RTX tells its layers in the verbose log, and nowhere else without a GPU

    def add(self, severity: str, message: str) -> None:
        """Take one message."""
        if message.startswith("Layers:\n"):
            self.layers = message
        if (
            severity == "VERBOSE" or self.full or self.file.closed
        ):  # closed after Ctrl-C, when TensorRT has not ended yet
            return
        self.warnings += severity == "WARNING"
        self.cache_refused |= CACHE_REFUSED[-1] in message
        if severity in ("ERROR", "INTERNAL_ERROR") and not any(words in message for words in CACHE_REFUSED):
            self.error = " ".join(message.split())
        try:
            self.file.write(f"{severity} {message}\n")
            self.file.flush()
        except OSError as error:  # raised from here, TensorRT would print its stack and go on
            self.full = error


@dataclass
class Phases:
    """TensorRT's nested phases as one share of the whole."""

    open: dict[str, list[Any]] = field(default_factory=dict)  # name: [parent, steps, done]
    reached: float = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins within another."""
        self.open[name] = [parent, max(1, steps), 0]

    def step(self, name: str, step: int) -> float:
        """A phase has done its step number `step`, from 0; returns the share of the whole, which never falls."""
        if name in self.open:
            self.open[name][2] = step + 1
            share = 0.0
            for _, steps, done in reversed(self._line(name)):
                share = min(1.0, (done + share) / steps)
            self.reached = max(self.reached, share)
        return self.reached

    def finish(self, name: str) -> None:
        """A phase is over."""
        self.open.pop(name, None)

    def _line(self, name: str | None) -> list[list[Any]]:
        line: list[list[Any]] = []
        while name in self.open and len(line) < 20:
            line.insert(0, self.open[name])
            name = self.open[name][0]
        return line


def build(request: Request, show: Show) -> list[Built]:
    """Build the stages that are missing or changed into the folder of `request.manifest`.

    Waits where another build holds the folder. Raises BuildError, EngineError (the folder's manifest is damaged),
    FlavourError, WeightsError, OSError; whatever happens, the finished stages stay and no half-written plan does.
    """
    folder = request.manifest.folder
    folder.mkdir(parents=True, exist_ok=True)
    with only_builder(folder, show):
        for leftover in folder.glob(".*.partial"):
            leftover.unlink()
        keys = {stage: stage_key(request, stage) for stage in STAGE_WEIGHTS}
        manifest = kept(request.manifest, keys)
        pending = [stage for stage in request.stages if stage not in manifest.stages]
        check_space(request, pending)
        manifest.save()  # what is not vouched for any more cannot be loaded from here on
        for stage in keys.keys() - manifest.stages.keys():
            manifest.plan_path(stage).unlink(missing_ok=True)
            report_path(folder, stage).unlink(missing_ok=True)
        if pending:
            (folder / TIMINGS).unlink(missing_ok=True)
        weights = request.load() if pending else Weights({})
        rows, refused = [], False
        for stage in request.stages:
            if stage not in pending:
                plan = manifest.stages[stage]
                rows.append(Built(stage, plan.seconds, plan.bytes, kept=True))
                continue
            plan, log = build_stage(request, stage, keys[stage], weights, show)
            if log.cache_refused and not refused:
                refused = True
                show.say("TensorRT does not take back its own timing cache: the kernels of every stage are timed anew.")
            manifest = manifest.with_stage(stage, plan)
            manifest.save()
            rows.append(Built(stage, plan.seconds, plan.bytes, kept=False, warnings=log.warnings))
    return rows


@contextmanager
def only_builder(folder: Path, show: Show) -> Iterator[None]:
    """Hold the folder's lock, waiting for whoever has it."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        show.say(f"Another build is writing to {folder}: waiting for it to end.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def stage_key(request: Request, stage: str) -> str:
    """The SHA-256 of everything that a stage's plan is made from."""
    m, shape = request.manifest, asdict(request.shape)
    if stage != "time":
        del shape["steps"]
    facts = [definition_sha(), stage, asdict(request.config), shape, request.options.as_dict(), m.weights_sha256,
             m.flavour, m.version, m.gpu, m.capability, m.targets, m.plugins]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def definition_sha() -> str:
    """The SHA-256 of the source files that define the networks."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name not in NOT_DEFINITION:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def kept(manifest: Manifest, keys: dict[str, str]) -> Manifest:
    """`manifest` with the stages of the folder that were built from the same things and are whole."""
    try:
        before = Manifest.load(manifest.folder)
    except EngineError:
        if (manifest.folder / "manifest.json").exists():
            raise
        return manifest
    for stage, plan in before.stages.items():
        if plan.key == keys.get(stage):
            try:
                before.plan_bytes(stage)
            except EngineError:
                continue
            manifest = manifest.with_stage(stage, plan)
    return manifest


def check_space(request: Request, stages: list[str]) -> None:
    """Raise BuildError where the disk has no room for the plans of `stages`, estimated from their weights."""
    size = 4 if request.options.precision == "fp32" else 2
    shapes = expected_shapes(request.config)
    needed = SPARE
    for stage in stages:
        for name, shape in shapes.items():
            if re.search(STAGE_WEIGHTS[stage], name):
                count = 1
                for side in shape:
                    count *= side
                needed += count * size * 5 // 4
        if stage == "clip" and request.options.cross_attention == "folded":
            for one in (one for name in request.config.consumers() for one in cross_attentions(request.config, name)):
                needed += text_columns(one.heads, one.channels) * request.config.unet.context_dim * size * 5 // 4
    free = shutil.disk_usage(request.manifest.folder).free
    if stages and free < needed:
        raise BuildError(
            f"the plans need about {needed / 1e9:.1f} GB and {request.manifest.folder} has {free / 1e9:.1f} GB free: "
            "make room or choose another --output."
        )


def build_stage(request: Request, stage: str, key: str, weights: Weights, show: Show) -> tuple[StagePlan, BuildLog]:
    """Build one stage and write its plan and report; returns its manifest entry and what TensorRT said."""
    folder = request.manifest.folder
    begin = time.perf_counter()
    show.begin(stage, request.flavour.progress)
    try:
        with open(folder / LOG, "a", encoding="utf-8") as file:
            file.write(f"== {stage}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            log = BuildLog(file)
            patience = 10.0 if request.flavour.progress else 0.0  # without a monitor nothing stops TensorRT
            plan = in_thread(lambda stopped: serialize(request, stage, weights, log, show, stopped), patience)
            if log.full:
                raise log.full
            seconds = time.perf_counter() - begin
            entry = StagePlan(key, hashlib.sha256(plan).hexdigest(), plan.nbytes, round(seconds, 3))
            write_whole(folder / f"{stage}.plan", plan)
            return entry, log
    except OSError as error:
        error.filename = error.filename or str(folder / LOG)
        raise
    finally:
        show.end()


def serialize(
    request: Request, stage: str, weights: Weights, log: BuildLog, show: Show, stopped: threading.Event
) -> memoryview:
    """A stage's plan; writes its report and the timing cache. Raises BuildError with TensorRT's last words."""
    flavour, folder = request.flavour, request.manifest.folder
    logger = logger_for(flavour.trt, log)
    builder = flavour.create_builder(logger)
    network = flavour.create_network(builder)
    weights.release()  # of the stage before, whose network is gone by now
    define(stage, network, flavour, request.config, weights, request.shape, request.options)
    cache = folder / TIMING_CACHE
    known = cache.read_bytes() if flavour.timing_cache and cache.is_file() else b""
    monitor = monitor_for(flavour.trt, show, stopped) if flavour.progress else None
    config = flavour.create_config(builder, request.options, request.manifest.targets, known, monitor)
    plan = flavour.serialize(builder, network, config)
    if stopped.is_set():
        raise KeyboardInterrupt
    if plan is None:
        said = f"{log.error.rstrip('.')} " if log.error else ""
        raise BuildError(f"TensorRT could not build {stage}: {said}(all of its words are in {folder / LOG}).")
    if flavour.timing_cache:
        write_whole(cache, flavour.saved_timing_cache(config))
    write_report(folder, stage, network, flavour, logger, plan, log.layers)
    return memoryview(plan)


def in_thread(work: Callable[[threading.Event], memoryview], patience: float) -> memoryview:
    """Run `work` in a thread, so that Ctrl-C is heard at once and not when TensorRT is done; its errors are raised.

    After Ctrl-C it has `patience` seconds to end; a process that leaves with it at work must leave by `os._exit`.
    """
    stopped, outcome = threading.Event(), dict[str, Any]()

    def run() -> None:
        try:
            outcome["plan"] = work(stopped)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, name=THREAD, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    except KeyboardInterrupt:
        stopped.set()
        thread.join(patience)
        raise
    if "error" in outcome:
        raise outcome["error"]
    return outcome["plan"]


def logger_for(trt: Any, log: BuildLog) -> Any:
    """A TensorRT logger that fills `log`."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            log.add(severity.name, msg)

    return Logger()


def monitor_for(trt: Any, show: Show, stopped: threading.Event) -> Any:
    """A TensorRT progress monitor that tells `show`, and ends the build once `stopped` is set."""
    phases = Phases()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            show.step(phases.step(phase_name, step), phase_name)
            return not stopped.is_set()

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()
