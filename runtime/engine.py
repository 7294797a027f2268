"""One TensorRT engine on the GPU: numpy in, numpy out, and how long it takes as a CUDA graph.

numpy arrays are always dense and in the order of the tensor's shape; what the engine wants channels-last is transposed
here, on the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from runtime.manifest import EngineError

DTYPES = {
    "FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip
CHANNELS_LAST = {"HWC": 1, "HWC8": 8, "HWC16": 16}  # to what the channels are padded
WARM_UP = 5
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class OutOfMemory(EngineError):
    """The GPU's memory does not suffice."""


class Flavour(Protocol):
    """What an engine needs of a TensorRT flavour."""

    @property
    def name(self) -> str:
        """The module's name."""

    @property
    def trt(self) -> Any:
        """The module `tensorrt` or `tensorrt_rtx`."""

    def create_context(self, engine: Any) -> Any:
        """An execution context without activation memory."""

    def activation_bytes(self, engine: Any) -> int:
        """How much activation memory a context of this engine needs."""

    def set_activation_memory(self, context: Any, address: int, size: int) -> None:
        """Give a context its activation memory."""


@dataclass(frozen=True)
class Gpu:
    """A GPU by name and compute capability ("8.9")."""

    name: str
    capability: str


@dataclass(frozen=True)
class Binding:
    """An input or output of an engine: its shape, numpy type and format ("LINEAR", "HWC8", …) in GPU memory."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    format: str

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in GPU memory: (N, C, H, W) becomes (N, H, W, C) with padded channels where it is channels-last."""
        if self.format == "LINEAR":
            return self.shape
        n, c, h, w = self.shape
        pad = CHANNELS_LAST[self.format]
        return n, h, w, -(-c // pad) * pad

    @property
    def nbytes(self) -> int:
        """Bytes in GPU memory."""
        return math.prod(self.stored_shape) * self.dtype.itemsize

    def pack(self, array: np.ndarray) -> np.ndarray:
        """An array of `shape` as GPU memory holds it; raises ValueError for another shape."""
        if array.shape != self.shape:
            raise ValueError(f"the input {self.name} has the shape {array.shape}, but must have {self.shape}.")
        if self.format == "LINEAR":
            return np.ascontiguousarray(array, self.dtype)
        stored = np.zeros(self.stored_shape, self.dtype)
        stored[..., : self.shape[1]] = array.transpose(0, 2, 3, 1)
        return stored

    def unpack(self, stored: np.ndarray) -> np.ndarray:
        """The inverse of `pack`."""
        if self.format == "LINEAR":
            return stored
        return np.ascontiguousarray(stored[..., : self.shape[1]].transpose(0, 3, 1, 2))


class Plan:
    """A plan on the GPU: its inputs and outputs by name, and a context that is told where they lie.

    With `own_memory` the context allocates its activation memory, otherwise `set_activation_memory` must give it some.
    Raises EngineError where there is no GPU, cuda-python is missing or TensorRT does not take the plan.
    """

    def __init__(self, plan: bytes, flavour: Flavour, own_memory: bool = True) -> None:
        if gpu() is None:
            raise EngineError("there is no NVIDIA GPU to run an engine on: run this on the machine that built it.")
        self._flavour, self._trt = flavour, flavour.trt
        trt = self._trt
        logger = trt.Logger(trt.Logger.ERROR)
        trt.init_libnvinfer_plugins(logger, "")
        self._runtime = trt.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        self._context: Any = None
        if self._engine and own_memory:
            self._context = self._engine.create_execution_context()
        elif self._engine:
            self._context = flavour.create_context(self._engine)
        if self._context is None:
            self.release()
            raise refusal(flavour, len(plan))
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self.inputs = {name: self._binding(name) for name in names if modes[name] == trt.TensorIOMode.INPUT}
        self.outputs = {name: self._binding(name) for name in names if modes[name] == trt.TensorIOMode.OUTPUT}

    @property
    def activation_bytes(self) -> int:
        """How much activation memory it needs."""
        return self._flavour.activation_bytes(self._engine)

    def set_activation_memory(self, address: int, size: int) -> None:
        """Let it work in memory of the caller, at a multiple of 256; what lies there is lost with every run."""
        self._flavour.set_activation_memory(self._context, address, size)

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Where inputs and outputs lie from the next run on, at multiples of 256."""
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise EngineError(f"TensorRT does not take an address for the tensor {name}.")

    def execute(self, stream: Any) -> None:
        """Run once on a stream, without waiting."""
        if not self._context.execute_async_v3(int(stream)):
            raise EngineError("TensorRT could not run the engine; its message is above.")

    def release(self) -> None:
        """Free what TensorRT holds, first what depends on the others."""
        self._context = None
        self._engine = None
        self._runtime = None

    def _binding(self, name: str) -> Binding:
        kind, layout = self._engine.get_tensor_dtype(name).name, self._engine.get_tensor_format(name).name
        shape = tuple(self._engine.get_tensor_shape(name))
        fits = layout == "LINEAR" or (layout in CHANNELS_LAST and len(shape) == 4)
        if kind not in DTYPES or not fits or min(shape, default=1) < 0:
            raise EngineError(f"the tensor {name} is {kind} {shape} in the format {layout}, which is not handled here.")
        return Binding(name, shape, np.dtype(DTYPES[kind]), layout)


class Engine(Plan):
    """A plan with memory of its own for its inputs and outputs; use it in a `with` block, which frees it.

    Raises EngineError as `Plan` does.
    """

    def __init__(self, plan: bytes, flavour: Flavour) -> None:
        self._buffers: dict[str, int] = {}
        self._stream: Any = None
        super().__init__(plan, flavour)
        self._cuda = cuda_runtime()
        try:
            self._stream = check(self._cuda.cudaStreamCreate())
            for name, binding in (self.inputs | self.outputs).items():
                self._buffers[name] = int(check(self._cuda.cudaMalloc(max(1, binding.nbytes))))
            self.bind(self._buffers)
        except EngineError:
            self.close()
            raise

    def upload(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Copy inputs by name into their buffers; raises ValueError where one is missing, surplus or misshapen."""
        wrong = sorted(self.inputs.keys() ^ inputs.keys())
        if wrong:
            given = "missing" if wrong[0] in self.inputs else "unknown"
            raise ValueError(f"the input {wrong[0]} is {given}; the engine takes {', '.join(self.inputs)}.")
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        for name, binding in self.inputs.items():
            host = binding.pack(inputs[name])
            check(self._cuda.cudaMemcpy(self._buffers[name], host.ctypes.data, binding.nbytes, kind))

    def enqueue(self) -> None:
        """Run once on the engine's stream, without waiting."""
        self.execute(self._stream)

    def synchronize(self) -> None:
        """Wait for everything that was enqueued."""
        check(self._cuda.cudaStreamSynchronize(self._stream))

    def download(self) -> dict[str, np.ndarray]:
        """The outputs by name."""
        self.synchronize()
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        outputs = {}
        for name, binding in self.outputs.items():
            host = np.empty(binding.stored_shape, binding.dtype)
            check(self._cuda.cudaMemcpy(host.ctypes.data, self._buffers[name], binding.nbytes, kind))
            outputs[name] = binding.unpack(host)
        return outputs

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for inputs by name; raises ValueError as `upload` does."""
        self.upload(inputs)
        self.enqueue()
        return self.download()

    def graph_times(self, replays: int = 50) -> list[float]:
        """Milliseconds of each replay of the engine as a CUDA graph, on whatever the input buffers hold."""
        cuda = self._cuda
        for _ in range(WARM_UP):  # TensorRT allocates and chooses on the first runs, which a capture forbids
            self.enqueue()
        self.synchronize()
        check(cuda.cudaStreamBeginCapture(self._stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed))
        self.enqueue()
        graph = check(cuda.cudaStreamEndCapture(self._stream))
        captured = check(cuda.cudaGraphInstantiate(graph, 0))
        begin, end = check(cuda.cudaEventCreate()), check(cuda.cudaEventCreate())
        times = []
        for i in range(WARM_UP + replays):
            check(cuda.cudaEventRecord(begin, self._stream))
            check(cuda.cudaGraphLaunch(captured, self._stream))
            check(cuda.cudaEventRecord(end, self._stream))
            check(cuda.cudaEventSynchronize(end))
            if i >= WARM_UP:
                times.append(float(check(cuda.cudaEventElapsedTime(begin, end))))
        for event in (begin, end):
            check(cuda.cudaEventDestroy(event))
        check(cuda.cudaGraphExecDestroy(captured))
        check(cuda.cudaGraphDestroy(graph))
        return times

    def layer_times(self, runs: int = 20) -> dict[str, float]:
        """The mean milliseconds of every layer, by the name that the engine inspector gives it."""
        trt, times = self._trt, dict[str, float]()

        class Profiler(trt.IProfiler):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)
                self.on = False

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                if self.on:
                    times[layer_name] = times.get(layer_name, 0.0) + ms / runs

        self._context.profiler = profiler = Profiler()
        for i in range(WARM_UP + runs):
            profiler.on = i >= WARM_UP
            self.enqueue()
            self.synchronize()
        return times

    def layers_json(self) -> str:
        """The engine inspector's account of every layer, as JSON; detailed where it was built so."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def close(self) -> None:
        """Free the GPU memory."""
        for buffer in self._buffers.values():
            check(self._cuda.cudaFree(buffer))
        self._buffers.clear()
        if self._stream is not None:
            check(self._cuda.cudaStreamDestroy(self._stream))
            self._stream = None
        self.release()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def cuda_runtime() -> Any:
    """The module `cuda.bindings.runtime`; raises EngineError where it is not installed."""
    try:
        from cuda.bindings import runtime  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        raise EngineError("running engines needs cuda-python: pip install 'cuda-python>=12.9'.") from None
    return runtime


def check(result: tuple[Any, ...]) -> Any:
    """The value of a CUDA call; raises EngineError with CUDA's own words, OutOfMemory where that is the reason."""
    values = check_many(result)
    return values[0] if values else None


def check_many(result: tuple[Any, ...]) -> list[Any]:
    """The values of a CUDA call that has several; raises as `check`."""
    error, *values = result
    if int(error):
        cuda = cuda_runtime()
        _, text = cuda.cudaGetErrorString(error)
        cuda.cudaGetLastError()  # or TensorRT would find the error later and take it for its own
        kind = OutOfMemory if int(error) == OUT_OF_MEMORY else EngineError
        raise kind(f"CUDA says: {text.decode()} ({error.name}).")
    return values


def refusal(flavour: Flavour, size: int) -> EngineError:
    """The error of a plan of `size` bytes that TensorRT did not take, which says nothing of why to its caller."""
    free, _ = check_many(cuda_runtime().cudaMemGetInfo())
    if free < size:
        what = f"a plan of {size / 2**20:.0f} MiB does not fit into the {free / 2**20:.0f} MiB that the GPU has free"
        return OutOfMemory(f"{what}: end other programs on it.")
    return EngineError(f"{flavour.name} refuses a plan: build it again with `python -m trt_builder build`.")


def gpu() -> Gpu | None:
    """The first GPU, or None where there is none or no way to ask for it."""
    try:
        cuda = cuda_runtime()
    except EngineError:
        return None
    error, count = cuda.cudaGetDeviceCount()
    if int(error) or not count:
        return None
    properties = check(cuda.cudaGetDeviceProperties(0))
    name = properties.name.split(b"\0")[0].decode()
    return Gpu(name, f"{properties.major}.{properties.minor}")
