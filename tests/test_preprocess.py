"""preprocess.py as a user meets it: run as a program on the small model, with TensorRT-RTX's real engines."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed: no engine can be built")
torch = pytest.importorskip("torch")

from safetensors.numpy import load_file, save_file  # noqa: E402

import preprocess  # noqa: E402
from bench.candidate import check_weights  # noqa: E402
from models import find_weights  # noqa: E402
from runtime.engine import Gpu  # noqa: E402
from runtime.manifest import Manifest  # noqa: E402
from trt_builder.convert import source_of  # noqa: E402
from trt_builder.flavour import get_flavour  # noqa: E402
from trt_builder.verify import Comparison  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "models" / "tiny" / "tiny.safetensors"
NAME = "tiny-128x128-n1-fp16"
HIDDEN = "import sys, runpy\nfor name in {names!r}: sys.modules[name] = None\n"
HIDDEN += "sys.argv = ['preprocess.py', *{argv!r}]\nrunpy.run_path('preprocess.py', run_name='__main__')"
TENSORRT = ("tensorrt", "tensorrt_rtx")
SCORE = "python compute_score.py"
slow_io = pytest.mark.skipif(not shutil.which("unshare"), reason="there is no unshare to make a read-only mount with")


def command(*argv: object, hide: tuple[str, ...] = ()) -> list[str]:
    """The command line of preprocess.py, as on a machine where the modules `hide` are not installed."""
    words = [str(word) for word in argv]
    return [sys.executable, *(["-c", HIDDEN.format(names=hide, argv=words)] if hide else ["preprocess.py", *words])]


def environment(**variables: str) -> dict[str, str]:
    """That of a machine without a GPU, where nothing names weights."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "CONTROLNET_WEIGHTS": "", **variables}


