"""compute_score.py that is stopped, killed or runs out of disk: what was finished is on disk, results.json is whole."""

import json
import os
import resource
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import compute_score  # noqa: E402
from runtime.images import read_image, write_image  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
COUNT = 6
CALLS = 2 * COUNT + 2  # of `process`, with the warm-ups


class Pipeline:
    """Returns its input at once; before the call number `at` of all pipelines it does what `action` says."""

    calls, at = 0, 0

    @staticmethod
    def action() -> None:
        """Nothing, unless a test says otherwise."""

    def __init__(self, *_: object) -> None:
        pass

    def process(self, image, **_):
        Pipeline.calls += 1
        if Pipeline.calls == Pipeline.at:
            Pipeline.action()
        return [image]

    def features(self, images):
        return np.zeros((len(images), 2), np.float32)


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys) -> Iterator[Run]:
    """Run the benchmark over pictures of noise, with something that happens before one of its pictures."""
    fake = types.ModuleType("cldm.canny2image")
    fake.load_model = lambda *_: None  # type: ignore[attr-defined]
    fake.Reference = fake.Staged = Pipeline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cldm.canny2image", fake)
    monkeypatch.setattr("bench.perceptual.InceptionFeatures", Pipeline)
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    Path("in").mkdir()
    for number in range(COUNT):
        write_image(f"in/{number}.png", draw.integers(0, 256, (64, 64, 3), np.uint8))
    before = signal.signal(signal.SIGTERM, compute_score.stop)

    def run(*options: str, at: int = 0, action: Callable[[], object] = lambda: None) -> tuple[int, str]:
        monkeypatch.setattr(Pipeline, "calls", 0)
        monkeypatch.setattr(Pipeline, "at", at)
        monkeypatch.setattr(Pipeline, "action", staticmethod(action))
        status = compute_score.main(["--images", "in", "--resolution", "64", "--format", "png", *options])
        return status, capsys.readouterr().err

    yield run
    signal.signal(signal.SIGTERM, before)


def send(number: int) -> Callable[[], None]:
    """What sends this process a signal."""
    return lambda: signal.raise_signal(number)


def check_whole(score: Path, interrupted: bool) -> int:
    """A folder of results holds what its results.json says, and nothing else; the number of pictures."""
    found = json.loads((score / "results.json").read_text(encoding="utf-8"))
    assert found["interrupted"] is interrupted and found["asked"] == COUNT
    names = [picture["name"] for picture in found["pictures"]]
    assert names == [str(number) for number in range(len(names))] and found["summary"]["pictures"] == len(names)
    for role in ("reference", "candidate"):
        assert sorted(path.name for path in (score / role).iterdir()) == [f"{name}.png" for name in names]
        assert all(read_image(score / role / f"{name}.png").shape == (64, 64, 3) for name in names)
    assert sorted(path.name for path in score.iterdir()) == [
        "candidate", "contact.png", "plot.png", "reference", "results.json",
    ]  # fmt: skip
    return len(names)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", range(5, CALLS + 1))
def test_a_stopped_run_keeps_what_is_finished(run, tally, sent, at):
    one = tally("SIGTERM or Ctrl-C in the middle of a run")
    one.inject()
    status, err = run(at=at, action=send(sent))
    made = check_whole(Path("score"), interrupted=True)
    assert status == 130 and made == (at - 3) // 2, "those that were finished when the signal came"
    assert err == f"compute_score: stopped after {made} of 6 pictures; they are in score, and results.json says so.\n"
    assert sorted(os.listdir()) == ["in", "score"]
    one.survive(err)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_run_that_is_stopped_at_its_first_picture_leaves_the_earlier_one(run, tally, sent, at):
    one = tally("SIGTERM or Ctrl-C before the first picture is finished")
    run()
    one.inject()
    assert run(at=at, action=send(sent)) == (130, "compute_score: stopped, and nothing was written.\n")
    assert check_whole(Path("score"), interrupted=False) == COUNT
    one.survive("compute_score: stopped, and nothing was written.")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("during", ["plot.png", "contact.png", "results.json"])
