"""Both halves of a cross-attention over a text that is multiplied out, on a GPU; as test_conv_gpu.py."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bench.conv import cuts, result_of
from plugins.call import error
from plugins.conv_calls import conv_on_gpu
from plugins.cross_calls import Cross, scores, values
from plugins.load import CONV_CAPABILITY, CROSS_WORDS
from runtime.engine import check, cuda_runtime, gpu

HERE = gpu()
pytestmark = pytest.mark.skipif(
    HERE is None or HERE.capability != CONV_CAPABILITY, reason="cuda-python sees no GPU of compute capability 9.0"
)

# Texts, channels, sides, heads, rows of x, words: those of Stable Diffusion 1.5 at 256×384, then others.
SHAPES = [
    (2, 320, 32, 48, 8, 1), (2, 320, 32, 48, 8, 2), (2, 640, 16, 24, 8, 1), (2, 640, 16, 24, 8, 2),
    (2, 1280, 8, 12, 8, 1), (2, 1280, 8, 12, 8, 2), (2, 1280, 4, 6, 8, 1), (2, 1280, 4, 6, 8, 2),
    (4, 320, 5, 9, 4, 2, 60), (6, 192, 9, 13, 4, 3, 1), (2, 128, 16, 6, 12, 1, 80), (1, 64, 1, 1, 4, 1),
]  # fmt: skip
HALVES = pytest.mark.parametrize("half", [scores, values])
Half = Callable[..., Cross]


@HALVES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_cut_against_float64(library: Any, half: Half, shape: tuple[int, ...]) -> None:
    cross = half(*shape)
    arrays = cross.arrays(mean=1.0)
    expected, tried = cross.expected(arrays), [cross, *cuts(cross, library)]
    assert len(tried) > 1
    with conv_on_gpu(library, cross, arrays) as on_gpu:
        for cut in tried:
            y = result_of(on_gpu, cut)
            assert error(y, expected) < 1e-3, cut
            if half is scores:
                assert not y.reshape(-1, CROSS_WORDS)[:, cross.words :].any(), cut


@HALVES
def test_texts_do_not_mix(library: Any, half: Half) -> None:
    """Numbers of another text, however large, change no bit, though a tile's last words lie in the next text's."""
    cross = half(2, 320, 9, 13, 8, 1, words=60)
    arrays, results = cross.arrays(), []
    for most in (0.0, 6e4):
        arrays["weight"][1] = np.float16(most)
        with conv_on_gpu(library, cross, arrays) as on_gpu:
            on_gpu.launch()
            results.append(on_gpu.result()[0].tobytes())
    assert results[0] == results[1]


ROWS = [replace(half(*shape), cluster=cluster) for half in (scores, values) for shape in (SHAPES[0], SHAPES[5])
        for cluster in (1, 4)]  # fmt: skip


@pytest.mark.parametrize("cross", ROWS, ids=str)
def test_the_same_bits_a_hundred_times_in_a_graph(library: Any, cross: Cross, same_bits_in_a_graph: Any) -> None:
    """Several in a row, each of which may begin before the one before it has ended."""
    with conv_on_gpu(library, cross, cross.arrays()) as on_gpu:
        same_bits_in_a_graph(on_gpu, 5)


def test_values_read_the_scores_that_were_just_written(library: Any) -> None:
    """One after the other 20 times, with early launches: the same bits as with a wait between them."""
    first, then = scores(2, 640, 16, 24, 8, 1), values(2, 640, 16, 24, 8, 1)
    cuda = cuda_runtime()
    of_first, of_then = first.arrays(), then.arrays()
    with conv_on_gpu(library, first, of_first) as one, conv_on_gpu(library, then, of_then) as two:
        calls: Any = (one.call, two.call)
        kept, calls[1].x = calls[1].x, calls[0].y
        results = []
        for waits in (True, False):
            check(cuda.cudaMemset(calls[0].y, 255, one.result().nbytes))
            for _ in range(20):
                for launched in (one, two):
                    launched.launch()
                    if waits:
                        check(cuda.cudaDeviceSynchronize())
            results.append(two.result().tobytes())
        assert results[0] == results[1] and not np.isnan(two.result()).any()
        calls[1].x = kept
    expected = then.expected(of_then | {"x": first.expected(of_first)})
    assert error(np.frombuffer(results[0], np.float16).reshape(then.out), expected) < 2e-3
