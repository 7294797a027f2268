"""The GroupNorm kernels on a CPU: as they are written, in an emulator, against float64."""

import ctypes
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import PLUGINS, all_between_guards, between_guards, compile_emulator, compile_mistaken

from bench.attention import residuals
from bench.group_norm import norms
from plugins.call import GroupNorm, error, plan
from plugins.token_calls import Join, JoinNorm
from trt_builder.config import ModelConfig, Options, Shape

KERNELS, SOURCE = PLUGINS / "group_norm", "group_norm_emulated.cpp"
JUDGED = Shape(256, 384, 1)

UNET = [
    GroupNorm(batch, channels, *size, row_batch=row)
    for (channels, size), (batch, row) in itertools.product(
        [
            (320, (32, 48)), (640, (32, 48)), (960, (32, 48)), (320, (16, 24)), (640, (16, 24)), (960, (16, 24)),
            (1280, (16, 24)), (1920, (16, 24)), (640, (8, 12)), (1280, (8, 12)), (1920, (8, 12)), (2560, (8, 12)),
            (1280, (4, 6)), (2560, (4, 6)),
        ],
        [(2, 1), (1, 0)],
    )
]  # fmt: skip
VAE = [
    GroupNorm(1, channels, *size, epsilon=1e-6)
    for channels, size in [(512, (32, 48)), (512, (64, 96)), (512, (128, 192)), (256, (128, 192)), (128, (128, 192))]
]
TWICE = GroupNorm(1, 128, 96, 128)  # read twice
LARGE = [GroupNorm(1, channels, 256, 384, epsilon=1e-6) for channels in (256, 128)]
ODD = [
    GroupNorm(2, 64, 8, 8), GroupNorm(1, 32, 5, 7), GroupNorm(2, 36, 5, 7, groups=4, row_batch=2),
    GroupNorm(2, 60, 5, 7, groups=6, row_batch=1), GroupNorm(3, 21, 5, 7, groups=7, silu=False),
    GroupNorm(1, 24, 1, 1, groups=3), GroupNorm(2, 330, 3, 3, groups=2), GroupNorm(1, 96, 64, 64, row_batch=1),
]  # fmt: skip
FLOATS = [
    GroupNorm(2, 320, 16, 24, half=False), GroupNorm(1, 640, 32, 48, half=False, row_batch=1),
    GroupNorm(1, 256, 128, 192, half=False, epsilon=1e-6), GroupNorm(2, 64, 8, 8, half=False),
]  # fmt: skip
LINEAR = [
    GroupNorm(2, 320, 16, 24, half=half, channels_last=False, row_batch=row)
    for half, row in ((True, 2), (False, 0))
] + [
    GroupNorm(2, 1280, 4, 6, channels_last=False, silu=False),
    GroupNorm(2, 33, 5, 7, groups=3, channels_last=False, row_batch=1),
    GroupNorm(1, 32, 1, 1, channels_last=False, half=False, epsilon=0.1),
    GroupNorm(1, 128, 64, 96, channels_last=False),
]  # fmt: skip


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compile_emulator(tmp_path_factory.mktemp("emulator"), KERNELS, SOURCE)


