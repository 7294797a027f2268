"""Which backend makes the candidate's pictures, and whether its engines are those of the reference's weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.remote import Remote
from models import find_weights
from runtime.engine import gpu
from runtime.pipeline import Canny2Image, usable
from runtime.schedule import Schedule
from runtime.session import PipelineOptions

ENGINES = Path(__file__).resolve().parent.parent / "engines"

log = logging.getLogger(__name__)


def tensorrt_candidate(
    backend: str,
    engines: Path | None,
    model: str,
    weights: Path | None,
    schedules: Sequence[Schedule],
    shapes: Iterable[tuple[int, int, int]],
    python: Path | None = None,
) -> Canny2Image | Remote | None:
    """The TensorRT pipeline, or None where PyTorch makes the candidate's pictures.

    backend: "tensorrt", "torch", or "auto", which takes TensorRT where there are a GPU and fitting engines, and says
    so. It begins with the first of the schedules and keeps all of them. shapes: height, width and samples of all
    pictures to come. python: another interpreter to run TensorRT in. Raises ValueError where TensorRT is asked for and
    cannot make them.
    """
    if backend == "torch":
        for option, value in (("--engines", engines), ("--engine-python", python)):
            if value:
                log.warning("%s is for --backend tensorrt: the torch backend does not read it.", option)
        return None
    if python:
        return Remote(python, engines or ENGINES, model, weights, list(schedules), list(shapes))
    if backend == "auto":
        folder = engines or ENGINES
        if not usable(folder):
            if engines:
                log.warning("PyTorch makes the candidate's pictures: there is no GPU, or no engine in %s.", engines)
            return None
        try:
            pipeline = open_pipeline(folder, model, weights, schedules, shapes)
        except ValueError as error:
            log.warning("PyTorch makes the candidate's pictures, because %s", error)
            return None
        log.warning("TensorRT makes the candidate's pictures, with the engines in %s.", folder)
        return pipeline
    return tensorrt_pipeline(engines or ENGINES, model, weights, schedules, shapes)


def tensorrt_pipeline(
    folder: Path, model: str, weights: Path | None, schedules: Sequence[Schedule],
    shapes: Iterable[tuple[int, int, int]],
) -> Canny2Image:  # fmt: skip
    """As `open_pipeline`; ValueError where there is no GPU."""
    if gpu() is None:
        raise ValueError("--backend tensorrt needs an NVIDIA GPU, and cuda-python sees none here: use --backend torch.")
    return open_pipeline(folder, model, weights, schedules, shapes)


@dataclass(frozen=True)
class Scheduled:
    """The TensorRT pipeline by one of its schedules."""

    pipeline: Canny2Image | Remote
    schedule: Schedule

    def process(self, *arguments: Any, **named: Any) -> list[Any]:
        """As `Canny2Image.process`."""
        self.pipeline.schedule = self.schedule
        return self.pipeline.process(*arguments, **named)


def open_pipeline(
    folder: Path, model: str, weights: Path | None, schedules: Sequence[Schedule],
    shapes: Iterable[tuple[int, int, int]],
) -> Canny2Image:  # fmt: skip
    """The pipeline of a folder; ValueError where it is not for these weights or lacks a shape."""
    usual = PipelineOptions()
    options = replace(usual, schedules=max(usual.schedules, len(schedules)))
    pipeline = Canny2Image(folder, schedules[0], options, model)
    try:
        for shape in shapes:
            pipeline.manifest_of(*shape)
        check_weights(pipeline, model, weights)
    except BaseException:
        pipeline.close()
        raise
    return pipeline


def check_weights(pipeline: Canny2Image, model: str, weights: Path | None) -> None:
    """Raise ValueError unless the engines were built from the weights that the reference is given."""
    from trt_builder.__main__ import file_sha256
    from trt_builder.convert import source_of

    try:
        path = find_weights(model, weights)
    except FileNotFoundError:
        return  # the reference says so
    manifest = next(iter(pipeline.manifests.values()))
    if path.suffix == ".safetensors" and manifest.weights.startswith("random:"):
        digest = source_of(path)  # random weights are known by what they were made from
    else:
        digest = file_sha256(path)
    built_from = Path(manifest.weights)  # what preprocess.py made of a .pth knows that file's SHA-256
    if digest and digest != manifest.weights_sha256 and source_of(built_from) == digest:
        digest = file_sha256(built_from)
    if digest != manifest.weights_sha256:
        what = f"{manifest.folder} was built from other weights ({manifest.weights}) than {path}"
        raise ValueError(f"{what}: run {manifest.command()} with --weights {path}.")
