"""The measurements run, on the simulator and on the CPU, and measure what they say; and who makes the candidate."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_simulator import Cuda
from fake_tensorrt import FakeFlavour, write_engines

import bench.candidate
import bench.ours
import bench.peers
import bench.timeline
import canny2image_TRT
from bench.candidate import tensorrt_candidate
from bench.peers import Peer, Pipeline, table
from cldm.canny2image import Reference, Staged
from cldm.model import create_model
from runtime.engine import Gpu
from runtime.images import read_image
from runtime.schedule import Schedule
from trt_builder.config import Shape

ROOT = Path(__file__).resolve().parents[1]
SCHEDULE = Schedule.of("19,10", 20, (19, 10))


@pytest.fixture(scope="module")
def model():
    """The tiny model with random weights."""
    torch.manual_seed(1)
    return create_model(ROOT / "models/tiny/tiny.yaml").requires_grad_(False)


@pytest.fixture
def engines(model, tmp_path, monkeypatch):
    """One engine folder, and the simulator in place of CUDA and TensorRT."""
    cuda = Cuda()
    for module in ("runtime.engine", "runtime.memory", "bench.ours"):
        monkeypatch.setattr(f"{module}.cuda_runtime", lambda: cuda)
    for module in ("runtime.engine", "runtime.pipeline", "bench.ours", "bench.candidate"):
        monkeypatch.setattr(f"{module}.gpu", lambda: Gpu("fake", "9.0"))
    monkeypatch.setattr("trt_builder.flavour.get_flavour", lambda name: FakeFlavour(cuda, model))
    write_engines(tmp_path / "tiny", model, Shape(64, 64, 1, 10))
    return tmp_path / "tiny"


def test_every_schedule_is_held_against_pytorch(model):
    given = bench.ours.arguments(64, 64)
    staged = bench.peers.Watched(model, Schedule.parse("19,4", 20))
    staged.process(**given)
    arrays = {"latent/19,4": staged.latent.numpy() * 1.25}
    ours = {"pictures": {"19,4": {"median": 3.0}}}
    (found,) = bench.peers.by_schedule(ours, arrays, model, given, "cpu").values()
    assert found["ms"] == 3.0 and found["off"] == pytest.approx(0.25) and 0 < found["off_fp16"] < 0.1
    assert bench.peers.schedule_table({"19,4": found}).row_count == 1


def test_ours_writes_all_that_the_table_needs(engines, tmp_path, monkeypatch, capsys, model):
    monkeypatch.setattr("bench.ours.WARM_UP", 1)
    monkeypatch.setattr("bench.ours.SCHEDULES", ("hackathon-10",))
    monkeypatch.setattr("bench.ours.ABLATIONS", {"one stream": bench.ours.ABLATIONS["one stream"]})
    output = tmp_path / "ours.json"
    options = ["--runs", "2", "--repeats", "2", "--endurance", "3", "--also", f"again={engines}"]
    assert bench.ours.main([str(engines), *options, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["endurance"] | {"host_growth_bytes": 0} == {
        "repeats": 2, "identical": 2, "pictures": 3, "device_growth_bytes": 0, "host_growth_bytes": 0, "captures": 2,
    }  # fmt: skip
    assert found["pictures"]["hackathon-10"]["count"] == 2 and set(found["ablation"]) == {"one stream", "again"}
    assert found["step"] == 0.25 and found["peak_bytes"] > 0 and found["left_bytes"] == 0
    given = bench.ours.arguments(64, 64)
    (expected,) = Staged(model, Schedule.parse("hackathon-10", 20)).process(**given)
    made = np.load(output.with_suffix(".npz"))["picture/hackathon-10"]
    assert abs(made.astype(int) - expected).max() <= 1
    assert "2 of 2 pictures identical" in capsys.readouterr().out


def test_the_timeline_has_three_stages_a_step(engines, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.timeline.gpu", lambda: Gpu("fake", "9.0"))
    source, picture = tmp_path / "timeline.json", tmp_path / "timeline.png"
    assert bench.timeline.main(["measure", str(engines), str(source), "--runs", "2"]) == 0
    spans = json.loads(source.read_text())["spans"]
    assert [(span["stage"], span["side"]) for span in spans] == 3 * [
        ("control", False), ("unet_encoder", True), ("unet_decoder", False),
    ]  # fmt: skip
    assert bench.timeline.main(["draw", str(source), str(picture)]) == 0
    assert min(read_image(picture).shape[:2]) > 200


def test_the_timeline_of_recorded_kernels(tmp_path, capsys):
    """Three steps of three milliseconds, of which the first is left out: the side stream ends before the main one."""
    kernels = [("a", 1, 0, 1), ("b", 2, 0.5, 1.5), ("c", 1, 1, 2), ("dJoinParams", 1, 2, 2.5), ("CannyLast", 1, 2.5, 3)]
    rows = [
        {"name": name, "stream": stream, "begin": 1000 * (3 * step + begin), "end": 1000 * (3 * step + end)}
        for step in range(3) for name, stream, begin, end in kernels
    ]  # fmt: skip
    spans = bench.timeline.spans_of_kernels(rows)
    one = [("control", False, 0, 2), ("unet_encoder", True, 0.5, 1.5), ("unet_decoder", False, 2, 3)]
    expected = [(stage, side, begin + at, end + at) for at in (0, 3) for stage, side, begin, end in one]
    assert [tuple(span.values()) for span in spans] == expected
    source, picture = tmp_path / "kernels.json", tmp_path / "timeline.png"
    source.write_text(json.dumps({"gpu": "fake", "rows": rows}))
    assert bench.timeline.main(["draw", str(source), str(picture)]) == 0 and picture.stat().st_size > 1000
    for wrong, said in ((rows[1:], "not 3 equal steps"), ([], "no kernel of these joins a skip")):
        source.write_text(json.dumps({"gpu": "fake", "rows": wrong}))
        assert bench.timeline.main(["draw", str(source), str(picture)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("batched", [False, True])
def test_the_peers_make_the_references_picture(model, batched):
    given = bench.ours.arguments(64, 64)
    pipeline = Pipeline(Peer("", torch.float32, batched, "eager"), model, given)
    (made,) = pipeline.process(Schedule.parse("full", 20))
    (expected,) = Reference(model).process(**given)
    assert made.std() > 10 and abs(made.astype(int) - expected).max() <= 1
    assert pipeline.latent.shape == (1, 4, 8, 8)


def test_the_table_has_a_line_for_each_and_ratios_to_ours():
    def one(ms, step):
        pictures = {name: {"median": 20 * ms} for name in bench.peers.SCHEDULES}
        return {"step": step, "pictures": pictures, "peak_bytes": 2**30, "off": {"latent": 0.01, "picture": 0.0}}

    view = table({"them": one(6.0, {"median": 6.0}), "ours": one(4.0, 4.0)}, "ours")
    assert [list(column.cells) for column in view.columns][:4] == [
        ["them", "ours"], ["6.00", "4.00"], ["1.50", "1.00"], ["120.00", "80.00"],
    ]  # fmt: skip


def choose(backend, engines=None, shape=(64, 64, 1), model="tiny", weights=None):
    made = tensorrt_candidate(backend, engines, model, weights, [SCHEDULE], [shape])
    if made:
        assert made.about()["folders"] == ["tiny"] and made.about()["memory"]["activation"] > 0
        made.close()
    return made


def test_auto_takes_engines_that_fit_and_says_so(engines, monkeypatch, caplog):
    monkeypatch.setattr("bench.candidate.check_weights", lambda *_: None)
    assert choose("auto", engines) and "TensorRT makes the candidate's pictures" in caplog.text
    caplog.clear()
    assert choose("auto", engines, (128, 64, 1)) is None
    assert "PyTorch makes the candidate's pictures, because there are no engines for 128x64" in caplog.text
    monkeypatch.setattr("bench.candidate.ENGINES", engines.parent / "nothing")
    caplog.clear()
    assert choose("auto") is None and not caplog.records
    assert choose("torch", engines) is None and "the torch backend does not read it" in caplog.text


def test_tensorrt_asked_for_and_not_to_be_had_is_an_error(engines, monkeypatch):
    with pytest.raises(ValueError, match="was built from other weights"):
        choose("tensorrt", engines, weights=ROOT / "models/tiny/tiny.yaml")
    monkeypatch.setattr("bench.candidate.check_weights", lambda *_: None)
    with pytest.raises(ValueError, match="no engines for 128x64"):
        choose("tensorrt", engines, (128, 64, 1))
    with pytest.raises(ValueError, match="no engines of the model sd15"):
        choose("tensorrt", engines, model="sd15")
    monkeypatch.setattr("bench.candidate.gpu", lambda: None)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        choose("tensorrt", engines)


def test_the_competitions_door_takes_engines(engines, model, caplog):
    caplog.set_level(logging.WARNING)
    door = canny2image_TRT.hackathon()
    door.initialize("tiny", engines=engines)
    given = bench.ours.arguments(64, 64)
    order = """input_image prompt a_prompt n_prompt num_samples image_resolution ddim_steps guess_mode strength scale
        seed eta low_threshold high_threshold"""
    (made,) = door.process(*(given[name] for name in order.split()))
    (expected,) = Staged(model, Schedule.parse("hackathon-10", 20)).process(**given)
    assert abs(made.astype(int) - expected).max() <= 1 and not caplog.records
    door.pipeline.close()
