"""The search for schedules: candidates, the beam, what it remembers; and trials against the plain pipeline."""

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.trials import Trials
from cldm.canny2image import Staged
from cldm.model import create_model
from cldm.stages import STAGES
from runtime import search_schedule
from runtime.candidates import (
    COSTS,
    FAMILIES,
    Candidate,
    Found,
    beam_search,
    cheapened,
    neighbours,
    starts,
    taken_over,
)
from runtime.images import read_image
from runtime.rules import EVALUATIONS, POLYNOMIALS, Rule, ScheduleError, rule_of
from runtime.schedule import Schedule
from runtime.search_schedule import Log

ROOT = Path(__file__).resolve().parents[1]
GIVEN: dict[str, Any] = {
    "prompt": "an owl", "a_prompt": "sharp", "n_prompt": "blurred", "num_samples": 1, "image_resolution": 64,
    "ddim_steps": 8, "guess_mode": False, "strength": 0.9, "scale": 5.0, "eta": 0.0, "low_threshold": 100,
    "high_threshold": 200,
}  # fmt: skip
EVERY = ("evaluate", "evaluate", "extrapolate-2", "evaluate-unet", "evaluate-cond", "adams-bashforth-3",
         "evaluate-cond-unet", "reuse")  # fmt: skip


class Brightness:
    """Features that are cheap: the picture itself, small."""

    def features(self, images: list[np.ndarray]) -> np.ndarray:
        return np.stack([image[::8, ::8].astype(np.float32).ravel() for image in images])


@pytest.fixture(scope="module")
def trials() -> Trials:
    torch.manual_seed(1)
    model = create_model(ROOT / "models/tiny/tiny.yaml").requires_grad_(False)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    owl, cat = (read_image(ROOT / f"pictures/{name}.png") for name in ("owl", "cat"))
    return Trials(model, [(owl, 5), (cat, 5), (owl, 6)], GIVEN, Brightness())  # type: ignore[arg-type]


