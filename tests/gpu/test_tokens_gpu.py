"""LayerNorm, GEGLU, sums and skips on a GPU, called directly; the library is compiled first where none fits."""

from typing import Any

import pytest

from bench.attention import attentions, between, residuals
from plugins.call import error
from plugins.token_calls import Geglu, Join, LayerNorm, Sum, tokens_on_gpu
from runtime.engine import gpu
from trt_builder.config import ModelConfig, Shape

pytestmark = pytest.mark.skipif(gpu() is None, reason="cuda-python sees no NVIDIA GPU")

CONFIG, SHAPE = ModelConfig.load("sd15"), Shape(256, 384, 1)
NETWORKS = [*between(attentions(CONFIG, SHAPE)), *residuals(CONFIG, SHAPE)]
OTHERS = [
    LayerNorm(1, 8), LayerNorm(5, 2048), LayerNorm(3, 264), Geglu(1, 8), Geglu(7, 1272), Sum(1, 8), Join(3, 5, 8, 64),
    Join(1, 1536, 320, 320), Join(3, 5, 8, 64, True),
]  # fmt: skip


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize("what", [*NETWORKS, *OTHERS], ids=str)
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
