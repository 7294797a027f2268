"""Both halves of a cross-attention over a text that is multiplied out, on a CPU: emulated, against float64."""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conv_emulated import KERNELS, SOURCE, alike, compiled, emulate, kernels_of, mistaken, slow_unless
from emulated import compile_emulator

from plugins.call import error
from plugins.cross_calls import Cross, scores, values
from plugins.load import CROSS_WORDS, has_cross_kernel

Half = Callable[..., Cross]
HALVES = pytest.mark.parametrize("half", [scores, values])

# Texts, channels, sides, heads, rows of x that they take in turn, words. Rows of an image: 24, 96, 45, 96, 45, 1, 117.
SHAPES = [
    (2, 64, 4, 6, 4, 1), (2, 128, 8, 12, 4, 2), (4, 192, 5, 9, 4, 2, 60), (2, 192, 16, 6, 8, 1, 80),
    (6, 64, 5, 9, 4, 3, 1), (1, 64, 1, 1, 4, 1), (3, 128, 9, 13, 4, 1, 77),
]  # fmt: skip
CUTS = [(half, high, wide) for half, widths in ((scores, (80, 160)), (values, (64, 128))) for high in (64, 128)
        for wide in widths]  # fmt: skip


@pytest.fixture(scope="module")
def emulator() -> Any:
    return compiled()


def of_words(conv: Cross, y: np.ndarray) -> np.ndarray:
    """The weights of words, (B, h, w, heads, 80)."""
    return y.reshape(*conv.out[:3], conv.heads, CROSS_WORDS)


