"""Every CUDA call of the runtime is one that cuda-python takes: made here for real, where CUDA can only answer no."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.engine import gpu

cuda = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
ROOT = Path(__file__).resolve().parents[1]

KIND, STREAM, EVENT = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, cuda.cudaStream_t(0), cuda.cudaEvent_t(0)
GRAPH, EXECUTABLE = cuda.cudaGraph_t(0), cuda.cudaGraphExec_t(0)
CALLS = {
    "cudaMalloc": (256,), "cudaFree": (0,), "cudaHostAlloc": (256, 0), "cudaFreeHost": (0,), "cudaMemGetInfo": (),
    "cudaMemsetAsync": (0, 0, 0, STREAM), "cudaMemcpy": (0, 0, 0, KIND), "cudaMemcpyAsync": (0, 0, 0, KIND, STREAM),
    "cudaMemcpy2DAsync": (0, 256, 0, 256, 0, 0, KIND, STREAM), "cudaStreamCreate": (),
    "cudaStreamCreateWithFlags": (cuda.cudaStreamNonBlocking,), "cudaStreamDestroy": (STREAM,),
    "cudaStreamSynchronize": (STREAM,), "cudaStreamWaitEvent": (STREAM, EVENT, 0), "cudaEventCreate": (),
    "cudaEventCreateWithFlags": (cuda.cudaEventDisableTiming,), "cudaEventDestroy": (EVENT,),
    "cudaEventRecord": (EVENT, STREAM), "cudaEventSynchronize": (EVENT,), "cudaEventElapsedTime": (EVENT, EVENT),
    "cudaEventRecordWithFlags": (EVENT, STREAM, cuda.cudaEventRecordExternal),
    "cudaStreamBeginCapture": (STREAM, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed),
    "cudaStreamEndCapture": (STREAM,), "cudaGraphInstantiate": (GRAPH, 0), "cudaGraphDestroy": (GRAPH,),
    "cudaGraphExecDestroy": (EXECUTABLE,), "cudaGraphLaunch": (EXECUTABLE, STREAM), "cudaGetDeviceCount": (),
    "cudaGetDeviceProperties": (0,), "cudaGetErrorString": (cuda.cudaError_t.cudaSuccess,), "cudaGetLastError": (),
}  # fmt: skip
VALUES = {  # how many a call returns beside the error
    "cudaMalloc": 1, "cudaHostAlloc": 1, "cudaMemGetInfo": 2, "cudaStreamCreateWithFlags": 1, "cudaStreamEndCapture": 1,
    "cudaEventCreateWithFlags": 1, "cudaGraphInstantiate": 1, "cudaEventElapsedTime": 1, "cudaFree": 0,
    "cudaGraphLaunch": 0, "cudaStreamCreate": 1, "cudaEventCreate": 1, "cudaGetErrorString": 1,
}  # fmt: skip


def used_names() -> set[str]:
    """Every name of CUDA that the runtime and the measurements use."""
    files = [*ROOT.glob("runtime/*.py"), *(ROOT / f"bench/{name}.py" for name in ("ours", "timeline", "kernels"))]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and node.attr.startswith("cuda")}


def test_every_call_is_tried_here() -> None:
    known = {name: getattr(cuda, name) for name in used_names() if hasattr(cuda, name)}  # others are members of enums
    functions = {name for name, value in known.items() if callable(value) and not isinstance(value, type)}
    assert functions == CALLS.keys() and len(functions) > 20


@pytest.mark.skipif(gpu() is not None, reason="there is a GPU, and null pointers would be taken seriously")
def test_cuda_python_takes_the_arguments() -> None:
    for name, given in CALLS.items():
        error, *values = getattr(cuda, name)(*given)
        assert isinstance(error, cuda.cudaError_t), name
        assert len(values) == VALUES.get(name, len(values)), name


def test_the_runtime_needs_neither_torch_nor_tensorrt_nor_cuda_to_import() -> None:
    code = (
        "import sys, runtime, pkgutil, importlib\n"
        "for module in pkgutil.iter_modules(runtime.__path__): importlib.import_module('runtime.' + module.name)\n"
        "from runtime import Canny2Image, PipelineOptions\n"
        "import bench.ours, canny2image_TRT\n"
        "found = {'torch', 'tensorrt', 'tensorrt_rtx', 'cuda.bindings'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
