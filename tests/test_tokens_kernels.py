"""LayerNorm, GEGLU, sums and skips on a CPU: kernels as they are written, emulated, against float64."""

import ctypes
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import PLUGINS, between_guards, compile_emulator, compile_mistaken

from bench import attention as bench
from bench.attention import attentions, between, residuals
from plugins.call import error
from plugins.token_calls import Geglu, Join, LayerNorm, Sum
from runtime.engine import Gpu
from trt_builder.config import ModelConfig, Options, Shape

KERNELS, SOURCE = PLUGINS / "tokens", "tokens_emulated.cpp"

SHAPES = [
    LayerNorm(37, 320), LayerNorm(8, 640), LayerNorm(5, 1280), LayerNorm(3, 2048), LayerNorm(1, 8), LayerNorm(9, 264),
    Geglu(5, 1280), Geglu(3, 2560), Geglu(2, 5120), Geglu(7, 8), Geglu(1, 1272), Sum(3, 1280), Sum(1, 8), Sum(255, 64),
    Join(2, 24, 1280, 1280), Join(2, 7, 320, 640), Join(1, 1, 8, 8), Join(3, 5, 64, 8),
    Join(2, 24, 1280, 1280, True), Join(3, 5, 64, 8, True),
]  # fmt: skip


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compile_emulator(tmp_path_factory.mktemp("emulator"), KERNELS, SOURCE)


