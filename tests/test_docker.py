"""The Dockerfile and its README against the programs they run; docker/check.sh builds and runs it, as root."""

import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench.perceptual import INSTALL
from models import VARIABLE

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
README = (ROOT / "docker" / "README.md").read_text(encoding="utf-8")
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"


def steps(instruction: str) -> list[str]:
    """What follows an instruction, wherever the Dockerfile has it."""
    return re.findall(rf"^{instruction} (.*)$", DOCKERFILE, re.MULTILINE)


def ignored(path: str) -> bool:
    """Whether a path, or a folder above it, stays out of the image."""
    parts = Path(path).parts
    return any(matches(parts[:depth], line.split("/")) for depth in range(1, len(parts) + 1) for line in IGNORED)


def matches(parts: tuple[str, ...], pattern: list[str]) -> bool:
    """Whether a path is what a line of .dockerignore names; `**/` stands for any folders."""
    if pattern[0] == "**":
        return fnmatch.fnmatch(parts[-1], pattern[-1])
    same = len(parts) == len(pattern)
    return same and all(fnmatch.fnmatch(part, one) for part, one in zip(parts, pattern, strict=True))


def test_what_is_copied_and_run_is_there():
    assert steps("COPY") == ["pyproject.toml README.md LICENSE ./", "docker/requirements.py docker/", ". ."]
    for word in ("pyproject.toml", "README.md", "LICENSE", "docker/requirements.py"):
        assert (ROOT / word).is_file() and not ignored(word)
    (start,), (health,) = steps("ENTRYPOINT"), steps("HEALTHCHECK")
    program = json.loads(start)[0]
    assert json.loads(health.partition("CMD ")[2]) == [program, "health"]
    (workdir,) = steps("WORKDIR")
    file = ROOT / Path(program).relative_to(workdir)
    assert os.access(file, os.X_OK) and not ignored("docker/entrypoint.sh")


def test_programs_go_in_and_weights_stay_out():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True)
    if tracked.returncode:
        pytest.skip("this is no git checkout")
    for path in tracked.stdout.split():
        if path.endswith((".py", ".yaml", ".safetensors")):
            assert ignored(path) == path.startswith("tests/"), path
    weights = ["models/control_sd15_canny.pth", "models/control_sd15_canny.safetensors"]
    for path in [*weights, "engines/a/b.plan", "score/a.png", ".git/config", "cldm/__pycache__/model.cpython-311.pyc"]:
        assert ignored(path), path


def test_the_image_runs_as_nobody_in_particular():
    (user,) = steps("USER")
    assert user.isdigit() and int(user) and f"--uid {user}" in DOCKERFILE
    assert steps("VOLUME") == ['["/engines", "/score"]'] and "install -d -m 1777 /engines /score" in DOCKERFILE
    assert "ln -s /engines /score ." in DOCKERFILE and ignored("engines") and ignored("score")
    assert f"{VARIABLE}=/weights" in steps("ENV")[-1] and "COMPUTE_SCORE=" in steps("ENV")[-1]


def test_versions_are_those_of_the_project():
    text = (ROOT / "pyproject.toml").read_text()
    (version,) = re.findall(r'^version = "(.*)"$', text, re.MULTILINE)
    assert f'org.opencontainers.image.version="{version}"' in DOCKERFILE
    assert INSTALL.removeprefix("pip install --no-deps ") in DOCKERFILE
    assert "'cuda-python>=12.9,<14'" in DOCKERFILE  # PyPI's PyTorch 2.13 asks for cuda-bindings 13


def test_what_is_installed_is_what_the_project_asks_for():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def listed(extras: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "docker/requirements.py", extras]
        return subprocess.run(words, cwd=ROOT, text=True, capture_output=True)

    extras = project["optional-dependencies"]
    assert listed("torch,rtx").stdout.splitlines() == [*project["dependencies"], *extras["torch"], *extras["rtx"]]
    assert listed("").stdout.splitlines() == project["dependencies"]
    done = listed("frob")
    assert done.returncode and "no extra 'frob'" in done.stderr


def docker_runs() -> list[list[str]]:
    """Every `docker run` line of the README, in words."""
    return [shlex.split(line) for line in re.findall(r"^ {4}(docker run .*)$", README, re.MULTILINE)]


@pytest.mark.parametrize("words", docker_runs(), ids=lambda words: words[-1])
def test_the_readmes_lines_name_options_that_exist(words):
    at = words.index("canny2image")
    docker, (program, *argv) = words[:at], words[at + 1 :]
    assert docker[docker.index("--network") + 1] == "none"
    mounts = [word for before, word in zip(docker, docker[1:], strict=False) if before == "-v"]
    kinds = {mount.split(":")[1]: mount.split(":")[2:] for mount in mounts}
    assert kinds.keys() <= {"/weights", "/engines", "/score", "/pictures"}
    assert all(kinds[read] == ["ro"] for read in ("/weights", "/pictures") if read in kinds)
    if program == "compute_score":
        import compute_score

        options = compute_score.parser().parse_args(argv)
        assert "/score" in kinds and all(str(path) in kinds for path in options.images if argv and "--images" in argv)
    elif program == "preprocess":
        import preprocess

        assert preprocess.wanted_shapes(preprocess.parser().parse_args(argv), "sd15") and "/engines" in kinds
    else:
        from trt_builder.__main__ import parser

        assert program == "trt_builder" and parser().parse_args(argv)


def test_the_build_arguments_exist():
    named = set(re.findall(r"--build-arg (\w+)=", README))
    assert named == {"BASE", "EXTRAS", "PIP_EXTRA_INDEX_URL"} <= {arg.partition("=")[0] for arg in steps("ARG")}
    tags = re.findall(r"BASE=(\S+)", README)
    assert all(tag.rpartition(":")[2] in DOCKERFILE for tag in tags)


@pytest.fixture
def enter(tmp_path):
    """Run docker/entrypoint.sh with this interpreter as `python`."""
    (tmp_path / "python").symlink_to(sys.executable)

    def enter(*argv: str) -> subprocess.CompletedProcess[str]:
        path = f"{tmp_path}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run([str(ENTRYPOINT), *argv], text=True, capture_output=True, env=env)

    return enter


def test_the_entrypoint_runs_the_programs(enter):
    assert "Usage: docker run" in enter().stdout and enter("--help").stdout == enter().stdout
    for program in ("preprocess", "compute_score", "trt_builder"):
        done = enter(program, "--help")
        assert done.returncode == 0 and f"usage: {program}" in done.stdout, done.stderr
        assert enter(program, "--frob").returncode == 2
    assert enter("health").returncode == 0
    assert enter("echo", "hello").stdout == "hello\n"


def test_bash_can_read_every_script():
    for script in (ENTRYPOINT, ROOT / "docker" / "check.sh", ROOT / "preprocess.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
