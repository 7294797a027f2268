"""One benchmark run: every picture through the reference and the candidate, timed, written, read back and scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bench.figures import MOST, SheetColumn
from bench.perceptual import InceptionFeatures, pd_score
from bench.report import PictureResult, short_path
from runtime.images import canny_hint, read_image, resize_image, write_image

Image = NDArray[np.uint8]  # (H, W, 3) RGB
Tell = Callable[[str, int], None]  # what is being done, and how many pictures were made since the last call


class Pipeline(Protocol):
    """What makes pictures: the competition's `process`."""

    def process(
        self,
        input_image: Image,
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
    ) -> list[Image]:
        """`num_samples` pictures that follow the edges of `input_image`."""
        ...


@dataclass(frozen=True)
class Input:
    """A picture that was found fit: its path, the file names of its samples, and the size of its results."""

    path: Path
    files: list[str]
    height: int
    width: int

    @property
    def size(self) -> str:
        """Width x height in pixels."""
        return f"{self.width}x{self.height}"


def measure(
    inputs: Sequence[Input],
    reference: Pipeline,
    candidates: Mapping[str, Pipeline],
    arguments: dict[str, Any],
    inception: InceptionFeatures,
    folder: Path,
    tell: Tell,
) -> tuple[dict[str, list[PictureResult]], list[SheetColumn]]:
    """Time and score every picture; they are written to reference/ and, by their names, the candidates' folders.

    arguments: those of `process` but the picture. The first picture of each size is made once more, before it is
    timed, to warm up. Returns each candidate's results, and the columns of the contact sheet for the first of them.
    A KeyboardInterrupt ends it with the results so far and only their files, and is raised where there are none.
    Raises OSError or ValueError where a picture cannot be written.
    """
    pipelines = {"reference": reference, **candidates}
    for role in pipelines:
        (folder / role).mkdir()
    found: list[dict[str, PictureResult]] = []
    columns: list[SheetColumn] = []
    try:
        for results, column in _measured(inputs, pipelines, arguments, inception, folder, tell):
            if len(columns) < MOST:
                columns.append(column)
            found.append(results)
    except KeyboardInterrupt:
        if not found:
            raise
        every = [result for results in found for result in results.values()]
        finished = {name for result in every for name in result.reference_files + result.candidate_files}
        for file in [path for role in pipelines for path in (folder / role).iterdir()]:
            if file.relative_to(folder).as_posix() not in finished:
                file.unlink()
    return {name: [results[name] for results in found] for name in candidates}, columns[: len(found)]


def _measured(
    inputs: Sequence[Input],
    pipelines: Mapping[str, Pipeline],
    arguments: dict[str, Any],
    inception: InceptionFeatures,
    folder: Path,
    tell: Tell,
) -> Iterator[tuple[dict[str, PictureResult], SheetColumn]]:
    """Every candidate's result and the column of one picture after the other."""
    warm: set[tuple[int, int]] = set()
    for item in inputs:
        image = read_image(item.path)
        if (item.height, item.width) not in warm:
            for role, pipeline in pipelines.items():
                tell(f"warm-up {item.size}, {role}", 0)
                pipeline.process(image, **arguments)
                tell("", 1)
            warm.add((item.height, item.width))
        latency: dict[str, float] = {}
        pictures: dict[str, list[Image]] = {}
        for role, pipeline in pipelines.items():
            tell(f"{item.path.stem}, {role}", 0)
            start = time.perf_counter()
            made = pipeline.process(image, **arguments)
            latency[role] = 1000 * (time.perf_counter() - start)
            files = [folder / role / name for name in item.files]
            pictures[role] = [_write_and_read(file, picture) for file, picture in zip(files, made, strict=True)]
            tell("", 1)
        features = {role: inception.features(made) for role, made in pictures.items()}
        results = {
            role: PictureResult(
                name=item.path.stem,
                source=short_path(item.path),
                height=item.height,
                width=item.width,
                pd_samples=pd_score(features["reference"], features[role]).tolist(),
                reference_ms=latency["reference"],
                candidate_ms=latency[role],
                reference_files=[f"reference/{name}" for name in item.files],
                candidate_files=[f"{role}/{name}" for name in item.files],
            )
            for role in pipelines
            if role != "reference"
        }
        resized = resize_image(image, arguments["image_resolution"])
        edges = canny_hint(resized, arguments["low_threshold"], arguments["high_threshold"])
        rows = {"input": resized, "edges": edges} | {role: pictures[role][0] for role in pipelines}
        yield results, SheetColumn(results, rows)


def _write_and_read(path: Path, image: Image) -> Image:
    # The score is of the file that a user gets, JPEG losses and all, as in the competition.
    write_image(path, image)
    return read_image(path)


def score_pairs(
    names: Sequence[str], candidates: Path, references: Path, inception: InceptionFeatures, tell: Tell
) -> tuple[list[PictureResult], list[SheetColumn]]:
    """Score pictures made elsewhere: the files called `names` in two folders. Returns what `measure` returns."""
    results: list[PictureResult] = []
    columns: list[SheetColumn] = []
    for name in names:
        tell(name, 0)
        pair = {"reference": read_image(references / name), "candidate": read_image(candidates / name)}
        score = pd_score(inception.features([pair["reference"]]), inception.features([pair["candidate"]]))
        height, width = pair["candidate"].shape[:2]
        result = PictureResult(
            name=name,
            source=short_path(candidates / name),
            height=height,
            width=width,
            pd_samples=score.tolist(),
            reference_files=[short_path(references / name)],
            candidate_files=[short_path(candidates / name)],
        )
        results.append(result)
        if len(columns) < MOST:
            columns.append(SheetColumn({"candidate": result}, dict(pair)))
        tell("", 1)
    return results, columns
