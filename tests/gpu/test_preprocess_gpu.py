"""preprocess.py on a GPU: builds, verifies against PyTorch, and what it says to run next runs. `pytest tests/gpu`."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.engine import gpu

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(gpu() is None, reason="cuda-python sees no NVIDIA GPU")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the repository."""
    return subprocess.run([sys.executable, *words], cwd=ROOT, text=True, capture_output=True)


def test_the_small_model_from_weights_to_scores(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="verifying compares with PyTorch")
    words = ["preprocess.py", "--model", "tiny", "--output", str(tmp_path / "engines")]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert "8 built" in done.stdout and "yes: " in done.stdout
    begin = time.monotonic()
    again = run(*words)
    assert again.returncode == 0 and "8 kept" in again.stdout and "yes: " in again.stdout
    assert time.monotonic() - begin < 20
    line = again.stdout.splitlines()[-1].strip()
    assert "--backend tensorrt" in line
    score = run(*shlex.split(line)[1:], "--output", str(tmp_path / "score"))
    assert score.returncode == 0, score.stderr
    results = json.loads((tmp_path / "score" / "results.json").read_text())
    assert results["backend"] == "tensorrt" and results["summary"]["pictures"] == 10


@pytest.mark.skipif(not os.environ.get("CONTROLNET_WEIGHTS"), reason="CONTROLNET_WEIGHTS names no weights")
def test_the_full_size_model(tmp_path: Path) -> None:
    done = run("preprocess.py", "--model", "sd15", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "8 built" in done.stdout and "yes: " in done.stdout
