"""Attention for compute capability 9.0 on a CPU: the kernel as it is written, in an emulator, against float64."""

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import PLUGINS, between_guards, compile_emulator, compile_mistaken

from bench import attention as bench
from plugins.call import Attention, error
from plugins.load import PluginError
from runtime.engine import Gpu

KERNELS, SOURCE = PLUGINS / "attention", "attention_hopper_emulated.cpp"

# `warps` forces that many warpgroups a block, `groups` as many blocks of a cluster. The last tile of queries goes no
# further than the guards where mistakes are found by it.
ONE = Attention(1, 1, 64, 64, 40, warps=-1, groups=1)
ODD = Attention(2, 2, 110, 200, 40, warps=-2, groups=2)  # four tiles, the last with 8 keys
WIDE = Attention(1, 2, 118, 331, 80, warps=-2, groups=3)  # seven tiles, for three blocks
LONG = Attention(1, 1, 100, 650, 40, joined=False, warps=-2, groups=1)  # each place of the ring thrice
SHAPES = [
    ONE, ODD, WIDE, LONG, replace(ONE, tokens=1, keys=1), replace(ONE, tokens=130, keys=63, batch=2),
    replace(ONE, keys=65, groups=2), replace(ODD, warps=-3, groups=4), replace(ODD, heads=3, groups=1, tokens=200),
    replace(WIDE, groups=1), replace(WIDE, warps=-1, groups=7), replace(WIDE, keys=48, groups=1),
    Attention(2, 2, 96, 96, 80, joined=True, warps=-3), Attention(2, 3, 150, 150, 40, joined=True, warps=-3, groups=2),
    Attention(4, 1, 33, 500, 80, repeat=2, warps=-3, groups=2), Attention(2, 1, 70, 140, 40, repeat=2, warps=-2),
    Attention(1, 1, 192, 1536, 40, warps=-3, groups=2), Attention(1, 1, 192, 384, 80, warps=-3, groups=4),
]  # fmt: skip


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compile_emulator(tmp_path_factory.mktemp("emulator"), KERNELS, SOURCE)


def run(library: Any, attention: Attention, arrays: dict[str, np.ndarray], order: int = 0) -> np.ndarray:
    """What the kernel makes of the arrays; everything else in memory stays as it was."""
    call = attention.call()

    def emulate() -> int:
        attention.place(call)
        return int(library.emulate_attention(ctypes.byref(call), order))

    y = between_guards(call, attention.memory(arrays), emulate)
    return y.view(np.float16).reshape(attention.batch, attention.tokens, attention.channels)


def off(library: Any, attention: Attention, deviation: float = 1.0, order: int = 0) -> float:
    """How far the kernel's result for random arrays is from float64's."""
    arrays = attention.arrays(deviation)
    return error(run(library, attention, arrays, order), attention.expected(arrays))


@pytest.mark.parametrize("deviation", [1.0, 6.0])
@pytest.mark.parametrize("attention", SHAPES, ids=str)
def test_against_float64(emulator: Any, attention: Attention, deviation: float) -> None:
    """Weights are rounded to half, each by up to 4.9e-4 of itself, and so is the result."""
    assert off(emulator, attention, deviation, int(deviation) % 3) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("attention", [Attention(1, 1, 1536, 1536, 40, joined=True), Attention(2, 2, 384, 384, 80)])
def test_the_shapes_of_sd15_with_fewer_heads(emulator: Any, attention: Attention) -> None:
    assert off(emulator, attention) < 1e-3


@pytest.mark.parametrize("attention", [ODD, WIDE, LONG], ids=str)
def test_the_order_of_threads_and_copies_changes_no_bit(emulator: Any, attention: Attention) -> None:
    arrays = attention.arrays()
    first = run(emulator, attention, arrays)
    for order in (1, 2, 3):
        assert run(emulator, attention, arrays, order).tobytes() == first.tobytes(), order