def test_signals_while_the_results_are_written_lose_nothing(run, tally, monkeypatch, sent, during):
    from bench import figures, report

    one = tally("SIGTERM or Ctrl-C while the results are written")
    name = {"plot.png": "score_plot", "contact.png": "contact_sheet", "results.json": "write_json"}[during]
    place = report if name == "write_json" else figures
    whole = getattr(place, name)

    def disturbed(*given):
        signal.raise_signal(sent)
        whole(*given)

    monkeypatch.setattr(place, name, disturbed)
    one.inject()
    assert run() == (0, "") and check_whole(Path("score"), interrupted=False) == COUNT
    assert signal.getsignal(signal.SIGTERM) is compute_score.stop, "signals are heard again"
    one.survive("nothing: the run ended well")


def test_sigterm_and_kill_9_of_the_program_itself(run, tally):
    """In a process of its own, as `docker stop` does it; a killed run leaves the earlier results."""
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "faults")!r}]
import runpy, time, types
import bench.perceptual
import test_faults_scoring as here
class Slow(here.Pipeline):
    def process(self, image, **_):
        print("begun", flush=True)
        time.sleep(0.2)
        return [image]
fake = types.ModuleType("cldm.canny2image")
fake.load_model, fake.Reference, fake.Staged = lambda *_: None, Slow, Slow
sys.modules["cldm.canny2image"], bench.perceptual.InceptionFeatures = fake, Slow
sys.argv[:] = ["compute_score.py", "--images", "in", "--resolution", "64", "--format", "png"]
runpy.run_path({str(ROOT / "compute_score.py")!r}, run_name="__main__")
"""
    for sent, interrupted in ((signal.SIGTERM, True), (signal.SIGKILL, True)):
        one = tally(f"{sent.name} of the program itself in the middle of a run")
        one.inject()
        process = subprocess.Popen(
            [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout and all(process.stdout.readline() == "begun\n" for _ in range(8))
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (130 if sent == signal.SIGTERM else -9), err
        assert check_whole(Path("score"), interrupted) == 2
        one.survive(err.strip() or "nothing: the earlier results are whole")


@pytest.mark.parametrize("kilobytes", [0, 40, 160, 240])
@pytest.mark.parametrize("mounted", [False, True])
def test_a_disk_that_fills_up_during_a_run(run, tally, kilobytes, mounted):
    """Twelve pictures take 150 kB, sheet and plot as much again; the folder may be the mount point itself."""
    disk = Path("disk").resolve()
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount).returncode:
        pytest.skip("mounting a small tmpfs takes root's rights")
    one = tally("disk full while results are written")
    try:
        output = ["--output", "disk" if mounted else "disk/score"]
        assert run(*output) == (0, "")
        score = Path(output[1])
        before = {path: path.read_bytes() for path in score.rglob("*") if path.is_file()}
        room = sum(-(-len(content) // 4096) * 4 for content in before.values()) + 4 + kilobytes
        subprocess.run(["mount", "-o", f"remount,size={room}k", str(disk)], check=True)
        one.inject()
        status, err = run(*output)
        assert status == 2 and err.count("\n") == 1 and err.endswith(": No space left on device.\n"), (err, room)
        assert {path: path.read_bytes() for path in score.rglob("*") if path.is_file()} == before
        assert mounted or os.listdir(disk) == ["score"]
        assert not list(disk.glob(".*"))
        one.survive(err)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("most", [1_000, 20_000, 40_000])
def test_files_that_may_not_grow_during_a_run(run, tally, most):
    one = tally("files limited in size while results are written (ulimit -f)")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    one.inject()
    try:
        status, err = run(at=1, action=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1])))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2 and err.count("\n") == 1 and err.endswith(": File too large.\n"), err
    assert os.listdir() == ["in"]
    one.survive(err)


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"[bold]x.png", b"$a_{$.png", b"a\nb.png", b"\x1b[2J.png"])
def test_odd_file_names_and_prompts(run, tally, name):
    one = tally("a file name and a prompt of odd bytes")
    with open(os.path.join(b"in", name), "wb") as file:
        file.write(Path("in/0.png").read_bytes())
    one.inject()
    assert run("--prompt", os.fsdecode(name)) == (0, "")
    found = json.loads(Path("score/results.json").read_text(encoding="utf-8"))
    assert found["options"]["prompt"] == os.fsdecode(name)
    assert os.fsdecode(name).removesuffix(".png") in {picture["name"] for picture in found["pictures"]}
    one.survive("nothing: the run ended well")
