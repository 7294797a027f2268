"""The command line of trt_builder: what it builds, keeps, continues and refuses. Real engines of the tiny model."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed: no engine can be built")

from filelock import FileLock  # noqa: E402

from runtime.engine import Gpu  # noqa: E402
from runtime.manifest import Manifest  # noqa: E402
from trt_builder import __main__ as cli  # noqa: E402
from trt_builder import build as building  # noqa: E402
from trt_builder import verify as verifying  # noqa: E402
from trt_builder.build import BuildLog  # noqa: E402
from trt_builder.config import ModelConfig, Shape  # noqa: E402
from trt_builder.flavour import get_flavour  # noqa: E402
from trt_builder.inspect import read_report  # noqa: E402
from trt_builder.random_weights import write_random_weights  # noqa: E402
from trt_builder.stages import STAGES, USUAL  # noqa: E402
from trt_builder.text import cross_attentions  # noqa: E402
from trt_builder.verify import input_shapes  # noqa: E402
from trt_builder.weights import expected_shapes  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RTX = ["--flavour", "tensorrt_rtx", "--target", "sm86,sm89"]
TINY = [*RTX, "--random-weights", "0"]
NAME = "tiny-128x128-n1-fp16"


@pytest.fixture
def run(capsys, tmp_path):
    """Run a command line into `tmp_path`: status, standard output, standard error."""

    def run(*argv: object) -> tuple[int, str, str]:
        words = [str(word) for word in argv]
        output = ["--output", str(tmp_path)] if words[0] == "build" and "--output" not in words else []
        status = cli.main([*words, *output])
        return status, *capsys.readouterr()

    return run


def refused(result: tuple[int, str, str], *said: str) -> None:
    """A refusal is one sentence on standard error, and exit status 2."""
    status, out, err = result
    assert status == 2 and not out and err.startswith("trt_builder: ") and err.count("\n") == 1 and err.endswith(".\n")
    for part in said:
        assert part in err


def states(out: str) -> dict[str, str]:
    """Of a build's table: "built" or "kept" by stage."""
    return {line.split()[0]: line.split()[-1] for line in out.splitlines() if line.strip().endswith(("built", "kept"))}


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Path:
    """All engines of the tiny model."""
    output = tmp_path_factory.mktemp("engines")
    assert cli.main(["build", *TINY, "--output", str(output)]) == 0
    return output / NAME


# -- build ------------------------------------------------------------------------------------------------------------


def test_every_stage_is_built_and_vouched_for(engines):
    manifest = Manifest.load(engines)
    assert list(manifest.stages) == list(USUAL)
    assert manifest.targets == ["sm86", "sm89"] and manifest.weights == "random:0" and manifest.gpu is None
    for stage in USUAL:
        assert len(manifest.plan_bytes(stage)) == manifest.stages[stage].bytes > 100_000
    assert not list(engines.glob(".*.partial"))
    assert "== clip" in (engines / "build.log").read_text()


def test_the_inputs_that_verify_makes_are_those_of_the_engines(engines):
    config, shape = ModelConfig.load("tiny"), Shape(128, 128)
    for stage in USUAL:
        report = read_report(engines, stage)
        assert {t.name: tuple(t.shape) for t in report.inputs} == input_shapes(stage, config, shape)


def test_what_did_not_change_is_kept_and_what_did_is_built(run, tmp_path):
    stages = ["--stages", "hint,time"]
    assert states(run("build", *TINY, *stages)[1]) == {"hint": "built", "time": "built"}
    assert states(run("build", *TINY, *stages)[1]) == {"hint": "kept", "time": "kept"}
    assert states(run("build", *TINY, *stages, "--steps", 10)[1]) == {"hint": "kept", "time": "built"}
    assert states(run("build", *TINY, "--stages", "hint", "--random-weights", 1)[1]) == {"hint": "built"}
    assert list(Manifest.load(tmp_path / NAME).stages) == ["hint"]
    assert not (tmp_path / NAME / "time.plan").exists()  # `time` was of other weights
    assert states(run("build", *RTX, "--target", "sm89", "--random-weights", 1, "--stages", "hint")[1]) == {
        "hint": "built"
    }


