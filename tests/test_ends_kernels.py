"""The ends of a step on a CPU: the first and the last convolution as they are written, emulated, against float64."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import PLUGINS, all_between_guards, compile_emulator, compile_mistaken

from plugins.call import error
from plugins.end_calls import First, Last, channels_last
from plugins.load import first_blocks, last_rows

KERNELS, SOURCE = PLUGINS / "ends", "ends_emulated.cpp"

FIRSTS = [  # ControlNet's and the UNet's of SD 1.5 at 256×384, alone, before a repetition, and with two samples
    First(1, 4, 32, 48, 320, hint_batch=1, repeat=2), First(1, 4, 32, 48, 320, repeat=2),
    First(2, 4, 16, 24, 320, hint_batch=1), First(2, 4, 5, 7, 320, hint_batch=2, repeat=2), First(2, 4, 5, 7, 320),
    First(1, 4, 8, 8, 32, repeat=2), First(3, 4, 5, 7, 32, hint_batch=1, repeat=2), First(1, 4, 5, 7, 8),
    First(1, 8, 5, 7, 72, repeat=3), First(2, 5, 3, 11, 136, hint_batch=2), First(1, 1, 1, 1, 8),
    First(2, 3, 1, 33, 64), First(1, 4, 40, 1, 64, hint_batch=1),
]  # fmt: skip
LASTS = [
    Last(1, 320, 32, 48), Last(1, 320, 16, 24, cond=True), Last(2, 320, 5, 7), Last(2, 320, 5, 7, cond=True),
    Last(1, 32, 8, 8), Last(3, 32, 5, 7), Last(3, 32, 5, 7, cond=True), Last(1, 8, 5, 7), Last(2, 40, 3, 11, 8),
    Last(1, 328, 4, 5, 3), Last(1, 160, 9, 1), Last(1, 168, 1, 17, 1, cond=True), Last(1, 8, 1, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compile_emulator(tmp_path_factory.mktemp("emulator"), KERNELS, SOURCE)


def emulate(library: Any, what: First | Last, order: int = 0) -> dict[str, np.ndarray]:
    """What a kernel makes of random arrays, as it lies in memory; everything else there stays as it was."""
    call, memory = what.call(), what.memory(what.arrays())
    run = library.canny_first if isinstance(what, First) else library.canny_last
    made = all_between_guards(call, memory, lambda: int(run(ctypes.byref(call), order)), what.results)
    return {name: made[name].view(memory[name].dtype).reshape(memory[name].shape) for name in what.results}


def worst(library: Any, what: First | Last, order: int = 0) -> float:
    """The largest error of any result, relative to its largest number."""
    made, arrays = emulate(library, what, order), what.arrays()
    if isinstance(what, Last):
        expected = what.expected(arrays)
        return float(np.max([error(made[name], expected[name]) for name in what.results]))
    y = channels_last(what.expected(arrays))
    return float(np.max([error(one, np.concatenate([y] * (len(one) // len(y)))) for one in made.values()]))


@pytest.mark.parametrize("what", FIRSTS, ids=str)
def test_the_first_against_float64(emulator: Any, what: First) -> None:
    """Rounded once: every number is within half of its last place, and what is repeated has the same bits."""
    made, arrays = emulate(emulator, what), what.arrays()
    y, exact = made["y"], channels_last(what.expected(arrays))
    place = np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64)
    assert (np.abs(y - exact) <= 0.5 * place + 2e-6).all()
    for part in np.split(made.get("repeated", y), max(1, what.repeat)):
        assert part.tobytes() == y.tobytes()


@pytest.mark.parametrize("what", LASTS, ids=str)
def test_the_last_against_float64(emulator: Any, what: Last) -> None:
    """No number is rounded to half precision on the way: that alone would be 2e-4 off."""
    assert worst(emulator, what) < 2e-6


def test_the_last_may_be_written_over_what_it_reads(emulator: Any) -> None:
    for what, over in (
        (Last(2, 40, 5, 7), {"e": "e1", "difference": "e2", "x_next": "x"}),
        (Last(2, 40, 5, 7, cond=True), {"e": "kept", "x_next": "x"}),
    ):
        arrays, call = what.arrays(), what.call()
        memory, expected = what.memory(arrays), what.expected(arrays)
        for name in memory:
            setattr(call, name, memory[over.get(name, name)].ctypes.data)
        assert emulator.canny_last(ctypes.byref(call), 1) == 0
        assert all(error(memory[place], expected[name]) < 2e-6 for name, place in over.items())


@pytest.mark.parametrize("what", [FIRSTS[3], FIRSTS[8], LASTS[2], LASTS[6]], ids=str)
def test_the_order_of_threads_changes_no_bit(emulator: Any, what: First | Last) -> None:
    first = emulate(emulator, what)
    for order in (1, 2):
        again = emulate(emulator, what, order)
        assert all(again[name].tobytes() == first[name].tobytes() for name in what.results), order


def test_a_border_of_what_is_no_number_stays_out(emulator: Any) -> None:
    """Beyond the map, the channels and the filters nothing is read, or nothing comes of it; between samples neither."""
    for what in (First(2, 3, 5, 7, 24), Last(2, 24, 5, 7, 3)):
        arrays = what.arrays()
        name = "x" if isinstance(what, First) else "h"
        arrays[name][0] = np.nan  # one sample, of `Last` its cond
        call, memory = what.call(), what.memory(arrays)
        run = emulator.canny_first if isinstance(what, First) else emulator.canny_last
        made = all_between_guards(call, memory, lambda: int(run(ctypes.byref(call), 0)), what.results)  # noqa: B023
        for result in what.results:
            of_sample = made[result].view(memory[result].dtype).reshape(memory[result].shape)
            assert np.isnan(of_sample[0]).all() and np.isfinite(of_sample[1]).all()


OF_ONE, OF_EACH = First(3, 4, 5, 7, 136, hint_batch=1, repeat=2), First(2, 4, 5, 7, 64, hint_batch=2)
WIDE, ODD, COND = First(1, 6, 5, 7, 72), Last(2, 168, 5, 7, 3), Last(2, 320, 5, 7, cond=True)


def slow(*given: Any) -> Any:
    """A mistake that takes as long to compile as the others, and is of their kind."""
    return pytest.param(*given, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("find", "put", "what"),
    [
        ("__syncthreads();", "", OF_ONE), slow("p.height), wide", "p.height + 1), wide", OF_ONE),
        slow("uint32_t(p.width);", "uint32_t(p.width + 1);", OF_ONE), slow("&& channel < p.channels;", ";", WIDE),
        slow("channel += kFirstWarps", "channel += kFirstWarps + 1", WIDE),
        slow("(position + i) % area", "position + i", OF_ONE),
        slow("p.hint_batch == p.samples ? position + i", "true ? (position + i) % area", OF_EACH),
        slow("blockIdx.y * (kTaps / 2 * 32)", "blockIdx.y * 32", OF_ONE),
        slow("low.z, fmaf(x.x, low.x,", "low.y, fmaf(x.x, low.x,", OF_ONE), slow("if (!mine ||", "if (", OF_ONE),
        slow("int64_t(k) * count", "int64_t(k) * area", OF_ONE), slow("call.channels <= 4 ?", "true ?", WIDE),
        slow("position + i < count) {", "position + i < area) {", OF_ONE),
    ],
)  # fmt: skip
def test_mistakes_in_the_first_show(tmp_path: Path, find: str, put: str, what: First) -> None:
    assert shows(compile_mistaken(tmp_path, KERNELS, SOURCE, find, put, "first.cuh"), what, 1e-3)


@pytest.mark.parametrize(
    ("find", "put", "what"),
    [
        ("__syncthreads();", "", ODD), slow("&& uint32_t(column) < uint32_t(p.width);", ";", ODD),
        slow("there && channel < channels", "there", ODD), slow("tap * p.filters + (", "tap * 8 + (", ODD),
        slow("{a[k].z, a_other[k].z", "{a[k].x, a_other[k].z", ODD), slow("+ made[1][k]", "", ODD),
        slow("(k * 16 + 8 + position)", "(k * 16 + position)", ODD), slow("of_cond = bias", "of_cond = 0.f", ODD),
        slow("first + kLastHeld * kLastChannels + mine", "first + mine", ODD),
        slow("sample * tiles) * kLastPositions", "sample * tiles) * 9", ODD),
        slow("c.z * e1 + c.w * e2", "c.w * e1 + c.z * e2", ODD), slow("guidance * difference :", "difference :", ODD),
        slow("(guidance - 1.f)", "guidance", COND), slow("int64_t(p.samples) * area * p.channels", "area", ODD),
    ],
)  # fmt: skip
def test_mistakes_in_the_last_show(tmp_path: Path, find: str, put: str, what: Last) -> None:
    assert shows(compile_mistaken(tmp_path, KERNELS, SOURCE, find, put, "last.cuh"), what, 2e-6)


def shows(library: Any, what: First | Last, tolerance: float) -> bool:
    """Whether a result is off, or something was written to where it must not be."""
    try:
        return not worst(library, what, order=1) < tolerance
    except AssertionError:
        return True


@pytest.mark.parametrize("filters, channels", [(320, 4), (72, 8), (8, 3), (136, 6)])
def test_where_the_first_ones_weights_lie(filters: int, channels: int) -> None:
    """Tap t of channel c of filter f: of 64 filters, at two taps of 32 lanes, two filters each; else zeros."""
    weight = 1 + np.arange(filters * channels * 9, dtype=np.float32).reshape(filters, channels, 3, 3)
    made, wide = first_blocks(weight), 4 if channels <= 4 else 8
    assert made.shape == (-(-filters // 64), wide * 9 // 2, 128)
    for f, c, t in ((0, 0, 0), (7, 1, 4), (filters - 1, channels - 1, 8), (filters // 2, 2, 7)):
        number = c * 9 + t
        assert made[f // 64, number // 2, f % 64 // 2 * 4 + number % 2 * 2 + f % 2] == weight[f, c, t // 3, t % 3]
    assert np.count_nonzero(made) == weight.size


def test_where_the_last_ones_weights_lie() -> None:
    weight = np.arange(4 * 16 * 9, dtype=np.float16).reshape(4, 16, 3, 3)
    made = last_rows(weight)
    assert made.shape == (9, 4, 16) and made.flags.c_contiguous and made[5, 2, 11] == weight[2, 11, 1, 2]


@pytest.mark.parametrize(
    "what",
    [
        First(0, 4, 8, 8, 64), First(1, 9, 8, 8, 64), First(1, 0, 8, 8, 64), First(1, 4, 8, 8, 60),
        First(1, 4, 0, 8, 64), First(3, 4, 8, 8, 64, hint_batch=2), First(3, 4, 8, 8, 64, hint_batch=-1),
        First(1, 4, 8, 8, 64, repeat=-1), First(1, 4, 1 << 15, 1 << 16, 64),
        Last(0, 320, 8, 8), Last(1, 12, 8, 8), Last(1, 320, 8, 8, 9),
        Last(1, 320, 8, 8, 0), Last(1, 320, 8, 0), Last(1, 8, 1 << 15, 1 << 16),
    ],
    ids=str,
)  # fmt: skip
def test_shapes_that_have_no_kernel(emulator: Any, what: First | Last) -> None:
    run = emulator.canny_first if isinstance(what, First) else emulator.canny_last
    assert run(ctypes.byref(what.call()), 0) == 1
