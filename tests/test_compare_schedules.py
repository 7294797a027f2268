"""`compute_score.py --schedule all`: every schedule beside one reference."""

from pathlib import Path

import pytest
from test_compute_score import FakePipeline, pictures, results, stand_ins  # noqa: F401

from compute_score import main
from runtime.schedule import every_schedule


def test_all_schedules_are_compared_in_one_run(pictures, stand_ins, capsys):
    made = {s.name: FakePipeline(1 + i) for i, s in enumerate(every_schedule(20))}
    stand_ins.Staged = lambda model, schedule: made[schedule.name]
    assert main(["--images", "in", "--schedule", "all", "--format", "png"]) == 0
    found = results()
    assert list(found["schedules"]) == [entry["name"] for entry in found["schedule"]] == list(made)
    assert {"full", "hackathon-10"} <= set(made)
    for i, (name, part) in enumerate(found["schedules"].items()):
        assert part["summary"]["pd"]["median"] == pytest.approx(1 + i, abs=0.1)
        assert (
            part["pictures"][0]["candidate"]["files"] == [f"{name}/fox.png"] and Path(f"score/{name}/fox.png").exists()
        )
    counts = [len(pipeline.calls) for pipeline in (stand_ins.pipelines["reference"], *made.values())]
    assert set(counts) == {4}  # two pictures of two sizes, each once to warm up: the reference no more often
    out = capsys.readouterr().out
    assert "10 of 20" in out and "20 of 20" in out and "hackathon-10" in out
