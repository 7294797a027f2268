"""canny2image on TensorRT: what `cldm.canny2image.Staged` does in PyTorch, without PyTorch."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from plugins.load import require
from runtime.engine import OutOfMemory, gpu
from runtime.images import canny_hint, resize_image, resized_size
from runtime.manifest import NAME, EngineError, Manifest, folders_in
from runtime.memory import Recent
from runtime.noise import cuda_randn, random_seed
from runtime.schedule import Evaluation, Schedule, alphas_cumprod, batch_scales
from runtime.session import PipelineOptions, Session, Steps
from runtime.tokenizer import tokenize

ALPHAS = alphas_cumprod().astype(np.float32).astype(np.float64)  # as every checkpoint holds them

log = logging.getLogger(__name__)


class Canny2Image:
    """Pictures along the edges of pictures, by the engines of a folder; load once, `process` often, close.

    engines: a folder that `python -m trt_builder build` made, or one that holds several, for several shapes.
    schedule: what `Schedule.parse` takes, or a Schedule. model: where the folder holds several, the one to take.
    Raises EngineError where there is no GPU, no engine, or one for another GPU or TensorRT or that is damaged,
    FlavourError where TensorRT is not installed, PluginError where plugins are missing, OutOfMemory (an EngineError).
    One picture at a time: `process` refuses a second thread.
    """

    def __init__(
        self,
        engines: str | Path,
        schedule: str | Path | Schedule = "hackathon-10",
        options: PipelineOptions | None = None,
        model: str | None = None,
    ) -> None:
        self.schedule = schedule
        self.options = options or PipelineOptions()
        self._here = gpu()
        if self._here is None:
            raise EngineError("TensorRT engines run on an NVIDIA GPU, and cuda-python sees none here: use PyTorch.")
        self.manifests = find_manifests(Path(engines), model)
        self.host_ms: dict[str, float] = {}
        self._sessions: Recent[tuple[int, ...], Session] = Recent(self.options.shapes)
        self._schedules: dict[int, Schedule] = {}
        self._last: tuple[Session, Steps] | None = None
        self._lock = threading.Lock()
        self._closed: str | None = None
        shape = next(iter(self.manifests))
        with self._one_at_a_time():
            self._session(*shape)

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Height, width and number of samples of every shape that there are engines for."""
        return list(self.manifests)

    def manifest_of(self, height: int, width: int, samples: int) -> Manifest:
        """The manifest of a shape; raises EngineError, which lists what there is, where it is not built."""
        if (height, width, samples) not in self.manifests:
            known = ", ".join(f"{h}x{w} with {n}" for h, w, n in self.manifests)
            size = f"--height {height} --width {width} --samples {samples}"
            what = f"there are no engines for {height}x{width} pixels with {samples} samples, only for {known}"
            raise EngineError(f"{what}: run `python -m trt_builder build … {size}`.")
        return self.manifests[height, width, samples]

    @property
    def captures(self) -> int:
        """How many CUDA graphs the loaded shapes have captured."""
        return sum(session.captures for session in self._sessions)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of GPU memory of the loaded shapes: activations (and what they would be apart), buffers, plans."""
        kinds = {kind for session in self._sessions for kind in session.memory}
        return {kind: sum(session.memory[kind] for session in self._sessions) for kind in sorted(kinds)}

    def about(self) -> dict[str, Any]:
        """Folders, TensorRT and memory of what is loaded, for a report."""
        manifests = [session.manifest for session in self._sessions]
        first = next(iter(self.manifests.values()))
        folders = [manifest.folder.name for manifest in manifests]
        return {"folders": folders, "flavour": first.flavour, "version": first.version, "memory": self.memory}

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
        is the guidance, `seed` -1 draws one. In guess mode only the prompt's half is controlled. The milliseconds that
        the host took for each part are in `host_ms` afterwards.
        Raises ValueError for a picture, a number of steps or thresholds out of range, EngineError for a shape that is
        not built, and where the GPU fails, which closes the pipeline.
        """
        with self._one_at_a_time():
            watch = Stopwatch()
            height, width = resized_size(input_image, image_resolution)
            updates = self._schedule(ddim_steps).updates(eta, ALPHAS)
            seed = random_seed(seed)
            session = self._session(height, width, num_samples)
            tokens = np.repeat(tokenize([f"{prompt}, {a_prompt}", n_prompt]), num_samples, axis=0)
            steps = self._prepare(session, tuple(u.evaluation for u in updates))
            watch.lap("prepare")
            with self._on_the_gpu(session):
                text = session.start(steps, tokens)
                watch.lap("text")
                edges = canny_hint(resize_image(input_image, image_resolution), low_threshold, high_threshold)
                watch.lap("edges")
                host = session.host
                shape = host["x"].shape
                plane = host["edges"][0, :1]  # the channels are equal
                np.divide(edges[None, :, :, 0], 255, out=plane, dtype=np.float32, casting="same_kind")
                host["edges"][0, 1:] = plane
                host["x"][:] = latent_noise(seed, shape)
                host["guidance"][:] = scale
                host["scales"][:] = batch_scales(len(host["scales"]), num_samples, strength, guess_mode)
                noisy = steps.fill(updates, lambda draw: latent_noise(seed, shape, draw))
                watch.lap("inputs")
                session.run(steps, text, noisy)
                watch.lap("launch")
                session.wait()
                watch.lap("wait")
                pictures = list(host["picture"].copy())
            watch.lap("copy")
            self.host_ms = watch.laps
            return pictures

    def profile(self, runs: int = 20) -> dict[str, float]:
        """Median milliseconds on the GPU of each stage, of a `step` on both streams and of a `picture` with its text.

        Each is replayed as a CUDA graph on what the last picture left. Raises EngineError before the first picture.
        """
        with self._one_at_a_time():
            session, steps = self.last_used()
            with self._on_the_gpu(session):
                times = session.profile(steps, runs)
            return {name: float(np.median(values)) for name, values in times.items()}

    def latent(self) -> np.ndarray:
        """The latent (N, 4, h, w) that the last picture was decoded from; raises EngineError before the first."""
        with self._one_at_a_time():
            session, steps = self.last_used()
            return session.latent(steps)

    def last_used(self) -> tuple[Session, Steps]:
        """What made the last picture, for measurements; raises EngineError before the first."""
        if self._last is None:
            raise EngineError("there was no picture yet: call process first.")
        return self._last

    def close(self) -> None:
        """Free everything, after a picture that another thread is making; later calls raise EngineError."""
        with self._lock:
            self._close("this pipeline was closed: make a new Canny2Image.")

    def _close(self, why: str) -> None:
        self._closed = self._closed or why
        self._last = None
        self._sessions.close()

    def __enter__(self) -> Canny2Image:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- what guards it -----------------------------------------------------------------------------------------------

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise EngineError("this pipeline is making a picture in another thread: take one Canny2Image a thread.")
        try:
            if self._closed:
                raise EngineError(self._closed)
            yield
        finally:
            self._lock.release()

    @contextmanager
    def _on_the_gpu(self, session: Session) -> Iterator[None]:
        """Close the pipeline where the GPU fails; after other errors wait until nothing reads the host's memory."""
        try:
            yield
        except EngineError as error:
            self._close(f"this pipeline was closed when the GPU failed in a picture: make a new Canny2Image. {error}")
            raise EngineError(f"the GPU failed in a picture, and the pipeline is closed: {error}") from error
        except BaseException:
            session.wait(quiet=True)
            raise

    def _schedule(self, ddim_steps: int) -> Schedule:
        if isinstance(self.schedule, Schedule):
            if ddim_steps != self.schedule.steps:
                raise ValueError(f"schedule {self.schedule.name} is for {self.schedule.steps} steps, not {ddim_steps}")
            return self.schedule
        if ddim_steps not in self._schedules:  # so that a file is not read for every picture
            self._schedules[ddim_steps] = Schedule.parse(self.schedule, ddim_steps)
        return self._schedules[ddim_steps]

    def _session(self, *shape: int) -> Session:
        """The session of height, width and samples, loaded where it is not."""
        manifest = self.manifest_of(*shape)
        return self._sessions.get(shape, lambda: self._load(manifest))

    def _load(self, manifest: Manifest) -> Session:
        from trt_builder.flavour import get_flavour

        assert self._here is not None
        self._last = None  # it may be of the session that goes
        flavour = get_flavour(manifest.flavour)
        manifest.check(flavour.name, flavour.trt.__version__, self._here.name, self._here.capability)
        require(manifest.plugins, flavour.trt)
        try:
            return Session(manifest, flavour, self.options)
        except OutOfMemory as error:
            raise OutOfMemory(f"the engines {manifest.folder} do not fit into the GPU's memory: {error}") from error

    def _prepare(self, session: Session, evaluations: tuple[Evaluation, ...]) -> Steps:
        try:
            steps = session.prepare(evaluations)
        except EngineError as error:
            self._last = None
            key = next(key for key, manifest in self.manifests.items() if manifest is session.manifest)
            self._sessions.drop(key)  # all of its memory: the next picture loads it again
            kind = OutOfMemory if isinstance(error, OutOfMemory) else EngineError
            raise kind(f"the picture of {session.manifest.folder} could not be prepared: {error}") from error
        self._last = session, steps
        return steps


