"""The convolution kernels on a CPU: as they are written, in an emulator, against float64."""

import ctypes
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from conv_emulated import compiled, emulate, is_finite_of_equal_numbers, slow_unless

from bench.conv import convolutions
from plugins.call import error
from plugins.conv_calls import Conv
from plugins.load import has_conv_kernel, up_phases, up_taps
from trt_builder.config import ModelConfig, Options, Shape

SHAPES = [
    Conv(2, 128, 4, 6, 64), Conv(2, 64, 4, 6, 128, residual_batch=2), Conv(2, 128, 8, 12, 64, residual_batch=1),
    Conv(2, 640, 4, 6, 64, size=1), Conv(2, 64, 8, 12, 128, stride=2), Conv(1, 64, 5, 7, 64, stride=2),
    Conv(1, 192, 8, 12, 192, size=1, residual_batch=1), Conv(3, 64, 3, 3, 64, residual_batch=1), Conv(1, 64, 1, 1, 64),
    Conv(4, 64, 7, 5, 64, size=1, stride=2), Conv(2, 64, 9, 13, 64), Conv(2, 640, 9, 13, 128, size=1),
    Conv(1, 128, 16, 24, 64), Conv(2, 64, 16, 24, 64, stride=2),
]  # fmt: skip
HIGH = [(64, 4), (64, 5), (128, 8), (128, 9), (192, 9)]  # rows of a tile and a map's height: one tile, or a second


@pytest.fixture(scope="module")
def emulator() -> Any:
    return compiled()


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


def of_every_kernel(conv: Conv) -> list[Any]:
    """A convolution in each cut of tiles up to 128 wide, the last of whose rows are full or not."""
    return [
        pytest.param(replace(conv, height=height, wide=wide, high=high), id=f"{high}x{wide}-{height}")
        for (high, height), wide in product(HIGH, (64, 128))
        if (high, wide) != (192, 128)
    ]


@pytest.mark.parametrize("conv", of_every_kernel(Conv(2, 128, 0, 12, 128, residual_batch=1, cluster=4)))
def test_every_kernel(emulator: Any, conv: Conv) -> None:
    assert error(*emulate(emulator, conv, order=2)) < 1e-3


TALL = [
    Conv(2, 128, 9, 13, 128, residual_batch=1), Conv(2, 64, 17, 25, 64, 1, 2), Conv(1, 64, 3, 43, 64),
    Conv(2, 320, 9, 13, 128, 1, residual_batch=2), Conv(2, 320, 9, 13, 128, 1, residual_batch=1, norm=True),
    Conv(3, 64, 8, 24, 64, 1, norm=True), Conv(2, 64, 9, 13, 64, second=192), Conv(3, 128, 7, 11, 64, 1, second=320),
]  # fmt: skip


@pytest.mark.parametrize("cluster", [1, 2, 8])
@pytest.mark.parametrize("conv", TALL, ids=str)
def test_tiles_of_192_rows(emulator: Any, conv: Conv, cluster: int) -> None:
    """One whose rows are all there, the others with rows that end inside a tile."""
    units = (conv.size**2 * conv.channels + conv.second) // 64
    conv = replace(conv, high=192, cluster=min(cluster, units))
    assert conv.plan(emulator) and error(*emulate(emulator, conv, order=cluster % 3)) < 1e-3


def test_which_tiles_have_192_rows(emulator: Any) -> None:
    """Those 64 wide without a gate, where there are more than 128 rows."""
    tall = Conv(2, 64, 9, 13, 256, 1, high=192)
    assert [bool(replace(tall, wide=wide).plan(emulator)) for wide in (64, 128, 192, 256)] == [True, *[False] * 3]
    assert not replace(tall, gate=True).plan(emulator) and not replace(tall, height=4).plan(emulator)


TURNED = [
    (Conv(2, 128, 9, 13, 192, residual_batch=1, high=64, wide=64, cluster=2), 1),
    (Conv(2, 128, 9, 13, 192, 1, residual_batch=2, high=64, wide=64, cluster=1), 0),
    (Conv(2, 128, 9, 13, 512, 1, norm=True, high=64, wide=256, cluster=1), 1),
    (Conv(2, 128, 9, 13, 384, 1, norm=True, high=128, wide=128, cluster=2, gate=True), 0),
    (Conv(2, 64, 9, 13, 192, second=64, high=192, wide=64, cluster=3), 1),
    (Conv(2, 64, 9, 13, 192, 1, norm=True, high=192, wide=64, cluster=1), 0),
]