@pytest.mark.parametrize("attention", [replace(ODD, tokens=100, keys=100, joined=True), WIDE], ids=str)
def test_a_head_and_a_row_get_what_they_get_alone(emulator: Any, attention: Attention) -> None:
    """Whatever lies beside it in memory: neither numbers nor what is none."""
    arrays, width = attention.arrays(), attention.width
    usual = run(emulator, attention, arrays)
    for array in arrays.values():
        array[..., :width] = np.nan  # the first head
        array[: attention.batch // 2] = np.nan
    assert np.array_equal(run(emulator, attention, arrays)[-1, :, width:], usual[-1, :, width:])
    arrays = attention.arrays()
    arrays["q"][:, 1::2] *= 9
    assert np.array_equal(run(emulator, attention, arrays)[:, ::2], usual[:, ::2])


def test_scores_that_grow_from_tile_to_tile(emulator: Any) -> None:
    """So that each tile raises the maximum, by far more than exponentials have room for."""
    attention = replace(LONG, groups=2)
    arrays = attention.arrays()
    arrays["k"] *= np.linspace(0, 12, attention.keys).astype(np.float16)[:, None]
    assert error(run(emulator, attention, arrays), attention.expected(arrays)) < 1e-3


MISTAKES = [
    ("__syncthreads();  // the barriers are there", ""), ("wait_for_previous();", ""), ("barriers_begun();", ""),
    ("products_begin();\n#pragma unroll\n        for (int i = 0; i < kSteps", "for (int i = 0; i < kSteps"),
    ("products_wait<kMore>();", "products_wait<1>();"),
    ("products_wait<0>();  // the next", "products_wait<1>();  // the next"),
    ("parity(turn) ^ 1)", "parity(turn))"), ("if (turn >= kHopperPlaces) barrier", "if (false) barrier"),
    ("rows_at(values_of(turn), kBox * 2)", "rows_at(values_of(turn), kBox)"), ("b + i * 128", "b + i * 64"),
    ("i / 4 * (kBox * 2 / 16)", "0"), ("s[i] = kFar", "s[i] = 0.f"),
    ("state.shrink[i / 2 % 2]", "state.shrink[0]"), ("state.total[half] *= state.shrink[half];", ""),
    ("i % 4 * 2, i > 0)", "i % 4 * 2, true)"),
    ("cluster_arrive(), cluster_wait();  // every", "// every"),
    ("cluster_arrive_read(), cluster_wait();  // nobody", "// nobody"),
    ("float by = exp2_fast(head.x - high);", "float by = 1.f;"),
]  # fmt: skip
ALIKE = [
    ("products_begin();\n#pragma unroll\n        for (int i = 0; i < kKeys", "for (int i = 0; i < kKeys"),
    ("products_wait<kMore>();", ""), ("if (threadIdx.x % 32 == 0) barrier_arrive", "barrier_arrive"),
    ("if (turn) release", "release"), ("barrier_expect(full, kTile * 2);", "barrier_expect(full, kTile);"),
    ("barrier_wait(keys_full(turn), parity(turn));", "barrier_wait(keys_full(turn), 0);"),
    ("barrier_wait(values_full(turn), parity(turn));", ""), ("two[0] + two[1]", "two[0]"),
    ("work.share + min(rank, work.rest)", "work.share"), ("mask <= 2; mask *= 2)", "mask <= 1; mask *= 2)"),
    ("kHopperAlign = 1024", "kHopperAlign = 512"), ("batch % p.query_batch", "0"),
    ("if (token >= p.tokens) break;", ""), ("if (token >= p.tokens) continue;", ""), ("head * D + pair", "pair"),
]  # fmt: skip


def right(library: Any, attention: Attention, deviation: float, order: int) -> bool:
    try:
        return off(library, attention, deviation, order) < 1e-3
    except AssertionError:
        return False


@pytest.mark.parametrize(
    "mistake", [*MISTAKES, *(pytest.param(one, marks=pytest.mark.slow) for one in ALIKE)], ids=lambda one: one[0][:40]
)
def test_the_emulator_finds_mistakes(tmp_path: Path, mistake: tuple[str, str]) -> None:
    (file,) = (name for name in ("hopper.cuh", "tiles.cuh") if mistake[0] in (KERNELS / name).read_text())
    library = compile_mistaken(tmp_path, KERNELS, SOURCE, *mistake, file=file)
    assert not all(right(library, one, *how) for one in FOUND_BY for how in ((1.0, 0), (6.0, 1)))


FOUND_BY = (ODD, WIDE, LONG, Attention(4, 1, 100, 140, 40, repeat=2, warps=-2, groups=1))


def test_without_mistakes_all_of_these_are_right(emulator: Any) -> None:
    assert all(right(emulator, one, *how) for one in FOUND_BY for how in ((1.0, 0), (6.0, 1)))


def test_values_in_rows_are_read_as_they_lie(tmp_path: Path) -> None:
    """A wrong distance between eights of rows, in the descriptor of matrices that are multiplied along, is found."""
    find, put = "box / 16) << 16 | kEightRows << 32", "box / 16) << 16 | kEightRows / 2 << 32"
    library = compile_mistaken(tmp_path, KERNELS, SOURCE, find, put, file="../conv/hopper.cuh")
    assert not right(library, ONE, 1.0, 0)


@pytest.mark.parametrize(
    ("attention", "blocks", "groups", "splits"),
    [
        (Attention(2, 8, 1536, 1536, 40), 128, 3, 1), (Attention(1, 8, 1536, 1536, 40), 128, 3, 2),
        (Attention(2, 8, 384, 384, 80), 96, 1, 1), (Attention(1, 8, 384, 384, 80), 48, 1, 1),
        (Attention(1, 8, 100, 2000, 40), 64, 1, 4),
    ],
    ids=str,
)  # fmt: skip
def test_how_a_call_is_cut(emulator: Any, attention: Attention, blocks: int, groups: int, splits: int) -> None:
    """Three warpgroups a block where there are queries enough, and the keys among blocks until processors are busy."""
    out = (ctypes.c_int32 * 4)()
    assert emulator.attention_cut(ctypes.byref(attention.call()), out)
    assert list(out[:3]) == [blocks, groups, splits] and out[3] <= 227 << 10


@pytest.mark.parametrize(
    "changes",
    [{"width": 64}, {"width": 160}, {"tokens": 0}, {"heads": 8200}, {"keys": 500}, {"warps": 6}, {"groups": 2},
     {"groups": -1}, {"warps": -4}, {"warps": -1, "groups": 9}, {"warps": -1, "keys": 64, "groups": 2},
     {"causal": True}],
    ids=str,
)  # fmt: skip
def test_shapes_that_other_kernels_have(emulator: Any, changes: dict[str, Any]) -> None:
    usual = Attention(1, 1, 64, 1024, 40)
    assert emulator.emulate_attention(ctypes.byref(replace(usual, **changes).call()), 0) == 1


def test_the_bench_sweeps_every_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def takes(library: Any, attention: Attention, replays: int) -> float:
        if attention.warps < 0 and attention.width == 160:
            raise PluginError("there is no kernel for it")
        return 10.0 - attention.warps + attention.groups

    monkeypatch.setattr("bench.group_norm.gpu", lambda: Gpu("fake", "9.0"))
    monkeypatch.setattr(bench, "open_library", lambda path: None)
    monkeypatch.setattr(bench, "kernel_us", takes)
    assert bench.main(["--library", "lib.so", "--sweep"]) == 0
    lines = {line.partition(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    found = lines["B 2, 1536 tokens, heads 40 wide"]
    assert "chosen 10.00, without wgmma 9.00, 3 by 1: 14.00" in found and "1 by 8: 19.00" in found
    assert lines["B 2, 96 tokens, heads 160 wide"].endswith("without wgmma 9.00")