class Stopwatch:
    """The milliseconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        """End what is called `name`."""
        now = time.perf_counter()
        self.laps[name] = 1000 * (now - self._since)
        self._since = now


@functools.lru_cache(maxsize=64)
def latent_noise(seed: int, shape: tuple[int, ...], draws_before: int = 0) -> np.ndarray:
    """`cuda_randn`, kept for the next picture of the same seed: it takes the host half a millisecond."""
    return cuda_randn(seed, shape, draws_before)


def usable(engines: str | Path) -> bool:
    """Whether there is a GPU, and an engine folder at this place or in it."""
    folder = Path(engines)
    return gpu() is not None and (os.path.isfile(folder / NAME) or bool(folders_in(folder)))


def find_manifests(folder: Path, model: str | None = None) -> dict[tuple[int, int, int], Manifest]:
    """The manifests of an engine folder, or of those in it, by height, width and samples.

    Raises EngineError where there is none (for this model), one is damaged, or two are for the same shape.
    """
    folders = [folder]
    if not os.path.isfile(folder / NAME):  # which is False where Path's raises: Manifest.load says why
        folders = folders_in(folder) or folders
    found: dict[tuple[int, int, int], Manifest] = {}
    models: dict[tuple[str, str], Manifest] = {}
    for manifest in map(Manifest.load, folders):
        if model is not None and Path(manifest.model).stem != Path(model).stem:
            continue
        shape: Any = tuple(manifest.shape.get(name, 0) for name in ("height", "width", "samples"))
        other = found.setdefault(shape, manifest)
        first = next(iter(models.values()), manifest)
        models.setdefault((manifest.model, manifest.weights_sha256), manifest)
        if other is not manifest or len(models) > 1:
            clash = other if other is not manifest else first
            raise EngineError(f"{clash.folder} and {manifest.folder} exclude each other: name one of them.")
    if not found:
        raise EngineError(f"{folder} holds no engines of the model {model}: run `python -m trt_builder build`.")
    return found
