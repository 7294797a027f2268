from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.rules import POLYNOMIALS, RULES, Rule, ScheduleError
from runtime.schedule import NAMED, Schedule, alphas_cumprod, ddim_timesteps

HACKATHON = (19, 18, 17, 16, 15, 14, 13, 11, 8, 4)


def test_alphas_cumprod() -> None:
    abar = alphas_cumprod()
    assert abar.shape == (1000,) and abar.dtype == np.float64
    assert abar[0] == pytest.approx(1 - 0.00085, abs=1e-15)
    assert abar[-1] == pytest.approx(0.0046601, abs=1e-7)  # Stable Diffusion's well-known last value
    product = 1.0
    for i in range(1000):
        beta = (0.00085**0.5 + (0.0120**0.5 - 0.00085**0.5) * i / 999) ** 2
        product *= 1 - beta
        assert abar[i] == pytest.approx(product, rel=1e-12)


@pytest.mark.parametrize(
    "steps, taken, first, second, last",
    [
        (20, 20, 1, 51, 951),
        (50, 50, 1, 21, 981),
        (30, 31, 1, 34, 991),
        (7, 8, 1, 143, 1 + 7 * 142),
        (2, 2, 1, 501, 501),
        (3, 4, 1, 334, 999),  # 1000 clamped
        (1000, 1000, 1, 2, 999),
    ],
)
def test_ddim_timesteps(steps: int, taken: int, first: int, second: int, last: int) -> None:
    timesteps = ddim_timesteps(steps)
    assert len(timesteps) == taken
    assert [timesteps[0], timesteps[1], timesteps[-1]] == [first, second, last]


def test_every_number_of_steps_stays_within_training() -> None:
    assert ddim_timesteps(1).tolist() == [1]
    for steps in range(1, 1001):
        timesteps = ddim_timesteps(steps)
        assert len(timesteps) >= steps and timesteps[0] == 1 and timesteps[-1] <= 999
        assert (np.diff(timesteps) >= 0).all()


@pytest.mark.parametrize("steps", [0, -1, 1001, 2000])
def test_refuses_a_number_of_steps(steps: int) -> None:
    with pytest.raises(ScheduleError, match=f"number of steps is {steps}, but must lie between 1 and 1000"):
        ddim_timesteps(steps)
    with pytest.raises(ScheduleError):
        Schedule.parse("full", steps)


def sigmas(steps: int) -> list[float]:
    """DDIM's own time, sqrt(1/alpha - 1), where each step begins and, last, where the last one ends."""
    at = alphas_cumprod()[[*ddim_timesteps(steps)[::-1], 0]]
    return [float((1 / a - 1) ** 0.5) for a in at]


def polynomial(points: list[float], values: list[float], begin: float, end: float, mean: bool) -> float:
    """The polynomial through points at `begin`, or its mean from there to `end`, by numpy's least squares."""
    p = np.polynomial.Polynomial.fit(points, values, len(points) - 1)
    whole = p.integ()
    return float((whole(end) - whole(begin)) / (end - begin)) if mean else float(p(begin))


def step_by_step(
    schedule: Schedule, eta: float, x: float, es: dict[int, float], noises: list[float]
) -> dict[int, float]:
    """The sampler's plain loop: x after the last step before each evaluated one, and after the end (key -1)."""
    abar, timesteps, time = alphas_cumprod(), ddim_timesteps(schedule.steps), sigmas(schedule.steps)
    seen: dict[int, float] = {}
    known: list[float] = []
    points: list[float] = []
    e = 0.0
    for k, i in enumerate(reversed(range(len(timesteps)))):
        rule = schedule.rules[k]
        if rule.evaluates:
            seen[i], known, points = x, [es[i], *known[:2]], [time[k], *points[:2]]
            e = es[i]
        if rule.weights:
            e = sum(w * value for w, value in zip(rule.weights, known, strict=False))
        if rule.name in POLYNOMIALS:
            n = POLYNOMIALS[rule.name]
            e = polynomial(points[:n], known[:n], time[k], time[k + 1], "adams" in rule.name)
        now = abar[timesteps[i]]
        before = abar[timesteps[i - 1]] if i else abar[0]
        sigma = eta * ((1 - before) / (1 - now) * (1 - now / before)) ** 0.5
        x0 = (x - (1 - now) ** 0.5 * e) / now**0.5
        x = before**0.5 * x0 + (1 - before - sigma**2) ** 0.5 * e + sigma * noises[k + 1]
    return seen | {-1: x}