def emulate(library: Any, what: LayerNorm | Geglu | Sum | Join, mean: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel makes of random arrays, and what float64 does; everything else in memory stays as it was."""
    arrays, call = what.arrays(mean), what.call()
    memory = {**arrays, "y": np.full((what.tokens, what.channels), np.nan, np.float16)}
    y = between_guards(call, memory, lambda: getattr(library, what.function)(ctypes.byref(call), 0))
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
        ("gelu(gate)", "gate", Geglu(3, 64)),
        ("at >= p.count", "at >= p.count - kWidth", Sum(3, 64)),
        ("position / p.positions", "0", Join(2, 3, 8, 16)),
        ("position * p.second + at - p.first", "position * p.second", Join(2, 3, 8, 16)),
        ("of_x ? p.x_scales : p.scales", "p.scales", Join(2, 3, 8, 16, True)),
    ],
)
def test_mistakes_show(tmp_path: Path, find: str, put: str, what: LayerNorm | Geglu | Sum | Join) -> None:
    library = compile_mistaken(tmp_path, KERNELS, SOURCE, find, put)
    assert not error(*emulate(library, what, mean=3.0)) < 1e-3


def exact_gelu(x: np.ndarray) -> np.ndarray:
    """In float64."""
    exact = x.astype(np.float64)
    return exact * 0.5 * np.vectorize(math.erfc)(-exact * 0.5**0.5)


def emulated_gelu(library: Any, x: np.ndarray) -> np.ndarray:
    """Before it is rounded to half precision."""
    y = np.empty_like(x)
    library.emulate_gelu(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), x.size)
    return y


def is_gelu(library: Any) -> bool:
    """Within 2e-5 of what it is, where that counts in half precision, and beyond 12 as near as it gets there."""
    x = np.linspace(-12, 12, 100_001, dtype=np.float32)
    exact = exact_gelu(x)
    close = np.abs(emulated_gelu(library, x) - exact) <= 2e-5 * np.maximum(np.abs(exact), 1e-4)
    ends = np.array([-np.inf, -65504, -20, 20, 65504, np.inf], np.float32)
    far = np.array_equal(np.abs(emulated_gelu(library, ends)).round(20), np.maximum(ends, 0))
    return bool(close.all()) and far and bool(np.isnan(emulated_gelu(library, np.array([np.nan], np.float32))[0]))


def test_gelu(emulator: Any) -> None:
    assert is_gelu(emulator)


def test_gates_of_all_halves(emulator: Any) -> None:
    """From -12 to 12, times 1: as near as half precision allows. What is no number stays that."""
    positive = np.arange(np.float16(12).view(np.uint16), dtype=np.uint16).view(np.float16)
    gates = np.concatenate([positive, -positive, np.full(8, np.nan, np.float16)]).reshape(-1, 8)
    what = Geglu(len(gates), 8)
    x, call = np.concatenate([np.ones_like(gates), gates], axis=1), what.call()
    memory = {"x": x, "y": np.full_like(gates, 7)}
    y = between_guards(call, memory, lambda: emulator.canny_geglu(ctypes.byref(call), 0)).view(np.float16)
    exact = exact_gelu(gates[:-1]).reshape(-1)
    rounded = np.maximum(np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64) / 2, 2.0**-25)
    off = np.abs(y[:-8] - exact) - 2e-5 * np.maximum(np.abs(exact), 1e-4)
    assert np.all(off <= rounded) and np.isnan(y[-8:]).all()


@pytest.mark.parametrize(
    ("find", "put"),
    [
        ("-1.1509935f", "-1.1510935f"), ("fminf(fabsf(x), 10.f)", "fabsf(x)"), ("x < 0.f ? 0.f : x)", "x)"),
        ("x < 0.f ? 0.f : x)", "fmaxf(x, 0.f))"), ("7.8221812e-3f", "7.8231812e-3f"),
    ],
)  # fmt: skip
def test_mistakes_in_gelu_show(tmp_path: Path, find: str, put: str) -> None:
    assert not is_gelu(compile_mistaken(tmp_path, KERNELS, SOURCE, find, put, "../group_norm/device.cuh"))


@pytest.mark.parametrize(
    "what",
    [
        LayerNorm(4, 12), LayerNorm(4, 2056), LayerNorm(0, 8), Geglu(4, 12), Geglu(0, 8), Sum(3, 3),
        Join(2, 3, 12, 8), Join(2, 3, 8, 12), Join(2, 0, 8, 8), Join(0, 3, 8, 8),
    ],
)  # fmt: skip
def test_shapes_that_have_no_kernel(emulator: Any, what: LayerNorm | Geglu | Sum | Join) -> None:
    call = replace(what).call()
    assert getattr(emulator, what.function)(ctypes.byref(call), 0) == 1


def test_a_step_has_three_norms_and_a_gate_a_block() -> None:
    """23 blocks: 7 in ControlNet, 7 in the UNet's input half, 9 in its output half."""
    counts = between(attentions(ModelConfig.load("sd15"), Shape(256, 384, 1)))
    norms = {what: count for what, count in counts.items() if isinstance(what, LayerNorm)}
    assert sum(norms.values()) == 69 and sum(counts.values()) == 69 + 23
    assert norms[LayerNorm(1536, 320)] == 4  # of each network's first block, before cond and uncond part


def test_a_step_has_sixteen_sums_and_twelve_skips() -> None:
    """Sums in the input halves alone: ResBlocks of the output half take more channels than they make."""
    counts = residuals(ModelConfig.load("sd15"), Shape(256, 384, 1))
    assert {one: count for one, count in counts.items() if isinstance(one, Sum)} == {
        Sum(1536, 320): 2, Sum(3072, 320): 2, Sum(768, 640): 2, Sum(192, 1280): 2, Sum(48, 1280): 8,
    }  # fmt: skip
    assert {one: count for one, count in counts.items() if isinstance(one, Join)} == {
        Join(2, 24, 1280, 1280, True): 1, Join(2, 24, 1280, 1280): 2, Join(2, 96, 1280, 1280): 2,
        Join(2, 96, 1280, 640): 1, Join(2, 384, 1280, 640): 1, Join(2, 384, 640, 640): 1, Join(2, 384, 640, 320): 1,
        Join(2, 1536, 640, 320): 1, Join(2, 1536, 320, 320): 2,
    }  # fmt: skip


def test_the_bench_times_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.group_norm.gpu", lambda: Gpu("fake", "9.0"))
    monkeypatch.setattr(bench, "open_library", lambda path: None)
    monkeypatch.setattr(bench, "kernel_us", lambda library, what, replays: 2.0)
    monkeypatch.setattr(bench, "torch_us", lambda attention, replays: None)
    output = tmp_path / "attention.json"
    assert bench.main(["--library", "lib.so", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["between"]
    join = {"batch": 2, "positions": 384, "first": 640, "second": 320, "both": False, "tokens": 768, "channels": 960}
    assert {"what": "Join", **join, "count": 1, "kernel": 2.0, "norm": 2.0, "with_norm": 2.0} in rows
    assert all((row["with_norm"] is None) == (row["what"] != "Join") for row in rows)
    assert sum(row["count"] for row in rows) == 69 + 23 + 16 + 12
    assert "Join" in capsys.readouterr().out


def test_the_builder_gives_sums_and_skips_to_the_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that bench.attention finds."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")
    import plugin_stand_ins

    config, shape = ModelConfig.load("tiny"), Shape(128, 64, samples=3)
    found: Counter[Sum | Join] = Counter()

    def add(network: Any, a: Any, b: Any) -> Any:
        batch, channels, h, w = a.shape
        found[Sum(batch * h * w, channels)] += 1
        return plugin_stand_ins.add(network, a, b)

    def join(network: Any, x: Any, skip: Any, *rest: Any, index: int, x_index: int) -> Any:
        batch, channels, h, w = x.shape
        found[Join(batch, h * w, channels, skip.shape[1], x_index >= 0)] += 1
        return plugin_stand_ins.join(network, x, skip, *rest, index=index, x_index=x_index)

    plugin_stand_ins.use(monkeypatch)
    monkeypatch.setitem(plugin_stand_ins.MAKE, "CannyAdd", add)
    monkeypatch.setitem(plugin_stand_ins.MAKE, "CannyJoin", join)
    plugin_stand_ins.define_step(config, shape, Options("fp32", residual="own"))
    assert found == residuals(config, shape)
