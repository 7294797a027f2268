"""The convolution kernels on a CPU: as they are written, in an emulator, against float64."""

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_group_norm import compile_emulator

from plugins.call import Conv, error

KERNELS = Path(__file__).resolve().parent.parent / "plugins" / "conv"
GUARD = 4096  # bytes before and after each array, which nothing may touch

SHAPES = [
    Conv(2, 128, 4, 6, 64), Conv(2, 64, 4, 6, 128, residual_batch=2), Conv(2, 128, 8, 12, 64, residual_batch=1),
    Conv(2, 640, 4, 6, 64, size=1), Conv(2, 64, 8, 12, 128, stride=2), Conv(1, 64, 5, 7, 64, stride=2),
    Conv(2, 192, 8, 12, 64, size=1, residual_batch=2), Conv(3, 64, 3, 3, 64, residual_batch=1), Conv(1, 64, 1, 1, 64),
    Conv(4, 64, 7, 5, 64, size=1, stride=2),
]  # fmt: skip


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compile_emulator(tmp_path_factory.mktemp("emulator"), KERNELS, source="conv_emulated.cpp")


def emulate(library: Any, conv: Conv, cluster: int = 8, order: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel makes of random arrays, and what float64 does; everything else in memory stays as it was."""
    arrays, call, held = conv.arrays(), conv.call(cluster), {}
    for name, array in {**arrays, "y": np.full(conv.out, np.nan, np.float16)}.items():
        held[name] = memory = np.full(array.nbytes + 2 * GUARD, 255, np.uint8)
        memory[GUARD:-GUARD] = array.reshape(-1).view(np.uint8)
        setattr(call, name, memory.ctypes.data + GUARD)
    before = {name: memory.copy() for name, memory in held.items()}
    assert library.emulate_conv(ctypes.byref(call), order) == 0
    y = held["y"][GUARD:-GUARD].copy()
    before["y"][GUARD:-GUARD] = y
    assert all(np.array_equal(held[name], before[name]) for name in held), "written to where it must not be"
    return y.view(np.float16).reshape(conv.out), conv.expected(arrays)


@pytest.mark.parametrize("cluster", [1, 2, 6, 8])
@pytest.mark.parametrize("conv", SHAPES, ids=str)
def test_against_float64(emulator: Any, conv: Conv, cluster: int) -> None:
    assert error(*emulate(emulator, conv, cluster)) < 1e-3


def test_expected_is_what_torch_says() -> None:
    import torch

    for conv in SHAPES:
        arrays = conv.arrays()
        x, weight = (torch.from_numpy(arrays[name]).double().movedim(3, 1) for name in ("x", "weight"))
        y = torch.nn.functional.conv2d(
            x, weight, torch.from_numpy(arrays["bias"]).double(), conv.stride, conv.size // 2
        )
        if conv.residual_batch:
            rest = torch.from_numpy(arrays["residual"]).double().movedim(3, 1)
            y += rest.repeat(conv.batch // conv.residual_batch, 1, 1, 1)
        np.testing.assert_allclose(conv.expected(arrays), y.movedim(1, 3).numpy(), atol=1e-12)


@pytest.mark.parametrize("cluster", [1, 8])
def test_the_order_of_threads_changes_no_bit(emulator: Any, cluster: int) -> None:
    first, _ = emulate(emulator, SHAPES[2], cluster)
    for order in (1, 2):
        again, _ = emulate(emulator, SHAPES[2], cluster, order)
        assert first.tobytes() == again.tobytes(), order


@pytest.mark.parametrize(
    ("find", "put"),
    [
        ("__syncthreads();  // this stage", "// this stage"),
        ("__syncthreads();  // the sums", "// the sums"),
        ("__syncthreads();  // the second", "// the second"),
        ("copies_wait<kConvStages - 2>();", "copies_wait<kConvStages - 1>();"),
        ("if (p.cluster > 1) cluster_arrive(), cluster_wait();\n    block.store();", "block.store();"),
        ("other = 0; other < p.cluster", "other = 1; other < p.cluster"),
        ("right >= 0 && right < c.width", "right < c.width"),
    ],
)
def test_the_emulator_finds_mistakes(tmp_path: Path, find: str, put: str) -> None:
    kernels = tmp_path / "plugins" / "conv"
    kernels.mkdir(parents=True)
    for path in KERNELS.iterdir():
        text = path.read_text().replace('"../attention/', f'"{KERNELS.parent}/attention/')
        assert path.name != "kernel.cuh" or text.count(find) == 1, f"{find!r} is not in the kernel any more"
        (kernels / path.name).write_text(text.replace(find, put))
    library = compile_emulator(tmp_path, kernels, "-O1", "conv_emulated.cpp")
    assert not all(error(*emulate(library, SHAPES[2], order=order)) < 1e-3 for order in (0, 1, 2))


@pytest.mark.parametrize(
    "changes", [{"channels": 96}, {"filters": 32}, {"size": 5}, {"stride": 3}, {"batch": 0}], ids=str
)
def test_shapes_that_have_no_kernel(emulator: Any, changes: dict[str, Any]) -> None:
    conv = replace(SHAPES[0], **changes)
    assert emulator.emulate_conv(ctypes.byref(conv.call(8)), 0) == 1