def check_updates(schedule: Schedule, eta: float, seed: int, rel: float = 1e-12) -> None:
    rng = np.random.default_rng(seed)
    taken = len(ddim_timesteps(schedule.steps))
    noises = rng.standard_normal(taken + 1).tolist()
    es = {i: float(rng.standard_normal()) for i in schedule.evaluated}
    x = noises[0]
    expected = step_by_step(schedule, eta, x, es, noises)
    updates = schedule.updates(eta)
    assert tuple(update.step for update in updates) == schedule.evaluated
    last = [0.0, 0.0]
    for update in updates:
        assert x == pytest.approx(expected[update.step], rel=rel, abs=rel)
        assert update.evaluation.timestep == ddim_timesteps(schedule.steps)[update.step]
        last = [es[update.step], *last[:2]]
        x = update.a * x + np.dot(update.b[: len(last)], last) + sum(s * noises[draw] for draw, s in update.noise)
    assert x == pytest.approx(expected[-1], rel=rel, abs=rel)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    steps = draw(st.sampled_from([1, 2, 3, 7, 20, 50, 1000]))
    first = len(ddim_timesteps(steps)) - 1
    others = draw(st.sets(st.integers(0, first), max_size=60))
    return Schedule.of("random", steps, tuple(sorted({first} | others, reverse=True)))


@st.composite
def ruled(draw: st.DrawFn) -> Schedule:
    """Twenty steps of any rules that can be carried out."""
    rules = [Rule("evaluate")]
    while len(rules) < 20:
        name = draw(st.sampled_from(RULES))
        evaluations = sum(rule.evaluates for rule in rules)
        if POLYNOMIALS.get(name, 0) > evaluations:
            name = "reuse"
        weights: tuple[float, ...] = ()
        if name not in POLYNOMIALS and draw(st.booleans()):
            most = min(3, evaluations + (name != "reuse"))
            weights = tuple(draw(st.lists(st.floats(-2, 2), min_size=1, max_size=most)))
        rules.append(Rule(name, weights))
    return Schedule("random", 20, tuple(rules))


@given(ruled(), st.sampled_from([0.0, 1.0, 0.3]), st.integers(0, 2**32))
def test_updates_of_any_rules_equal_the_plain_loop(schedule: Schedule, eta: float, seed: int) -> None:
    check_updates(schedule, eta, seed, 1e-6)  # numpy's polynomials are fitted, not exact


@given(schedules(), st.sampled_from([0.0, 1.0, 0.3]), st.integers(0, 2**32))
def test_updates_equal_the_plain_loop(schedule: Schedule, eta: float, seed: int) -> None:
    check_updates(schedule, eta, seed)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50, 1000])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_full_schedule_equals_the_plain_loop(steps: int, eta: float) -> None:
    schedule = Schedule.parse("full", steps)
    assert schedule.evaluated == tuple(range(len(ddim_timesteps(steps)) - 1, -1, -1))
    check_updates(schedule, eta, steps)


def test_true_noise_is_removed_exactly() -> None:
    # x = sqrt(abar) x0 + sqrt(1 - abar) e with the true e: DDIM then lands on the same mix at training step 0.
    abar, e, x0 = alphas_cumprod(), 0.7, -1.3
    x = abar[951] ** 0.5 * x0 + (1 - abar[951]) ** 0.5 * e
    for update in Schedule.parse("hackathon-10", 20).updates():
        x = update.a * x + sum(update.b) * e
    assert x == pytest.approx(abar[0] ** 0.5 * x0 + (1 - abar[0]) ** 0.5 * e, rel=1e-12)


def test_noise_draws() -> None:
    assert all(update.noise == () for update in Schedule.parse("full", 20).updates(0.0))
    first, second = Schedule.parse("3,1", 4).updates(1.0)
    assert [draw for draw, _ in first.noise] == [1, 2]
    assert [draw for draw, _ in second.noise] == [3, 4]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_share_of_noise_falls_as_planned(eta: float) -> None:
    # Where x is sqrt(1 - abar) e and no picture, the update's variance must be 1 - abar of the next step, for any eta.
    abar, timesteps = alphas_cumprod(), ddim_timesteps(50)
    for update in Schedule.parse("full", 50).updates(eta):
        before = abar[timesteps[update.step - 1]] if update.step else abar[0]
        kept = update.a * (1 - abar[update.evaluation.timestep]) ** 0.5 + update.b[0]
        assert kept**2 + sum(s**2 for _, s in update.noise) == pytest.approx(1 - before, rel=1e-12)


def test_other_alphas() -> None:
    schedule = Schedule.parse("full", 20)
    assert schedule.updates(0.0, alphas_cumprod()) == schedule.updates()
    assert schedule.updates(0.0, alphas_cumprod(0.001, 0.02)) != schedule.updates()
    with pytest.raises(ScheduleError, match=r"shape \(10,\), not \(1000,\)"):
        schedule.updates(0.0, np.ones(10))


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_refuses_eta(eta: float) -> None:
    with pytest.raises(ScheduleError, match=f"eta is {eta}, but must lie between 0"):
        Schedule.parse("full", 20).updates(eta)


def test_named_schedules() -> None:
    assert Schedule.parse("hackathon-10", 20) == Schedule.of("hackathon-10", 20, HACKATHON)
    assert Schedule.parse("full", 30).evaluated[0] == 30
    for name, path in NAMED.items():
        assert f"name: {name}\n" in path.read_text()


@pytest.mark.parametrize("text", ["19,18,4", " 19, 18 ,4 ", "19 18 4"])
def test_lists(text: str) -> None:
    assert Schedule.parse(text, 20) == Schedule.of("19,18,4", 20, (19, 18, 4))


