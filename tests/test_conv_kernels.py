"""The convolution kernels on a CPU: as they are written, in an emulator, against float64."""

import ctypes
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import PLUGINS, between_guards, compile_emulator, compile_mistaken

from bench.conv import convolutions
from plugins.call import error
from plugins.conv_calls import Conv
from plugins.load import has_conv_kernel
from trt_builder.config import ModelConfig, Options, Shape

KERNELS, SOURCE = PLUGINS / "conv", "conv_emulated.cpp"

SHAPES = [
    Conv(2, 128, 4, 6, 64), Conv(2, 64, 4, 6, 128, residual_batch=2), Conv(2, 128, 8, 12, 64, residual_batch=1),
    Conv(2, 640, 4, 6, 64, size=1), Conv(2, 64, 8, 12, 128, stride=2), Conv(1, 64, 5, 7, 64, stride=2),
    Conv(1, 192, 8, 12, 192, size=1, residual_batch=1), Conv(3, 64, 3, 3, 64, residual_batch=1), Conv(1, 64, 1, 1, 64),
    Conv(4, 64, 7, 5, 64, size=1, stride=2), Conv(2, 64, 9, 13, 64), Conv(2, 640, 9, 13, 128, size=1),
    Conv(1, 128, 16, 24, 64), Conv(2, 64, 16, 24, 64, stride=2),
]  # fmt: skip
# Its tiles go 4 rows beyond y, as far as the guards: a mistake that stores them spoils nothing else.
WIDE = Conv(2, 192, 9, 14, 512, 1, residual_batch=1, norm=True, cluster=1, high=128, wide=256, epsilon=0.1)
ONE = Conv(2, 128, 8, 12, 128, residual_batch=1, cluster=5, high=128, wide=64)
TALL = Conv(2, 192, 9, 13, 64, cluster=1)
NORMED = Conv(2, 320, 9, 13, 128, 1, residual_batch=1, norm=True, cluster=3, wide=64, high=128, epsilon=0.1)
IN_BOTH = Conv(2, 128, 9, 13, 64, second=320, cluster=3, high=64)
GATED = [replace(WIDE, residual_batch=0, gate=True, cluster=cluster, high=64, wide=64) for cluster in (3, 1)]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compile_emulator(tmp_path_factory.mktemp("emulator"), KERNELS, SOURCE)


