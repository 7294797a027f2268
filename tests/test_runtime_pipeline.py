"""The TensorRT pipeline on the CUDA simulator, whose engines are the PyTorch twins: the same pictures as `Staged`."""

import gc
import hashlib
import pickle
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cuda_simulator import Error, Hazard
from simulated import USUAL, assert_same, cuda, engines, model, staged  # noqa: F401

import runtime.session
from cldm.canny2image import Staged
from runtime import Canny2Image, PipelineOptions
from runtime.engine import OutOfMemory
from runtime.manifest import EngineError, Manifest, StagePlan
from runtime.session import STAGES
from runtime.steps import COND

CHANGES = {
    "prompt": {"prompt": "a fox"}, "negative": {"n_prompt": ""}, "seed": {"seed": 6}, "scale": {"scale": 3.0},
    "strength": {"strength": 0.4}, "thresholds": {"low_threshold": 50}, "guess": {"guess_mode": True},
    "eta": {"eta": 0.7}, "usual": {},
}  # fmt: skip


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("schedule", ["full", "hackathon-10"])
def test_pictures_are_those_of_pytorch_without_another_capture(cuda, engines, model, schedule, samples):
    with Canny2Image(engines, schedule) as pipeline:
        first = pipeline.process(**USUAL | {"num_samples": samples})
        captures = pipeline.captures
        assert captures == cuda.calls.count("cudaStreamBeginCapture") == 2
        assert_same(first, staged(model, schedule, num_samples=samples))
        rounded = np.array(staged(model, schedule, Staged, num_samples=samples), np.int16) - first
        assert abs(rounded).max() <= 1 and (rounded != 0).mean() < 0.01
        changes = CHANGES if schedule == "hackathon-10" else {"guess and eta": {"guess_mode": True, "eta": 1.0}}
        for change in changes.values():
            assert_same(
                pipeline.process(**USUAL | {"num_samples": samples} | change),
                staged(model, schedule, num_samples=samples, **change),
            )
        assert pipeline.captures == cuda.calls.count("cudaStreamBeginCapture") == captures


OPTIONS = [
    PipelineOptions(graph="step"),
    PipelineOptions(graph="none"),
    PipelineOptions(graph="none", overlap=False),
    PipelineOptions(overlap=False),
    PipelineOptions(overlap=False, skip_text=False),
    PipelineOptions(skip_text=False),
    PipelineOptions(two_streams=False),
    PipelineOptions(hoist=False),
    PipelineOptions(share_memory=False),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_switch_makes_the_same_picture(cuda, engines, model, options):
    with Canny2Image(engines, "19,10,4", options) as pipeline:
        for change in ({}, {"seed": 6}, {"prompt": "a fox", "eta": 0.5}, {}):
            assert_same(pipeline.process(**USUAL | change), staged(model, "19,10,4", **change))
        shared = pipeline.memory
        assert (shared["activation"] < shared["activation_apart"]) == options.share_memory


def test_text_runs_only_where_the_prompts_changed(cuda, engines):
    def runs(options, *changes):
        with Canny2Image(engines, "19", options) as pipeline:
            pipeline.process(**USUAL)
            before = sum(done.name == "clip" for done in cuda.done)
            for change in changes:
                pipeline.process(**USUAL | change)
            return sum(done.name == "clip" for done in cuda.done) - before

    assert runs(PipelineOptions(), {}, {"seed": 1}, {"scale": 2.0}) == 0
    assert runs(PipelineOptions(), {"prompt": "a fox"}, {"prompt": "a fox"}, {}) == 2
    assert runs(PipelineOptions(skip_text=False), {}, {}) == 2
    assert runs(PipelineOptions(overlap=False), {}, {"n_prompt": "x"}) == 1


def test_the_host_does_not_wait_between_upload_and_download(cuda, engines):
    with Canny2Image(engines) as pipeline:
        pipeline.process(**USUAL)
        del cuda.calls[:]
        pipeline.process(**USUAL | {"prompt": "a fox"})
        assert cuda.calls == [
            "cudaMemcpyAsync", "cudaGraphLaunch",  # the text
            "cudaMemcpyAsync", "cudaMemcpyAsync", "cudaGraphLaunch", "cudaMemcpyAsync",
            "cudaStreamSynchronize", "cudaStreamSynchronize",
        ]  # fmt: skip
        assert set(pipeline.host_ms) == {"prepare", "text", "edges", "inputs", "launch", "wait", "copy"}


@pytest.mark.parametrize("graph", ["picture", "step", "none"])
@pytest.mark.parametrize("missing", ["fork", "join"])
def test_a_missing_wait_is_found(cuda, engines, monkeypatch, graph, missing):
    place = runtime.session.Session._place_buffers

    def drop(self):
        cuda.ignore_waits = {int(self.side if missing == "fork" else self.main)}
        place(self)

    monkeypatch.setattr(runtime.session.Session, "_place_buffers", drop)
    with Canny2Image(engines, "19,10", PipelineOptions(graph=graph)) as pipeline:
        with pytest.raises(Hazard, match="may still be using"):
            pipeline.process(**USUAL)
            pipeline.process(**USUAL)


def test_memory_shared_by_engines_at_work_at_once_is_found(cuda, engines, monkeypatch):
    monkeypatch.setattr("runtime.session.activation_places", lambda sizes, share: dict.fromkeys(sizes, 0))
    with Canny2Image(engines, "19") as pipeline:
        with pytest.raises(Hazard, match="unet_encoder writes what control may still be using"):
            pipeline.process(**USUAL)


def test_host_memory_touched_too_early_is_found(cuda, engines):
    with Canny2Image(engines, "19") as pipeline:
        expected = pipeline.process(**USUAL)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runtime.session.Session, "wait", lambda self, quiet=False: None)
            assert not np.array_equal(pipeline.process(**USUAL), expected)
        with pytest.raises(Hazard, match="host memory was changed"):
            pipeline.process(**USUAL | {"seed": 6})


