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
WORDS = Attention(2, 2, 77, 77, 64, joined=True, causal=True)
# 5 blocks of 3 warps, of whose groups the first queries see one tile of 7 only.
MASKED = Attention(1, 1, 200, 200, 64, joined=True, causal=True, warps=3, groups=4)
CAUSAL = [
    WORDS, replace(WORDS, warps=6), replace(WORDS, warps=3), replace(WORDS, joined=False), MASKED,
    replace(MASKED, warps=1), replace(MASKED, warps=6, groups=1), replace(MASKED, warps=2, groups=3, joined=False),
    replace(MASKED, warps=0, groups=0), replace(MASKED, tokens=81, keys=81, warps=2, groups=2),
    replace(MASKED, batch=4, repeat=2, tokens=97, keys=97, joined=False), replace(WORDS, tokens=1, keys=1),
    replace(WORDS, tokens=16, keys=16), replace(WORDS, tokens=17, keys=17, warps=2), replace(WORDS, tokens=80, keys=80),
]  # fmt: skip


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compile_emulator(tmp_path_factory.mktemp("emulator"), KERNELS, SOURCE)


def emulate(
    library: Any, attention: Attention, deviation: float = 1.0, order: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """What the kernels make of random arrays, and what float64 does."""
    arrays = attention.arrays(deviation)
    return made(library, attention, arrays, order), attention.expected(arrays)


def made(library: Any, attention: Attention, arrays: dict[str, np.ndarray], order: int = 0) -> np.ndarray:
    """What the kernels make of these arrays; everything else in memory stays as it was."""
    call = attention.call()

    def run() -> int:
        attention.place(call)
        return int(library.emulate_attention(ctypes.byref(call), order))

    y = between_guards(call, attention.memory(arrays), run)
    return y.view(np.float16).reshape(attention.batch, attention.tokens, attention.channels)


@pytest.mark.parametrize("deviation", [1.0, 6.0])
@pytest.mark.parametrize("attention", [*SHAPES, *ODD, *CAUSAL], ids=str)
def test_against_float64(emulator: Any, attention: Attention, deviation: float) -> None:
    """Weights are rounded to half, each by up to 4.9e-4 of itself, and so is the result."""
    assert error(*emulate(emulator, attention, deviation)) < 1e-3


@pytest.mark.slow
def test_the_largest(emulator: Any) -> None:
    assert error(*emulate(emulator, Attention(1, 1, 1536, 1536, 40, joined=True))) < 1e-3


@pytest.mark.parametrize("attention", [MERGED, replace(MERGED, width=80, groups=4), ODD[4], MASKED], ids=str)
def test_the_order_of_threads_changes_no_bit(emulator: Any, attention: Attention) -> None:
    first, _ = emulate(emulator, attention)
    for order in (1, 2):
        again, _ = emulate(emulator, attention, order=order)
        assert first.tobytes() == again.tobytes(), order


@pytest.mark.parametrize("attention", [WORDS, MASKED], ids=str)
def test_no_query_sees_a_key_after_it(emulator: Any, attention: Attention) -> None:
    """Whatever it is: a query's bits are the same where all after it are other numbers, far larger ones too."""
    arrays, later = attention.arrays(), attention.arrays(30.0, seed=1)
    usual = made(emulator, attention, arrays)
    for query in (0, 15, 16, 31, 32, 40, 76):
        for name, array in arrays.items():
            later[name][:, : query + 1] = array[:, : query + 1]
        assert np.array_equal(made(emulator, attention, later)[:, : query + 1], usual[:, : query + 1]), query


@pytest.mark.parametrize(
    ("find", "put"),
    [
        ("+ 1 - tile * kKeys", "- tile * kKeys"), ("+ 1 - tile * kKeys", "+ 2 - tile * kKeys"),
        ("(kCausal && block.seen(tile) < 1)", "(false)"), ("block.seen(tile) < 1", "block.seen(tile) < 17"),
        pytest.param("+ row + i % 4 / 2 * 8", "+ row", marks=pytest.mark.slow),
        pytest.param("+ row + i % 4 / 2 * 8", "+ i % 4 / 2 * 8", marks=pytest.mark.slow),
        pytest.param("|| seen(tile) >= kKeys", "|| true", marks=pytest.mark.slow),
        pytest.param("|| seen(tile) >= kKeys", "|| seen(tile) + 15 >= kKeys", marks=pytest.mark.slow),
        pytest.param("min(p.keys, queries_before() +", "min(p.keys,", marks=pytest.mark.slow),
        pytest.param("return queries_before() + first()", "return first()", marks=pytest.mark.slow),
        pytest.param("return queries_before() + first()", "return queries_before()", marks=pytest.mark.slow),
        pytest.param("by = exp2_fast(head.x - high);", "by = 1.f;", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_mistakes_under_a_causal_mask_are_found(tmp_path: Path, find: str, put: str) -> None:
    library = compile_mistaken(tmp_path, KERNELS, SOURCE, find, put)
    found_by = MASKED, replace(MASKED, warps=2, groups=3, joined=False)
    assert not all(
        error(*emulate(library, one, deviation, order=1)) < 1e-3 for one in found_by for deviation in (1.0, 6.0)
    )


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
        (Attention(2, 12, 77, 77, 64, causal=True), 120, 1, 1),
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


@pytest.mark.parametrize("changes", [{"width": 40}, {"width": 80}, {"keys": 201}, {"keys": 77}, {"groups": 5}])
def test_what_has_no_kernel_under_a_causal_mask(emulator: Any, changes: dict[str, Any]) -> None:
    assert emulator.emulate_attention(ctypes.byref(replace(MASKED, joined=False, **changes).call()), 0) == 1
