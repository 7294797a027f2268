"""bench.conv without a GPU: the shapes that it finds, and its arithmetic on the emulated kernels."""

import ctypes
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conv_emulated import compiled

from bench import conv as bench
from runtime.engine import Gpu
from trt_builder.config import ModelConfig, Options, Shape


class OnCpu:
    """What `plugins.call.OnGpu` is, in this process's memory."""

    def __init__(self, function: Any, call: Any, memory: dict[str, np.ndarray], unpack: Any) -> None:
        self.call, self.function, self.memory = call, function, {name: array.copy() for name, array in memory.items()}
        for name, array in self.memory.items():
            setattr(call, name, array.ctypes.data)

    def launch(self, stream: Any = 0) -> None:
        assert self.function(ctypes.byref(self.call), 0) == 0

    def result(self) -> np.ndarray:
        return self.memory["y"].copy()

    def __enter__(self) -> "OnCpu":
        return self

    def __exit__(self, *given: Any) -> None:
        pass


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The kernels in the emulator, CUDA as far as the bench calls it, and few shapes."""
    library = compiled()
    call = SimpleNamespace(canny_conv=library.emulate_conv, canny_conv_plan=library.canny_conv_plan)

    def set_memory(address: int, value: int, size: int) -> None:
        ctypes.memset(address, value, size)

    def graph_us(several: Any, replays: int) -> float:
        several(0)
        return 100.0

    cuda = SimpleNamespace(cudaFree=lambda address: None, cudaMemset=set_memory)
    for module in ("plugins.conv_calls", "bench.conv"):
        monkeypatch.setattr(f"{module}.OnGpu", OnCpu)
        monkeypatch.setattr(f"{module}.check", lambda result: result)
        monkeypatch.setattr(f"{module}.cuda_runtime", lambda: cuda)
    monkeypatch.setattr(bench, "graph_us", graph_us)
    monkeypatch.setattr("bench.group_norm.gpu", lambda: Gpu("fake", "9.0"))
    monkeypatch.setattr(bench, "open_library", lambda path: call)
    monkeypatch.setattr(bench, "LAUNCHES", 2)
    monkeypatch.setattr(bench, "CACHED", 200_000)
    shapes = Counter({bench.Conv(1, 64, 4, 6, 128, residual_batch=1): 3, bench.Conv(2, 128, 4, 6, 64, 1, norm=True): 1})
    shapes[bench.Conv(2, 64, 4, 6, 64, residual_batch=1, second=128)] = 1
    shapes[bench.Conv(2, 64, 4, 6, 768, 1, gate=True)] = 1
    monkeypatch.setattr(bench, "convolutions", lambda config, shape, options: shapes)
    return call


def test_it_measures_and_checks(
    on_cpu: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--library", "lib.so", "--output", str(tmp_path / "conv.json")]
    assert bench.main([*arguments, "--sweep"]) == 0
    rows = json.loads((tmp_path / "conv.json").read_text())["rows"]
    assert (
        len(rows) == 4
        and {"64·192x1", "64·256x1"} <= rows[1]["cuts"].keys()
        and {"64·64x1", "64·64x8", "64·128x3"} <= rows[0]["cuts"].keys()
        and rows[0]["plan"]["high"] == 64
    )
    assert rows[0]["kernel"] == pytest.approx(100.0 / max(2, bench.copies_of(bench.Conv(1, 64, 4, 6, 128))))
    assert bench.main([*arguments, "--check"]) == 0
    assert "worst of 4 shapes" in capsys.readouterr().out
    wrong = on_cpu.canny_conv

    def spoilt(call: Any, order: int) -> int:
        done = wrong(call, order)
        ctypes.memset(call._obj.y, 0, 2)
        return int(done)

    monkeypatch.setattr(on_cpu, "canny_conv", spoilt)
    assert bench.main([*arguments, "--check"]) == 1
    assert bench.main([*arguments, "--plan"]) == 0


def test_the_layer_norms_of_sd15() -> None:
    """One before each of three layers of a transformer, of which Q, K and V may be apart, where they are ours."""
    config, small, large = ModelConfig.load("sd15"), Shape(256, 384), Shape(512, 512)
    own = Options(attention="own", conv="own")
    folded = replace(own, layer_norm="folded")
    for options, shape, norms in (
        (folded, small, 69), (replace(folded, qkv="apart"), small, 115), (own, small, 0), (folded, large, 45),
    ):  # fmt: skip
        with_norm = {one: n for one, n in bench.convolutions(config, shape, options).items() if one.norm}
        assert sum(with_norm.values()) == norms and all(bench.is_ours(one, options) for one in with_norm)


def test_the_second_maps_of_sd15() -> None:
    """Of the ResBlocks that change the channels, and of each transformer; larger pictures have some apart."""
    config, options = ModelConfig.load("sd15"), Options(attention="own", conv="own")
    for shape, expected in ((Shape(256, 384), {3: 12 + 2 + 2, 1: 23}), (Shape(512, 512), {3: 6 + 1 + 1, 1: 16})):
        sizes: Counter[int] = Counter()
        for one, count in bench.convolutions(config, shape, options).items():
            sizes[one.size] += count * bool(one.second)
        assert sizes == expected
    assert not any(one.second for one in bench.convolutions(config, Shape(256, 384)))


def test_the_gates_of_sd15() -> None:
    """One in each transformer, but where maps are too large, of batch 2 as the feed-forward has them."""
    config, small, own = ModelConfig.load("sd15"), Shape(256, 384), Options(conv="own")
    for options, shape, gates in (
        (Options(), small, 0), (own, small, 23), (own, Shape(256, 384, samples=2), 16), (own, Shape(512, 512), 9),
    ):  # fmt: skip
        gated = {one: n for one, n in bench.convolutions(config, shape, options).items() if one.gate}
        assert sum(gated.values()) == gates and all(one.batch == shape.batch for one in gated)


def test_the_shapes_of_sd15() -> None:
    """Those that the report of a step counted on TensorRT 8.6: bench/RESULTS.md."""
    found = bench.convolutions(ModelConfig.load("sd15"), Shape(256, 384))
    sizes: Counter[tuple[int, int]] = Counter()
    for one, count in found.items():
        sizes[one.rows, one.size] += count
    assert (sizes[192, 3], sizes[192, 1], sizes[768, 1], sizes[48, 3] + sizes[48, 1]) == (17, 64, 64, 26 + 21)