@pytest.mark.parametrize(("conv", "beside"), TURNED, ids=str)
def test_the_order_of_tiles_changes_no_bit(emulator: Any, conv: Conv, beside: int) -> None:
    """Whether those of rows begin side by side, as where they read more of the same weights, or those of filters."""
    call: Any = conv.call()
    call.weight_sums = 1 if conv.norm else None
    assert emulator.conv_rows_beside(ctypes.byref(call)) == beside
    usual, expected = emulate(emulator, conv)
    assert error(usual, expected) < 1e-3
    assert usual.tobytes() == emulate(emulator, conv, turned=True)[0].tobytes()


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
    [slow_unless(cluster in (1, 5 if norm else 3), norm, cluster)
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


@pytest.mark.parametrize("conv", of_every_kernel(Conv(2, 320, 0, 12, 128, 1, residual_batch=1, norm=True, cluster=4)))
def test_every_kernel_with_a_layer_norm(emulator: Any, conv: Conv) -> None:
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


@pytest.mark.parametrize("conv", of_every_kernel(Conv(2, 64, 0, 12, 128, residual_batch=1, second=256, cluster=4)))
def test_every_kernel_with_a_second_map(emulator: Any, conv: Conv) -> None:
    for size in (1, 3):
        assert error(*emulate(emulator, replace(conv, size=size), order=2)) < 1e-3


def test_a_layer_norm_of_equal_numbers(emulator: Any) -> None:
    assert is_finite_of_equal_numbers(emulator)


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


UP = [
    Conv(2, 128, 4, 6, 64), Conv(1, 64, 5, 7, 128), Conv(3, 192, 9, 13, 64, high=128),
    Conv(2, 64, 9, 13, 128, wide=128), Conv(2, 64, 8, 12, 64, high=192), Conv(1, 64, 1, 1, 64),
    Conv(1, 128, 12, 9, 128, high=128, wide=128),
]  # fmt: skip


@pytest.mark.parametrize("cluster", [1, 3])
@pytest.mark.parametrize("conv", UP, ids=str)
def test_of_a_doubled_map(emulator: Any, conv: Conv, cluster: int) -> None:
    assert error(*emulate(emulator, replace(conv, up=True, cluster=cluster), cluster)) < 1e-3


def test_phases_of_a_doubled_map_are_pytorchs() -> None:
    import torch

    given = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(s, generator=given, dtype=torch.float64) for s in ((8, 4, 3, 3), (2, 4, 5, 7)))
    expected = torch.nn.functional.conv2d(torch.nn.functional.interpolate(x, scale_factor=2), weight, padding=1)
    phases = up_phases(weight.numpy()).astype(np.float64)
    assert phases.shape == (32, 4, 2, 2)
    y = torch.nn.functional.conv2d(x, torch.from_numpy(phases), padding=1).reshape(2, 2, 2, 8, 6, 8)
    for line, column in product((0, 1), (0, 1)):
        part = y[:, line, column, :, line : line + 5, column : column + 7]
        torch.testing.assert_close(part, expected[:, :, line::2, column::2], atol=1e-5, rtol=0)
    taps = torch.from_numpy(up_taps(weight.numpy()).astype(np.float64))
    transposed = torch.nn.functional.conv_transpose2d(x, taps, stride=2, padding=1)
    torch.testing.assert_close(transposed, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{"second": 64}, {"stride": 2}, {"size": 1}, {"residual_batch": 1}], ids=str)
def test_what_is_of_no_doubled_map(emulator: Any, changes: dict[str, Any]) -> None:
    call: Any = replace(Conv(2, 64, 4, 6, 64, up=True), **changes).call()
    call.residual = 16 if "residual_batch" in changes else None
    assert emulator.emulate_conv(ctypes.byref(call), 0) == 1


ONE = Conv(2, 64, 8, 12, 128, residual_batch=1, cluster=5, high=128, wide=64)
OTHER_ORDERS = [
    ONE, replace(ONE, cluster=7, size=1, channels=640), replace(ONE, cluster=3, second=192),
    Conv(2, 64, 8, 12, 64, up=True, cluster=3, high=128),
    Conv(2, 128, 9, 14, 256, 1, residual_batch=1, norm=True, cluster=1, high=128, wide=256),
]  # fmt: skip


@pytest.mark.parametrize("conv", OTHER_ORDERS, ids=str)
def test_the_order_of_threads_and_copies_changes_no_bit(emulator: Any, conv: Conv) -> None:
    first, _ = emulate(emulator, conv)
    for order in (1, 2, 3):
        assert first.tobytes() == emulate(emulator, conv, order)[0].tobytes(), order


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
            once = (2, 64, -(-height // 2), width)
            doubled = replace(conv, height=once[2], up=True)
            if size == 3 and stride == 1 and has_conv_kernel(once, (64, 64, 3, 3), 1, up=True):
                assert doubled.plan(emulator), doubled
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
