"""The output folder of a run: whole or untouched."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.output import OutputError, check_output, output_folder
from bench.report import MADE_BY

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def working_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def run(output, *files):
    """A run that leaves `files` and its results."""
    check_output(Path(output))
    with output_folder(Path(output)) as folder:
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(file)
        (folder / "results.json").write_text(json.dumps({"made_by": MADE_BY}))


def files():
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def test_an_earlier_run_is_replaced_whole():
    run("score", "candidate/a", "old")
    run("score", "candidate/b")
    assert files() == ["score/candidate/b", "score/results.json"]
    assert sorted(os.listdir()) == ["score"], "a temporary folder was left"


def test_nothing_is_there_before_the_end():
    with output_folder(Path("new/score")) as folder:
        (folder / "a").write_text("a")
        assert not Path("new/score").exists()
    assert files() == ["new/score/a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_run_that_breaks_off_leaves_what_was_there(error):
    run("score", "a")
    for output in ("score", "new/deep/score"):
        with pytest.raises(error), output_folder(Path(output)) as folder:
            (folder / "b").write_text("b")
            raise error
    assert files() == ["score/a", "score/results.json"] and sorted(os.listdir()) == ["score"]


def test_the_earlier_run_comes_back_where_the_new_one_cannot_be_moved(monkeypatch):
    run("score", "a")
    rename = Path.rename

    def fails(self, target):
        if self.name == "new":
            raise OSError(18, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="cross-device"):
        run("score", "b")
    assert files() == ["score/a", "score/results.json"]


def test_a_mounted_folder_is_filled_in_place(monkeypatch):
    Path("volume").mkdir()
    inode = os.stat("volume").st_ino
    monkeypatch.setattr("bench.output.is_mount", lambda path: Path(path).name == "volume")
    run("volume", "candidate/a", "old")
    run("volume", "candidate/b")
    assert os.stat("volume").st_ino == inode
    assert files() == ["volume/candidate/b", "volume/results.json"] and os.listdir() == ["volume"]


SAVE = """
from pathlib import Path
from bench.output import check_output, output_folder
check_output(Path("a volume"))
with output_folder(Path("a volume")) as folder:
    (folder / "a").write_text("a")
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="there is no unshare to mount a folder with")
def test_a_folder_of_the_same_disk_that_is_mounted_is_filled_in_place(tmp_path):
    Path("a volume").mkdir()
    namespace, mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"], 'mount --bind "$0" "$0"'
    if subprocess.run([*namespace, mount, "a volume"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a folder")
    words = [*namespace, f'{mount} && exec "$@"', str(tmp_path / "a volume"), sys.executable, "-c", SAVE]
    subprocess.run(words, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert files() == ["a volume/a"] and os.listdir("a volume") == ["a"]


@pytest.mark.parametrize("content", ['{"accuracy": 0.9}', "[]", "{", "[" * 100_000])
def test_results_of_another_program_are_not_replaced(content):
    Path("score").mkdir()
    Path("score/results.json").write_text(content)
    with pytest.raises(OutputError, match="something else"):
        run("score", "a")
    assert Path("score/results.json").read_text() == content


def test_what_came_there_during_the_run_is_not_replaced():
    with pytest.raises(OutputError, match="something else"), output_folder(Path("score")):
        Path("score").mkdir()
        Path("score/thesis.txt").write_text("years of it")
    assert files() == ["score/thesis.txt"]


def test_inputs_inside_the_output_are_safe():
    run("score", "candidate/a")
    with pytest.raises(OutputError, match="score/candidate"):
        check_output(Path("score"), [Path("score/candidate")])
    check_output(Path("score"), [Path("score2/candidate")])


def test_a_folder_that_cannot_be_made_is_one_sentence(monkeypatch):
    def mkdtemp(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", mkdtemp)
    with pytest.raises(OutputError, match="'new/score' cannot be written: Read-only file system."):
        run("new/score", "a")
    assert os.listdir() == []