def test_shapes_and_schedules_are_bounded_and_the_oldest_go(cuda, engines):
    options = PipelineOptions(shapes=1, schedules=2)
    with Canny2Image(engines, "full", options) as pipeline:
        for steps in (1, 2, 4):
            pipeline.process(**USUAL | {"ddim_steps": steps})
        assert (pipeline.captures, len(cuda.executables)) == (6, 4)
        pipeline.process(**USUAL | {"ddim_steps": 2})
        assert pipeline.captures == 6
        for steps, captures in ((1, 8), (2, 8), (4, 10)):  # 4 went for 1, as 2 had been used since
            pipeline.process(**USUAL | {"ddim_steps": steps})
            assert pipeline.captures == captures
        used = cuda.total - cuda.free
        for _ in range(3):
            pipeline.process(**USUAL | {"ddim_steps": 1, "num_samples": 2})
            pipeline.process(**USUAL | {"ddim_steps": 4})
            pipeline.process(**USUAL | {"ddim_steps": 2})
            assert cuda.total - cuda.free <= used


def test_a_profile_names_every_stage(cuda, engines):
    with Canny2Image(engines, "19,10") as pipeline:
        with pytest.raises(EngineError, match="no picture yet"):
            pipeline.profile()
        expected = pipeline.process(**USUAL)
        assert pipeline.latent().shape == (1, 4, 8, 8) and 0 < abs(pipeline.latent()).max() < 100
        assert pipeline.profile(runs=2) == dict.fromkeys([*STAGES, *COND, "step", "picture"], 0.25)
        np.testing.assert_array_equal(pipeline.process(**USUAL), expected)


def test_a_shape_that_is_not_built_lists_those_that_are(cuda, engines):
    with Canny2Image(engines) as pipeline:
        assert pipeline.shapes == [(64, 64, 1), (64, 64, 2)]
        for change in ({"image_resolution": 128}, {"num_samples": 3}):
            with pytest.raises(EngineError, match="only for 64x64 with 1, 64x64 with 2: run"):
                pipeline.process(**USUAL | change)


@pytest.mark.parametrize("change", [{"low_threshold": 0}, {"eta": 2.0}, {"ddim_steps": 7}, {"seed": -2}])
def test_bad_arguments_leave_the_pipeline_usable(cuda, engines, model, change):
    with Canny2Image(engines) as pipeline:
        with pytest.raises(ValueError):
            pipeline.process(**USUAL | {"prompt": "a fox"} | change)
        assert_same(pipeline.process(**USUAL), staged(model))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_picture_broken_off_leaves_no_text_of_its_own(cuda, engines, model, overlap):
    with Canny2Image(engines, options=PipelineOptions(overlap=overlap)) as pipeline:
        pipeline.process(**USUAL)
        with pytest.raises(ValueError, match="thresholds"):
            pipeline.process(**USUAL | {"prompt": "a fox", "low_threshold": 0})
        pipeline.profile(1)
        assert_same(pipeline.process(**USUAL), staged(model))


def test_a_fault_in_a_picture_closes_the_pipeline(cuda, engines, caplog):
    pipeline = Canny2Image(engines)
    pipeline.process(**USUAL)
    cuda.fail["cudaGraphLaunch"] = 0, Error.cudaErrorIllegalAddress
    with pytest.raises(EngineError, match="GPU failed in a picture, and the pipeline is closed: CUDA says: an illegal"):
        pipeline.process(**USUAL)
    with pytest.raises(EngineError, match="was closed when the GPU failed.*make a new"):
        pipeline.process(**USUAL)
    assert "could not be freed" in caplog.text
    for kind in ("device", "pinned", "streams", "events", "executables"):
        getattr(cuda, kind).clear()  # the GPU's context is lost, and with it all that it held
    cuda.free, cuda.broken = cuda.total, None


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaHostAlloc", "cudaGraphInstantiate", "cudaStreamCreateWithFlags"])
def test_out_of_memory_gives_everything_back(cuda, engines, model, call):
    reached = 0
    for after in range(20):
        cuda.fail = {call: (after, Error.cudaErrorMemoryAllocation)}
        try:
            with Canny2Image(engines) as pipeline:
                try:
                    pipeline.process(**USUAL)
                except OutOfMemory as error:
                    assert "out of memory" in str(error) and cuda.leaks() == {}
                    reached += 1
                    cuda.fail = {}
                    assert_same(pipeline.process(**USUAL), staged(model))
        except OutOfMemory as error:
            assert "do not fit into the GPU's memory" in str(error)
            reached += 1
        gc.collect()
        assert cuda.leaks() == {}
        if cuda.fail:
            break
    assert reached == after > 0


