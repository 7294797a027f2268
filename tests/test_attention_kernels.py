"""The attention kernels on a CPU: as they are written, in an emulator, against float64."""

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_group_norm import compile_emulator

from plugins.call import Attention, error

KERNELS = Path(__file__).resolve().parent.parent / "plugins" / "attention"
GUARD = 4096  # bytes before and after each array, which nothing may touch

SHAPES = [  # of the networks, with fewer heads
    Attention(1, 2, 384, 384, 80, joined=True), Attention(2, 2, 96, 96, 160, joined=True),
    Attention(2, 1, 24, 24, 160, joined=True), Attention(1, 1, 1536, 77, 40), Attention(1, 2, 384, 77, 80),
    Attention(2, 2, 96, 77, 160), Attention(1, 1, 24, 77, 160), Attention(1, 2, 256, 256, 40, joined=True),
]  # fmt: skip
FOUR_WARPS = Attention(12, 8, 50, 90, 40)  # a block; above there is one
ODD = [
    Attention(1, 3, 100, 200, 40), Attention(2, 1, 1, 1, 64), Attention(1, 1, 17, 81, 80), Attention(1, 2, 33, 64, 64),
    FOUR_WARPS, Attention(6, 8, 30, 70, 160),
]  # fmt: skip


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compile_emulator(tmp_path_factory.mktemp("emulator"), KERNELS, source="attention_emulated.cpp")


def emulate(
    library: Any, attention: Attention, deviation: float = 1.0, order: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """What the kernels make of random arrays, and what float64 does; everything else in memory stays as it was."""
    arrays, call, held = attention.arrays(deviation), attention.call(), {}
    for name, array in attention.memory(arrays).items():
        held[name] = memory = np.full(array.nbytes + 2 * GUARD, 255, np.uint8)
        memory[GUARD:-GUARD] = array.reshape(-1).view(np.uint8)
        setattr(call, name, memory.ctypes.data + GUARD)
    attention.place(call)
    before = {name: memory.copy() for name, memory in held.items()}
    assert library.emulate_attention(ctypes.byref(call), order) == 0
    y = held["y"][GUARD:-GUARD].copy()
    before["y"][GUARD:-GUARD] = y
    assert all(np.array_equal(held[name], before[name]) for name in held), "written to where it must not be"
    return y.view(np.float16).reshape(attention.batch, attention.tokens, attention.channels), attention.expected(arrays)


@pytest.mark.parametrize("deviation", [1.0, 6.0])
@pytest.mark.parametrize("attention", [*SHAPES, *ODD], ids=str)
def test_against_float64(emulator: Any, attention: Attention, deviation: float) -> None:
    """Weights are rounded to half, each by up to 4.9e-4 of itself, and so is the result."""
    assert error(*emulate(emulator, attention, deviation)) < 1e-3


@pytest.mark.slow
def test_the_largest(emulator: Any) -> None:
    assert error(*emulate(emulator, Attention(1, 1, 1536, 1536, 40, joined=True))) < 1e-3


@pytest.mark.parametrize("attention", [FOUR_WARPS, ODD[0]], ids=str)
def test_the_order_of_threads_changes_no_bit(emulator: Any, attention: Attention) -> None:
    first, _ = emulate(emulator, attention)
    for order in (1, 2):
        again, _ = emulate(emulator, attention, order=order)
        assert first.tobytes() == again.tobytes(), order


@pytest.mark.parametrize(
    ("find", "put"),
    [
        ("__syncthreads();", ""),
        pytest.param("copies_wait<0>();", "copies_wait<1>();", marks=pytest.mark.slow),
        pytest.param("s[n][i] = kFar;", "s[n][i] = 0.f;", marks=pytest.mark.slow),
        pytest.param("y[n][0] *= shrink.x, y[n][1] *= shrink.x;", "", marks=pytest.mark.slow),
        pytest.param("block.clear_padding();", "", marks=pytest.mark.slow),
    ],
)
def test_the_emulator_finds_mistakes(tmp_path: Path, find: str, put: str) -> None:
    kernels = tmp_path / "plugins" / "attention"
    kernels.mkdir(parents=True)
    for path in KERNELS.iterdir():
        text = path.read_text().replace('"../group_norm/', f'"{KERNELS.parent}/group_norm/')
        assert path.name != "kernel.cuh" or text.count(find) == 1, f"{find!r} is not in the kernel any more"
        (kernels / path.name).write_text(text.replace(find, put))
    library = compile_emulator(tmp_path, kernels, "-O1", "attention_emulated.cpp")
    assert not error(*emulate(library, FOUR_WARPS, order=1)) < 1e-3


@pytest.mark.parametrize("changes", [{"width": 48}, {"tokens": 0}, {"heads": 70_000}])
def test_shapes_that_have_no_kernel(emulator: Any, changes: dict[str, Any]) -> None:
    attention = replace(Attention(1, 1, 8, 8, 40), **changes)
    assert emulator.emulate_attention(ctypes.byref(attention.call()), 0) == 1
