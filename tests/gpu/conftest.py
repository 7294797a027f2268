"""What the tests of the kernels on a GPU share."""

from collections.abc import Callable
from typing import Any

import pytest

from plugins.build import build
from plugins.call import OnGpu, open_library
from plugins.load import PluginError
from runtime.engine import check, cuda_runtime


@pytest.fixture(scope="module")
def library() -> Any:
    """The plugins' C functions, compiled first where `plugins/lib` has none that fits."""
    try:
        return open_library(build())
    except PluginError as why:
        pytest.skip(str(why))


@pytest.fixture(scope="session")
def same_bits_in_a_graph() -> Callable[[OnGpu, int], None]:
    """What replays a graph of so many launches of a call a hundred times, over numbers that are none."""

    def replay(on_gpu: OnGpu, launches: int) -> None:
        cuda, call = cuda_runtime(), on_gpu.call
        on_gpu.launch()
        first = on_gpu.result()
        stream = check(cuda.cudaStreamCreate())
        check(cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal))
        for _ in range(launches):
            on_gpu.launch(stream)
        graph = check(cuda.cudaStreamEndCapture(stream))
        captured = check(cuda.cudaGraphInstantiate(graph, 0))
        for _ in range(100):
            check(cuda.cudaMemset(call.y, 255, first.nbytes))  # type: ignore[attr-defined]
            check(cuda.cudaGraphLaunch(captured, stream))
            assert on_gpu.result().tobytes() == first.tobytes()
        check(cuda.cudaGraphExecDestroy(captured))
        check(cuda.cudaGraphDestroy(graph))
        check(cuda.cudaStreamDestroy(stream))

    return replay