def test_every_switch_and_the_definition_change_the_key(engines, monkeypatch):
    manifest, config = Manifest.load(engines), ModelConfig.load("tiny")
    options = cli.Options()
    request = building.Request(manifest, config, Shape(128, 128), options, get_flavour("tensorrt_rtx"), STAGES, dict)
    keys = {building.stage_key(request, "control")}
    for change in ({"attention": "plain"}, {"qkv": "apart"}, {"shared_prefix": False}, {"precision": "fp32"}):
        keys.add(building.stage_key(dataclasses.replace(request, options=cli.Options(**change)), "control"))
    own = {"attention": "own", "conv": "own"}
    folded = own | {"layer_norm": "folded"}
    for change in (own, folded, folded | {"cross_attention": "folded"}):
        keys.add(building.stage_key(dataclasses.replace(request, options=cli.Options(**change)), "control"))
    for change in ({"version": "9"}, {"flavour": "x"}, {"targets": ["sm86"]}, {"weights_sha256": "0"}, {"gpu": "x"}):
        changed = dataclasses.replace(manifest, **change)
        keys.add(building.stage_key(dataclasses.replace(request, manifest=changed), "control"))
    monkeypatch.setattr(building, "definition_sha", lambda: "other sources")
    assert len(keys | {building.stage_key(request, "control")}) == 14


def test_a_changed_plan_is_built_again(run, tmp_path):
    run("build", *TINY, "--stages", "hint,time")
    plan = tmp_path / NAME / "hint.plan"
    content = bytearray(plan.read_bytes())
    content[5000] ^= 1
    plan.write_bytes(content)
    assert states(run("build", *TINY, "--stages", "hint,time")[1]) == {"hint": "built", "time": "kept"}


def test_a_damaged_manifest_stops_a_build(run, tmp_path):
    run("build", *TINY, "--stages", "hint")
    (tmp_path / NAME / "manifest.json").write_text("{")
    refused(run("build", *TINY, "--stages", "hint"), "manifest.json cannot be used", "delete the folder")


def test_weights_of_a_file(run, tmp_path):
    file = tmp_path / "tiny.safetensors"
    assert run("random-weights", "--model", "tiny", "--seed", 3, "--write", file)[0] == 0
    assert states(run("build", *RTX, "--weights", file, "--stages", "hint")[1]) == {"hint": "built"}
    manifest = Manifest.load(tmp_path / NAME)
    assert manifest.weights == str(file) and manifest.weights_sha256 == cli.file_sha256(file)


SLOW = """
import runpy, sys, time
import trt_builder.build as building
define = building.define
def slow(stage, *rest):
    if stage == "time":
        print("at it", flush=True)
        time.sleep({seconds})
    define(stage, *rest)
building.define = slow
sys.argv = ["trt_builder", *{argv!r}]
runpy.run_module("trt_builder", run_name="__main__", alter_sys=True)
"""


def slow_build(output: Path, seconds: float) -> subprocess.Popen:
    """A build in another process that is in the middle of its second stage."""
    argv = ["build", *TINY, "--stages", "hint,time", "--output", str(output)]
    script = SLOW.format(seconds=seconds, argv=argv)
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stdout.readline() == "at it\n"
    return process


def test_a_killed_build_is_continued(run, tmp_path):
    process = slow_build(tmp_path, 600)
    process.kill()
    process.communicate()
    (tmp_path / NAME / ".time.plan.partial").write_bytes(b"half")  # as if killed while writing
    assert list(Manifest.load(tmp_path / NAME).stages) == ["hint"]
    assert states(run("build", *TINY, "--stages", "hint,time")[1]) == {"hint": "kept", "time": "built"}
    assert not list((tmp_path / NAME).glob(".*.partial"))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_a_build_with_one_sentence(tmp_path, sent):
    process = slow_build(tmp_path, 1)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("trt_builder: stopped;") and "Traceback" not in err
    assert sorted(p.name for p in (tmp_path / NAME).glob("*.plan")) == ["hint.plan"]
    assert list(Manifest.load(tmp_path / NAME).stages) == ["hint"]


def test_a_second_build_waits_and_says_so(run, tmp_path, capsys):
    (tmp_path / NAME).mkdir()
    lock = FileLock(tmp_path / NAME / ".lock")
    lock.acquire()
    statuses: list[int] = []
    thread = threading.Thread(
        target=lambda: statuses.append(cli.main(["build", *TINY, "--stages", "hint", "--output", str(tmp_path)]))
    )
    thread.start()
    said = ""
    for _ in range(200):
        said += capsys.readouterr().err
        if "waiting" in said:
            break
        time.sleep(0.05)
    assert f"Another build is writing to {tmp_path / NAME}" in said
    assert not list((tmp_path / NAME).glob("*.plan")) and thread.is_alive()
    lock.release()
    thread.join(60)
    assert statuses == [0] and (tmp_path / NAME / "hint.plan").is_file()


