"""The benchmark from the command line, with a stand-in for the pipelines that takes milliseconds."""

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import cv2
import numpy as np
import pytest

import bench.measure
import compute_score
from compute_score import main
from runtime.images import read_image, resize_image, write_image
from runtime.tokenizer import tokenize

ROOT = Path(__file__).parent.parent


class FakePipeline:
    """Makes the resized input, darker by `shift`, and remembers what it was called with."""

    def __init__(self, shift: int) -> None:
        self.shift = shift
        self.calls: list[dict] = []

    def process(self, input_image, **arguments):
        self.calls.append(arguments)
        tokenize([f"{arguments['prompt']}, {arguments['a_prompt']}"])
        picture = resize_image(input_image, arguments["image_resolution"])
        shifts = [self.shift * (n + 1) for n in range(arguments["num_samples"])]
        return [np.maximum(picture, shift) - np.uint8(shift) for shift in shifts]


class FakeInception:
    """Features whose distance is the difference of the pictures' means."""

    def features(self, images):
        return np.array([[image.mean(), 0.0] for image in images], np.float32).reshape(-1, 2)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, tmp_path):
    """Fakes for all that is slow; the candidate's pictures are about 5 darker a sample than the reference's."""
    fake = types.ModuleType("cldm.canny2image")
    fake.pipelines = {"reference": FakePipeline(0), "candidate": FakePipeline(5)}
    fake.load_model = lambda model, weights, device: (model, weights, device)
    fake.Reference = lambda model: fake.pipelines["reference"]
    fake.Staged = lambda model, schedule: fake.pipelines["candidate"]
    monkeypatch.setitem(sys.modules, "cldm.canny2image", fake)
    monkeypatch.setattr("bench.perceptual.InceptionFeatures", FakeInception)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def pictures(tmp_path):
    """A folder with two small pictures of different shapes, and a file that is no picture by its name."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "README.md").write_text("where they are from")
    for name, width in (("owl", 64), ("fox", 96)):
        picture = np.full((64, width, 3), 100, np.uint8)
        cv2.circle(picture, (32, 32), 20, (250, 200, 120), -1)
        write_image(folder / f"{name}.png", picture)
    return folder


def results(folder="score"):
    return json.loads(Path(folder, "results.json").read_text())


def test_a_run_leaves_results_pictures_and_plots(pictures, tmp_path, capsys):
    assert main(["--images", "in"]) == 0
    assert sorted(path.name for path in Path("score").iterdir()) == [
        "candidate", "contact.png", "plot.png", "reference", "results.json",
    ]  # fmt: skip
    assert sorted(path.name for path in Path("score/candidate").iterdir()) == ["fox.jpg", "owl.jpg"]
    assert read_image("score/candidate/fox.jpg").shape == (128, 192, 3)
    for name in ("contact.png", "plot.png"):
        assert min(read_image(f"score/{name}").shape[:2]) > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "score"], "a temporary folder was left"
    out = capsys.readouterr().out
    assert "fox" in out and "owl" in out and "0 of 2 over PD 12" in out


def test_results_json_says_everything(pictures, stand_ins):
    main(["--images", "in", "--schedule", "19,10", "--seed", "7", "--format", "png"])
    found = results()
    assert (found["made_by"], found["schema"]) == ("canny2image-trt compute_score", 1)
    assert found["schedule"] == {"name": "19,10", "taken": 20, "evaluated": [19, 10]}
    assert found["options"]["seed"] == 7 and found["options"]["images"] == ["in"]
    assert set(found["options"]) == set(vars(compute_score.parser().parse_args([])))
    assert found["versions"]["python"] and found["versions"]["torch"]
    assert found["machine"]["cpu"] and found["machine"]["cores"] >= 1
    fox, owl = found["pictures"]
    assert (fox["name"], fox["width"], fox["height"], fox["failed"]) == ("fox", 192, 128, False)
    assert fox["pd"] == pytest.approx(5, abs=0.1) and fox["pd_samples"] == [fox["pd"]]
    assert fox["candidate"]["files"] == ["candidate/fox.png"] and fox["candidate"]["latency_ms"] > 0
    summary = found["summary"]
    assert (summary["pictures"], summary["failed"]) == (2, 0)
    assert summary["speed_up"] == summary["reference_ms"]["median"] / summary["candidate_ms"]["median"]


def test_defaults_are_the_competitions(pictures, stand_ins):
    main(["--images", "in"])
    assert stand_ins.pipelines["reference"].calls[0] == stand_ins.pipelines["candidate"].calls[0]
    assert stand_ins.pipelines["reference"].calls[0] == {
        "prompt": "a bird",
        "a_prompt": "best quality, extremely detailed",
        "n_prompt": "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, "
        "worst quality, low quality",
        "num_samples": 1,
        "image_resolution": 128,
        "ddim_steps": 20,
        "guess_mode": False,
        "strength": 1.0,
        "scale": 9.0,
        "seed": 2946901,
        "eta": 0.0,
        "low_threshold": 100,
        "high_threshold": 200,
    }


def test_every_option_reaches_the_pipelines(pictures, stand_ins):
    options = "--prompt p --added-prompt a --negative-prompt n --samples 2 --resolution 64 --steps 10 --schedule full"
    more = "--guess-mode --strength 0.5 --scale 3 --seed 1 --eta 0.5 --low-threshold 10 --high-threshold 20"
    assert main(["--images", "in", *options.split(), *more.split()]) == 0
    assert stand_ins.pipelines["candidate"].calls[-1] == {
        "prompt": "p", "a_prompt": "a", "n_prompt": "n", "num_samples": 2, "image_resolution": 64, "ddim_steps": 10,
        "guess_mode": True, "strength": 0.5, "scale": 3.0, "seed": 1, "eta": 0.5, "low_threshold": 10,
        "high_threshold": 20,
    }  # fmt: skip


def test_model_and_weights_reach_load_model(pictures, stand_ins, monkeypatch):
    asked = []
    monkeypatch.setattr(stand_ins, "load_model", lambda *given: asked.append(given))
    main(["--images", "in", "--model", "sd15", "--weights", "w.pth", "--device", "cpu"])
    assert asked == [("sd15", Path("w.pth"), "cpu")]
    assert results()["options"]["resolution"] == 256


def test_one_warm_up_for_each_shape_is_not_timed(pictures, stand_ins):
    write_image(pictures / "yak.png", read_image(pictures / "owl.png"))
    main(["--images", "in"])
    assert [len(pipeline.calls) for pipeline in stand_ins.pipelines.values()] == [3 + 2, 3 + 2]


def test_pd_is_of_the_files_read_back(pictures, monkeypatch):
    monkeypatch.setattr(bench.measure, "write_image", lambda path, image: write_image(path, image // 5))
    main(["--images", "in", "--format", "png"])
    assert results()["pictures"][0]["pd"] == pytest.approx(1)


def test_pd_is_the_mean_over_samples(pictures, capsys):
    assert main(["--images", "in", "--samples", "3", "--format", "png"]) == 0
    owl = results()["pictures"][1]
    assert owl["pd_samples"] == pytest.approx([5, 10, 15], abs=0.1) and owl["pd"] == pytest.approx(10, abs=0.1)
    assert owl["candidate"]["files"] == [f"candidate/owl-{n}.png" for n in (1, 2, 3)]
    assert all(Path("score", name).exists() for name in owl["candidate"]["files"])
    assert "of samples" in capsys.readouterr().out


@pytest.mark.parametrize("shift, strict, status", [(30, [], 0), (30, ["--strict"], 1), (5, ["--strict"], 0)])
def test_a_pd_over_12_is_marked_and_with_strict_an_error(pictures, stand_ins, capsys, shift, strict, status):
    stand_ins.pipelines["candidate"].shift = shift
    assert main(["--images", "in", *strict]) == status
    assert [picture["failed"] for picture in results()["pictures"]] == [shift > 12] * 2
    assert ("failed" in capsys.readouterr().out) == (shift > 12)


@pytest.mark.parametrize("kind", ["grey", "rgba", "16-bit"])
def test_unusual_pictures_work(tmp_path, kind):
    shape = {"grey": (64, 64), "rgba": (64, 64, 4), "16-bit": (64, 64, 3)}[kind]
    picture = np.full(shape, 40000 if kind == "16-bit" else 90, np.uint16 if kind == "16-bit" else np.uint8)
    cv2.imwrite("odd.png", picture)
    assert main(["--images", "odd.png"]) == 0
    assert results()["summary"]["pictures"] == 1


def test_a_prompt_of_500_words_is_cut_and_said_so(pictures, caplog):
    with caplog.at_level(logging.WARNING):
        assert main(["--images", "in", "--prompt", "bird " * 500]) == 0
    assert sum("tokens" in message for message in caplog.messages) == 1


def make_bad_pictures():
    """In the working folder: files and folders that must be refused."""
    Path("empty").mkdir()
    Path("text.png").write_text("no picture")
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    write_image("whole.jpg", picture)
    data = Path("whole.jpg").read_bytes()
    Path("cut.jpg").write_bytes(data[: len(data) // 2])
    cv2.imwrite("dot.png", picture[:1, :1])
    cv2.imwrite("line.png", np.zeros((10, 20000, 3), np.uint8))
    Path("twice").mkdir()
    write_image("twice/owl.jpg", picture)
    Path("work").mkdir()
    Path("work/thesis.txt").write_text("years of it")
    Path("bad.yaml").write_text("steps: [")


BAD = {
    "not a picture": ("--images text.png", "text.png"),
    "no such file": ("--images absent.png", "no file or folder absent.png"),
    "empty folder": ("--images empty", "empty holds no picture"),
    "truncated JPEG": ("--images in cut.jpg", "cut.jpg"),
    "1x1": ("--images dot.png", "1x1"),
    "20000x10": ("--images line.png", "20000x10"),
    "the same name twice": ("--images in twice", "owl.jpg"),
    "steps 0": ("--images in --steps 0", "steps is 0"),
    "steps 2000": ("--images in --steps 2000", "steps is 2000"),
    "steps in words": ("--images in --steps many", "--steps"),
    "schedule twice": ("--images in --schedule 19,5,5", "step 5 more than once"),
    "schedule out of range": ("--images in --schedule 19,-3", "-3"),
    "schedule without the first": ("--images in --schedule 18,4", "first step, 19"),
    "schedule unknown": ("--images in --schedule best", "'best'"),
    "schedule of other steps": ("--images in --steps 30", "for 20 steps, not 30"),
    "schedule damaged": ("--images in --schedule bad.yaml", "bad.yaml"),
    "thresholds": ("--images in --low-threshold 200 --high-threshold 100", "200 and 100"),
    "resolution 0": ("--images in --resolution 0", "resolution 0"),
    "resolution huge": ("--images in --resolution 100000", "100000"),
    "samples": ("--images in --samples 0", "--samples is 0"),
    "seed": ("--images in --seed -1", "--seed is -1"),
    "scale": ("--images in --scale nan", "--scale is nan"),
    "scale huge": ("--images in --scale 1e300", "between 0 and 100"),
    "strength": ("--images in --strength -1", "--strength is -1"),
    "eta": ("--images in --eta 2", "eta is 2"),
    "model missing": ("--images in --model absent.yaml", "no model description absent.yaml"),
    "model": ("--images in --model large", "'large'"),
    "tensorrt": ("--images in --backend tensorrt", "--backend torch"),
    "unknown option": ("--images in --fast", "--fast"),
    "output is a file": ("--images in --output whole.jpg", "is a file"),
    "output of others": ("--images in --output work", "something else"),
    "output inside a file": ("--images in --output whole.jpg/score", "cannot be written"),
    "output holds the input": ("--images in --output in", "is needed"),
    "score-only alone": ("--score-only in", "--reference"),
    "reference alone": ("--reference in", "--score-only"),
    "nothing in common": ("--score-only in --reference twice", "no picture of the same file name"),
    "score-only damaged": ("--score-only cut --reference cut", "cut.jpg"),
}


@pytest.mark.parametrize("options, part", BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(pictures, tmp_path, capsys, stand_ins, options, part):
    make_bad_pictures()
    Path("cut").mkdir()
    Path("cut/cut.jpg").write_bytes(Path("cut.jpg").read_bytes())
    before = sorted(tmp_path.rglob("*"))
    assert main(options.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("compute_score: ") and err.endswith(".\n") and err.count("\n") == 1
    assert part in err
    assert sorted(tmp_path.rglob("*")) == before
    assert not stand_ins.pipelines["reference"].calls, "a picture was made before the input was found bad"


def test_missing_weights_are_one_sentence(pictures, stand_ins, monkeypatch, capsys):
    def load_model(*_):
        raise FileNotFoundError("no weights for model 'tiny'\nlooked at models/tiny")

    monkeypatch.setattr(stand_ins, "load_model", load_model)
    assert main(["--images", "in"]) == 2
    assert capsys.readouterr().err == "compute_score: no weights for model 'tiny' looked at models/tiny.\n"


def test_cuda_without_a_gpu_is_refused(pictures, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--images", "in", "--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_first(pictures, monkeypatch, capsys, stand_ins):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # tests may run as root, who may write everywhere
    assert main(["--images", "in", "--output", "locked/score"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert not stand_ins.pipelines["reference"].calls


@pytest.mark.parametrize(
    "error, status, at", [(KeyboardInterrupt, 130, 1), (OSError(28, "No space left on device"), 2, 3)]
)
def test_a_run_that_breaks_off_leaves_the_earlier_one(
    pictures, tmp_path, stand_ins, monkeypatch, capsys, error, status, at
):
    main(["--images", "in/owl.png"])
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    candidate, calls = stand_ins.pipelines["candidate"], iter(range(100))
    process = candidate.process

    def breaks(*given, **named):
        if next(calls) == at:
            raise error
        return process(*given, **named)

    monkeypatch.setattr(candidate, "process", breaks)
    assert main(["--images", "in"]) == status
    assert sorted(tmp_path.rglob("*")) == before
    assert capsys.readouterr().err.count("\n") == 1


def test_folders_made_for_a_failed_run_are_removed(pictures, stand_ins, monkeypatch):
    monkeypatch.setattr(stand_ins.pipelines["reference"], "process", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a mistake of the program is not dressed up as bad input
        main(["--images", "in", "--output", "new/deep/score"])
    assert not Path("new").exists()


def test_score_only_scores_equal_names_and_says_what_is_missing(pictures, caplog, capsys):
    for folder, level in (("mine", 90), ("theirs", 100)):
        Path(folder).mkdir()
        write_image(f"{folder}/both.png", np.full((64, 64, 3), level, np.uint8))
        write_image(f"{folder}/{folder}.png", np.full((64, 64, 3), level, np.uint8))
    options = ["--score-only", "mine", "--reference", "theirs"]
    assert main(options) == 0
    found = results()
    assert [(picture["name"], picture["pd"]) for picture in found["pictures"]] == [("both.png", 10)]
    assert found["missing"] == {"candidate": ["theirs.png"], "reference": ["mine.png"]}
    assert found["summary"]["speed_up"] is None and found["pictures"][0]["candidate"]["latency_ms"] is None
    assert sorted(path.name for path in Path("score").iterdir()) == ["contact.png", "results.json"]
    assert any("theirs.png" in message for message in caplog.messages)
    assert main([*options, "--strict"]) == 1, "a missing picture is a failure to the strict"
    Path("mine/mine.png").unlink()
    Path("theirs/theirs.png").unlink()
    assert main([*options, "--strict"]) == 0


def test_score_only_does_not_delete_what_it_scores(pictures, capsys):
    main(["--images", "in"])
    assert main(["--score-only", "score/candidate", "--reference", "score/reference"]) == 2
    assert Path("score/candidate/owl.jpg").exists()
    assert main(["--score-only", "score/candidate", "--reference", "score/reference", "--output", "again"]) == 0
    assert results("again")["pictures"][0]["pd"] == pytest.approx(results()["pictures"][0]["pd"])


def test_the_figures_take_many_pictures_and_long_names(pictures):
    for number in range(52):
        write_image(pictures / f"{'a very long name ' * 4}{number}.png", np.full((64, 64, 3), number, np.uint8))
    assert main(["--images", "in", "--resolution", "64", "--format", "png"]) == 0
    assert results()["summary"]["pictures"] == 54


def test_terminated_runs_clean_up(pictures, tmp_path):
    code = (
        "import sys, time, types; fake = types.ModuleType('cldm.canny2image')\n"
        "class P:\n    def process(self, *_, **__): print('started', flush=True); time.sleep(60)\n"
        "fake.load_model = lambda *_: None; fake.Reference = lambda _: P(); fake.Staged = lambda *_: P()\n"
        "sys.modules['cldm.canny2image'] = fake\n"
        "import runpy; sys.argv[:] = ['compute_score.py', '--images', 'in']\n"
        f"runpy.run_path({str(ROOT / 'compute_score.py')!r}, run_name='__main__')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[1].strip() == "compute_score: stopped, and nothing was written."
    assert process.returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_competitions_entry_point(stand_ins, monkeypatch, caplog):
    class Staged:
        def __init__(self, model, schedule):
            self.schedule = schedule

        def process(self, *given):
            return [self.schedule, *given]

    monkeypatch.setattr(stand_ins, "Staged", Staged)
    monkeypatch.delitem(sys.modules, "canny2image_TRT", raising=False)
    door = importlib.import_module("canny2image_TRT").hackathon()
    monkeypatch.delitem(sys.modules, "canny2image_TRT")  # other tests get the real one
    door.initialize()
    assert [message for message in caplog.messages if "TensorRT" in message] == [caplog.messages[-1]]
    assert door.model[0] == "sd15"
    given = (np.zeros((64, 64, 3), np.uint8), "p", "a", "n", 1, 256, 20, False, 1, 9, 2946901, 0.0, 100, 200)
    schedule, *passed = door.process(*given)
    assert tuple(passed) == given and (schedule.name, schedule.steps) == ("hackathon-10", 20)


def test_help_names_every_option_of_the_benchmark(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    options = """images prompt added-prompt negative-prompt model weights backend engines schedule steps scale seed eta
        strength samples resolution low-threshold high-threshold guess-mode output format strict score-only reference"""
    assert all(f"--{option} " in text for option in [*options.split(), "device"])
