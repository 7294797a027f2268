"""The attention kernels on a GPU, called directly; the library is compiled first where none that fits is there."""

from typing import Any

import pytest

from bench.attention import attentions, without_hopper
from plugins.call import Attention, attention_on_gpu, error
from plugins.load import CONV_CAPABILITY
from runtime.engine import gpu
from trt_builder.config import ModelConfig, Shape

HERE = gpu()
pytestmark = pytest.mark.skipif(HERE is None, reason="cuda-python sees no NVIDIA GPU")

NETWORKS = sorted(attentions(ModelConfig.load("sd15"), Shape(256, 384, 1)), key=lambda one: one.flop)
OTHERS = [Attention(1, 3, 100, 200, 40), Attention(2, 1, 1, 1, 64), Attention(1, 1, 17, 81, 80)]
CAUSAL = [  # that of the text encoder; several tiles, of which groups of warps share some and see none of others
    Attention(2, 12, 77, 77, 64, joined=True, causal=True), Attention(1, 1, 1, 1, 64, causal=True),
    Attention(1, 2, 200, 200, 64, joined=True, causal=True, warps=3, groups=4),
    Attention(2, 12, 333, 333, 64, joined=True, causal=True),
]  # fmt: skip
WITHOUT = [without_hopper(one) for one in NETWORKS if one.joined and one.width <= 80]
HOPPER = [  # by the kernel for compute capability 9.0: tiles that are not full, one, and more than a ring has places
    Attention(1, 1, 64, 64, 40, warps=-1, groups=1), Attention(1, 1, 1, 1, 80, warps=-1),
    Attention(2, 2, 110, 200, 40, warps=-2, groups=2), Attention(1, 2, 118, 331, 80, warps=-2, groups=3),
    Attention(2, 3, 650, 650, 40, joined=True, warps=-3, groups=1), Attention(1, 2, 96, 384, 80, warps=-1, groups=8),
    Attention(4, 1, 100, 140, 40, repeat=2, warps=-2), Attention(2, 8, 1500, 1500, 40, joined=True),
    Attention(1, 8, 1600, 4096, 40),
]  # fmt: skip


@pytest.mark.parametrize("deviation", [1.0, 6.0])
@pytest.mark.parametrize("attention", [*NETWORKS, *OTHERS, *CAUSAL, *WITHOUT, *HOPPER], ids=str)
def test_against_float64(library: Any, attention: Attention, deviation: float) -> None:
    if attention.warps < 0 and HERE and HERE.capability != CONV_CAPABILITY:
        pytest.skip(f"the kernel is for compute capability {CONV_CAPABILITY}")
    arrays = attention.arrays(deviation)
    with attention_on_gpu(library, attention, arrays) as on_gpu:
        on_gpu.launch()
        assert error(on_gpu.result(), attention.expected(arrays)) < 1e-3


@pytest.mark.parametrize("attention", [NETWORKS[0], *NETWORKS[-2:], OTHERS[0], *CAUSAL[::2]], ids=str)
def test_the_same_bits_a_hundred_times_in_a_graph(
    library: Any, attention: Attention, same_bits_in_a_graph: Any
) -> None:
    with attention_on_gpu(library, attention, attention.arrays()) as on_gpu:
        same_bits_in_a_graph(on_gpu, 1)
