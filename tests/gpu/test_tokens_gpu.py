"""LayerNorm, GEGLU, sums and skips on a GPU, called directly; the library is compiled first where none fits."""

from typing import Any

import pytest

from bench.attention import attentions, between
from plugins.call import error
from plugins.token_calls import Geglu, Join, LayerNorm, Sum, tokens_on_gpu
from runtime.engine import gpu
from trt_builder.config import ModelConfig, Shape

pytestmark = pytest.mark.skipif(gpu() is None, reason="cuda-python sees no NVIDIA GPU")

NETWORKS = list(between(attentions(ModelConfig.load("sd15"), Shape(256, 384, 1))))
SUMS = [Sum(48, 1280), Sum(192, 1280), Sum(768, 640), Sum(3072, 320)]
JOINS = [Join(2, 24, 1280, 1280), Join(2, 384, 1280, 640), Join(2, 1536, 640, 320), Join(1, 1536, 320, 320)]
OTHERS = [LayerNorm(1, 8), LayerNorm(5, 2048), LayerNorm(3, 264), Geglu(1, 8), Geglu(7, 1272), Sum(1, 8)]


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize("what", [*NETWORKS, *SUMS, *JOINS, *OTHERS], ids=str)
def test_against_float64_and_the_same_bits_every_time(
    library: Any, what: LayerNorm | Geglu | Sum | Join, mean: float
) -> None:
    arrays = what.arrays(mean)
    with tokens_on_gpu(library, what, arrays) as on_gpu:
        on_gpu.launch()
        first = on_gpu.result()
        assert error(first, what.expected(arrays)) < 1e-3
        for _ in range(20):
            on_gpu.launch()
            assert on_gpu.result().tobytes() == first.tobytes()
