"""Builds that are killed, run out of disk or meet another: nothing half-made is ever loaded, the next completes."""

import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed: no engine can be built")

from runtime.manifest import EngineError, Manifest  # noqa: E402
from trt_builder.__main__ import main  # noqa: E402
from trt_builder.build import BuildLog  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NAME = "tiny-128x128-n1-fp16"
BUILD = ["build", "--model", "tiny", "--flavour", "tensorrt_rtx", "--target", "sm89"]
SHORT = ["--stages", "hint,time"]
# Kills itself at the COUNT-th time that it opens, renames or removes something in its engine folder.
KILLED_AT = """
import os, runpy, signal, sys
folder, count, seen = sys.argv[1], int(sys.argv[2]), 0
def hook(event, arguments):
    global seen
    if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(arguments[0]).startswith(folder):
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
sys.argv = ["trt_builder", *sys.argv[3:]]
runpy.run_module("trt_builder", run_name="__main__", alter_sys=True)
"""
# Believes that there is room on the disk, as where it fills up during the build.
NO_LOOK = """
import runpy, shutil, sys, types
shutil.disk_usage = lambda path: types.SimpleNamespace(free=10**12)
sys.argv = ["trt_builder", *sys.argv[1:]]
runpy.run_module("trt_builder", run_name="__main__", alter_sys=True)
"""


def start(*command: str, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    """A Python process in the repository."""
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        preexec_fn=before,
    )  # fmt: skip


def vouched(folder: Path) -> list[str]:
    """The stages that load; all that the manifest names must."""
    try:
        manifest = Manifest.load(folder)
    except EngineError as error:
        assert "holds no engines" in str(error)
        return []
    for stage, plan in manifest.stages.items():
        assert len(manifest.plan_bytes(stage)) == plan.bytes
    return list(manifest.stages)


def completes(output: Path, *options: str) -> str:
    """Build again: every stage is there, and no half of a file; what was kept and built."""
    before = vouched(output / NAME)
    assert main([*BUILD, *options, "--output", str(output)]) == 0
    assert not list((output / NAME).glob(".*.partial"))
    after = vouched(output / NAME)
    assert set(after) == {path.stem for path in (output / NAME).glob("*.plan")} and len(after) == (2 if options else 8)
    assert set(before) <= set(after)
    return "nothing: the next build kept " + ("some" if before else "no") + " plans and built the others"


def killed_at(output: Path, count: int) -> int:
    """The exit status of a short build that is killed at the `count`-th operation in its folder."""
    process = start("-c", KILLED_AT, str(output / NAME), str(count), *BUILD, *SHORT, "--output", str(output))
    process.communicate(timeout=120)
    return process.returncode


@pytest.mark.parametrize("count", [2, 9, 17])
def test_killed_between_two_operations(tmp_path, tally, count):
    one = tally("kill -9 of a build between two file operations")
    one.inject()
    assert killed_at(tmp_path, count) == -9
    one.survive(completes(tmp_path, *SHORT))


@pytest.mark.slow
def test_killed_between_any_two_operations(tmp_path, tally):
    one = tally("kill -9 of a build between two file operations")
    for count in range(1, 100):
        output = tmp_path / str(count)
        output.mkdir()
        if killed_at(output, count) == 0:
            break
        one.inject()
        one.survive(completes(output, *SHORT))
    assert count > 15


def test_killed_at_some_moments(tmp_path, tally):
    kill_at_moments(tmp_path, tally, 1)


@pytest.mark.slow
def test_killed_at_20_moments(tmp_path, tally):
    kill_at_moments(tmp_path, tally, 20)


def kill_at_moments(tmp_path: Path, tally, moments: int) -> None:
    """Kill whole builds at random moments of their whole length."""
    one, draw = tally("kill -9 of a build at a random moment"), random.Random(5)
    begin = time.monotonic()
    start("-m", "trt_builder", *BUILD, "--output", str(tmp_path / "whole")).communicate()
    seconds = time.monotonic() - begin
    for moment in range(moments):
        output = tmp_path / str(moment)
        one.inject()
        process = start("-m", "trt_builder", *BUILD, "--output", str(output))
        time.sleep(draw.uniform(0.2, 0.98) * seconds)
        process.kill()
        process.communicate()
        one.survive(completes(output))
        shutil.rmtree(output)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A folder on a file system of its own, which `resize` makes larger."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]).returncode:
        pytest.skip("mounting a small tmpfs takes root's rights")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kilobytes", [4, 12, 292, 308, 3000])
def test_a_disk_that_fills_up_during_a_build(small_disk, tally, kilobytes):
    resize(small_disk, f"{kilobytes}k")
    full_disk(small_disk, tally("disk full during a build"), lambda: resize(small_disk, "200m"))


def resize(disk: Path, size: str) -> None:
    """Give the small disk another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@pytest.mark.parametrize("most", [1_000, 200_000, 1_000_000])
def test_a_file_that_may_not_grow_during_a_build(tmp_path, tally, most):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    full_disk(tmp_path, tally("files limited in size during a build (ulimit -f)"), lambda: None, limit)


def test_a_log_that_cannot_be_written_is_reported_once(tmp_path):
    log = BuildLog(open("/dev/full", "w"))  # noqa: SIM115
    for _ in range(3):
        log.add("INFO", "words")  # from TensorRT's threads, where nothing may be raised
    assert log.full and log.full.strerror == "No space left on device"


def full_disk(output: Path, one, make_room, before: Callable[[], None] | None = None) -> None:
    """A build fails in one sentence, what it leaves is consistent, and the next one with room completes."""
    one.inject()
    process = start("-c", NO_LOOK, *BUILD, *SHORT, "--output", str(output), before=before)
    _, err = process.communicate(timeout=120)
    said = err.splitlines()[-1]
    assert process.returncode == 2 and err.count("\n") <= 3, err  # the stages that were begun, and the sentence
    assert said.startswith(f"trt_builder: {output}/") and said.endswith(
        (": No space left on device.", ": File too large.")
    ), err
    assert not list(output.glob("*/.*.partial")), "what half a file takes is missing to others"
    vouched(output / NAME)
    make_room()
    completes(output, *SHORT)
    one.survive(said)


def test_two_builds_at_once(tmp_path, tally):
    one = tally("two builds at once into one folder")
    one.inject()
    both = [start("-m", "trt_builder", *BUILD, "--output", str(tmp_path)) for _ in range(2)]
    ends = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    waited = [err for _, err in ends if "waiting" in err]
    assert len(waited) == 1 and waited[0].splitlines()[0].startswith(f"Another build is writing to {tmp_path / NAME}")
    assert sorted(out.count("built") for out, _ in ends) == [0, 8] and len(vouched(tmp_path / NAME)) == 8
    one.survive(waited[0].splitlines()[0])
