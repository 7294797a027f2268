"""Running an engine, with a stand-in for TensorRT and CUDA whose GPU memory is the host's."""

import ctypes
from enum import Enum, IntEnum
from types import SimpleNamespace

import numpy as np
import pytest

from runtime import engine as module
from runtime.engine import Binding, Engine, OutOfMemory
from runtime.manifest import EngineError


def test_channels_last_bindings_are_padded_and_transposed():
    binding = Binding("x", (2, 3, 4, 5), np.dtype(np.float16), "HWC8")
    array = np.arange(120, dtype=np.float16).reshape(2, 3, 4, 5)
    stored = binding.pack(array.astype(np.float32))
    assert stored.shape == binding.stored_shape == (2, 4, 5, 8) and stored.dtype == np.float16
    assert binding.nbytes == stored.nbytes and stored.flags.c_contiguous
    assert stored[1, 2, 3, 1] == array[1, 1, 2, 3] and not stored[..., 3:].any()
    np.testing.assert_array_equal(binding.unpack(stored), array)
    assert Binding("x", (2, 8, 4, 5), np.dtype(np.float32), "HWC").stored_shape == (2, 4, 5, 8)


def test_linear_bindings_are_left_alone():
    binding = Binding("x", (2, 3), np.dtype(np.int32), "LINEAR")
    stored = binding.pack(np.array([[1, 2, 3], [4, 5, 6]], np.int64).T.copy().T)
    assert stored.flags.c_contiguous and stored.dtype == np.int32
    np.testing.assert_array_equal(binding.unpack(stored), [[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match=r"x has the shape \(3,\)"):
        binding.pack(np.zeros(3))


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2


class Cuda:
    """What the engine calls of cuda.bindings.runtime, on host memory."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeRelaxed=2)

    def __init__(self):
        self.memory: dict[int, np.ndarray] = {}
        self.launches = 0
        self.full = False

    def cudaMalloc(self, size):
        if self.full:
            return Error.cudaErrorMemoryAllocation, None
        buffer = np.full(size, 255, np.uint8)
        self.memory[buffer.ctypes.data] = buffer
        return Error.cudaSuccess, buffer.ctypes.data

    def cudaFree(self, pointer):
        del self.memory[pointer]
        return (Error.cudaSuccess,)

    def cudaMemcpy(self, to, source, size, kind):
        ctypes.memmove(to, source, size)
        return (Error.cudaSuccess,)

    def cudaGraphLaunch(self, graph, stream):
        self.launches += 1
        return (Error.cudaSuccess,)

    def cudaEventElapsedTime(self, begin, end):
        return Error.cudaSuccess, 0.25

    def cudaMemGetInfo(self):
        return Error.cudaSuccess, 2**30, 2**30

    def cudaGetErrorString(self, error):
        return Error.cudaSuccess, b"out of memory"

    def __getattr__(self, name):
        assert name.startswith("cuda")
        return lambda *arguments: (Error.cudaSuccess, 7)


class Mode(Enum):
    INPUT = 0
    OUTPUT = 1


TENSORS = {  # y = 2 x, channels-last both
    "x": (Mode.INPUT, "HALF", "HWC8", (1, 3, 2, 2)),
    "y": (Mode.OUTPUT, "HALF", "HWC8", (1, 3, 2, 2)),
}


class Context:
    def __init__(self):
        self.addresses: dict[str, int] = {}
        self.profiler = None

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        x, y = (np.ctypeslib.as_array((ctypes.c_uint16 * 32).from_address(self.addresses[n])) for n in "xy")
        y[:] = (2 * x.view(np.float16)).view(np.uint16)
        if self.profiler:
            self.profiler.report_layer_time("double", 0.5)
        return True


def fake_flavour(tensors=TENSORS, takes=True):
    names = list(tensors)
    cuda_engine = SimpleNamespace(
        num_io_tensors=len(names),
        get_tensor_name=lambda i: names[i],
        get_tensor_mode=lambda name: tensors[name][0],
        get_tensor_dtype=lambda name: SimpleNamespace(name=tensors[name][1]),
        get_tensor_format=lambda name: SimpleNamespace(name=tensors[name][2]),
        get_tensor_shape=lambda name: tensors[name][3],
        create_execution_context=Context,
    )

    class Profiler:
        def __init__(self):
            pass

    class Logger:
        ERROR = 1

        def __init__(self, severity):
            pass

    trt = SimpleNamespace(
        Logger=Logger,
        IProfiler=Profiler,
        TensorIOMode=Mode,
        init_libnvinfer_plugins=lambda logger, namespace: True,
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: cuda_engine if takes else None),
    )
    return SimpleNamespace(name="tensorrt", trt=trt)


@pytest.fixture
def cuda(monkeypatch):
    made = Cuda()
    monkeypatch.setattr(module, "cuda_runtime", lambda: made)
    monkeypatch.setattr(module, "gpu", lambda: module.Gpu("fake", "9.0"))
    return made


def test_an_engine_runs_numpy_to_numpy_and_frees_its_memory(cuda):
    x = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    with Engine(b"plan", fake_flavour()) as engine:
        assert engine.inputs["x"].format == "HWC8" and list(engine.outputs) == ["y"]
        np.testing.assert_array_equal(engine.run({"x": x})["y"], 2 * x)
        with pytest.raises(ValueError, match="the input z is unknown"):
            engine.run({"x": x, "z": x})
        with pytest.raises(ValueError, match="the input x is missing"):
            engine.run({})
        assert len(cuda.memory) == 2
    assert not cuda.memory


def test_times_leave_out_the_warm_up(cuda):
    with Engine(b"plan", fake_flavour()) as engine:
        assert engine.graph_times(replays=4) == [0.25] * 4 and cuda.launches == 4 + module.WARM_UP
        assert engine.layer_times(runs=2) == {"double": 0.5}


def test_what_cannot_run_is_one_sentence(cuda, monkeypatch):
    with pytest.raises(EngineError, match="tensorrt refuses a plan"):
        Engine(b"plan", fake_flavour(takes=False))
    odd = {**TENSORS, "y": (Mode.OUTPUT, "HALF", "CHW32", (1, 3, 2, 2))}
    with pytest.raises(EngineError, match="y is HALF .* CHW32"):
        Engine(b"plan", fake_flavour(odd))
    cuda.full = True
    with pytest.raises(OutOfMemory, match=r"CUDA says: out of memory \(cudaErrorMemoryAllocation\)"):
        Engine(b"plan", fake_flavour())
    with pytest.raises(OutOfMemory, match="2048 MiB does not fit into the 1024 MiB"):
        raise module.refusal(fake_flavour(), 2**31)
    monkeypatch.setattr(module, "gpu", lambda: None)
    with pytest.raises(EngineError, match="no NVIDIA GPU"):
        Engine(b"plan", fake_flavour())
