"""The GroupNorm plugin on a GPU: its kernels called directly, and in TensorRT where that takes plugins.

The library is compiled first where `plugins/lib` has none that fits; without nvcc or TensorRT's headers they skip.
"""

from typing import Any

import numpy as np
import pytest

from bench.attention import residuals
from bench.group_norm import chain, norms
from plugins.call import GroupNorm, error, group_norm_on_gpu, plan
from plugins.token_calls import Join, JoinNorm, join_norm_on_gpu, tokens_on_gpu
from runtime.engine import Engine, gpu
from trt_builder.config import ModelConfig, Shape
from trt_builder.flavour import Flavour, FlavourError, get_flavour

pytestmark = pytest.mark.skipif(gpu() is None, reason="cuda-python sees no NVIDIA GPU")

NETWORKS = sorted(
    {
        norm
        for shape in (Shape(256, 384, 1), Shape(256, 384, 2))
        for found in norms(ModelConfig.load("sd15"), shape).values()
        for norm in found
    },
    key=lambda norm: norm.moved,
)
OTHERS = [
    GroupNorm(2, 320, 16, 24, half=False), GroupNorm(2, 64, 8, 8), GroupNorm(2, 36, 5, 7, groups=4, row_batch=2),
    GroupNorm(3, 21, 5, 7, groups=7, silu=False), GroupNorm(2, 320, 16, 24, channels_last=False, row_batch=2),
    GroupNorm(2, 33, 5, 7, groups=3, channels_last=False, half=False), GroupNorm(1, 256, 64, 96, half=False),
]  # fmt: skip
FEW = [NETWORKS[0], NETWORKS[len(NETWORKS) // 2], NETWORKS[-1], OTHERS[2], OTHERS[4]]


@pytest.fixture(scope="module")
def flavour(library: Any) -> Flavour:
    try:
        return get_flavour("tensorrt")
    except FlavourError as why:
        pytest.skip(str(why))


def test_clusters_are_known(library: Any) -> None:
    here = gpu()
    assert here is not None and library.canny_max_cluster() == (8 if float(here.capability) >= 9 else 1)


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("norm", [*NETWORKS, *OTHERS], ids=str)
def test_kernels_are_within_rounding_of_float64(library: Any, norm: GroupNorm, mean: float) -> None:
    arrays = norm.arrays(mean)
    with group_norm_on_gpu(library, norm, arrays) as on_gpu:
        on_gpu.launch()
        assert error(on_gpu.result(), norm.expected(arrays)) < (2e-3 if norm.half else 2e-5)


@pytest.mark.parametrize("force", [1, 2, 4, 8, -1])
@pytest.mark.parametrize("norm", FEW, ids=str)
def test_every_way_to_cut_a_map(library: Any, norm: GroupNorm, force: int) -> None:
    if plan(library, norm.call(library.canny_max_cluster(), force)).path == "none":
        pytest.skip("there is no such plan")
    arrays = norm.arrays(100.0)
    with group_norm_on_gpu(library, norm, arrays, force) as on_gpu:
        on_gpu.launch()
        assert error(on_gpu.result(), norm.expected(arrays)) < 2e-3


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("norm", FEW, ids=str)
def test_the_same_bits_a_hundred_times_in_a_graph(
    library: Any, norm: GroupNorm, overlap: bool, same_bits_in_a_graph: Any
) -> None:
    with group_norm_on_gpu(library, norm, norm.arrays(), overlap=overlap) as on_gpu:
        same_bits_in_a_graph(on_gpu, 1)


JOINED = [
    JoinNorm(one)
    for shape in (Shape(256, 384, 1), Shape(256, 384, 2))
    for one in residuals(ModelConfig.load("sd15"), shape)
    if isinstance(one, Join)
] + [JoinNorm(Join(2, 9, 8, 56), groups=4, silu=False), JoinNorm(Join(2, 7, 40, 24, True)),
     JoinNorm(Join(1, 96 * 128, 64, 64))]  # fmt: skip


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("what", JOINED, ids=str)
def test_what_is_joined_and_its_group_norm(
    library: Any, what: JoinNorm, mean: float, same_bits_in_a_graph: Any
) -> None:
    """Each against float64, and the bits of CannyJoin and of CannyGroupNorm behind it."""
    arrays = what.arrays(mean)
    with join_norm_on_gpu(library, what, arrays) as on_gpu:
        on_gpu.launch()
        y, joined = on_gpu.result(), on_gpu.result("joined")
        same_bits_in_a_graph(on_gpu, 1)
        assert joined.tobytes() == on_gpu.result("joined").tobytes()
    assert error(joined, what.join.expected(arrays)) < 1e-3
    assert error(y, what.expected(arrays, joined)) < 2e-3
    with tokens_on_gpu(library, what.join, {k: v for k, v in arrays.items() if k not in ("gamma", "beta")}) as on_gpu:
        on_gpu.launch()
        assert joined.tobytes() == on_gpu.result().tobytes()
    x = joined.reshape(what.join.batch, what.join.positions, -1).transpose(0, 2, 1)[..., None]
    with group_norm_on_gpu(library, what.norm, {"x": x, **{k: arrays[k] for k in ("gamma", "beta")}}) as on_gpu:
        on_gpu.launch()
        again = on_gpu.result()[..., 0].transpose(0, 2, 1).reshape(y.shape)
    assert y.tobytes() == np.ascontiguousarray(again).tobytes()


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("norm", [*FEW, OTHERS[0], OTHERS[5]], ids=str)
def test_in_tensorrt(flavour: Flavour, norm: GroupNorm, mean: float) -> None:
    """One layer: the same numbers, the same bits every time, and in a CUDA graph; channels-last no reformat."""
    arrays = norm.arrays(mean)
    made = bytes(chain(flavour, norm, "own", 1, arrays))
    with Engine(made, flavour) as engine:
        inputs = {name: arrays[name] for name in engine.inputs}
        y = engine.run(inputs)["y"]
        assert error(y, norm.expected(arrays)) < (2e-3 if norm.half else 2e-5)
        assert all(engine.run(inputs)["y"].tobytes() == y.tobytes() for _ in range(20))
        assert np.median(engine.graph_times(20)) > 0
        assert engine.download()["y"].tobytes() == y.tobytes()
        if norm.half and norm.channels_last:
            assert "reformat" not in engine.layers_json().lower()