def emulate(
    library: Any, norm: GroupNorm, mean: float = 0.0, cluster: int = 8, force: int = 0, order: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """What the kernels make of random arrays, and what float64 does; everything else in memory stays as it was."""
    arrays = norm.arrays(mean)
    call = norm.call(cluster, force)
    stored = {name: norm.pack(array) if name == "x" else array for name, array in arrays.items()}
    stored["y"] = np.full_like(stored["x"], np.nan)
    stored["workspace"] = np.full(library.canny_group_norm_workspace(ctypes.byref(call)), 255, np.uint8)
    written = between_guards(
        call, stored, lambda: library.emulate_group_norm(ctypes.byref(call), order), ("y", "workspace")
    )
    y = written.view(norm.dtype).reshape(norm.stored_shape)
    assert not norm.channels_last or (y[..., norm.channels :] == 0).all(), "the padding is not zero"
    return norm.unpack(y), norm.expected(arrays)


# -- the kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("norm", [*UNET, *VAE, *ODD], ids=str)
def test_half_precision_is_within_its_rounding(emulator: Any, norm: GroupNorm, mean: float) -> None:
    """The bar is 2e-3; rounding the result to half makes up to 4.9e-4 of the largest value."""
    assert error(*emulate(emulator, norm, mean)) < 5e-4


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("norm", FLOATS, ids=str)
def test_single_precision(emulator: Any, norm: GroupNorm, mean: float) -> None:
    assert error(*emulate(emulator, norm, mean)) < (2e-6 if mean == 0 else 2e-5)


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("norm", LINEAR, ids=str)
def test_maps_with_channels_first(emulator: Any, norm: GroupNorm, mean: float) -> None:
    assert error(*emulate(emulator, norm, mean)) < (5e-4 if norm.half else 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("norm", LARGE, ids=str)
def test_the_largest_maps(emulator: Any, norm: GroupNorm) -> None:
    assert error(*emulate(emulator, norm, 100.0)) < 5e-4


@pytest.mark.parametrize("force", [1, 2, 4, 8, -1])
@pytest.mark.parametrize("norm", [UNET[6], ODD[0], ODD[2], FLOATS[0]], ids=str)
def test_every_way_to_cut_a_map_gives_the_same(emulator: Any, norm: GroupNorm, force: int) -> None:
    cut = plan(emulator, norm.call(8, force))
    if cut.path == "none":
        assert force == 1 and norm.height * norm.width > 100, "only a map too large for one block has no plan"
        return
    assert cut.path == ("two launches" if force < 0 else "one launch")
    assert error(*emulate(emulator, norm, 100.0, force=force)) < 5e-4


@pytest.mark.parametrize("norm", [UNET[0], UNET[20], TWICE, ODD[0], FLOATS[0], LINEAR[0]], ids=str)
def test_the_order_of_threads_changes_no_bit(emulator: Any, norm: GroupNorm) -> None:
    """Threads in another order between barriers: a result that depends on it lacks a barrier."""
    first, _ = emulate(emulator, norm)
    for order in (1, 2, 3):
        again, _ = emulate(emulator, norm, order=order)
        assert first.tobytes() == again.tobytes(), order


@pytest.mark.parametrize(
    ("find", "put", "file"),
    [
        ("thread.put(shared, records, slot, next_slot);\n    __syncthreads();",
         "thread.put(shared, records, slot, next_slot);", "channels_last.cuh"),
        ("        cluster_arrive();\n        cluster_wait();", "        __syncthreads();", "channels_last.cuh"),
        pytest.param("c > 0 && c >= cut", "c > 0 && c > cut", "channels_last.cuh", marks=pytest.mark.slow),
        pytest.param(
            "squares - deviation * delta", "squares", "records.cuh", marks=pytest.mark.slow
        ),
        pytest.param("shift[c] += to_float(row.value[c]) * float(count);", ";", "channels_last.cuh",
                     marks=pytest.mark.slow),
        pytest.param("data[v].clear(wide);", ";", "channels_last.cuh", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_emulator_finds_mistakes(tmp_path: Path, find: str, put: str, file: str) -> None:
    library = compile_mistaken(tmp_path, KERNELS, SOURCE, find, put, file)
    bad = False
    for norm, order in ((UNET[6], 0), (UNET[6], 1), (ODD[2], 1)):
        try:
            bad |= not error(*emulate(library, norm, 100.0, order=order)) < 5e-4
        except AssertionError:
            bad = True
    assert bad


# -- behind a join ----------------------------------------------------------------------------------------------------

DECODER = [JoinNorm(one) for one in residuals(ModelConfig.load("sd15"), JUDGED) if isinstance(one, Join)]
IN_ONE = [
    *DECODER, JoinNorm(Join(1, 60, 320, 320)), JoinNorm(Join(3, 5, 248, 8, True), silu=False),
    JoinNorm(Join(2, 9, 8, 56), groups=4), JoinNorm(Join(1, 1, 72, 8, True), groups=2),
]  # fmt: skip
IN_MORE = [  # fewer than four channels a group, and a map that registers do not hold
    (JoinNorm(Join(2, 7, 40, 24, True)), 2), (JoinNorm(Join(1, 96 * 128, 64, 64)), 3),
]  # fmt: skip


def emulate_join(
    library: Any, what: JoinNorm, mean: float = 0.0, order: int = 0, cluster: int = 8, apart: bool = False
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """What is joined and GroupNorm of it, and the arrays that they were made of."""
    arrays, call = what.arrays(mean), what.call(cluster)
    stored = what.memory(library, arrays, call)
    written = all_between_guards(
        call, stored, lambda: library.emulate_join_norm(ctypes.byref(call), order, apart), ("joined", "y", "workspace")
    )
    joined, y = (written[name].view(np.float16).reshape(stored["y"].shape) for name in ("joined", "y"))
    return joined, y, arrays


def join_errors(library: Any, what: JoinNorm, **how: Any) -> float:
    """The larger relative error against float64; GroupNorm is that of the numbers that are written."""
    joined, y, arrays = emulate_join(library, what, **how)
    return float(np.max([error(joined, what.join.expected(arrays)), error(y, what.expected(arrays, joined))]))


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("what", IN_ONE, ids=str)
def test_joined_in_one_launch(emulator: Any, what: JoinNorm, mean: float) -> None:
    assert join_errors(emulator, what, mean=mean) < 5e-4
    assert emulator.emulated_launches() == 1


@pytest.mark.parametrize(("what", "launches"), IN_MORE, ids=str)
def test_joined_in_more_launches(emulator: Any, what: JoinNorm, launches: int) -> None:
    assert join_errors(emulator, what) < 5e-4
    assert emulator.emulated_launches() == launches


@pytest.mark.parametrize("what", [DECODER[0], JoinNorm(Join(2, 384, 1280, 640)), *IN_ONE[-3:]], ids=str)
def test_one_launch_gives_the_bits_of_two(emulator: Any, what: JoinNorm) -> None:
    joined, y, _ = emulate_join(emulator, what)
    for order, apart in ((0, True), (1, False), (2, False)):
        again = emulate_join(emulator, what, order=order, apart=apart)
        assert (joined.tobytes(), y.tobytes()) == (again[0].tobytes(), again[1].tobytes())


@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_joined_without_large_clusters(emulator: Any, cluster: int) -> None:
    what = JoinNorm(Join(2, 384, 640, 320))
    assert join_errors(emulator, what, cluster=cluster) < 5e-4
    assert emulator.emulated_launches() == (3 if cluster == 1 else 1)


@pytest.mark.parametrize(
    "what", [JoinNorm(Join(2, 3, 12, 20)), JoinNorm(Join(2, 0, 32, 32)), JoinNorm(Join(2, 3, 32, 8))]
)
def test_joins_that_have_no_kernel(emulator: Any, what: JoinNorm) -> None:
    assert emulator.emulate_join_norm(ctypes.byref(what.call(8)), 0, 0) == 1


@pytest.mark.parametrize(
    ("find", "put"),
    [
        ("channel < join.first;", "channel <= join.first;"),
        ("channel - (of_x(join) ? 0 : join.first)", "channel"),
        ("(of_x ? join.x_scales : join.scales)[blockIdx.z]", "(of_x ? join.x_scales : join.scales)[0]"),
        ("if (adds) add_scaled(data[v], scale", "if (adds) add_scaled(data[v], 0.f * scale"),
        ("data[v].store(y);", "if (!adds) data[v].store(y);"),
    ],
)
def test_mistakes_in_joins_show(tmp_path: Path, find: str, put: str) -> None:
    library = compile_mistaken(tmp_path, KERNELS, SOURCE, find, put, "channels_last.cuh", "-O1 -DEMULATE_JOINS")
    assert not join_errors(library, JoinNorm(Join(2, 9, 40, 88, True)), mean=3.0) < 5e-4


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [*UNET, *VAE, *LARGE, *ODD, *FLOATS, *LINEAR], ids=str)
@pytest.mark.parametrize("cluster", [8, 1])
def test_plans_fit_a_gpu(emulator: Any, norm: GroupNorm, cluster: int) -> None:
    cut = plan(emulator, norm.call(cluster))
    assert cut.path != "none"
    assert cut.threads % 32 == 0 and 32 <= cut.threads <= 512 and cut.shared <= 48 << 10
    assert cut.path != "one launch" or (cut.grid[0] <= cluster and cut.held <= 6)


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 330}, {"groups": 0}, {"height": 0}, {"batch": 70_000}, {"row_batch": 3},
        {"half": False, "channels": 36, "groups": 4}, {"channels": 10_007 * 2, "groups": 2},
        {"height": 100_000, "width": 100_000},
    ],
)  # fmt: skip
def test_shapes_that_have_no_plan(emulator: Any, changes: dict[str, Any]) -> None:
    norm = GroupNorm(**({"batch": 2, "channels": 320, "height": 4, "width": 4} | changes))
    assert plan(emulator, norm.call(8)).path == "none"
    assert emulator.emulate_group_norm(ctypes.byref(norm.call(8)), 0) == 1


# -- which there are --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [Shape(128, 128), Shape(128, 192, 2)], ids=str)
def test_the_benchmark_knows_every_group_norm_of_the_networks(shape: Shape) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")
    from trt_builder.flavour import get_flavour
    from trt_builder.random_weights import random_weights
    from trt_builder.stages import define
    from trt_builder.weights import Weights, expected_shapes

    flavour, config, options = get_flavour("tensorrt_rtx"), ModelConfig.load("tiny"), Options(precision="fp32")
    trt = flavour.trt
    builder = flavour.create_builder(trt.Logger(trt.Logger.ERROR))
    weights = Weights.from_dict(random_weights(expected_shapes(config), 0))
    for stage, found in norms(config, shape).items():
        network = flavour.create_network(builder)
        define(stage, network, flavour, config, weights, shape, options)
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        shapes = [tuple(x.get_output(0).shape) for x in layers if x.type == trt.LayerType.NORMALIZATION]
        ours: Counter[tuple[int, ...]] = Counter()
        for norm, count in found.items():
            ours[norm.shape] += count
        assert ours == Counter(shape for shape in shapes if len(shape) == 4), stage
    weights.release()