@HALVES
@pytest.mark.parametrize("cluster", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(emulator: Any, half: Half, shape: tuple[int, ...], cluster: int) -> None:
    conv = half(*shape)
    conv = replace(conv, cluster=min(cluster, conv.channels // 64))
    y, expected = emulate(emulator, conv, order=cluster % 3)
    assert error(y, expected) < 1e-3
    if half is scores:
        assert not of_words(conv, y)[..., conv.words :].any()


@pytest.mark.parametrize("sides", [(4, 6), (5, 9), (8, 12), (9, 13)], ids=str)
@pytest.mark.parametrize(("half", "high", "wide"), CUTS)
def test_every_kernel(emulator: Any, half: Half, high: int, wide: int, sides: tuple[int, int]) -> None:
    """Images that a tile is too high for, or that take two of them."""
    conv = replace(half(4, 128, *sides, 4, 2, words=60), high=high, wide=wide, cluster=2)
    plan, fits = conv.plan(emulator), sides[0] * sides[1] > high - 64
    assert bool(plan) == fits and (not fits or error(*emulate(emulator, conv, order=2)) < 1e-3)


@HALVES
@pytest.mark.parametrize("cluster", range(1, 9))
def test_every_cluster(emulator: Any, half: Half, cluster: int) -> None:
    conv = replace(half(1, 512, 5, 9, 8 if half is values else 4, 1), cluster=cluster, high=64)
    assert conv.plan(emulator) and error(*emulate(emulator, conv, order=cluster % 3)) < 1e-3


@pytest.mark.parametrize(("half", "high", "wide"), CUTS)
def test_no_order_changes_a_bit(emulator: Any, half: Half, high: int, wide: int) -> None:
    """Neither that of threads and copies nor that of tiles."""
    conv = replace(half(2, 128, 8, 9, 4, 1), cluster=high // 64, high=high, wide=wide)
    assert emulator.conv_rows_beside(ctypes.byref(conv.call())) == (wide > high)
    first, _ = emulate(emulator, conv)
    for order, turned in ((1, False), (2, False), (0, True)):
        assert first.tobytes() == emulate(emulator, conv, order, turned=turned)[0].tobytes(), (order, turned)


@pytest.mark.parametrize("mean", [-1.0, 0.0, 3.0])
@pytest.mark.parametrize("cluster", [1, 3])
def test_positions_with_a_mean(emulator: Any, mean: float, cluster: int) -> None:
    conv = replace(scores(2, 320, 5, 9, 4, 1), cluster=cluster)
    assert error(*emulate(emulator, conv, mean=mean)) < 1e-3


@HALVES
@pytest.mark.parametrize("words", [1, 60, 77, 80])
def test_texts_do_not_mix(emulator: Any, half: Half, words: int) -> None:
    """Numbers of another text, however large, change no bit, though a tile's last words lie in the next text's."""
    conv = half(3, 128, 5, 9, 4, 1, words=words)
    weight = conv.arrays()["weight"]
    usual, _ = emulate(emulator, conv)
    for row in range(3):
        huge = np.random.default_rng(row).choice(np.array([-6e4, 6e4], np.float16), weight.shape)
        huge[row] = weight[row]
        assert emulate(emulator, conv, weight=huge)[0][row].tobytes() == usual[row].tobytes()


FAR = replace(scores(2, 128, 4, 15, 4, 2, words=60), high=64, wide=80)


def far_apart(own: Any) -> dict[str, np.ndarray]:
    """A text whose scores have a deviation of 30, and what each word's have by themselves."""
    weight = FAR.arrays()["weight"]
    columns = FAR.heads * FAR.channels
    weight[..., :columns] *= np.float16(15)
    weight[..., 2 * columns :][..., : FAR.heads] += np.asarray(own, np.float16).reshape(-1, 1)
    return {"weight": weight}


OWN = [2000.0, -2000.0, [0.0, 500.0] * 30, [500.0, 0.0] * 30]  # of all words, or of every other one


@pytest.mark.parametrize("own", [0.0, *OWN], ids=lambda own: str(own)[:12])
def test_large_scores(emulator: Any, own: Any) -> None:
    y, expected = emulate(emulator, FAR, **far_apart(own))
    assert error(y, expected) < (1e-2 if own else 3e-3)  # sums of float beside 2000 are rounded
    assert np.abs(y.astype(np.float64).reshape(-1, CROSS_WORDS).sum(1) - 1).max() < 2e-3


def test_equal_scores(emulator: Any) -> None:
    weight = np.zeros_like(FAR.arrays()["weight"])
    y, expected = emulate(emulator, FAR, weight=weight)
    assert np.array_equal(y, expected.astype(np.float16)) and y.max() == np.float16(1 / 60)


def test_equal_positions(emulator: Any) -> None:
    """Whose variance, rounded, may come out below zero."""
    assert is_finite_of_equal_numbers(emulator)


def is_finite_of_equal_numbers(library: Any) -> bool:
    conv = replace(scores(1, 640, 4, 6, 4, 1), high=64)
    x = np.linspace(1, 50, 24, dtype=np.float16).reshape(1, 4, 6, 1).repeat(640, axis=3)
    return bool(np.isfinite(emulate(library, conv, x=x)[0]).all())


NO_KERNEL: list[dict[str, Any]] = [
    {"words": 81}, {"words": 0}, {"batch": 0}, {"size": 3}, {"stride": 2}, {"cross": 3}, {"cross": -1}, {"gate": 1},
    {"second_channels": 64}, {"weight_sums": 16}, {"high": 192}, {"wide": 240}, {"cluster": 9}, {"height": 1000},
]  # fmt: skip
OF_EITHER: list[tuple[Half, dict[str, Any]]] = [
    (scores, {"channels": 96}), (scores, {"filters": 160}), (scores, {"filters": 384}), (scores, {"wide": 64}),
    (scores, {"batch": 3}), (scores, {"x_batch": 0}), (scores, {"residual": 16, "residual_batch": 1}),
    (values, {"filters": 96}), (values, {"channels": 160}), (values, {"channels": 384}), (values, {"wide": 80}),
    (values, {"wide": 192}),
]  # fmt: skip


@pytest.mark.parametrize(("half", "changes"), [*product((scores, values), NO_KERNEL), *OF_EITHER])
def test_what_has_no_kernel(emulator: Any, half: Half, changes: dict[str, Any]) -> None:
    call: Any = half(4, 128, 8, 12, 4, 2).call()
    if half is values:
        call.residual = 16
    for name, value in changes.items():
        setattr(call, name, value)
    assert emulator.emulate_conv(ctypes.byref(call), 0) == 1


@HALVES
def test_a_text_that_is_too_narrow(emulator: Any, half: Half) -> None:
    """Each line has 2 · heads · C numbers and one for each head, a multiple of 8."""
    call: Any = half(4, 128, 8, 12, 8, 2).call()
    out = (ctypes.c_int32 * 8)()
    for pitch, there in ((2 * 8 * 128 + 8, True), (2 * 8 * 128, False), (2 * 8 * 128 + 12, False), (8, False)):
        call.text_pitch = pitch
        emulator.canny_conv_plan(ctypes.byref(call), out)
        assert bool(out[0]) == there, pitch


def test_the_builder_asks_for_no_kernel_that_there_is_not(emulator: Any) -> None:
    served = 0
    for batch, rows, channels, height, heads, words in product(
        (1, 2, 6), (1, 2, 4), (64, 320, 96), (1, 8, 33, 400), (4, 8, 6), (1, 77, 80, 81)
    ):
        if has_cross_kernel((rows, channels, height, 7), batch, heads, words):
            served += 1
            for half in (scores, values):
                assert half(batch, channels, height, 7, heads, rows, words).plan(emulator)
    assert served > 100


# -- mistakes ---------------------------------------------------------------------------------------------------------

# Images of 126 or 60 rows, so that tiles end a few rows beyond y, among the guards; more units than places for them.
OF_SCORES = [
    replace(scores(2, 128, 9, 14, 8, 1), high=64, wide=160, cluster=1),
    replace(scores(4, 192, 4, 15, 4, 2, words=60), high=64, wide=80, cluster=3),
    replace(scores(1, 640, 9, 14, 4, 1), high=128, wide=80, cluster=1),
]
OF_VALUES = [
    replace(values(2, 128, 9, 14, 4, 1), high=64, wide=128, cluster=1),
    replace(values(4, 128, 4, 15, 4, 2, words=60), high=64, wide=64, cluster=3),
    replace(values(1, 64, 9, 14, 8, 1), high=128, wide=64, cluster=1),
]


def found(library: Any, convs: list[Cross]) -> bool:
    """Whether something is not as float64 does it."""
    of_scores = convs[0].cross == 1
    tried: list[tuple[Cross, dict[str, np.ndarray]]] = [(conv, {}) for conv in convs]
    tried += [(FAR, far_apart(own)) for own in OWN] if of_scores else []
    for (conv, changed), order in product(tried, (0, 1)):
        try:
            if not error(*emulate(library, conv, order, **changed)) < (1e-2 if changed else 1e-3):
                return True
        except AssertionError:
            return True
    return of_scores and not is_finite_of_equal_numbers(library)


NEXT_ROW = "y += 8 * p.call.filters;\n            "
NEXT_SUMS = "x = moments.x[1], squares = moments.squares[1];\n#pragma unroll\n            for (float(&four)[4] : sums) "
MOST, TOTAL = "mask *= 2) most = ", "mask *= 2) total += "
BOTH_MISTAKES = [
    ("first_row += image * (p.rows_each - p.tiles_each * kHigh);", ""), ("end_row = (image + 1) * p.rows_each;", ""),
    *alike(
        ("words = image * p.call.words;", "words = 0;"),
        ("conv_divide(of_rows, p.by_tiles)", "min(of_rows, p.call.batch - 1)"),
        ("(p.rows_each - p.tiles_each * kHigh)", "(p.rows_each - kHigh)"),
        ("end_row = (image + 1) * p.rows_each;", "end_row = p.rows_each;"),
        ("row < end_row ? row - first_row : 0", "row"),
        ("full, kUnit)", "full, kUnit / 2)"),
        ("ring.wait_empty();\n            barrier_expect", "barrier_expect"),
        ("(p.rows_each + high - 1) / high", "p.rows_each / high"),
    ),
]  # fmt: skip
SCORES_MISTAKES = [
    ("conv_divide(image, p.by_x_batch) * p.call.x_batch", "image"),
    ("if (word >= c.words) return kFar;", ""), ("end_row && first + lane % 4 < kEights)", "end_row)"),
    *alike(
        ("i++, channel += p.call.channels)", "i++)"),
        (NEXT_ROW + "x = moments.x[1]", NEXT_ROW + "x = moments.x[0]"),
        ("total += sums[j][k] = exp2_fast(sums[j][k] - most)", "total += sums[j][k] = exp2_fast(sums[j][k])"),
        ("first_row + (of_x - image) * p.rows_each", "first_row + (image - of_x) * p.rows_each"),
        ("if (kScores) of_x -= conv_divide(image, p.by_x_batch) * p.call.x_batch;", ""),
        ("first_filter / kConvWords * p.call.channels + unit", "unit"),
        ("* p.call.channels + unit * kConvDeep;", "* p.call.channels;"),
        ("ring.place + i * kConvWords * kConvRow, work.second", "ring.place, work.second"),
        ("work.second, words, channel, ring.full", "work.second, words + 1, channel, ring.full"),
        ("head = at / kConvWords, word = at - head * kConvWords", "head = 0, word = at"),
        ("head += first_filter / kConvWords;", ""), ("int64_t(image * c.words + word)", "int64_t(word)"),
        ("line + 2 * p.heads * c.channels + head]", "line + p.heads * c.channels + head]"),
        ("* c.channels + head]", "* c.channels]"), ("return kFar;", "return -10.f;"),
        ("norm_of(x, squares).by", "norm_of(squares, x).by"), ("most = kFar, total", "most = 0.f, total"),
        ("constants + to.filter + 8 * j", "constants + 8 * j"), ("sums[j][0], by, of_words.x", "sums[j][0], by, 0.f"),
        ("sums[j][1], by, of_words.y", "sums[j][1], by, of_words.x"),
        ("most = fmaxf(most, fmaxf(sums[j][0], sums[j][1]));", "most = fmaxf(most, sums[j][0]);"),
        ("mask <= 2; " + MOST, "mask <= 1; " + MOST), ("mask <= 2; " + TOTAL, "mask <= 1; " + TOTAL),
        ("k < 2; k++) total", "k < 1; k++) total"), ("total = reciprocal_fast(total);", ""),
        ("sums[j][1] * total)", "sums[j][1])"), ("first < kEights; first += 4", "first < 8; first += 4"),
        ("words[j - first] = pack", "words[first + 3 - j] = pack"),
        ("swap_words(words);\n                if", "if"), ("if (to.row + 8 * i < end_row && first", "if (first"),
        ("store_words(words, y + 8 * first)", "store_words(words, y)"), ("y += 8 * p.call.filters;", ""),
        (NEXT_ROW + "x = moments.x[1], squares = moments.squares[1]", NEXT_ROW + "x = moments.x[1]"),
        (NEXT_ROW + NEXT_SUMS + "four[0] = four[2], ", NEXT_ROW + NEXT_SUMS),
        (NEXT_ROW + NEXT_SUMS + "four[0] = four[2], four[1] = four[3]", NEXT_ROW + NEXT_SUMS + "four[0] = four[2]"),
    ),
]  # fmt: skip
VALUES_MISTAKES = [
    ("step = unit * kSteps + i,", "step = unit * kSteps,"), ("(k * kSteps + i) * kBytes", "i * kBytes"),
    *alike(
        ("uint64_t(box / 16) << 16", "uint64_t(1) << 16"),
        ("head = uint32_t(step) / kEach", "head = uint32_t(step) / kSteps"),
        ("words + (step - head * kEach) * kConvStep", "words + step % kSteps * kConvStep"),
        ("words + (step - head * kEach) * kConvStep", "words + (step - head * kEach)"),
        ("(p.heads + head) * p.call.filters", "head * p.call.filters"),
        ("(p.heads + head) * p.call.filters + first_filter", "(p.heads + head) * p.call.filters"),
        ("channel + k * 64, ring.full", "channel, ring.full"), ("b + k * (kConvStep * kConvRow / 16)", "b + 2 * k"),
        ("box / 16) << 16 | kEightRows << 32", "box / 16) << 16 | kEightRows / 2 << 32"),
        ("row - conv_divide(row, p.by_residual) * lines", "min(row, lines)"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("mistake", BOTH_MISTAKES, ids=lambda mistake: mistake[-1][:40])
@pytest.mark.parametrize(
    "convs", [slow_unless(True, OF_SCORES), slow_unless(False, OF_VALUES)], ids=["scores", "values"]
)
def test_the_emulator_finds_mistakes_in_both(tmp_path: Path, mistake: tuple[str, str], convs: list[Cross]) -> None:
    assert found(mistaken(tmp_path, *mistake, cross=convs[0].cross), convs)


@pytest.mark.parametrize("mistake", SCORES_MISTAKES, ids=lambda mistake: mistake[-1][-40:])
def test_the_emulator_finds_mistakes_in_scores(tmp_path: Path, mistake: tuple[str, str]) -> None:
    assert found(mistaken(tmp_path, *mistake, cross=1), OF_SCORES)


@pytest.mark.parametrize("mistake", VALUES_MISTAKES, ids=lambda mistake: mistake[-1][-40:])
def test_the_emulator_finds_mistakes_in_values(tmp_path: Path, mistake: tuple[str, str]) -> None:
    assert found(mistaken(tmp_path, *mistake, cross=2), OF_VALUES)


def test_without_mistakes_all_is_right(emulator: Any) -> None:
    assert not found(emulator, OF_SCORES) and not found(emulator, OF_VALUES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("convs", "others"), [(OF_SCORES, OF_VALUES), (OF_VALUES, OF_SCORES)], ids=["scores", "values"]
)
def test_and_with_no_more_kernels_than_above(tmp_path: Path, convs: list[Cross], others: list[Cross]) -> None:
    library = compile_emulator(tmp_path, KERNELS, SOURCE, "-O1 " + kernels_of(cross=convs[0].cross))
    assert not found(library, convs)
    with pytest.raises(RuntimeError, match="not compiled"):
        found(library, others)