SCHEDULES = [Schedule.parse("7,5,4,1", 8), Schedule("every", 8, tuple(map(Rule, EVERY))), Schedule.parse("full", 8)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_a_trial_goes_where_the_pipeline_goes(trials: Trials, schedule: Schedule, monkeypatch: Any) -> None:
    ends: list[torch.Tensor] = []

    def score(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        ends.append(x)
        return np.zeros(3), np.zeros(3)

    monkeypatch.setattr(trials, "score", score)
    trials.run(schedule)
    for i, (name, seed) in enumerate((("owl", 5), ("cat", 5), ("owl", 6))):
        image = read_image(ROOT / f"pictures/{name}.png")
        (expected,) = Staged(trials.model, schedule).process(**GIVEN | {"input_image": image, "seed": seed})
        made = STAGES["vae_decoder"](trials.model, {"x": ends[0][i : i + 1]})["picture"][0].numpy()
        assert np.abs(made.astype(int) - expected).max() <= 1


def test_the_full_schedule_is_the_reference_and_fewer_steps_are_not(trials: Trials) -> None:
    full, few = (trials.run(Schedule.parse(text, 8)) for text in ("full", "7,3"))
    assert full.rms.max() < 1e-5 and full.pd.max() < few.pd.min() and few.rms.min() > 1e-3


def test_fitted_weights_come_nearer_and_are_those_of_the_schedule(trials: Trials) -> None:
    plain = trials.run(Schedule.parse("7,6,4,2", 8))
    fitted = trials.run(Schedule.parse("7,6,4,2", 8), fit=True)
    again = trials.run(fitted.schedule)
    assert fitted.rms.mean() < 0.9 * plain.rms.mean()
    np.testing.assert_allclose(again.rms, fitted.rms, rtol=1e-3)
    assert [len(rule.weights) for rule in fitted.schedule.rules if rule.evaluates] == [1, 2, 3, 3]


def test_what_begins_alike_is_evaluated_once(trials: Trials, monkeypatch: Any) -> None:
    plain, calls = trials.denoiser.stage, list[str]()

    def counting(name: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(name)
        return plain(name, inputs)

    monkeypatch.setattr(trials, "denoiser", replace(trials.denoiser, stage=counting))
    trials.run(Schedule.parse("7,6,5,1", 8))
    before = calls.count("unet_encoder")
    trials.run(Schedule.parse("7,6,5,2", 8))
    assert calls.count("unet_encoder") == before + 1


# -- candidates and the beam ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FAMILIES), st.integers(2, 20), st.randoms(use_true_random=False))
def test_every_neighbour_can_be_carried_out_within_the_budget(family: str, budget: int, draw: Any) -> None:
    begin = starts(family, budget, 20)
    assert begin and all(sum(map(bool, c.kinds)) == budget for c in begin)
    for _ in range(3):
        candidate = draw.choice(begin)
        near = list(neighbours(candidate, family, budget, COSTS))
        assert len(near) == len(set(near)) and candidate not in near
        for other in near:
            schedule = other.schedule("x", 20)  # raises where it cannot be carried out
            assert budget - 0.5 < other.cost(COSTS) <= budget + 1e-9
            cheap = {rule.name for rule in schedule.rules} - {"evaluate", "reuse"}
            assert not cheap or family == ("mixed" if cheap & EVALUATIONS.keys() else "extrapolate")
        begin = near or begin


def indices(candidate: Candidate) -> np.ndarray:
    return np.array([i for i, kind in enumerate(candidate.kinds) if kind])


def test_the_beam_finds_the_best_of_what_can_be_reached() -> None:
    wanted = np.array([0, 3, 4, 11, 19])

    def score(candidates: list[Candidate]) -> list[Found]:
        return [Found(c, float(np.abs(indices(c) - wanted).sum()), c.schedule("x", 20)) for c in candidates]

    def near(c: Candidate) -> list[Candidate]:
        return list(neighbours(c, "reuse", 5, COSTS))

    found = beam_search(score, starts("reuse", 5, 20), near, 4, 30, 40, 0)
    assert found[0].pd == 0 and indices(found[0].candidate).tolist() == wanted.tolist()
    assert [f.pd for f in found] == sorted(f.pd for f in found)


def test_the_last_evaluations_are_made_cheaper_until_they_fit() -> None:
    dear = Candidate(("evaluate",) * 6 + ("",), fit=True)
    made = cheapened(dear, "evaluate-cond", 4.6, COSTS)
    assert made and made.kinds == ("evaluate",) * 3 + ("evaluate-cond",) * 3 + ("",) and made.fit
    assert cheapened(dear, "evaluate-cond", 6, COSTS) == dear
    assert cheapened(dear, "evaluate-unet", 4, COSTS) is None  # two whole ones and four cheaper ones are 4.96


def test_a_known_schedule_is_taken_over_without_its_weights() -> None:
    known = Schedule("known", 8, (*map(Rule, EVERY[:7]), Rule("reuse", (1.5, -0.5))))
    (made,) = taken_over(known, 3.7, COSTS)
    assert made.fit and made.fill == "reuse"
    assert made.kinds == ("evaluate", "evaluate", "", "evaluate-unet", "evaluate-cond", "", "evaluate-cond-unet", "")
    assert made.cost(COSTS) == pytest.approx(3.61)
    assert not taken_over(known, 3.6, COSTS) and not taken_over(known, 4.2, COSTS)


def test_a_search_begins_at_known_schedules(tmp_path: Path, monkeypatch: Any) -> None:
    class Pool:
        def map(self, score: Any, candidates: list[Candidate], steps: list[int]) -> list[dict[str, Any]]:
            rules = ["evaluate", *["reuse"] * 7]
            return [{"key": c.key(), "rules": rules, "pd": [1.0], "rms": [1.0]} for c in candidates]

    monkeypatch.setattr(search_schedule, "workers", lambda settings, count: nullcontext(Pool()))
    options = search_schedule.parser().parse_args(["--budget", "3", "--families", "fitted", "--rounds", "1"])
    for begin in ([], [Schedule.parse("7,1,0", 8)]):
        options.begin, tried = begin, Log(tmp_path / f"{len(begin)}.jsonl", {})
        search_schedule.search({"given": {"ddim_steps": 8}}, options, tried, lambda text, advance: None)
        assert ("evaluate - - - - - evaluate evaluate reuse fitted" in list(tried.known)[:5]) == bool(begin)


def test_costs_count_what_runs() -> None:
    kinds = ("evaluate", "", "evaluate-cond", "evaluate-unet", "")
    assert Candidate(kinds).cost(COSTS) == pytest.approx(1 + 0.5 + 0.74)


# -- what is remembered -----------------------------------------------------------------------------------------------


def test_a_search_goes_on_after_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "tried.jsonl"
    entry: dict[str, Any] = {"key": "a", "rules": ["evaluate", {"reuse": [1.5]}], "pd": [1.0]}
    Log(path, {"scale": 9}).add(entry)
    with open(path, "a") as file:
        file.write('{"key": "b", "ru')
    again = Log(path, {"scale": 9})
    assert again.known == {"a": entry}
    again.add(entry | {"key": "c"})
    assert set(Log(path, {"scale": 9}).known) == {"a", "c"}
    assert [rule_of(rule) for rule in entry["rules"]] == [Rule("evaluate"), Rule("reuse", (1.5,))]
    with pytest.raises(ScheduleError, match="of a search with other settings"):
        Log(path, {"scale": 7})


def test_a_schedule_reads_back_as_it_was_written(tmp_path: Path) -> None:
    rules = (*map(Rule, EVERY[:6]), Rule("evaluate", (1.25, -0.5, 0.125)), Rule("reuse"))
    schedule = Schedule("mine", 8, rules)
    (tmp_path / "mine.yaml").write_text(schedule.to_yaml("why\nand how"))
    assert Schedule.parse(tmp_path / "mine.yaml", 8) == schedule
    assert {rule.name for rule in rules} & POLYNOMIALS.keys()


# -- the command ------------------------------------------------------------------------------------------------------


def run(*words: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime.search_schedule", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=timeout)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--budget", 1], "--budget must lie between 2 and the 20 steps"),
        (["--budget", 21], "--budget must lie between 2 and the 20 steps"),
        (["--beam", 0], "--beam is 0"),
        (["--seeds", 3, 3], "two pictures and two seeds"),
        (["--images", ROOT / "pictures/owl.png"], "two pictures and two seeds"),
        (["--images", "nowhere"], "nowhere"),
        (["--costs", "evaluate-unet=2"], "'evaluate-unet=2' is no cost"),
        (["--steps", 0, "--budget", 2], "0 steps"),
        (["--begin", "fastest"], "There is no schedule 'fastest'"),
        (["--begin", "frontier-8", "--steps", 10], "is for 20 steps, not 10"),
    ],
)
def test_bad_input_is_one_sentence(words: list[object], sentence: str, tmp_path: Path, capsys: Any) -> None:
    from runtime.search_schedule import main

    try:
        status: Any = main([*map(str, words), "--output", str(tmp_path / "new")])
    except SystemExit as error:
        status = error.code
    assert status == 2 and sentence in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_search_from_the_command_line_and_once_more(tmp_path: Path) -> None:
    """Two minutes; the second run tries nothing again."""
    words = ["--budget", 4, "--families", "reuse", "mixed", "--steps", 8, "--seeds", 0, 1, "--rounds", 2, "--tries", 3,
             "--images", ROOT / "pictures/owl.png", ROOT / "pictures/cat.png", "--output", tmp_path, "--save",
             tmp_path / "best"]  # fmt: skip
    done = run(*words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "frontier.json").read_text())
    assert {"fewer steps", "UniPC", "reuse"} <= {row["family"] for row in found["rows"]}
    assert all(0 < row["pd"] < 100 and row["ms"] > 0 for row in found["rows"])
    assert len((tmp_path / "frontier.png").read_bytes()) > 10_000
    for path in (*tmp_path.glob("*.yaml"), tmp_path / "best/frontier-4.yaml"):
        Schedule.parse(path, 8)
    tried = (tmp_path / "tried.jsonl").read_text()
    assert run(*words).returncode == 0 and (tmp_path / "tried.jsonl").read_text() == tried


@pytest.mark.slow
def test_a_killed_search_leaves_no_process(tmp_path: Path) -> None:
    words = ["--budget", "4", "--workers", "1", "--output", str(tmp_path)]
    command = [sys.executable, "-m", "runtime.search_schedule", *words]
    search = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{search.pid}/task/{search.pid}/children")
    if not children.exists():
        pytest.skip("this system's /proc does not tell a process's children")
    deadline = time.monotonic() + 120
    while len((tmp_path / "tried.jsonl").read_text().splitlines() if (tmp_path / "tried.jsonl").exists() else []) < 2:
        assert time.monotonic() < deadline and search.poll() is None
        time.sleep(0.5)
    workers = [Path(f"/proc/{pid}") for pid in children.read_text().split()]
    assert workers
    search.kill()
    search.wait()
    while any(worker.exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.2)
