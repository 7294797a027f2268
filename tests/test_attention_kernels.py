"""The attention kernels on a CPU: as they are written, in an emulator, against float64."""

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import PLUGINS, between_guards, compile_emulator, compile_mistaken

from plugins.call import Attention, error

KERNELS, SOURCE = PLUGINS / "attention", "attention_emulated.cpp"

SHAPES = [  # of the networks, with fewer heads
    Attention(1, 2, 384, 384, 80, joined=True), Attention(2, 2, 96, 96, 160, joined=True),
    Attention(2, 1, 24, 24, 160, joined=True), Attention(1, 1, 1536, 77, 40), Attention(1, 2, 384, 77, 80),
    Attention(2, 2, 96, 77, 160), Attention(1, 1, 24, 77, 160), Attention(1, 2, 256, 256, 40, joined=True),
]  # fmt: skip
MERGED = Attention(1, 2, 100, 200, 40, warps=2, groups=2)  # 5 tiles: one group has 3, the other 2
ODD = [
    Attention(1, 3, 100, 200, 40), Attention(2, 1, 1, 1, 64), Attention(1, 1, 17, 81, 80), Attention(1, 2, 33, 64, 64),
    Attention(12, 8, 50, 90, 40), Attention(6, 8, 30, 70, 160), MERGED, replace(MERGED, warps=1, groups=4),
    replace(MERGED, warps=6, groups=1), replace(MERGED, width=64, groups=4), replace(MERGED, width=80, groups=4),
    replace(MERGED, width=80, warps=3), replace(MERGED, width=160), Attention(1, 1, 40, 128, 160, warps=1, groups=3),
    Attention(2, 1, 40, 77, 40, repeat=2), Attention(4, 1, 33, 90, 80, repeat=2),
    Attention(1, 2, 40, 90, 40, warps=1, groups=4), Attention(1, 1, 20, 24, 160, warps=2, groups=3),  # one without keys
]  # fmt: skip


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compile_emulator(tmp_path_factory.mktemp("emulator"), KERNELS, SOURCE)


def emulate(
    library: Any, attention: Attention, deviation: float = 1.0, order: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """What the kernels make of random arrays, and what float64 does; everything else in memory stays as it was."""
    arrays, call = attention.arrays(deviation), attention.call()

    def run() -> int:
        attention.place(call)
        return int(library.emulate_attention(ctypes.byref(call), order))

    y = between_guards(call, attention.memory(arrays), run)
    return y.view(np.float16).reshape(attention.batch, attention.tokens, attention.channels), attention.expected(arrays)


@pytest.mark.parametrize("deviation", [1.0, 6.0])
@pytest.mark.parametrize("attention", [*SHAPES, *ODD], ids=str)
def test_against_float64(emulator: Any, attention: Attention, deviation: float) -> None:
    """Weights are rounded to half, each by up to 4.9e-4 of itself, and so is the result."""
    assert error(*emulate(emulator, attention, deviation)) < 1e-3


@pytest.mark.slow
def test_the_largest(emulator: Any) -> None:
    assert error(*emulate(emulator, Attention(1, 1, 1536, 1536, 40, joined=True))) < 1e-3


@pytest.mark.parametrize("attention", [MERGED, replace(MERGED, width=80, groups=4), ODD[4]], ids=str)
def test_the_order_of_threads_changes_no_bit(emulator: Any, attention: Attention) -> None:
    first, _ = emulate(emulator, attention)
    for order in (1, 2):
        again, _ = emulate(emulator, attention, order=order)
        assert first.tobytes() == again.tobytes(), order


@pytest.mark.parametrize(
    ("find", "put"),
    [
        ("__syncthreads();  // no group reads keys and values any more", ""),
        ("float by = exp2_fast(head.x - high);", "float by = 1.f;"),
        pytest.param("__syncthreads();  // every group's sums are there", "", marks=pytest.mark.slow),
        pytest.param("group_sync<most_groups(D, kKeys)>(block.group, block.threads);", "", marks=pytest.mark.slow),
        pytest.param("copies_wait<0>();", "copies_wait<1>();", marks=pytest.mark.slow),
        pytest.param("[i % 4] = kFar;", "[i % 4] = 0.f;", marks=pytest.mark.slow),
        pytest.param("shrink = exp2_fast(most[r][half] - top);", "shrink = 1.f;", marks=pytest.mark.slow),
        pytest.param("D % 16 && n < kTiles", "D < 0 && n < kTiles", marks=pytest.mark.slow),
    ],
)
def test_the_emulator_finds_mistakes(tmp_path: Path, find: str, put: str) -> None:
    library = compile_mistaken(tmp_path, KERNELS, SOURCE, find, put)
    assert not all(error(*emulate(library, MERGED, deviation, order=1)) < 1e-3 for deviation in (1.0, 6.0))


@pytest.mark.parametrize(
    ("attention", "blocks", "warps", "groups"),
    [
        (Attention(2, 8, 1536, 1536, 40), 128, 6, 2), (Attention(1, 8, 1536, 1536, 40), 128, 3, 4),
        (Attention(2, 8, 384, 384, 80), 128, 3, 4), (Attention(1, 8, 384, 384, 80), 96, 2, 4),
        (Attention(2, 8, 96, 96, 160), 96, 1, 6), (Attention(2, 8, 24, 24, 160), 32, 1, 2),
        (Attention(2, 8, 1536, 77, 40), 256, 6, 1), (Attention(2, 8, 96, 77, 160), 96, 1, 5),
        (Attention(2, 8, 4096, 4096, 40), 352, 6, 1), (Attention(64, 8, 400, 400, 160), 2560, 5, 1),
    ],
    ids=str,
)  # fmt: skip
def test_how_a_call_is_cut(emulator: Any, attention: Attention, blocks: int, warps: int, groups: int) -> None:
    """Few queries a block where there are few, and the keys among so many groups that a processor has 12 warps."""
    out = (ctypes.c_int32 * 4)()
    assert emulator.attention_cut(ctypes.byref(attention.call()), out)
    assert list(out[:3]) == [blocks, warps, groups] and out[3] <= 99 * 1024


@pytest.mark.parametrize(
    "changes",
    [{"width": 48}, {"tokens": 0}, {"heads": 70_000}, {"warps": 13}, {"warps": -1}, {"groups": 5}, {"keys": 1 << 26}],
)
def test_shapes_that_have_no_kernel(emulator: Any, changes: dict[str, Any]) -> None:
    attention = replace(Attention(1, 1, 8, 200, 40), **changes)
    assert emulator.emulate_attention(ctypes.byref(attention.call()), 0) == 1