def run(output: Path, *argv: object, hide: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    words = command("--output", output, *argv, hide=hide)
    return subprocess.run(words, cwd=ROOT, env=environment(**variables), text=True, capture_output=True, timeout=120)


def refused(done: subprocess.CompletedProcess[str], *said: str) -> None:
    """A refusal is one last sentence and exit status 2, after nothing on standard output."""
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("preprocess: ") and last.endswith(".")
    for part in said:
        assert part in last


def cell(text: str, row: str) -> str:
    """The column "engines" of a row of the summary."""
    return next(re.split(r"\s{2,}", line.strip())[2] for line in text.splitlines() if line.strip().startswith(row))


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> SimpleNamespace:
    """A first run on the small model: its output folder and what it said."""
    output = tmp_path_factory.mktemp("engines")
    return SimpleNamespace(output=output, done=run(output))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """The small model's weights as ControlNet publishes them: a .pth with a state_dict."""
    path = tmp_path / "weights" / "mine.pth"
    path.parent.mkdir()
    torch.save({"state_dict": {name: torch.from_numpy(array) for name, array in load_file(TINY).items()}}, path)
    return path


def test_without_a_gpu_it_prepares_the_small_model(first):
    assert first.done.returncode == 0, first.done.stderr
    assert "There is no GPU here" in first.done.stderr and "With an NVIDIA GPU" in first.done.stderr
    assert cell(first.done.stdout, "128x128") == "8 built" and "no: needs a GPU" in first.done.stdout
    assert first.done.stdout.rstrip().endswith(SCORE)
    manifest = Manifest.load(first.output / NAME)
    assert len(manifest.stages) == 8 and manifest.targets == ["sm89"] and manifest.weights == str(TINY)


def test_a_second_run_ends_in_seconds_and_builds_nothing(first):
    plans = {path: path.stat().st_mtime_ns for path in (first.output / NAME).glob("*.plan")}
    begin = time.monotonic()
    done = run(first.output)
    assert time.monotonic() - begin < 15  # it takes about one; the first took five
    assert done.returncode == 0 and cell(done.stdout, "128x128") == "8 kept"
    assert {path: path.stat().st_mtime_ns for path in (first.output / NAME).glob("*.plan")} == plans


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_it_goes_on(tmp_path, sent):
    words = command("--output", tmp_path)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(words, cwd=ROOT, env=environment(), text=True, **pipes)
    assert process.stderr and any(line.startswith("time (3 of 8)") for line in process.stderr)  # two are done by now
    process.send_signal(sent)
    err = process.communicate(timeout=60)[1]
    if sent == signal.SIGKILL:
        (tmp_path / NAME / ".time.plan.partial").write_bytes(b"half")  # as if killed while writing
    else:
        assert process.returncode == 130
        assert err.splitlines()[-1].startswith("preprocess: stopped; what was finished is kept")
        assert "Traceback" not in err
    finished = len(Manifest.load(tmp_path / NAME).stages)
    assert 2 <= finished < 8
    done = run(tmp_path)
    assert done.returncode == 0 and cell(done.stdout, "128x128") == f"{8 - finished} built, {finished} kept"
    assert len(list((tmp_path / NAME).glob("*.plan"))) == 8 and not list((tmp_path / NAME).glob(".*.partial"))


def test_a_pth_is_converted_once(tmp_path, checkpoint):
    made = checkpoint.with_suffix(".safetensors")
    argv = ("--model", "tiny", "--weights", checkpoint)
    made.with_name(f".{made.name}.partial").write_bytes(b"half")  # as if killed while writing
    done = run(tmp_path, *argv, hide=TENSORRT)
    assert done.returncode == 0 and f"{checkpoint} is {made} from here on" in done.stderr
    assert done.stdout.rstrip().endswith(f"{SCORE} --weights {made}")
    expected, found = load_file(TINY), load_file(made)
    assert expected.keys() == found.keys() and all(np.array_equal(expected[name], found[name]) for name in expected)
    assert made.stat().st_mode == checkpoint.stat().st_mode
    before = made.stat().st_mtime_ns
    assert run(tmp_path, *argv, hide=TENSORRT).returncode == 0 and made.stat().st_mtime_ns == before
    other = {name: torch.from_numpy(array) for name, array in expected.items()}
    other["betas"] = other["betas"] + 1
    torch.save(other, checkpoint)
    assert run(tmp_path, *argv, hide=TENSORRT).returncode == 0
    assert np.array_equal(load_file(made)["betas"], expected["betas"] + 1)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["mine.pth", "mine.safetensors"]


def test_a_file_that_is_in_the_way_is_not_overwritten(tmp_path, checkpoint):
    made = checkpoint.with_suffix(".safetensors")
    save_file({"a": np.zeros(1)}, made)
    before = made.read_bytes()
    done = run(tmp_path, "--model", "tiny", "--weights", checkpoint, hide=TENSORRT)
    refused(done, str(made), "was not made from", "move it away")
    assert made.read_bytes() == before


@slow_io
def test_beside_a_read_only_folder_the_conversion_goes_to_the_engines(tmp_path, checkpoint):
    folder, output = checkpoint.parent, tmp_path / "engines"
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0"'
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*namespace, mount, folder], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a folder read-only")
    words = command("--output", output, "--model", "tiny", "--weights", checkpoint, hide=TENSORRT)
    script = f'{mount} && exec "$@"'
    for _ in range(2):
        words_there = [*namespace, script, str(folder), *words]
        done = subprocess.run(words_there, cwd=ROOT, env=environment(), text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert f"{checkpoint} is {output / 'weights' / 'mine.safetensors'} from here on" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["mine.pth"]
    assert load_file(output / "weights" / "mine.safetensors").keys() == load_file(TINY).keys()


def test_without_pytorch_a_pth_is_refused_with_the_way_out(tmp_path, checkpoint):
    done = run(tmp_path, "--model", "tiny", "--weights", checkpoint, hide=("torch", *TENSORRT))
    refused(done, str(checkpoint), "PyTorch", "preprocess.py --weights mine.pth", ".safetensors")
    assert run(tmp_path, "--model", "tiny", hide=("torch", *TENSORRT)).returncode == 0  # which needs none


def test_missing_weights_say_where_it_looked(tmp_path):
    done = run(tmp_path, "--model", "sd15", CONTROLNET_WEIGHTS=str(tmp_path))
    usual = "control_sd15_canny{.safetensors,.pth,.ckpt}"
    refused(done, f"{tmp_path}/{usual}, {ROOT}/models/{usual}", "--weights", "CONTROLNET_WEIGHTS")
    refused(run(tmp_path, "--model", "sd15", CONTROLNET_WEIGHTS="/nowhere/at.pth"), "/nowhere/at.pth", usual)
    refused(run(tmp_path, "--weights", "nowhere.pth"), "nothing at nowhere.pth")
    assert not list(tmp_path.iterdir())


def test_weights_are_found_in_their_order(tmp_path, monkeypatch):
    for name in ("control_sd15_canny.pth", "given.pth"):
        (tmp_path / name).touch()
    monkeypatch.setenv("CONTROLNET_WEIGHTS", str(tmp_path))
    assert find_weights("sd15") == tmp_path / "control_sd15_canny.pth"
    (tmp_path / "control_sd15_canny.safetensors").touch()
    assert find_weights("sd15") == tmp_path / "control_sd15_canny.safetensors"
    assert find_weights("sd15", tmp_path / "given.pth") == tmp_path / "given.pth"
    monkeypatch.setenv("CONTROLNET_WEIGHTS", str(tmp_path / "given.pth"))
    assert find_weights("sd15") == tmp_path / "given.pth" and find_weights("tiny") == TINY


def test_unfit_weights_are_named_before_anything_is_built(tmp_path, checkpoint):
    arrays, file, output = load_file(TINY), tmp_path / "bad.safetensors", tmp_path / "out"
    names = sorted(name for name in arrays if name.endswith(".weight"))
    save_file({**arrays, names[0]: arrays[names[0]][:-1]}, file)
    refused(run(output, "--model", "tiny", "--weights", file), "bad.safetensors", "1 wrong-shaped", names[0])
    save_file({name: array for name, array in arrays.items() if name != names[1]}, file)
    refused(run(output, "--model", "tiny", "--weights", file), "1 missing", names[1])
    worse = {names[2]: np.full_like(arrays[names[2]], np.nan), names[3]: arrays[names[3]].copy()}
    worse[names[3]].flat[-1] = np.inf
    save_file({**arrays, **worse}, file)
    refused(run(output, "--model", "tiny", "--weights", file), "2 with NaN or infinity", names[2], names[3])
    torch.save({name: torch.from_numpy(array) for name, array in {**arrays, **worse}.items()}, checkpoint)
    refused(run(output, "--model", "tiny", "--weights", checkpoint), str(checkpoint), "with NaN or infinity", names[3])
    assert not checkpoint.with_suffix(".safetensors").exists() and not list(output.rglob("*.plan"))


def test_a_reference_that_will_refuse_the_weights_is_announced(tmp_path):
    arrays, file = load_file(TINY), tmp_path / "more.safetensors"
    del arrays["betas"]
    save_file({**arrays, "surplus": np.zeros(1)}, file)
    done = run(tmp_path, "--model", "tiny", "--weights", file, hide=TENSORRT)
    assert done.returncode == 0 and "2 names that the model lacks or has besides (betas, surplus)" in done.stderr


def test_without_tensorrt_it_says_how_to_get_it(tmp_path):
    done = run(tmp_path, hide=TENSORRT)
    assert done.returncode == 0 and "pip install -e '.[rtx]'" in done.stderr and "all numbers are finite" in done.stderr
    assert done.stdout.split() == ["Next:", *SCORE.split()] and not list(tmp_path.iterdir())
    for asked in (["--shapes", "128x128"], ["--flavour", "tensorrt"], ["--target", "sm86"]):
        done = run(tmp_path, *asked, hide=TENSORRT)
        assert done.returncode == 2 and "pip install" in done.stderr and "Traceback" not in done.stderr


def test_the_competitions_script(tmp_path):
    words = ["bash", str(ROOT / "preprocess.sh"), "--shapes", "64by64"]
    done = subprocess.run(words, cwd=tmp_path, text=True, capture_output=True, env=environment(PYTHON=sys.executable))
    refused(done, "64by64", "256x384")


# -- in this process ---------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_in_one_sentence(tmp_path, capsys, monkeypatch):
    for module in (preprocess, preprocess.cli):
        monkeypatch.setattr(module, "gpu", lambda: None)
    for argv, said in {
        ("--shapes", "100x128"): "multiple of 64",
        ("--samples", "0"): "samples is 0",
        ("--target", "sm13"): "cannot build for sm13",
        ("--model", "nope"): "sd15, tiny",
        ("--shapes", "64x64", "128x128", "--reference", "a.npz"): "--reference is for one shape",
        ("--weights", str(ROOT / "README.md")): "none of .safetensors, .pth, .ckpt",
        ("--frob",): "--help",
    }.items():
        assert preprocess.main(["--output", str(tmp_path), *argv]) == 2
        out, err = capsys.readouterr()
        last = err.splitlines()[-1]
        assert not out and last.startswith("preprocess: ") and last.endswith(".") and said in last


@pytest.fixture
def with_a_gpu(first, monkeypatch):
    """As on a machine with the GPU that the engines are for; `errors` are what verifying finds, one an output."""
    errors: list[float] = []
    calls: list[str] = []

    def verify(manifest, flavour, reference):
        calls.append(manifest.folder.name)
        yield from (Comparison("control", f"residual{i}", e, e, e, 1.0, 0, 2e-2) for i, e in enumerate(errors))

    here = Gpu("RTX 4090", "8.9")
    for module in (preprocess, preprocess.cli):
        monkeypatch.setattr(module, "gpu", lambda: here)
    monkeypatch.setattr(preprocess.cli, "ready", lambda manifest: get_flavour("tensorrt_rtx"))
    monkeypatch.setattr(preprocess.verifying, "fresh_reference", lambda *rest: iter(()))
    monkeypatch.setattr(preprocess.verifying, "verify", verify)
    yield SimpleNamespace(errors=errors, calls=calls, argv=["--model", "tiny", "--output", str(first.output)])
    (first.output / NAME / "verified.json").unlink(missing_ok=True)


def test_engines_are_verified_once(with_a_gpu, capsys, first):
    with_a_gpu.errors += [1e-3, 4e-3]
    for _ in range(2):
        argv = [*with_a_gpu.argv, "--flavour", "tensorrt_rtx"]
        assert preprocess.main(argv) == 0
        out = capsys.readouterr().out
        assert "yes: control.residual1 4.0e-03 off" in out and cell(out, "128x128") == "8 kept"
        assert out.rstrip().endswith(f"{SCORE} --backend tensorrt --engines {first.output}")
    assert with_a_gpu.calls == [NAME]
    assert preprocess.main([*argv, "--no-verify"]) == 0 and "no: --no-verify" in capsys.readouterr().out


def test_engines_that_are_off_fail(with_a_gpu, capsys):
    with_a_gpu.errors += [1e-3, 4e-2]
    for count in (1, 2):
        assert preprocess.main([*with_a_gpu.argv, "--flavour", "tensorrt_rtx"]) == 1
        assert "over: control.residual1 4.0e-02 off" in capsys.readouterr().out
        assert len(with_a_gpu.calls) == count  # a bad verdict is not kept


def test_plugins_are_compiled_where_they_can_be(monkeypatch, capsys):
    flavour = SimpleNamespace(rtx=False)
    monkeypatch.setattr(preprocess.importlib.util, "find_spec", lambda name: name == "plugins")
    for made, said in (
        (Path("/a/plugins.so"), "Plugins: /a/plugins.so"),
        (ValueError("no nvcc"), "compiled: no nvcc."),
    ):

        def build(made=made):
            if isinstance(made, Exception):
                raise made
            return made

        monkeypatch.setitem(sys.modules, "plugins.build", SimpleNamespace(build=build))
        preprocess.compile_plugins(flavour, preprocess.Bar([]))
        assert said in capsys.readouterr().err
    preprocess.compile_plugins(SimpleNamespace(rtx=True), preprocess.Bar([]))
    assert not capsys.readouterr().err


def test_what_to_run_next_fits_the_shapes(monkeypatch, tmp_path):
    options = preprocess.parser().parse_args(["--output", str(preprocess.ROOT / "engines")])
    monkeypatch.setenv("CONTROLNET_WEIGHTS", str(tmp_path / "mine.pth"))

    def lines(model, *shapes):
        options.shapes = shapes
        return preprocess.next_lines(options, model, TINY, preprocess.wanted_shapes(options, model), True)

    assert lines("tiny") == [f"{SCORE} --backend tensorrt"]
    assert lines("tiny", "128x128", "64x64")[1] == f"{SCORE} --backend tensorrt --resolution 64"
    (line,) = lines("sd15", "256x384", "384x256")  # our pictures are square
    assert "--model sd15 --weights models/tiny/tiny.safetensors --backend tensorrt --images FOLDER" in line
    assert "384x256, 256x384" in line
    assert lines("sd15", "256x256") == [
        f"{SCORE} --model sd15 --weights models/tiny/tiny.safetensors --backend tensorrt"
    ]


def test_engines_of_a_conversion_serve_the_pth(tmp_path, checkpoint):
    assert run(tmp_path, "--model", "tiny", "--weights", checkpoint, hide=TENSORRT).returncode == 0
    made = checkpoint.with_suffix(".safetensors")
    sha = preprocess.cli.file_sha256
    assert source_of(made) == sha(checkpoint)
    manifest = SimpleNamespace(weights=str(made), weights_sha256=sha(made), folder="f", command=lambda: "`build`")
    pipeline = SimpleNamespace(manifests={(1, 1, 1): manifest})
    check_weights(pipeline, "tiny", checkpoint)
    check_weights(pipeline, "tiny", made)
    with pytest.raises(ValueError, match="other weights"):
        check_weights(pipeline, "tiny", None)
    manifest.weights_sha256 = "0"
    with pytest.raises(ValueError, match="other weights"):
        check_weights(pipeline, "tiny", checkpoint)
