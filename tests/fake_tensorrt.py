"""TensorRT on the CUDA simulator: engines that evaluate the PyTorch twins of the stages, and folders of them."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from cuda_records import GRAIN, Work, peek, poke
from cuda_simulator import Cuda

from cldm.stages import STAGES
from runtime.engine import Binding
from runtime.manifest import Manifest, StagePlan
from runtime.session import STAGES as STAGE_NAMES
from runtime.steps import COND
from trt_builder.config import ModelConfig, Shape
from trt_builder.verify import input_shapes, random_inputs, twin_outputs


@dataclass(frozen=True)
class FakePlan:
    """A stage: its inputs and outputs, and how much activation memory it says that it needs."""

    stage: str
    inputs: Sequence[Binding]
    outputs: Sequence[Binding]
    activation: int = 1000

    def to_bytes(self) -> bytes:
        """The plan as a file holds it."""
        return pickle.dumps(self)


class Mode(Enum):
    INPUT = 0
    OUTPUT = 1


class Context:
    """An execution context that evaluates a stage's PyTorch twin."""

    def __init__(self, cuda: Cuda, plan: FakePlan, model: Any) -> None:
        self.cuda, self.plan, self.model = cuda, plan, model
        self.addresses: dict[str, int] = {}
        self.activation: tuple[int, int] | None = None
        cuda.plans += 1

    def __del__(self) -> None:
        self.cuda.plans -= 1

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in {b.name for b in (*self.plan.inputs, *self.plan.outputs)}, f"{self.plan.stage} has no {name}"
        assert address % GRAIN == 0, f"{name} lies at {address}, no multiple of {GRAIN}"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        plan, model, at = self.plan, self.model, dict(self.addresses)
        assert self.activation and self.activation[1] >= plan.activation, "too little activation memory"

        def do() -> None:
            given = {b.name: torch.from_numpy(load(b, at[b.name])) for b in plan.inputs}
            with torch.inference_mode():
                made = STAGES[plan.stage](model, given)
            for b in plan.outputs:
                poke(at[b.name], b.pack(made[b.name].numpy()).reshape(-1).view(np.uint8))

        reads = [(at[b.name], b.nbytes) for b in plan.inputs]
        writes = [(at[b.name], b.nbytes) for b in plan.outputs]
        self.cuda.enqueue(stream, Work(plan.stage, do, reads, [*writes, self.activation]))
        return True


def load(binding: Binding, address: int) -> np.ndarray:
    """A tensor as the twin takes it."""
    return binding.unpack(peek(address, binding.nbytes).view(binding.dtype).reshape(binding.stored_shape))


class FakeFlavour:
    """What `trt_builder.flavour` gives; `trt` is the module."""

    name = "tensorrt"

    def __init__(self, cuda: Cuda, model: Any) -> None:
        def deserialize(content: bytes) -> Any:
            plan: FakePlan = pickle.loads(content)
            tensors = {b.name: b for b in (*plan.inputs, *plan.outputs)}
            inputs, names = {b.name for b in plan.inputs}, list(tensors)
            kinds = {"float32": "FLOAT", "float16": "HALF", "int32": "INT32", "uint8": "UINT8"}
            return SimpleNamespace(
                plan=plan,
                num_io_tensors=len(names),
                get_tensor_name=lambda i: names[i],
                get_tensor_mode=lambda name: Mode.INPUT if name in inputs else Mode.OUTPUT,
                get_tensor_dtype=lambda name: SimpleNamespace(name=kinds[tensors[name].dtype.name]),
                get_tensor_format=lambda name: SimpleNamespace(name=tensors[name].format),
                get_tensor_shape=lambda name: tensors[name].shape,
            )

        self.cuda, self.model = cuda, model
        self.trt = SimpleNamespace(
            __version__="8.6.0",
            Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, severity: None}),
            TensorIOMode=Mode,
            init_libnvinfer_plugins=lambda logger, namespace: True,
            Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=deserialize),
        )

    def create_context(self, engine: Any) -> Context:
        return Context(self.cuda, engine.plan, self.model)

    def activation_bytes(self, engine: Any) -> int:
        return int(engine.plan.activation)

    def set_activation_memory(self, context: Context, address: int, size: int) -> None:
        assert address % GRAIN == 0
        context.activation = address, size


def write_engines(folder: Path, model: Any, shape: Shape) -> None:
    """An engine folder of the tiny model in float32; feature maps are channels-last, as those of real engines."""
    config = ModelConfig.load("tiny")
    folder.mkdir()
    sizes = {"height": shape.height, "width": shape.width, "samples": shape.samples, "steps": shape.steps}
    manifest = Manifest(
        "tiny", "tensorrt", "8.6.0", "fake", "9.0", [], "random:1", "0" * 64, sizes, {"precision": "fp32"},
        folder=folder,
    )  # fmt: skip

    def binding(name: str, size: tuple[int, ...], dtype: Any) -> Binding:
        last = name.startswith(("skip", "residual", "middle", "hint"))
        return Binding(name, size, np.dtype(dtype), "HWC" if last else "LINEAR")

    for i, stage in enumerate((*STAGE_NAMES, *COND)):
        kinds = {"tokens": np.int32, "timesteps": np.int32}
        inputs = input_shapes(stage, config, shape)
        outputs = twin_outputs(model, stage, random_inputs(stage, config, shape, 0))
        plan = FakePlan(
            stage,
            [binding(name, size, kinds.get(name, np.float32)) for name, size in inputs.items()],
            [binding(name, array.shape, array.dtype) for name, array in outputs.items()],
            activation=1000 + 500 * i,
        ).to_bytes()
        manifest.plan_path(stage).write_bytes(plan)
        manifest = manifest.with_stage(stage, StagePlan("", hashlib.sha256(plan).hexdigest(), len(plan), 0.0))
    manifest.save()
