"""The candidate in another interpreter: what goes over the pipe, and what goes wrong there."""

import sys
import threading
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.candidate import tensorrt_candidate
from bench.remote import Remote, serve
from runtime.engine import OutOfMemory, gpu
from runtime.manifest import EngineError
from runtime.schedule import Schedule, every_schedule

SHAPES = [(128, 128, 1)]


class Fake:
    """A pipeline that gives back what it was asked."""

    def __init__(self, *given: Any) -> None:
        self.given, self.schedule, self.closed = given, given[3][0], False

    def about(self) -> dict[str, Any]:
        return {"gpu": "none"}

    def process(self, picture: np.ndarray, seed: int) -> list[np.ndarray]:
        if seed < 0:
            raise OutOfMemory("the GPU has not enough memory.")
        return [picture + seed, np.array(len(self.schedule.evaluated))]

    def close(self) -> None:
        self.closed = True


def test_what_goes_over_the_pipe(tmp_path: Path) -> None:
    made: list[Fake] = []
    ours, theirs = Pipe()

    def make(*given: Any) -> Fake:
        made.append(Fake(*given))
        return made[0]

    thread = threading.Thread(target=serve, args=(theirs, make))
    thread.start()
    remote = Remote.__new__(Remote)  # without a process
    remote._connection = ours
    schedules = every_schedule(20)
    assert remote._ask("open", str(tmp_path), "tiny", None, schedules, SHAPES) == {"gpu": "none"}
    assert made[0].given == (tmp_path, "tiny", None, schedules, SHAPES)
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    for schedule in schedules:
        remote.schedule = schedule
        shifted, evaluated = remote.process(picture, seed=3)
        np.testing.assert_array_equal(shifted, picture + 3)
        assert evaluated == len(schedule.evaluated)
    with pytest.raises(EngineError, match="not enough memory"):
        remote.process(picture, seed=-1)
    assert len(remote.process(picture, seed=1)) == 2  # it lives on
    ours.close()
    thread.join(10)
    assert not thread.is_alive() and made[0].closed


def opened(python: str) -> str:
    with pytest.raises(ValueError) as caught:
        tensorrt_candidate(
            "tensorrt", Path("engines"), "tiny", None, [Schedule.parse("full", 20)], SHAPES, Path(python)
        )
    return str(caught.value)


@pytest.mark.skipif(gpu() is not None, reason="there is a GPU")
def test_another_interpreter_says_what_is_wrong_there() -> None:
    assert opened(sys.executable).startswith("--backend tensorrt needs an NVIDIA GPU")


def test_no_interpreter_is_one_sentence() -> None:
    assert opened("/nowhere/python") == "--engine-python /nowhere/python cannot be started: No such file or directory."
    assert opened("/bin/true") == "the interpreter of --engine-python ended with status 0."


def test_the_torch_backend_does_not_read_it(caplog: pytest.LogCaptureFixture) -> None:
    assert tensorrt_candidate("torch", None, "tiny", None, [], [], Path("/nowhere")) is None
    assert "--engine-python is for --backend tensorrt" in caplog.text
