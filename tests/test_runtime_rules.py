"""Schedules of every rule on the TensorRT pipeline, on the simulator: the same pictures as the PyTorch sampler's."""

import numpy as np
import pytest
from simulated import USUAL, Dense, assert_same, cuda, engines, model  # noqa: F401

from runtime import Canny2Image, PipelineOptions
from runtime.manifest import EngineError, Manifest
from runtime.rules import Rule
from runtime.schedule import Schedule
from runtime.steps import COND

RULES = {
    "every rule": (
        "evaluate", "evaluate", "extrapolate-2", "evaluate-unet", "adams-bashforth-2", "evaluate-cond",
        "extrapolate-3", "evaluate-cond-unet", "adams-bashforth-3", "evaluate", "evaluate-cond", "evaluate-unet",
        "reuse", "evaluate-cond-unet", "evaluate-cond", "evaluate", "reuse", "reuse", "evaluate-unet", "reuse",
    ),
    "no control": ("evaluate", *["evaluate-unet"] * 19),
    "no difference": ("evaluate", *["evaluate-cond"] * 9, *["reuse"] * 10),
}  # fmt: skip
SCHEDULES = {name: Schedule(name, 20, tuple(map(Rule, rules))) for name, rules in RULES.items()}
WEIGHTED = [Rule("evaluate"), Rule("evaluate", (1.5, -0.5)), Rule("evaluate", (1.25, -0.5, 0.25)), Rule("reuse")]
SCHEDULES["weights"] = Schedule("weights", 20, (*WEIGHTED, *[Rule("reuse", (0.5, 0.5)), Rule("evaluate")] * 8))


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_pictures_are_those_of_pytorch_without_another_capture(cuda, engines, model, schedule, samples):
    with Canny2Image(engines, schedule) as pipeline:
        captures = None
        for change in ({}, {"seed": 8, "eta": 0.6}, {"scale": 2.0, "strength": 0.5}, {"guess_mode": True}):
            given = USUAL | {"num_samples": samples} | change
            assert_same(pipeline.process(**given), Dense(model, schedule).process(**given))
            captures = captures or pipeline.captures
        assert pipeline.captures == captures


@pytest.mark.parametrize("options", [{"graph": "step"}, {"graph": "none"}, {"two_streams": False}], ids=str)
def test_every_switch_makes_the_same_picture(cuda, engines, model, options):
    schedule = SCHEDULES["every rule"]
    with Canny2Image(engines, schedule, PipelineOptions(**options)) as pipeline:
        assert_same(pipeline.process(**USUAL), Dense(model, schedule).process(**USUAL))


def test_only_what_a_rule_asks_for_runs(cuda, engines):
    with Canny2Image(engines, SCHEDULES["every rule"]) as pipeline:
        pipeline.process(**USUAL)
        before = len(cuda.done)
        pipeline.process(**USUAL)
    ran = [done.name for done in cuda.done[before:]]
    rules = RULES["every rule"]
    for stage, counted in {
        "control": rules.count("evaluate"),
        "unet_encoder": rules.count("evaluate") + rules.count("evaluate-unet"),
        "control_cond": rules.count("evaluate-cond"),
        "unet_decoder_cond": rules.count("evaluate-cond") + rules.count("evaluate-cond-unet"),
    }.items():
        assert ran.count(stage) == counted, stage


def test_rules_make_different_pictures(model):
    pictures = [Dense(model, schedule).process(**USUAL)[0] for schedule in SCHEDULES.values()]
    for i, picture in enumerate(pictures):
        assert all(np.abs(picture.astype(int) - other).max() > 2 for other in pictures[:i])


def test_a_picture_of_nan_does_not_spoil_the_next(cuda, engines, model):
    """Early steps give weight 0 to e that were never evaluated; what lies there must not matter."""
    with Canny2Image(engines, "19,4") as pipeline:
        with np.errstate(all="ignore"):
            pipeline.process(**USUAL | {"scale": float("inf")})
        assert not np.isfinite(pipeline.latent()).all()
        expected = Dense(model, Schedule.parse("19,4", 20)).process(**USUAL)
        assert_same(pipeline.process(**USUAL), expected)


def test_without_the_engines_of_one_half_one_sentence(cuda, engines, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    whole = Manifest.load(engines / "tiny-64x64-n1-fp32")
    for path in whole.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    stages = {name: plan for name, plan in whole.stages.items() if name not in COND}
    Manifest(**{**vars(whole), "stages": stages, "folder": folder}).save()
    with Canny2Image(folder, SCHEDULES["no control"]) as pipeline:
        pipeline.process(**USUAL)
    with Canny2Image(folder, SCHEDULES["no difference"]) as pipeline:
        with pytest.raises(EngineError, match="for the prompt alone, and there are no engines .* with --cond"):
            pipeline.process(**USUAL)
