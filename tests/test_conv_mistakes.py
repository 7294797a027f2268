"""Mistakes put into the convolution kernels, each of which the emulator must find.

The usual run has a few of every kind: to compile one takes three seconds.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conv_emulated import KERNELS, SOURCE, alike, is_finite_of_equal_numbers, kernels_of, mistaken, right
from emulated import compile_emulator

from plugins.conv_calls import Conv

# Its tiles go 4 rows beyond y, as far as the guards: a mistake that stores them spoils nothing else.
WIDE = Conv(2, 192, 9, 14, 512, 1, residual_batch=1, norm=True, cluster=1, high=128, wide=256, epsilon=0.1)
ONE = Conv(2, 128, 8, 12, 128, residual_batch=1, cluster=5, high=128, wide=64)
LONG = Conv(2, 192, 9, 13, 64, cluster=1, high=128)
NORMED = Conv(2, 320, 9, 13, 128, 1, residual_batch=1, norm=True, cluster=3, wide=64, high=128, epsilon=0.1)
IN_BOTH = Conv(2, 128, 9, 13, 64, second=320, cluster=3, high=64)
GATED = [replace(WIDE, residual_batch=0, gate=True, cluster=cluster, high=64, wide=64) for cluster in (3, 1)]
TALL = [Conv(2, 64, 9, 13, 64, residual_batch=1, cluster=cluster, high=192) for cluster in (1, 2)]

# What comes before the second of a thread's rows is finished: `finish_scores` has the same lines.
NEXT_ROW = "y += 8 * (p.call.filters >> kGate);\n            "
NEXT_SUMS = "x = moments.x[1], squares = moments.squares[1];\n#pragma unroll\n            for (float(&four)[4] : sums) "

MISTAKES = [
    ("__syncthreads();  // barriers and", "// barriers and"), ("y >= 0 && y", "y"),
    ("ring.wait_empty();\n            barrier_expect", "barrier_expect"), ("wait_for_previous();", ""),
    ("cluster_arrive(), cluster_wait();  // all", "cluster_arrive();  // all"),
    ("p.rows_beside ? blockIdx.y : blockIdx.z", "blockIdx.z"),
    *alike(
        ("there = ring.is_full();", "there = true;"), ("products_wait<1>();", "products_wait<2>();"),
        ("(slot * p.cluster + rank) * kPart<kShared>", "slot * p.cluster * kPart<kShared>"),
        ("a[k], b + 2 * k", "a[k], b + 4 * k"),
        ("cluster_wait();\n            block.template give", "block.template give"),
        ("group_sync<1>(0, Block::kConsumers);", ""), ("if (kTaps > 1) x_ring.wait_full();", ""),
        ("x_there = x_ring.is_full();", "x_ring.is_full();"), ("empty(), parity ^ 1)", "empty(), parity)"),
        ("ring.wait_empty();\n            bool of_x", "bool of_x"), ("products_begin();", ""),
        ("unit > first, be", "true, be"), ("step(a[1], a[0], unit + 1)", "step(a[1], a[1], unit + 1)"),
        ("barrier_expect(ring.full, kUnit)", "barrier_expect(ring.full, kUnit / 2)"),
        ("from = x_ring.place + offset()", "from = positions + offset()"),
        ("positions_ring().begin_barriers(1, ", "positions_ring().begin_barriers(2, "),
        ("piece - slot * p.cluster) : 0", "0) : 0"), ("other < p.cluster; other++", "other < 4; other++"),
        ("theirs + j * 512", "theirs + j * 256"), ("x >= 0 && x", "x"), ("barriers_begun();", ""),
        ("1) << 16 | kEightRows << 32", "1) << 16 | kEightRows / 2 << 32"),
        ("slot += kWarps) {", "slot += 2 * kWarps) {"), ("barrier_wait(full, parity)", "barrier_wait(full, 0)"),
        ("conv_position(p, last_row).at + border + 1", "conv_position(p, last_row).at + 1"),
        ("zeros + (at & (", "zeros - 8 + (at & ("), ("products_wait<0>();", ""), ("&& x < p.call.width;", ";"),
        ("leads = lane == 0", "leads = lane <= 1"), ("kConvAlign = 1024", "kConvAlign = 512"),
        ("1) << 16 | kEightRows << 32 | kSwizzle128", "1) << 16 | kEightRows << 32 | 2 * kSwizzle128"),
        ("section = piece / kWarps * kColumns", "section = 0"),
        ("p.rows_beside ? blockIdx.z : blockIdx.y", "blockIdx.y"),
        ("p.rows_beside ? along : across, p.rows_beside ? across : along", "across, along"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[-1][:40])
def test_the_emulator_finds_mistakes(tmp_path: Path, mistake: tuple[str, str]) -> None:
    library = mistaken(tmp_path, *mistake, wide=64)
    assert not all(right(library, conv, order) for conv in (ONE, LONG) for order in (0, 1, 2))


UP = [Conv(2, 64, 9, 13, 64, up=True, cluster=cluster, high=128) for cluster in (1, 3)]
UP_MISTAKES = [
    ("line += image / 2, column += image % 2", "line += image % 2, column += image / 2"),
    *alike(
        ("blocks += image * (p.call.filters / 64)", "blocks += 0"), ("2 * to.x + image % 2", "2 * to.x"),
        ("line = line_of(to.row)", "line = to.row"), ("line_of(to.row + 8) - line", "line_of(to.row + 8) - line + 1"),
        ("+ to.y) * 2 + image / 2)", "+ to.y) * 2 + image % 2)"),
        ("conv_range(p, first_row - image * p.rows_each", "conv_range(p, first_row"),
        ("kSide = kUp ? 2 : 3", "kSide = 3"),
        ("end_row = (image + 1) * p.rows_each", "end_row = (image + 1) * p.rows_each + 1"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("mistake", UP_MISTAKES, ids=lambda mistake: mistake[-1][:40])
def test_the_emulator_finds_mistakes_with_a_doubled_map(tmp_path: Path, mistake: tuple[str, str]) -> None:
    library = mistaken(tmp_path, *mistake, wide=64)
    assert not all(right(library, conv, order) for conv in UP for order in (0, 1))


NORM_MISTAKES = [
    ("moments.add(mine);", "moments.add(after);"), ("fmaxf(square - mean * mean, 0.f)", "(square - mean * mean)"),
    *alike(
        ("mask <= 2; mask *= 2) sum", "mask <= 1; mask *= 2) sum"), ("norm.mean * of_filters.x)", "norm.mean)"),
        ("moments.add(mine);", ";"), ("x[i / 2 % 2] += value", "x[i % 2] += value"),
        ("squares[i / 2 % 2] += value", "squares[0] += value"), ("+ p.call.epsilon)", ")"),
        ("kEights, moments.x[0], moments.squares[0]", "kEights, moments.x[1], moments.squares[1]"),
        ("make_float2(x + bias.x, ", "make_float2(x, "), ("fmaxf(square - mean * mean, 0.f)", "square"),
        ("moments.squares[0] += four.y", "moments.squares[0] = four.y"),
        ("moments.squares[1] += four.w", "moments.squares[1] = four.w"),
        ("p.call.weight_sums[first_filter + at]", "p.call.weight_sums[at]"),
        ("p.rows_beside ? blockIdx.y : blockIdx.z", "blockIdx.y"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("mistake", NORM_MISTAKES, ids=lambda mistake: mistake[-1][:40])
def test_the_emulator_finds_mistakes_in_a_layer_norm(tmp_path: Path, mistake: tuple[str, str]) -> None:
    library = mistaken(tmp_path, *mistake, wide=64, norm=True)
    found = not all(right(library, NORMED, order) for order in (0, 1, 2))
    assert found or not is_finite_of_equal_numbers(library)


SECOND_MISTAKES = [
    ("first - part_of(first) * kTaps : kTaps / 2", "0 : kTaps / 2"), ("first_row - ahead % kConvEight", "first_row"),
    *alike(
        ("plan.h", "high + kConvEight - 1", "high - kConvEight"),
        ("min(unit, p.x_units)", "unit"), ("tap = of_x ? 0 : kTaps / 2", "tap = 0"), ("part < parts", "part <= parts"),
        ("work.second, first_row", "work.x, first_row"), ("ahead / kConvEight * kConvEight", "0"),
        ("p.x_boxes * p.x_box : p.second_box", "p.x_boxes * p.x_box : p.x_boxes * p.x_box"),
        ("left = of_x ? kTaps : 1", "left = kTaps"), ("(part - parts) * kConvDeep", "part * kConvDeep"),
        ("plan.h", "p.x_units + call.second_channels / kConvDeep", "p.x_units"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("mistake", SECOND_MISTAKES, ids=lambda mistake: mistake[-1][:40])
def test_the_emulator_finds_mistakes_with_a_second_map(tmp_path: Path, mistake: tuple[str, ...]) -> None:
    *file, find, put = mistake
    library = mistaken(tmp_path, find, put, *file, wide=64)
    assert not all(right(library, replace(IN_BOTH, cluster=cluster), 0) for cluster in (1, 3, 8))


WIDE_MISTAKES = [
    ("if (to.row + 8 * i < end_row) store_words", "store_words"),
    (NEXT_ROW + NEXT_SUMS + "four[0] = four[2], ", NEXT_ROW + NEXT_SUMS),
    *alike(
        ("words[mask == 1 ? 2 * i : i]", "words[i]"),
        ("(high ? low : up) = theirs;", "up = theirs;"), ("norm, to.filter + eight * 8);", "norm, to.filter);"),
        ("kTaps == 1 ? 2 : 1, kConsumers", "1, kConsumers"), ("moments.join();", ";"),
        ("(t * kEights + j) * 4", "j * 4"),
        (NEXT_ROW + "x = moments.x[1], squares", NEXT_ROW + "x = moments.x[0], squares"),
        ("i < kWide / 64; i++)\n                    copy_b", "i < 2; i++)\n                    copy_b"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("mistake", WIDE_MISTAKES, ids=lambda mistake: mistake[-1][-40:])
def test_the_emulator_finds_mistakes_in_wide_tiles(tmp_path: Path, mistake: tuple[str, str]) -> None:
    library = mistaken(tmp_path, *mistake, wide=256, norm=True)
    assert not all(right(library, WIDE, order) for order in (0, 1))


GATE_MISTAKES = [
    ("y.y * gelu(b.y)", "y.y * gelu(b.x)"), ("(first_filter >> kGate) + section", "first_filter + section"),
    *alike(
        ("to.filter + eight * 8 + 8", "to.filter + eight * 8"), ("y.x * gelu(b.x)", "y.x * b.x"),
        ("kEights, moments.x[0]", "kEights, moments.x[1]"), ("made(sums[eight + 1][0]", "made(sums[eight][0]"),
        ("eight = k << kGate", "eight = k"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("mistake", GATE_MISTAKES, ids=lambda mistake: mistake[-1][:40])
def test_the_emulator_finds_mistakes_in_a_gate(tmp_path: Path, mistake: tuple[str, str]) -> None:
    library = mistaken(tmp_path, *mistake, wide=64, norm=True)
    assert not all(right(library, conv, order) for order, conv in enumerate(GATED))


TALL_MISTAKES = [
    ("piece % kWarps * 16", "piece % 8 * 16"), ("high = 64 * plan.groups, most_x", "high = 128, most_x"),
    *alike(
        ("piece / kWarps * kColumns", "piece / 8 * kColumns"), ("warp * 16 + lane % 16, stride", "lane % 16, stride"),
        ("return groups * kConvWarpgroup + (", "return (groups == 3 ? 2 : groups) * kConvWarpgroup + ("),
    ),
]  # fmt: skip


@pytest.mark.parametrize("mistake", TALL_MISTAKES, ids=lambda mistake: mistake[-1][:40])
def test_the_emulator_finds_mistakes_in_tiles_of_192_rows(tmp_path: Path, mistake: tuple[str, str]) -> None:
    library = mistaken(tmp_path, *mistake, wide=64, tall=True)
    assert not all(right(library, conv, order) for order, conv in enumerate(TALL))


@pytest.mark.parametrize(
    ("kernels", "convs"),
    [
        ({"wide": 64}, [ONE, LONG, IN_BOTH, replace(IN_BOTH, cluster=8)]),
        *(
            pytest.param(kernels, convs, marks=pytest.mark.slow)
            for kernels, convs in (
                ({"wide": 64, "norm": True}, [NORMED, *GATED]), ({"wide": 256, "norm": True}, [WIDE]),
                ({"wide": 64, "tall": True}, TALL),
            )
        ),
    ],
    ids=["narrow", "normed", "wide", "tall"],
)  # fmt: skip
def test_without_mistakes_all_of_these_are_right(tmp_path: Path, kernels: dict[str, Any], convs: list[Conv]) -> None:
    """With no more kernels than were compiled above."""
    library = compile_emulator(tmp_path, KERNELS, SOURCE, "-O1 " + kernels_of(**kernels))
    assert all(right(library, conv, order=1) for conv in convs)
    assert NORMED not in convs or is_finite_of_equal_numbers(library)
    with pytest.raises(RuntimeError, match="not compiled"):
        right(library, replace(ONE, wide=128), 0)
