"""Anything that a user may type: schedules, sizes, prompts and whole command lines end in a result or one sentence."""

import contextlib
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

import bench.figures  # noqa: E402
import compute_score  # noqa: E402
from runtime.images import MAX_PIXELS, ImageError, resize_image, resized_size, write_image  # noqa: E402
from runtime.schedule import Schedule, ScheduleError, ddim_timesteps  # noqa: E402
from runtime.tokenizer import END, LENGTH, START, tokenize  # noqa: E402
from trt_builder import __main__ as builder  # noqa: E402

ANY_TEXT = st.text(st.characters(codec=None), max_size=300)  # lone surrogates, too: they stand for bytes of no encoding
NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["1" + "0" * 400, "9" * 5000, "-0", "0x10", "1e3", "½"]),
)
PLACES = st.sampled_from(["in", "in/a.png", "out", "absent", "", ".", "a\0b", "x" * 300, "ü/é", "\udcff", "/dev/null",
                          "/dev/full", "bad.yaml", "deep.yaml", "file/below", "file"])  # fmt: skip
# Without slashes, so that no file is written outside the working folder.
WORDS = st.text(st.characters(codec=None, exclude_characters="/"), max_size=30).filter(lambda text: ".." not in text)
CALM = settings(
    max_examples=150, derandomize=True, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


def command_lines(parser) -> st.SearchStrategy[list[str]]:
    """Lists of words, most of them options of this parser with values of every kind."""
    options = [option for action in parser._actions for option in action.option_strings]
    choices = [str(choice) for action in parser._actions for choice in action.choices or ()]
    value = st.one_of(PLACES, NUMBERS, WORDS, st.sampled_from(["--", "-", "=--", *choices]))
    pair = st.tuples(st.sampled_from(options), value).map(list)
    joined = st.tuples(st.sampled_from(options), value).map(lambda both: ["=".join(both)])
    return st.lists(st.one_of(pair, pair, joined, value.map(lambda one: [one])), max_size=6).map(lambda x: sum(x, []))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with a picture and files of no use."""
    (tmp_path / "in").mkdir()
    write_image(tmp_path / "in" / "a.png", np.full((64, 64, 3), 99, np.uint8))
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    (tmp_path / "file").write_text("no folder")
    return tmp_path


def check_ends_well(program, argv: list[str], here: Path, tally) -> None:
    """Run a program in a fresh working folder: it ends with a status, and where that is not 0 with one sentence."""
    one = tally(f"a random command line of {program.__module__}")
    one.inject()
    out, err = io.StringIO(), io.StringIO()
    status: str | int | None = 0
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        for path in here.iterdir():
            Path(folder, path.name).symlink_to(path)
        with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else _chdir(folder):
            try:
                status = program(argv)
            except SystemExit as stopped:
                status = stopped.code
    lines = [line for line in err.getvalue().splitlines() if line.strip()]
    assert status in (0, 1, 2), argv
    if status == 2:
        assert len(lines) == 1 and lines[0].endswith((".", "…")), (argv, lines)
        one.survive(lines[0])
    else:
        one.survive(f"it did what it was told (status {status})")


@contextlib.contextmanager
def _chdir(folder: str):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class Quick:
    """A pipeline that takes no time."""

    def __init__(self, *_: object) -> None:
        pass

    def process(self, input_image, **arguments):
        picture = resize_image(input_image, arguments["image_resolution"])
        return [picture] * arguments["num_samples"]

    def features(self, images):
        return np.zeros((len(images), 2), np.float32)


@pytest.mark.filterwarnings("ignore")
@CALM
@given(argv=command_lines(compute_score.parser()))
def test_any_command_line_of_compute_score(argv, here, tally):
    def load(options, schedules, *_):
        names = [schedule.name for schedule in schedules] if options.schedule == "all" else ["candidate"]
        return Quick(), {name: Quick() for name in names}, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute_score, "load_pipelines", load)
        patch.setattr(compute_score.ERRORS, "file", io.StringIO())  # rich's; warnings are not the end
        patch.setattr("bench.perceptual.InceptionFeatures", Quick)
        patch.setattr(bench.figures, "contact_sheet", lambda *_: None)
        patch.setattr(bench.figures, "score_plot", lambda *_: None)
        patch.setattr(compute_score, "MOST_SAMPLES", 3)
        check_ends_well(compute_score.main, argv, here, tally)


COMMANDS: dict = builder.parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr, assignment]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", COMMANDS)
def test_any_command_line_of_trt_builder(command, here, tally):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")

    @CALM
    @given(rest=command_lines(COMMANDS[command]))
    def run(rest):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder, "ERRORS", builder.ERRORS.__class__(file=io.StringIO()))
            patch.setattr(builder.building, "build", lambda *_: [])
            patch.setattr(builder.verifying, "make_reference", lambda *_: None)
            patch.setattr(builder, "write_random_weights", lambda *_: None)
            check_ends_well(builder.main, [command, *rest], here, tally)

    run()


@CALM
@given(st.lists(WORDS, max_size=3))
def test_any_command(words):
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            assert builder.main(words) == 2 and err.getvalue().count("\n") == 1
        except SystemExit as stopped:
            assert stopped.code == 0


@CALM
@given(ANY_TEXT | st.text("0123456789-, \n٣²") | PLACES, st.integers(-5, 1100))
def test_any_schedule(text, steps):
    try:
        schedule = Schedule.parse(text, steps)
    except ScheduleError as error:
        assert str(error).endswith(".")
    except ValueError as error:
        raise AssertionError(f"{error!r} is no sentence") from error
    else:
        updates = schedule.updates(0.5)
        assert [update.step for update in updates] == list(schedule.evaluated)
        assert schedule.evaluated[0] == len(ddim_timesteps(steps)) - 1
        assert all(np.isfinite([update.a, update.b]).all() for update in updates)


@CALM
@given(content=st.binary(max_size=100) | ANY_TEXT.map(lambda text: text.encode("utf-8", "replace"))
       | st.tuples(NUMBERS | ANY_TEXT, NUMBERS | ANY_TEXT).map(lambda x: f"name: x\nsteps: {x[0]}\nevaluate: [{x[1]}]".encode("utf-8", "replace")))  # fmt: skip  # noqa: E501
def test_any_schedule_file(content, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_bytes(content)
    with contextlib.suppress(ScheduleError):
        Schedule.parse(path, 20)


@CALM
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(-100, 20_000) | st.integers())
def test_sizes_are_multiples_of_64_within_bounds(height, width, resolution):
    picture = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (height, width, 3), (0, 0, 0))
    try:
        new = resized_size(picture, resolution)
    except ImageError as error:
        assert str(error).endswith(".")
        return
    assert all(side % 64 == 0 and side >= 64 for side in new) and new[0] * new[1] <= MAX_PIXELS
    for side, made in zip((height, width), new, strict=True):
        assert abs(made - side * resolution / min(height, width)) <= 32.000001


@CALM
@given(ANY_TEXT | st.text(max_size=2000) | st.text("<|endoftext>&;# \u200d", max_size=200))
def test_any_prompt_is_77_tokens(prompt):
    (tokens,) = tokenize([prompt])
    assert tokens.shape == (LENGTH,) and tokens.dtype == np.int32 and tokens[0] == START and tokens[-1] == END
    assert tokens.min() >= 0 and tokens.max() <= END
    if "endoftext" not in prompt and "&" not in prompt:
        inside = tokens[1 : 1 + list(tokens[1:]).index(END)]
        assert (tokens[1 + len(inside) :] == END).all()


def test_a_prompt_of_a_million_letters_is_quick(tally):
    for prompt in ("a" * 1_000_000, "é" * 1_000_000, "a " * 500_000, "<" * 1_000_000, "&amp;" * 200_000):
        assert tokenize([prompt]).shape == (1, LENGTH)
