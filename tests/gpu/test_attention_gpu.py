"""The attention kernels on a GPU, called directly; the library is compiled first where none that fits is there."""

from typing import Any

import pytest

from bench.attention import attentions
from plugins.call import Attention, attention_on_gpu, error
from runtime.engine import gpu
from trt_builder.config import ModelConfig, Shape

pytestmark = pytest.mark.skipif(gpu() is None, reason="cuda-python sees no NVIDIA GPU")

NETWORKS = sorted(attentions(ModelConfig.load("sd15"), Shape(256, 384, 1)), key=lambda one: one.flop)
OTHERS = [Attention(1, 3, 100, 200, 40), Attention(2, 1, 1, 1, 64), Attention(1, 1, 17, 81, 80)]


@pytest.mark.parametrize("deviation", [1.0, 6.0])
@pytest.mark.parametrize("attention", [*NETWORKS, *OTHERS], ids=str)
def test_against_float64(library: Any, attention: Attention, deviation: float) -> None:
    arrays = attention.arrays(deviation)
    with attention_on_gpu(library, attention, arrays) as on_gpu:
        on_gpu.launch()
        assert error(on_gpu.result(), attention.expected(arrays)) < 1e-3


@pytest.mark.parametrize("attention", [NETWORKS[0], NETWORKS[-1], OTHERS[0]], ids=str)
def test_the_same_bits_a_hundred_times_in_a_graph(
    library: Any, attention: Attention, same_bits_in_a_graph: Any
) -> None:
    with attention_on_gpu(library, attention, attention.arrays()) as on_gpu:
        same_bits_in_a_graph(on_gpu, 1)
