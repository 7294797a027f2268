"""The TensorRT pipeline on a GPU: `pytest tests/gpu`, with ENGINES=<engine folder>, or it builds the tiny model's."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.ours import arguments, used
from runtime import Canny2Image, PipelineOptions
from runtime.engine import OutOfMemory, check, cuda_runtime, gpu
from runtime.manifest import Manifest
from runtime.rules import Rule
from runtime.schedule import Schedule, every_schedule
from runtime.session import STAGES
from runtime.steps import COND

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(gpu() is None, reason="cuda-python sees no NVIDIA GPU")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine folder that ENGINES names, or one of the tiny model with random weights."""
    if "ENGINES" in os.environ:
        return Path(os.environ["ENGINES"])
    folder = tmp_path_factory.mktemp("engines")
    build = "-m trt_builder build --model tiny --random-weights 0 --height 64 --width 128 --cond --output".split()
    done = subprocess.run([sys.executable, *build, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(path.parent for path in folder.glob("*/manifest.json"))


@pytest.fixture(scope="module")
def given(engines: Path) -> dict:
    shape = Manifest.load(engines).shape
    return arguments(shape["height"], shape["width"]) | {"num_samples": shape["samples"]}


def test_the_same_picture_every_time_and_by_every_switch(engines: Path, given: dict) -> None:
    usual = PipelineOptions()
    with Canny2Image(engines, options=usual) as pipeline:
        first = pipeline.process(**given)
        assert first[0].std() > 5
        assert all(np.array_equal(pipeline.process(**given), first) for _ in range(100))
    for change in (
        {"graph": "step"}, {"graph": "none"}, {"two_streams": False}, {"hoist": False}, {"overlap": False},
        {"skip_text": False}, {"share_memory": False},
    ):  # fmt: skip
        with Canny2Image(engines, options=replace(usual, **change)) as pipeline:
            pictures = [pipeline.process(**given), pipeline.process(**given)]
            assert all(np.array_equal(picture, first) for picture in pictures), change


def test_nothing_is_captured_again_and_memory_does_not_grow(engines: Path, given: dict) -> None:
    with Canny2Image(engines) as pipeline:
        first, captures = pipeline.process(**given), pipeline.captures
        before = used()
        for i in range(100):
            change = {"prompt": f"a bird, {i}", "seed": i, "scale": 5.0 + i % 3, "strength": 0.5, "eta": (i % 2) * 0.5}
            assert not np.array_equal(pipeline.process(**given | change), first)
        assert pipeline.captures == captures and used() <= before
        np.testing.assert_array_equal(pipeline.process(**given), first)


def test_closing_gives_the_memory_back(engines: Path, given: dict) -> None:
    def once() -> int:
        with Canny2Image(engines) as pipeline:
            pipeline.process(**given)
        return used()

    after = once()  # what CUDA and TensorRT keep for themselves is there from now on
    assert once() <= after + 2**21 and once() <= after + 2**21


def test_out_of_memory_at_load_is_one_sentence_and_the_next_load_works(engines: Path, given: dict) -> None:
    cuda, held = cuda_runtime(), []
    try:
        for size in (2**30, 2**26, 2**22):
            while True:
                error, address = cuda.cudaMalloc(size)
                if int(error):
                    cuda.cudaGetLastError()
                    break
                held.append(address)
        with pytest.raises(OutOfMemory):
            Canny2Image(engines)
    finally:
        for address in held:
            check(cuda.cudaFree(address))
    with Canny2Image(engines) as pipeline:
        pipeline.process(**given)


def test_a_profile_has_a_time_for_each(engines: Path, given: dict) -> None:
    with Canny2Image(engines) as pipeline:
        first = pipeline.process(**given)
        times = pipeline.profile(20)
        assert times.keys() >= {*STAGES, "step", "picture"} and min(times.values()) > 0
        np.testing.assert_array_equal(pipeline.process(**given), first)


RULES = (
    "evaluate", "evaluate", "extrapolate-2", "evaluate-unet", "adams-bashforth-2", "evaluate-cond", "extrapolate-3",
    "evaluate-cond-unet", "reuse", *["evaluate", "evaluate-cond", "evaluate-unet", "reuse"] * 2, "evaluate",
    "adams-bashforth-3", "reuse",
)  # fmt: skip
SCHEDULES = [*every_schedule(20), Schedule("every rule", 20, tuple(map(Rule, RULES)))]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
def test_pictures_are_near_those_of_pytorch(engines: Path, given: dict, schedule: Schedule) -> None:
    """Half precision against float32 on the CPU, where PyTorch shares the interpreter; `bench/peers.py` where not."""
    manifest = Manifest.load(engines)
    if not set(COND) <= manifest.stages.keys() and not all(u.evaluation.both for u in schedule.updates()):
        pytest.skip("the engines were built without --cond")
    with Canny2Image(engines, schedule) as pipeline:
        made = pipeline.process(**given)
        np.testing.assert_array_equal(pipeline.process(**given), made)
    pytest.importorskip("torch", reason="PyTorch is not in this interpreter")
    from cldm.canny2image import Staged
    from trt_builder.verify import load_twin

    if Path(manifest.model).stem != "tiny":
        pytest.skip("the full size takes minutes on a CPU")
    expected = Staged(load_twin(manifest, "cpu"), schedule).process(**given)
    assert np.abs(np.array(made, np.int16) - np.array(expected, np.int16)).mean() < 4