def test_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nsteps: 20\nevaluate: [19, 4]\n")
    assert Schedule.parse(path, 20) == Schedule.parse(str(path), 20) == Schedule.of("mine", 20, (19, 4))


@pytest.mark.parametrize(
    "text, steps, sentence",
    [
        ("fast", 20, "There is no schedule 'fast': take one of full, frontier-10, .*hackathon-10, a list"),
        ("19,18,18,4", 20, "names step 18 more than once"),
        ("20,19", 20, "names step 20, but the steps are 19 to 0"),
        ("19,-1", 20, "names step -1, but the steps are 19 to 0"),
        ("18,4", 20, "must begin with the first step, 19"),
        ("4,19", 20, "must begin with the first step, 19"),
        ("19,4,18", 20, "names 18 after 4: steps must descend"),
        ("", 20, "evaluates no step"),
        (" , ", 20, "evaluates no step"),
        ("19-4", 20, "'19-4' is no list of steps"),
        ("hackathon-10", 30, "'hackathon-10' is for 20 steps, not 30"),
        ("19,4", 30, "must begin with the first step, 30"),
        ("no/such/file.yaml", 20, "no/such/file.yaml cannot be read: No such file or directory"),
    ],
)
def test_refusals(text: str, steps: int, sentence: str) -> None:
    with pytest.raises(ScheduleError, match=sentence) as error:
        Schedule.parse(text, steps)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("name: x\nsteps: 20\nevaluate: [19, 4\n", "line 4 is not valid YAML"),
        ("name: x\n  steps: 20\n", "line 2 is not valid YAML"),
        ("\0\1", "is not a YAML text file"),
        ("", "must hold the keys name, steps, and either evaluate or rules"),
        ("- 19\n- 4\n", "must hold the keys"),
        ("name: x\nsteps: 20\n", "must hold the keys"),
        ("name: x\nsteps: 20\nevaluate: [19]\nskip: [3]\n", "and no others"),
        ("name: x\nsteps: twenty\nevaluate: [19]\n", "line 2: steps must be a whole number, not 'twenty'"),
        ("name: x\nsteps: 20\nevaluate: 19\n", "line 3: evaluate must be a list"),
        ("name: x\nsteps: 20\nevaluate: [19, 4.5]\n", "line 3: evaluate must list whole numbers, not 4.5"),
        ("name: x\nsteps: 20\nevaluate:\n- 19\n- true\n", "line 5: evaluate must list whole numbers, not True"),
        ("name: x\nsteps: 20\nevaluate: [19, 19]\n", "names step 19 more than once"),
        ("name: x\nsteps: 0\nevaluate: [0]\n", "number of steps is 0"),
        (
            "name: x\nsteps: 2\nrules:\n- evaluate\n- evalute\n",
            "line 5: there is no rule 'evalute': take one of evaluate,",
        ),
        ("name: x\nsteps: 2\nrules:\n- reuse\n- evaluate\n", "line 4: The schedule 'x', step 1: reuse needs what an"),
        ("name: x\nsteps: 2\nrules:\n- evaluate-cond\n- evaluate\n", "line 4: .* begin with evaluate"),
        ("name: x\nsteps: 2\nrules:\n- evaluate\n- extrapolate-2\n", "line 5: .*needs 2 evaluations, but there were 1"),
        ("name: x\nsteps: 2\nrules:\n- evaluate\n- evaluate: [1, 2, 3]\n", "line 5: .*needs 3 evaluations, but .* 2"),
        ("name: x\nsteps: 2\nrules:\n- evaluate\n", "line 4: The schedule 'x' has 1 rules, but 2 steps"),
        ("name: x\nsteps: 1\nrules:\n- evaluate\n- reuse\n", "line 4: The schedule 'x' has 2 rules, but 1 steps"),
        ("name: x\nsteps: 2\nrules: []\n", "line 3: .* has 0 rules, but 2 steps|evaluates no step"),
        ("name: x\nsteps: 2\nrules:\n- evaluate\n- reuse: [.nan]\n", "line 5: .*finite weights"),
        ("name: x\nsteps: 2\nrules:\n- evaluate\n- reuse: 1\n", "line 5: the weights of reuse must be a list of num"),
        ("name: x\nsteps: 2\nrules:\n- evaluate\n- reuse: [1, x]\n", "line 5: the weights of reuse must be a list"),
        ("name: x\nsteps: 2\nrules:\n- evaluate\n- 1\n", "line 5: a rule is a name, or a name with weights as .*not 1"),
        ("name: x\nsteps: 2\nrules:\n- evaluate\n- 2026-99-99\n", "line 5: this value cannot be read: month"),
        ("name: x\nsteps: 2\nrules:\n- evaluate\n- extrapolate-2: [1]\n", "line 5: the rule extrapolate-2 finds its"),
        ("? [a, b]\n: 1\nname: x\n", "must hold the keys"),
        ("name: x\nsteps: 30\nevaluate: [30, 4]\n", "'x' is for 30 steps, not 20"),
    ],
)
def test_yaml_refusals(content: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ScheduleError, match=sentence):
        Schedule.parse(path, 20)