def test_a_stopped_monitor_ends_tensorrt(engines, tmp_path):
    manifest = dataclasses.replace(Manifest.load(engines), folder=tmp_path)
    config, flavour = ModelConfig.load("tiny"), get_flavour("tensorrt_rtx")
    request = building.Request(manifest, config, Shape(128, 128), cli.Options(), flavour, STAGES, dict)
    show, steps, stopped = building.Show(), [], threading.Event()
    show.step = lambda done, what: steps.append(done)
    stopped.set()
    with open(tmp_path / "log", "w") as file, pytest.raises(KeyboardInterrupt):
        weights = cli.weights_of(manifest, config)
        building.serialize(request, "hint", weights, BuildLog(file), show, stopped)
    assert 1 <= len(steps) < 10  # of some 60


def test_a_timing_cache_that_is_not_taken_back_is_said_once_and_is_no_error(run, tmp_path, monkeypatch):
    """TensorRT 8.6.0's words."""
    words = (
        "1: [myelinCache.h::deserializeFromBuffer::52] Error Code 1: Myelin (Myelin error from unknown graph)",
        "4: The timing cache will not be used!",
    )
    make = building.serialize

    def refusing(request, stage, weights, log, show, stopped):
        for line in words:
            log.add("ERROR", line)
        assert log.cache_refused and not log.error
        return make(request, stage, weights, log, show, stopped)

    monkeypatch.setattr(building, "serialize", refusing)
    status, _, err = run("build", *TINY, "--stages", "hint,time")
    assert status == 0 and err.count("does not take back its own timing cache") == 1
    assert (tmp_path / NAME / "build.log").read_text().count(words[1]) == 2


def test_our_plugins_are_the_usual_choice_where_they_were_measured_to_win(tmp_path, monkeypatch, caplog):
    from plugins.load import Library, PluginError
    from trt_builder import plugin_layers

    flavour = dataclasses.replace(get_flavour("tensorrt_rtx"), name="tensorrt", strongly_typed=False)
    library = Library("8.6.0", ["86", "90"], "", "", "", tmp_path)
    monkeypatch.setattr(plugin_layers, "find", lambda version: library)
    assert flavour.plugins_win("fp16", "9.0") and not flavour.plugins_win("fp32", "9.0")
    assert not flavour.plugins_win("fp16", "8.9") and "not for compute capability 8.9" in caplog.text

    def chosen(capability, *asked):
        made = cli.switches(cli.parser().parse_args(["build", *asked]), flavour, capability)
        folds = made.attention == made.conv == "own" and "apart" not in asked
        assert made.layer_norm == made.cross_attention == ("folded" if folds else "apart")
        assert made.upsample == ("folded" if made.residual == "own" else "apart")
        return made.attention, made.residual, made.group_norm, made.conv

    assert chosen("9.0") == ("own",) * 4 and chosen("8.6") == ("own", "own", "own", "builtin")
    for layer_norm in ("folded", "apart"):
        assert chosen("9.0", "--layer-norm", layer_norm) == ("own",) * 4
    with pytest.raises(ValueError, match="layer_norm is 'folded'"):
        chosen("8.6", "--layer-norm", "folded")
    made = cli.switches(cli.parser().parse_args(["build", "--cross-attention", "apart"]), flavour, "9.0")
    assert (made.layer_norm, made.cross_attention) == ("folded", "apart")
    with pytest.raises(ValueError, match="cross_attention is 'folded', but must be 'apart' unless layer_norm is, too"):
        chosen("9.0", "--layer-norm", "apart", "--cross-attention", "folded")
    assert chosen("9.0", "--attention", "plain", "--conv", "builtin") == ("plain", "own", "own", "builtin")
    assert chosen("8.9") == ("fused", "fused", "auto", "builtin") and chosen("8.9", "--conv", "own")[-1] == "own"
    assert not dataclasses.replace(flavour, strongly_typed=True).plugins_win("fp16", "9.0")

    def missing(version):
        raise PluginError("there are no plugins: run `python -m plugins build`.")

    monkeypatch.setattr(plugin_layers, "find", missing)
    assert not flavour.plugins_win("fp16", "9.0") and "run `python -m plugins build`" in caplog.text


