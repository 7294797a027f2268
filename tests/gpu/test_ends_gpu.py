"""The ends of a step on a GPU, called directly; the library is compiled first where none fits."""

from typing import Any

import numpy as np
import pytest

from bench.group_norm import graph_us
from plugins.call import error
from plugins.end_calls import First, Last, channels_last, end_on_gpu
from runtime.engine import gpu

pytestmark = pytest.mark.skipif(gpu() is None, reason="cuda-python sees no NVIDIA GPU")

FIRSTS = [
    First(1, 4, 32, 48, 320, hint_batch=1, repeat=2), First(1, 4, 32, 48, 320, repeat=2), First(2, 4, 32, 48, 320),
    First(1, 4, 64, 64, 320, hint_batch=1, repeat=2), First(3, 4, 5, 7, 136, hint_batch=1, repeat=2),
    First(2, 8, 5, 7, 72, hint_batch=2, repeat=3), First(1, 4, 8, 8, 32), First(1, 1, 1, 1, 8),
]  # fmt: skip
LASTS = [
    Last(1, 320, 32, 48), Last(1, 320, 32, 48, cond=True), Last(2, 320, 64, 64), Last(2, 168, 5, 7, 3),
    Last(3, 32, 5, 7, cond=True), Last(1, 8, 1, 1), Last(2, 40, 3, 11, 8),
]  # fmt: skip


@pytest.mark.parametrize("what", [*FIRSTS, *LASTS], ids=str)
def test_against_float64_and_the_same_bits_every_time(library: Any, what: First | Last) -> None:
    arrays = what.arrays()
    with end_on_gpu(library, what, arrays) as on_gpu:
        on_gpu.launch()
        made = {name: on_gpu.result(name) for name in what.results}
        for _ in range(20):
            on_gpu.launch()
            assert all(on_gpu.result(name).tobytes() == made[name].tobytes() for name in what.results)
    if isinstance(what, Last):
        expected = what.expected(arrays)
        assert all(error(made[name], expected[name]) < 2e-6 for name in what.results)
        return
    y = channels_last(what.expected(arrays))
    assert error(made["y"], y) < 5e-4
    for part in np.split(made.get("repeated", made["y"]), max(1, what.repeat)):
        assert part.tobytes() == made["y"].tobytes()


@pytest.mark.parametrize("what", [FIRSTS[0], LASTS[0]], ids=str)
def test_a_graph_of_launches_has_the_same_bits(library: Any, what: First | Last) -> None:
    """Each may be set up while the one before it ends."""

    def several(stream: Any) -> None:
        for _ in range(20):
            on_gpu.launch(stream)

    with end_on_gpu(library, what, what.arrays()) as on_gpu:
        on_gpu.launch()
        made = {name: on_gpu.result(name) for name in what.results}
        graph_us(several, replays=20)
        assert all(on_gpu.result(name).tobytes() == made[name].tobytes() for name in what.results)