def emulate(library: Any, conv: Conv, order: int = 0, mean: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel makes of random arrays, and what float64 does; everything else in memory stays as it was."""
    arrays, call = conv.arrays(mean=mean if conv.norm else 0.0), conv.call()
    y = between_guards(call, conv.memory(arrays), lambda: library.emulate_conv(ctypes.byref(call), order))
    return y.view(np.float16).reshape(conv.out), conv.expected(arrays)


def is_right_or_too_large(library: Any, conv: Conv, order: int) -> bool:
    """Some wide tiles have too little shared memory in a cluster, one too few registers."""
    tile, large = (conv.wide, conv.high, conv.norm), {(192, 128, True), (256, 64, True), (256, 128, True)}
    if conv.plan(library) is None:
        return tile == (256, 128, False) or (conv.cluster > 1 and tile in large)
    return error(*emulate(library, conv, order)) < 1e-3


@pytest.mark.parametrize("cluster", [0, 1, 3, 8])
@pytest.mark.parametrize("conv", SHAPES, ids=str)
def test_against_float64(emulator: Any, conv: Conv, cluster: int) -> None:
    conv = replace(conv, cluster=min(cluster, conv.size**2 * conv.channels // 64))
    assert error(*emulate(emulator, conv, order=cluster % 3)) < 1e-3


@pytest.mark.parametrize("wide", [64, 128])
@pytest.mark.parametrize("height", [4, 5, 8, 9])  # one, two warpgroups; two tiles of both
def test_every_kernel(emulator: Any, height: int, wide: int) -> None:
    conv = Conv(2, 128, height, 12, 128, residual_batch=1, wide=wide, cluster=4)
    assert error(*emulate(emulator, conv, order=2)) < 1e-3


def slow_unless(usual: bool, *given: Any) -> Any:
    """Parameters that the usual run has, or that it leaves out."""
    return pytest.param(*given, marks=[] if usual else pytest.mark.slow)


@pytest.mark.parametrize(
    ("norm", "cluster", "residual"),
    [slow_unless((norm + i + residual) % 3 == 0, norm, cluster, residual)
     for norm, (i, cluster), residual in product((False, True), enumerate((1, 3, 8)), range(3))],
)  # fmt: skip
@pytest.mark.parametrize("high", [64, 128])
@pytest.mark.parametrize("wide", [192, 256])
def test_wide_tiles(emulator: Any, wide: int, high: int, norm: bool, cluster: int, residual: int) -> None:
    """Two of filters, two of rows of which the second is not full."""
    height = 5 if high == 64 else 7
    conv = Conv(2, 576, height, 11, 2 * wide, 1, 1, residual, norm, cluster=cluster, high=high, wide=wide)
    assert is_right_or_too_large(emulator, conv, (cluster + residual) % 3)


@pytest.mark.parametrize(
    ("norm", "cluster"),
    [slow_unless(cluster in (1, 2, 5 if norm else 3), norm, cluster)
     for norm, cluster in product((False, True), (0, 1, 2, 3, 5))],
)  # fmt: skip
@pytest.mark.parametrize(("wide", "high"), [(64, 64), *product((128, 192, 256), (64, 128))])
def test_a_gate(emulator: Any, wide: int, high: int, norm: bool, cluster: int) -> None:
    conv = Conv(2, 320, 9, 8, 2 * wide, 1, norm=norm, cluster=cluster, high=high, wide=wide, gate=True)
    assert is_right_or_too_large(emulator, conv, cluster % 3)


@pytest.mark.slow
def test_the_shapes_of_sd15_with_fewer_filters(emulator: Any) -> None:
    """As long products as a step has, in the cut that the whole shape would have."""
    config, shape = ModelConfig.load("sd15"), Shape(256, 384)
    own = Options(attention="own", conv="own")
    folded = replace(own, layer_norm="folded")
    every = (Options(), own, folded, replace(folded, qkv="apart"))
    for conv in set().union(*(convolutions(config, shape, one) for one in every)):
        plan = conv.plan(emulator)
        if conv.rows > 768 or plan is None:
            continue
        assert plan.shared <= 227 << 10
        part = replace(conv, filters=plan.wide, wide=plan.wide, cluster=plan.cluster)
        assert error(*emulate(emulator, part)) < 1e-3, conv


NORMS = [
    Conv(2, 640, 4, 6, 64, 1, norm=True), Conv(2, 128, 8, 12, 192, 1, residual_batch=1, norm=True),
    Conv(1, 64, 1, 1, 64, 1, norm=True), Conv(3, 192, 5, 7, 128, 1, residual_batch=3, norm=True),
    Conv(2, 320, 9, 13, 128, 1, norm=True),
]  # fmt: skip


@pytest.mark.parametrize("cluster", [0, 1, 3, 8])
@pytest.mark.parametrize("conv", NORMS, ids=str)
def test_a_layer_norm_before_it(emulator: Any, conv: Conv, cluster: int) -> None:
    conv = replace(conv, cluster=min(cluster, conv.channels // 64))
    assert error(*emulate(emulator, conv, order=cluster % 3)) < 1e-3


@pytest.mark.parametrize("wide", [64, 128])
@pytest.mark.parametrize("height", [4, 5, 8, 9])
def test_every_kernel_with_a_layer_norm(emulator: Any, height: int, wide: int) -> None:
    conv = Conv(2, 320, height, 12, 128, 1, residual_batch=1, norm=True, wide=wide, cluster=4)
    assert error(*emulate(emulator, conv, order=2)) < 1e-3


@pytest.mark.parametrize(("mean", "most"), [(0.0, 1e-3), (-3.0, 1e-3), (30.0, 1e-3), (100.0, 3e-3)])
@pytest.mark.parametrize("cluster", [1, 8])
def test_a_layer_norm_of_positions_with_a_large_mean(emulator: Any, cluster: int, mean: float, most: float) -> None:
    conv = Conv(2, 1280, 8, 12, 64, 1, norm=True, cluster=cluster)
    assert error(*emulate(emulator, conv, mean=mean)) < most


SECONDS = [
    Conv(2, 128, 8, 12, 64, residual_batch=1, second=192), Conv(2, 64, 4, 6, 128, second=640),
    Conv(1, 192, 8, 12, 192, 1, residual_batch=1, second=64), Conv(2, 640, 9, 13, 128, 1, second=320),
    Conv(3, 64, 3, 3, 64, second=64), Conv(1, 64, 1, 1, 64, 1, second=128), Conv(2, 64, 9, 13, 64, second=64),
    Conv(1, 128, 16, 24, 64, second=128),
]  # fmt: skip


@pytest.mark.parametrize("cluster", [0, 1, 3, 8])
@pytest.mark.parametrize("conv", SECONDS, ids=str)
def test_a_second_map(emulator: Any, conv: Conv, cluster: int) -> None:
    conv = replace(conv, cluster=min(cluster, (conv.size**2 * conv.channels + conv.second) // 64))
    assert error(*emulate(emulator, conv, order=cluster % 3)) < 1e-3


@pytest.mark.parametrize("cluster", range(1, 9))
def test_slices_that_begin_and_end_in_x_and_in_the_second_map(emulator: Any, cluster: int) -> None:
    """Nine units of x and seven of the other: a block has some of both, or of one alone, taps in the middle."""
    for size, channels in ((3, 64), (1, 576)):
        conv = Conv(2, channels, 8, 12, 64, size, residual_batch=2, second=448, cluster=cluster, wide=64)
        assert error(*emulate(emulator, conv, order=cluster % 3)) < 1e-3


@pytest.mark.parametrize("wide", [64, 128])
@pytest.mark.parametrize("height", [4, 5, 8, 9])
def test_every_kernel_with_a_second_map(emulator: Any, height: int, wide: int) -> None:
    for size in (1, 3):
        conv = Conv(2, 128, height, 12, 128, size, residual_batch=1, second=320, wide=wide, cluster=4)
        assert error(*emulate(emulator, conv, order=2)) < 1e-3


def test_a_layer_norm_of_equal_numbers(emulator: Any) -> None:
    assert is_finite_of_equal_numbers(emulator)


def is_finite_of_equal_numbers(library: Any) -> bool:
    """Whose variance, rounded, may come out below zero."""
    conv = Conv(1, 640, 4, 6, 64, 1, norm=True)
    arrays, call = conv.arrays(), conv.call()
    arrays["x"][:] = np.linspace(1, 50, 24).reshape(1, 4, 6, 1)
    y = between_guards(call, conv.memory(arrays), lambda: library.emulate_conv(ctypes.byref(call), 0))
    return bool(np.isfinite(y.view(np.float16)).all())


def test_expected_is_what_torch_says() -> None:
    import torch

    for conv in SHAPES + SECONDS:
        arrays = conv.arrays()
        x, weight, bias = (torch.from_numpy(arrays[name]).double() for name in ("x", "weight", "bias"))
        y = torch.nn.functional.conv2d(x.movedim(3, 1), weight, bias, conv.stride, conv.size // 2)
        if conv.second:
            second, weight = (torch.from_numpy(arrays[name]).double() for name in ("second", "second_weight"))
            y += torch.nn.functional.conv2d(second.movedim(3, 1), weight)
        if conv.residual_batch:
            rest = torch.from_numpy(arrays["residual"]).double().movedim(3, 1)
            y += rest.repeat(conv.batch // conv.residual_batch, 1, 1, 1)
        np.testing.assert_allclose(conv.expected(arrays), y.movedim(1, 3).numpy(), atol=1e-12)


OTHER_ORDERS = [ONE, replace(ONE, cluster=7, size=1, channels=640), replace(ONE, cluster=3, second=192), WIDE]


@pytest.mark.parametrize("conv", OTHER_ORDERS, ids=str)
def test_the_order_of_threads_and_copies_changes_no_bit(emulator: Any, conv: Conv) -> None:
    first, _ = emulate(emulator, conv)
    for order in (1, 2, 3):
        assert first.tobytes() == emulate(emulator, conv, order)[0].tobytes(), order


def alike(*mistakes: tuple[str, ...]) -> list[Any]:
    """Mistakes that are found as others are, which the usual run leaves out."""
    return [slow_unless(False, one) for one in mistakes]


MISTAKES = [
    ("__syncthreads();  // barriers and", "// barriers and"),
    ("cluster_arrive(), cluster_wait();  // all", "cluster_arrive();  // all"),
    ("cluster_wait();\n            block.template give", "block.template give"),
    ("group_sync<1>(0, Block::kConsumers);", ""), ("there = ring.is_full();", "there = true;"),
    ("if (kTaps > 1) x_ring.wait_full();", ""), ("x_there = x_ring.is_full();", "x_ring.is_full();"),
    ("ring.wait_empty();\n            barrier_expect", "barrier_expect"),
    ("ring.wait_empty();\n            bool of_x", "bool of_x"), ("empty(), parity ^ 1)", "empty(), parity)"),
    ("products_begin();", ""), ("products_wait<1>();", "products_wait<2>();"), ("unit > first, be", "true, be"),
    ("step(a[1], a[0], unit + 1)", "step(a[1], a[1], unit + 1)"),
    ("barrier_expect(ring.full, kUnit)", "barrier_expect(ring.full, kUnit / 2)"),
    ("from = x_ring.place + offset()", "from = positions + offset()"), ("mine[1], b + 2)", "mine[1], b + 4)"),
    ("positions_ring().begin_barriers(1, ", "positions_ring().begin_barriers(2, "),
    ("piece - slot * p.cluster) : 0", "0) : 0"),
    ("(slot * p.cluster + rank) * kPart<kShared>", "slot * p.cluster * kPart<kShared>"),
    ("other < p.cluster; other++", "other < 4; other++"), ("theirs + j * 512", "theirs + j * 256"),
    ("x >= 0 && x", "x"), ("wait_for_previous();", ""), ("barriers_begun();", ""),
    ("kEightRows = 1024 / 16", "kEightRows = 512 / 16"), ("slot += kWarps) {", "slot += 2 * kWarps) {"),
    ("conv_position(p, last_row).at + border + 1", "conv_position(p, last_row).at + 1"),
    *alike(("barrier_wait(full, parity)", "barrier_wait(full, 0)"), ("zeros + (at & (", "zeros - 8 + (at & ("),
        ("products_wait<0>();", ""), ("leads = lane == 0", "leads = lane <= 1"),
        ("&& x < p.call.width;", ";"), ("y >= 0 && y", "y"), ("kSwizzle128 = 1", "kSwizzle128 = 2"),
        ("kConvAlign = 1024", "kConvAlign = 512"), ("section = piece / kWarps * 32", "section = 0")),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[-1][:40])
def test_the_emulator_finds_mistakes(tmp_path: Path, mistake: tuple[str, str]) -> None:
    library = mistaken(tmp_path, *mistake)
    assert not all(right(library, conv, order) for conv in (ONE, TALL) for order in (0, 1, 2))


def kernels_of(wide: int, norm: bool) -> str:
    """The compiler's flags for these kernels alone."""
    return f"-O1 -DEMULATE_WIDE={wide} -DEMULATE_NORM={int(norm)}"


def mistaken(folder: Path, find: str, put: str, *file: str, wide: int = 64, norm: bool = False) -> Any:
    """These kernels with a mistake, in a file or the one that has what is to be replaced."""
    (name,) = file or (path.name for path in KERNELS.iterdir() if find in path.read_text())
    return compile_mistaken(folder, KERNELS, SOURCE, find, put, name, kernels_of(wide, norm))


def right(library: Any, conv: Conv, order: int) -> bool:
    try:
        return error(*emulate(library, conv, order)) < 1e-3
    except AssertionError:
        return False


NORM_MISTAKES = [
    ("moments.add(mine);", "moments.add(after);"), ("squares[i / 2 % 2] += value", "squares[0] += value"),
    ("mask <= 2; mask *= 2) sum", "mask <= 1; mask *= 2) sum"), ("norm.mean * of_filters.x)", "norm.mean)"),
    ("4 << kGate, moments.x[0], moments.squares[0]", "4 << kGate, moments.x[1], moments.squares[1]"),
    ("fmaxf(square - mean * mean, 0.f)", "(square - mean * mean)"), ("+ p.call.epsilon)", ")"),
    ("make_float2(x + bias.x, ", "make_float2(x, "), ("moments.squares[0] += four.y", "moments.squares[0] = four.y"),
    *alike(("moments.add(mine);", ";"), ("x[i / 2 % 2] += value", "x[i % 2] += value"),
        ("moments.squares[1] += four.w", "moments.squares[1] = four.w"),
        ("p.call.weight_sums[first_filter + at]", "p.call.weight_sums[at]"),
        ("fmaxf(square - mean * mean, 0.f)", "square")),
]  # fmt: skip


@pytest.mark.parametrize("mistake", NORM_MISTAKES, ids=lambda mistake: mistake[-1][:40])
def test_the_emulator_finds_mistakes_in_a_layer_norm(tmp_path: Path, mistake: tuple[str, str]) -> None:
    library = mistaken(tmp_path, *mistake, norm=True)
    found = not all(right(library, NORMED, order) for order in (0, 1, 2))
    assert found or not is_finite_of_equal_numbers(library)


SECOND_MISTAKES = [
    ("min(unit, p.x_units)", "unit"), ("tap = of_x ? 0 : kTaps / 2", "tap = 0"),
    ("first - part_of(first) * kTaps : kTaps / 2", "0 : kTaps / 2"),
    ("part < parts", "part <= parts"), ("first_row - ahead % kConvEight", "first_row"),
    ("work.second, first_row", "work.x, first_row"),
    ("p.x_boxes * p.x_box : p.second_box", "p.x_boxes * p.x_box : p.x_boxes * p.x_box"),
    ("plan.h", "high + kConvEight - 1", "high - kConvEight"),
    *alike(("left = of_x ? kTaps : 1", "left = kTaps"), ("ahead / kConvEight * kConvEight", "0"),
        ("(part - parts) * kConvDeep", "part * kConvDeep"),
        ("plan.h", "p.x_units + call.second_channels / kConvDeep", "p.x_units")),
]  # fmt: skip


@pytest.mark.parametrize("mistake", SECOND_MISTAKES, ids=lambda mistake: mistake[-1][:40])
def test_the_emulator_finds_mistakes_with_a_second_map(tmp_path: Path, mistake: tuple[str, ...]) -> None:
    *file, find, put = mistake
    library = mistaken(tmp_path, find, put, *file)
    assert not all(right(library, replace(IN_BOTH, cluster=cluster), 0) for cluster in (1, 3, 8))


WIDE_MISTAKES = [
    ("(high ? low : up) = theirs;", "up = theirs;"),
    ("words[mask == 1 ? 2 * i : i]", "words[i]"), ("if (to.row + 8 * i < p.rows) store_words", "store_words"),
    ("four[0] = four[2], ", ""), ("norm, to.filter + eight * 8);", "norm, to.filter);"),
    ("moments.join();", ";"), ("(t * (4 << kGate) + j) * 4", "j * 4"),
    ("kTaps == 1 ? 2 : 1, kConsumers", "1, kConsumers"),
    *alike(("x = moments.x[1], squares", "x = moments.x[0], squares"),
        ("i < kWide / 64; i++)\n                copy", "i < 2; i++)\n                copy")),
]  # fmt: skip


@pytest.mark.parametrize("mistake", WIDE_MISTAKES, ids=lambda mistake: mistake[-1][:40])
def test_the_emulator_finds_mistakes_in_wide_tiles(tmp_path: Path, mistake: tuple[str, str]) -> None:
    library = mistaken(tmp_path, *mistake, wide=256, norm=True)
    assert not all(right(library, WIDE, order) for order in (0, 1))


GATE_MISTAKES = [
    ("to.filter + eight * 8 + 8", "to.filter + eight * 8"), ("y.y * gelu(b.y)", "y.y * gelu(b.x)"),
    ("(first_filter >> kGate) + section", "first_filter + section"), ("y.x * gelu(b.x)", "y.x * b.x"),
    ("4 << kGate, moments.x[0]", "4 << kGate, moments.x[1]"),
    *alike(("made(sums[eight + 1][0]", "made(sums[eight][0]"), ("eight = k << kGate", "eight = k")),
]  # fmt: skip


@pytest.mark.parametrize("mistake", GATE_MISTAKES, ids=lambda mistake: mistake[-1][:40])
def test_the_emulator_finds_mistakes_in_a_gate(tmp_path: Path, mistake: tuple[str, str]) -> None:
    library = mistaken(tmp_path, *mistake, norm=True)
    assert not all(right(library, conv, order) for order, conv in enumerate(GATED))


@pytest.mark.parametrize(
    ("wide", "norm", "convs"),
    [(64, False, [ONE, TALL, IN_BOTH, replace(IN_BOTH, cluster=8)]), (64, True, [NORMED, *GATED]), (256, True, [WIDE])],
)
def test_without_mistakes_all_of_these_are_right(tmp_path: Path, wide: int, norm: bool, convs: list[Conv]) -> None:
    """With no more kernels than were compiled above."""
    library = compile_emulator(tmp_path, KERNELS, SOURCE, kernels_of(wide, norm))
    assert all(right(library, conv, order) for conv in convs for order in (0, 1))
    assert (wide, norm) != (64, True) or is_finite_of_equal_numbers(library)
    assert not right(library, replace(ONE, wide=128), 0)


def test_the_builder_asks_for_no_kernel_that_there_is_not(emulator: Any) -> None:
    served = 0
    for size, stride, height, width in product(
        (1, 3), (1, 2), (1, 2, 5, 8, 16, 31, 64), (*range(1, 40, 6), *range(60, 800, 17))
    ):
        conv = Conv(2, 64, height, width, 64, size, stride)
        if has_conv_kernel((2, 64, height, width), (64, 64, size, size), stride):
            served += 1
            assert conv.plan(emulator), conv
            assert stride == 2 or replace(conv, second=640).plan(emulator), conv
    assert served > 500
    for wide in (Conv(2, 64, 16, 224, 64, stride=2), Conv(2, 64, 8, 360, 64)):
        assert wide.plan(emulator) is None


@pytest.mark.parametrize(
    "changes",
    [{"channels": 96}, {"filters": 32}, {"size": 5}, {"stride": 3}, {"batch": 0}, {"cluster": 9}, {"wide": 96}],
    ids=str,
)
def test_shapes_that_have_no_kernel(emulator: Any, changes: dict[str, Any]) -> None:
    conv = replace(SHAPES[0], **changes)
    assert emulator.emulate_conv(ctypes.byref(conv.call()), 0) == 1 and conv.plan(emulator) is None


@pytest.mark.parametrize("changes", [{"second": 96}, {"second": -64}, {"stride": 2}, {"norm": True}], ids=str)
def test_what_takes_no_second_map(emulator: Any, changes: dict[str, Any]) -> None:
    call: Any = replace(Conv(2, 128, 4, 6, 64, 1, second=64), **changes).call()
    call.weight_sums = 16 if "norm" in changes else None
    assert emulator.emulate_conv(ctypes.byref(call), 0) == 1


@pytest.mark.parametrize("wide", [192, 256])
def test_only_1x1_have_wide_tiles(emulator: Any, wide: int) -> None:
    one = Conv(2, 64, 8, 12, 2 * wide, 1, wide=wide)
    assert one.plan(emulator) and not replace(one, size=3).plan(emulator)
    assert not replace(one, filters=2 * wide + 64).plan(emulator)


def test_only_1x1_take_a_layer_norm_or_without_a_residual_a_gate(emulator: Any) -> None:
    one = Conv(2, 64, 8, 12, 128, 1, gate=True)
    assert one.plan(emulator) and not replace(one, size=3).plan(emulator)
    assert not replace(one, high=128, wide=64).plan(emulator)  # no registers for it
    call: Any = one.call()
    call.residual, call.residual_batch = 16, 1
    three: Any = SHAPES[0].call()
    three.weight_sums = 16
    assert all(emulator.emulate_conv(ctypes.byref(one), 0) == 1 for one in (call, three))