def test_a_failed_build_says_what_tensorrt_said(run, tmp_path, monkeypatch):
    define = building.define

    def broken(stage, network, *rest):
        if stage != "time":
            define(stage, network, *rest)

    monkeypatch.setattr(building, "define", broken)  # a network without outputs
    status, _, err = run("build", *TINY, "--stages", "hint,time,control")
    last = err.splitlines()[-1]
    assert status == 2 and last.startswith("trt_builder: TensorRT could not build time: ") and "output" in last
    assert str(tmp_path / NAME / "build.log") in last
    assert "ERROR" in (tmp_path / NAME / "build.log").read_text()
    assert list(Manifest.load(tmp_path / NAME).stages) == ["hint"]


def test_bad_input_is_refused_in_one_sentence(run, tmp_path):
    refused(run("build", *RTX, "--weights", "nowhere.safetensors"), "nowhere.safetensors", "--weights")
    yaml = ROOT / "tests" / "data" / "wide.yaml"
    refused(run("build", *RTX, "--model", yaml), "has no weights", "--random-weights")
    refused(run("build", *TINY, "--model", "nope"), "nope", "sd15, tiny")
    refused(run("build", *TINY, "--stages", "hint,unet"), "no stage unet", "vae_decoder")
    refused(run("build", *TINY, "--stages", ","), "no stage")
    for side in ("--height", "--width"):
        refused(run("build", *TINY, side, 100), "100", "multiple of 64")
    refused(run("build", *TINY, "--samples", 0), "samples is 0")
    refused(run("build", *TINY, "--target", "sm13"), "sm13", "sm86")
    refused(run("build", *RTX, "--random-weights", -1), "-1")
    refused(run("build", *TINY, "--weights", yaml), "exclude")
    refused(run("build", *TINY, "--precision", "fp8"), "fp8")
    refused(run("build", *TINY, "--frob"), "--frob")
    refused(run("build", *TINY, "--layer-norm", "folded"), "'folded'", "unless attention and conv are 'own'")
    refused(run("build", *TINY, "--cross-attention", "folded"), "'folded'", "unless layer_norm is, too")
    refused(run("inspect", tmp_path / "nowhere"), "holds no engines")
    refused(run("verify"), "engine folder")
    assert not list(tmp_path.iterdir())


def test_wrong_weights_are_named(run, tmp_path):
    shapes = expected_shapes(ModelConfig.load("tiny"))
    some = dict(list(shapes.items())[20:])
    file = tmp_path / "some.safetensors"
    write_random_weights(file, some, 0)
    refused(run("build", *RTX, "--weights", file), "20 missing", *list(shapes)[:10], "…")
    assert list(tmp_path.iterdir()) == [file]
    file.write_bytes(b"\0" * 100)
    refused(run("build", *RTX, "--weights", file), "some.safetensors")
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_is_noticed_before_building(run, tmp_path, monkeypatch):
    monkeypatch.setattr(building.shutil, "disk_usage", lambda path: SimpleNamespace(free=80_000_000))
    refused(run("build", *TINY), "0.1 GB", "0.1 GB free", "--output")
    assert not list((tmp_path / NAME).glob("*.plan"))


def test_the_estimate_covers_every_weight_and_the_plans(engines):
    shapes = expected_shapes(ModelConfig.load("tiny"))
    manifest = Manifest.load(engines)
    unclaimed = [n for n in shapes if not any(building.re.search(p, n) for p in building.STAGE_WEIGHTS.values())]
    assert unclaimed == [] and tuple(building.STAGE_WEIGHTS) == STAGES
    assert sum(plan.bytes for plan in manifest.stages.values()) < building.SPARE * 1.25


def test_a_flavour_that_needs_a_gpu_says_so(run, monkeypatch):
    needs = dataclasses.replace(get_flavour("tensorrt_rtx"), name="tensorrt", needs_gpu=True)
    monkeypatch.setattr(cli, "get_flavour", lambda name: needs)
    monkeypatch.setattr(cli, "gpu", lambda: None)
    refused(run("build", "--random-weights", 0), "builds on the GPU that it builds for", "--flavour tensorrt_rtx")
    refused(run("build", *TINY), "leave --target out")


