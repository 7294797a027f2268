"""The convolution kernels on a GPU, called directly; the library is compiled first where none that fits is there."""

from dataclasses import replace
from typing import Any

import pytest

from bench.conv import convolutions, cuts, result_of
from plugins.call import error
from plugins.conv_calls import Conv, conv_on_gpu
from plugins.load import CONV_CAPABILITY, CONV_MULTIPLE
from runtime.engine import check, cuda_runtime, gpu
from trt_builder.config import ModelConfig, Options, Shape

HERE = gpu()
pytestmark = pytest.mark.skipif(
    HERE is None or HERE.capability != CONV_CAPABILITY, reason="cuda-python sees no GPU of compute capability 9.0"
)

OWN = Options(attention="own", conv="own")
FOLDED = replace(OWN, layer_norm="folded")
SD15, SHAPE = ModelConfig.load("sd15"), Shape(256, 384)
ALL = set().union(
    *(convolutions(SD15, SHAPE, options) for options in (Options(), OWN, FOLDED, replace(FOLDED, qkv="apart")))
)
NETWORKS = sorted((one for one in ALL if one.channels % CONV_MULTIPLE == 0), key=lambda one: one.flop)
WIDE = [
    Conv(2, 320, 9, 14, 768, 1, residual_batch=1), Conv(3, 640, 9, 14, 768, 1, norm=True, gate=True),
    Conv(1, 64, 1, 1, 768, 1, gate=True),
]  # fmt: skip
TALL = [
    Conv(2, 128, 9, 13, 128, residual_batch=1), Conv(2, 320, 9, 13, 128, 1, residual_batch=2),
    Conv(2, 320, 9, 13, 128, 1, residual_batch=1, norm=True), Conv(2, 64, 9, 13, 64, second=192),
]  # fmt: skip
OTHERS = [
    Conv(1, 64, 1, 1, 64), Conv(3, 64, 5, 7, 128, residual_batch=1), Conv(2, 192, 9, 13, 192, stride=2),
    Conv(4, 64, 7, 5, 64, size=1, stride=2), Conv(2, 640, 9, 13, 128, size=1, residual_batch=2),
    Conv(3, 640, 5, 7, 128, 1, residual_batch=1, norm=True), Conv(1, 64, 1, 1, 64, 1, norm=True),
    Conv(2, 192, 9, 13, 192, residual_batch=1, second=320), Conv(3, 64, 5, 7, 128, 1, residual_batch=3, second=448),
    Conv(2, 64, 4, 6, 64, second=640), Conv(1, 64, 1, 1, 64, 1, second=64),
]  # fmt: skip


@pytest.mark.parametrize("conv", [*OTHERS, *TALL, *WIDE, *NETWORKS], ids=str)
def test_every_cut_against_float64(library: Any, conv: Conv) -> None:
    arrays = conv.arrays(mean=3.0 if conv.norm else 0.0)
    expected, tried = conv.expected(arrays), [conv, *cuts(conv, library)]
    assert len(tried) > 1 and (conv not in TALL or any(cut.high == 192 for cut in tried))
    with conv_on_gpu(library, conv, arrays) as on_gpu:
        for cut in tried:
            assert error(result_of(on_gpu, cut), expected) < 1e-3, cut


ROWS = [NETWORKS[0], NETWORKS[-1], OTHERS[1], replace(OTHERS[1], cluster=8), OTHERS[7], replace(OTHERS[7], cluster=8)]
ROWS += [replace(one, high=64, wide=wide, cluster=n) for one in WIDE[:2] for wide in (128, 192) for n in (1, 4)]
ROWS += [replace(WIDE[1], high=128, wide=wide, cluster=1) for wide in (192, 256)]
ROWS += [replace(one, high=192, cluster=n) for one in (*TALL[:3], OTHERS[7]) for n in (1, 2)]


@pytest.mark.parametrize("conv", ROWS, ids=str)
def test_the_same_bits_a_hundred_times_in_a_graph(library: Any, conv: Conv, same_bits_in_a_graph: Any) -> None:
    """Several in a row, each of which may begin before the one before it has ended."""
    with conv_on_gpu(library, conv, conv.arrays()) as on_gpu:
        same_bits_in_a_graph(on_gpu, 5)


def test_a_chain_reads_what_the_one_before_it_wrote(library: Any) -> None:
    """y of one is x of the next, 20 times over, with early launches: the same bits as with a wait between them."""
    cuda, conv = cuda_runtime(), Conv(2, 1280, 4, 6, 1280)
    with conv_on_gpu(library, conv, conv.arrays()) as on_gpu:
        call: Any = on_gpu.call
        x, y, size = call.x, call.y, 2 * conv.rows * conv.filters
        kept = int(check(cuda.cudaMalloc(size)))
        copy = cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        check(cuda.cudaMemcpy(kept, x, size, copy))
        results = []
        for waits in (True, False):
            check(cuda.cudaMemcpy(x, kept, size, copy))
            for i in range(20):
                call.x, call.y = (x, y) if i % 2 == 0 else (y, x)
                on_gpu.launch()
                if waits:
                    check(cuda.cudaDeviceSynchronize())
            results.append(on_gpu.result().tobytes())
        call.x, call.y = x, y
        check(cuda.cudaFree(kept))
        assert results[0] == results[1]