def test_a_fault_while_capturing_gives_everything_back(cuda, engines, model):
    with Canny2Image(engines) as pipeline:
        calls = {"n": 0}
        execute = runtime.session.Plan.execute

        def refuse(self, stream):
            if stream.capture is not None:
                calls["n"] += 1
                raise EngineError("TensorRT could not run the engine; its message is above.")
            execute(self, stream)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("runtime.engine.Plan.execute", refuse)
            with pytest.raises(EngineError, match="could not be prepared: TensorRT could not run"):
                pipeline.process(**USUAL)
        assert calls["n"] == 1 and cuda.leaks() == {}
        assert_same(pipeline.process(**USUAL), staged(model))


def test_a_second_thread_is_refused(cuda, engines, monkeypatch):
    with Canny2Image(engines) as pipeline:
        inside, on = threading.Event(), threading.Event()

        def slow(*given):
            inside.set()
            assert on.wait(10)
            return np.zeros((64, 64, 3), np.uint8)

        monkeypatch.setattr("runtime.pipeline.canny_hint", slow)
        thread = threading.Thread(target=lambda: pipeline.process(**USUAL))
        thread.start()
        assert inside.wait(10)
        try:
            with pytest.raises(EngineError, match="in another thread: take one Canny2Image a thread"):
                pipeline.process(**USUAL)
        finally:
            on.set()
            thread.join()
    with pytest.raises(EngineError, match="was closed"):
        pipeline.process(**USUAL)


def change_manifest(folder, **changes):
    replace(Manifest.load(folder), **changes).save()


def test_engines_for_something_else_are_refused(cuda, engines, tmp_path):
    folder = Path(shutil.copytree(engines / "tiny-64x64-n1-fp32", tmp_path / "one"))
    for changes, words in (
        ({"version": "10.0.1"}, "is for tensorrt 10.0.1, but this is tensorrt 8.6.0"),
        ({"gpu": "another"}, "is for the GPU another"),
        ({"stages": {}}, "has no plan of the stage 'clip'"),
    ):
        kept = Manifest.load(folder)
        change_manifest(folder, **changes)
        with pytest.raises(EngineError, match=words):
            Canny2Image(folder)
        kept.save()
    plan = folder / "control.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(EngineError, match=r"control\.plan has \d+ bytes instead of"):
        Canny2Image(folder)
    with pytest.raises(EngineError, match="holds no engines of the model sd15"):
        Canny2Image(engines, model="sd15")
    with pytest.raises(EngineError, match="is missing"):
        Canny2Image(tmp_path / "nowhere")
    assert not cuda.device


@pytest.mark.parametrize(("name", "change"), [("hint", {"format": "LINEAR"}), ("row0", {"dtype": np.dtype("f2")})])
def test_stages_that_see_a_tensor_differently_are_refused(cuda, engines, tmp_path, name, change):
    folder = Path(shutil.copytree(engines / "tiny-64x64-n1-fp32", tmp_path / "one"))
    manifest = Manifest.load(folder)
    plan = pickle.loads(manifest.plan_bytes("control"))
    content = replace(plan, inputs=[replace(b, **change) if b.name == name else b for b in plan.inputs]).to_bytes()
    manifest.plan_path("control").write_bytes(content)
    entry = StagePlan("", hashlib.sha256(content).hexdigest(), len(content), 0.0)
    manifest.with_stage("control", entry).save()
    with pytest.raises(EngineError, match=f"control has {name} as .* another stage as .*: run `python -m trt_builder"):
        Canny2Image(folder)


def test_two_folders_for_one_shape_exclude_each_other(cuda, engines, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_bytes((engines / "tiny-64x64-n1-fp32/manifest.json").read_bytes())
    with pytest.raises(EngineError, match="exclude each other: name one of them"):
        Canny2Image(tmp_path)


def test_without_a_gpu_one_sentence(engines, monkeypatch):
    monkeypatch.setattr("runtime.pipeline.gpu", lambda: None)
    with pytest.raises(EngineError, match="run on an NVIDIA GPU, and cuda-python sees none here"):
        Canny2Image(engines)


@pytest.mark.parametrize("given", [{"graph": "both"}, {"shapes": 0}, {"schedules": 0}])
def test_options_are_checked(given):
    with pytest.raises(ValueError, match=f"the option {next(iter(given))} is"):
        PipelineOptions(**given)