def test_the_gpu_here_is_the_target(monkeypatch):
    flavour = get_flavour("tensorrt_rtx")
    monkeypatch.setattr(cli, "gpu", lambda: Gpu("RTX 4090", "8.9"))
    assert cli.place(flavour, []) == (None, None, ["sm89"])
    assert cli.place(flavour, ["sm120", "sm86"]) == (None, None, ["sm120", "sm86"])
    monkeypatch.setattr(cli, "gpu", lambda: Gpu("H200", "9.0"))
    with pytest.raises(ValueError, match="cannot build for sm90"):
        cli.place(flavour, [])


# -- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_without_a_gpu_shows_what_the_build_wrote_down(run, engines, monkeypatch):
    monkeypatch.setattr(cli, "gpu", lambda: None)
    status, out, _ = run("inspect", engines, "--bindings")
    assert status == 0 and "NVIDIA GPU only" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if len(line.split()) > 1}
    assert set(USUAL) <= set(rows)
    attentions = 2 * len(cross_attentions(ModelConfig.load("tiny"), "control"))  # self and cross
    assert rows["control"][3:5] == [str(attentions), str(attentions)]  # in the network, and fused
    assert "residual0…" in out and "half HWC8" in out
    status, out, _ = run("inspect", engines, "--stage", "control")
    assert status == 0 and "_gemm_mha" in out and "residual0" in out


def test_inspect_names_a_stage_that_is_not_there(run, tmp_path):
    run("build", *TINY, "--stages", "hint")
    refused(run("inspect", tmp_path / NAME, "--stage", "clip"), "no plan of the stage 'clip'", "trt_builder build")


# -- verify -----------------------------------------------------------------------------------------------------------


class FakeEngine:
    """An engine that gives what it is told to."""

    outputs: dict[int, dict[str, np.ndarray]] = {}

    def __init__(self, plan, flavour):
        self.size = len(plan)
        self.inputs = {"edges": None}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def run(self, inputs):
        assert inputs.keys() == self.inputs.keys() and set(np.unique(inputs["edges"])) == {0, 1}
        return self.outputs[self.size]


@pytest.fixture
def hint_only(run, tmp_path, monkeypatch):
    """A folder with the engine `hint`, which FakeEngine stands for."""
    run("build", *TINY, "--stages", "hint")
    monkeypatch.setattr(verifying, "Engine", FakeEngine)
    monkeypatch.setattr(cli, "ready", lambda manifest: None)
    return tmp_path / NAME


def test_verify_compares_with_a_reference(run, hint_only, tmp_path):
    pytest.importorskip("torch")
    file = tmp_path / "ref.npz"
    assert run("verify", hint_only, "--make-reference", file)[0] == 0
    stored = np.load(file)["hint/out/hint"]
    size = Manifest.load(hint_only).stages["hint"].bytes
    FakeEngine.outputs = {size: {"hint": stored.astype(np.float16)}}
    status, out, _ = run("verify", hint_only, "--reference", file)
    assert status == 0 and "hint.hint" in out and "ok" in out
    assert run("verify", hint_only)[0] == 0  # the twin in this interpreter, on the same inputs
    FakeEngine.outputs = {size: {"hint": stored * 1.1}}
    status, out, _ = run("verify", hint_only, "--reference", file)
    assert status == 1 and "over" in out
    FakeEngine.outputs = {size: {"other": stored}}
    refused(run("verify", hint_only, "--reference", file), "differ in their outputs: hint, other")


def test_a_reference_for_something_else_is_refused(run, hint_only, tmp_path):
    pytest.importorskip("torch")
    file = tmp_path / "ref.npz"
    refused(run("verify", hint_only, "--reference", file), "no reference", "--make-reference")
    file.write_bytes(b"PK nothing")
    refused(run("verify", hint_only, "--reference", file), "ref.npz")
    size = ["--model", "tiny", "--height", 64, "--width", 64]
    status, _, err = run("verify", "--make-reference", file, *size, "--random-weights", 0)
    assert status == 0 and err.split() == list(STAGES)
    refused(run("verify", hint_only, "--reference", file), "is for shape", "'height': 64")
    run("verify", "--make-reference", file, "--model", "tiny", "--random-weights", 1)
    refused(run("verify", hint_only, "--reference", file), "is for weights")


def test_verify_wants_the_gpu(run, engines, monkeypatch):
    monkeypatch.setattr(cli, "gpu", lambda: None)
    refused(run("verify", engines), "NVIDIA GPU only")
    refused(run("verify", engines, "--time"), "NVIDIA GPU only")


def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "trt_builder", "inspect", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=os.environ)
    assert done.returncode == 2 and done.stderr.startswith("trt_builder: ") and done.stderr.count("\n") == 1
