"""LayerNorm, GEGLU and sums on a CPU: the kernels as they are written, in an emulator, against float64."""

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_group_norm import compile_emulator

from bench.attention import attentions, between
from plugins.call import error
from plugins.token_calls import Geglu, Join, LayerNorm, Sum
from trt_builder.config import ModelConfig, Shape

KERNELS = Path(__file__).resolve().parent.parent / "plugins" / "tokens"
GUARD = 4096  # bytes before and after each array, which nothing may touch

SHAPES = [
    LayerNorm(37, 320), LayerNorm(8, 640), LayerNorm(5, 1280), LayerNorm(3, 2048), LayerNorm(1, 8), LayerNorm(9, 264),
    Geglu(5, 1280), Geglu(3, 2560), Geglu(2, 5120), Geglu(7, 8), Geglu(1, 1272), Sum(3, 1280), Sum(1, 8), Sum(255, 64),
    Join(2, 24, 1280, 1280), Join(2, 7, 320, 640), Join(1, 1, 8, 8), Join(3, 5, 64, 8),
]  # fmt: skip


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compile_emulator(tmp_path_factory.mktemp("emulator"), KERNELS, source="tokens_emulated.cpp")


def emulate(library: Any, what: LayerNorm | Geglu | Sum | Join, mean: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel makes of random arrays, and what float64 does; everything else in memory stays as it was."""
    arrays, call, held = what.arrays(mean), what.call(), {}
    memory = {**arrays, "y": np.full((what.tokens, what.channels), np.nan, np.float16)}
    for name, array in memory.items():
        held[name] = bytes_ = np.full(array.nbytes + 2 * GUARD, 255, np.uint8)
        bytes_[GUARD:-GUARD] = array.reshape(-1).view(np.uint8)
        setattr(call, name, bytes_.ctypes.data + GUARD)
    before = {name: bytes_.copy() for name, bytes_ in held.items()}
    assert getattr(library, what.function)(ctypes.byref(call), 0) == 0
    y = held["y"][GUARD:-GUARD].copy()
    before["y"][GUARD:-GUARD] = y
    assert all(np.array_equal(held[name], before[name]) for name in held), "written to where it must not be"
    return y.view(np.float16).reshape(what.tokens, what.channels), what.expected(arrays)


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize("what", SHAPES, ids=str)
def test_against_float64(emulator: Any, what: LayerNorm | Geglu | Sum | Join, mean: float) -> None:
    assert error(*emulate(emulator, what, mean)) < 1e-3


def test_a_mean_that_dwarfs_the_deviation(emulator: Any) -> None:
    assert error(*emulate(emulator, LayerNorm(8, 320), mean=100.0)) < 1e-3


@pytest.mark.parametrize(
    ("find", "put", "what"),
    [
        ("mask; mask /= 2", "mask > 1; mask /= 2", LayerNorm(8, 320)),
        ("lane < vectors ? to_float", "lane <= vectors ? to_float", LayerNorm(8, 328)),
        ("x + p.channels", "x + p.channels - kWidth", Geglu(3, 64)),
        ("1.f + erff", "1.f - erff", Geglu(3, 64)),
        ("at >= p.count", "at >= p.count - kWidth", Sum(3, 64)),
        ("position / p.positions", "0", Join(2, 3, 8, 16)),
        ("position * p.second + at - p.first", "position * p.second", Join(2, 3, 8, 16)),
    ],
)
def test_mistakes_show(tmp_path: Path, find: str, put: str, what: LayerNorm | Geglu | Sum | Join) -> None:
    kernels = tmp_path / "plugins" / "tokens"
    kernels.mkdir(parents=True)
    for path in KERNELS.iterdir():
        text = path.read_text().replace('"../group_norm/', f'"{KERNELS.parent}/group_norm/')
        assert path.name != "kernel.cuh" or text.count(find) == 1, f"{find!r} is not in the kernel any more"
        (kernels / path.name).write_text(text.replace(find, put))
    library = compile_emulator(tmp_path, kernels, "-O1", "tokens_emulated.cpp")
    assert not error(*emulate(library, what, mean=3.0)) < 1e-3


@pytest.mark.parametrize(
    "what", [LayerNorm(4, 12), LayerNorm(4, 2056), LayerNorm(0, 8), Geglu(4, 12), Geglu(0, 8), Sum(3, 3)]
)
def test_shapes_that_have_no_kernel(emulator: Any, what: LayerNorm | Geglu | Sum | Join) -> None:
    call = replace(what).call()
    assert getattr(emulator, what.function)(ctypes.byref(call), 0) == 1


def test_a_step_has_three_norms_and_a_gate_a_block() -> None:
    """23 blocks: 7 in ControlNet, 7 in the UNet's input half, 9 in its output half."""
    counts = between(attentions(ModelConfig.load("sd15"), Shape(256, 384, 1)))
    norms = {what: count for what, count in counts.items() if isinstance(what, LayerNorm)}
    assert sum(norms.values()) == 69 and sum(counts.values()) == 69 + 23
    assert norms[LayerNorm(1536, 320)] == 4  # of each network's first block, before cond and uncond part
