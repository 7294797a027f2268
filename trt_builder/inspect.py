"""What is inside an engine: its inputs and outputs, layers and tactics, and what went wrong in them.

A build writes <stage>.layers.json beside the plan. TensorRT tells its layers through the engine inspector, which wants
the GPU; TensorRT-RTX, which builds without one, tells them in its verbose log.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from runtime.manifest import EngineError, write_whole
from trt_builder.flavour import Flavour

# TensorRT 8.6 names what it fuses after its layers, {ForeignNode[first...last]}; the plain form has one named softmax.
ATTENTION = re.compile(r"mha|flash|sdpa|fused_?attention|ForeignNode.*/(softmax|scores|values)", re.IGNORECASE)
CONVOLUTION = re.compile(r"conv|correlation", re.IGNORECASE)
REFORMAT = re.compile(r"^(reformat|noop|memcpy)", re.IGNORECASE)
# TensorRT-RTX names a generated kernel after its operations: these only move or cast numbers.
MOVES = re.compile(r"^__myl_((Tran|Move|Cast|Copy|Resh|Repl|Slic|Conc)+)_", re.IGNORECASE)
LOGGED_TENSOR = re.compile(
    r"\{ Name: (.*?), (?:Location: \w+, )?Dimensions: \[([\d,]*)\].*?Datatype: (\w+), Format: (.*?) \}"
)
LOGGED_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>.*?), Inputs: \[(?P<inputs>.*?)\](?:, Constants: \[.*?\])?"
    r", Outputs: \[(?P<outputs>.*? \}|)\](?:.*?, TacticName: (?P<tactic>.*?), StreamId)?"
)
INSPECTED_DTYPES = {"FP32": "FLOAT", "FP16": "HALF", "INT32": "INT32", "INT64": "INT64", "INT8": "INT8",
                    "UINT8": "UINT8", "BOOL": "BOOL", "BF16": "BF16"}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine or a layer; `format` in TensorRT's words."""

    name: str
    shape: list[int]
    dtype: str
    format: str

    def __str__(self) -> str:
        size = "×".join(map(str, self.shape)) or "scalar"
        return f"{self.name} {size} {self.dtype.lower()} {self.format}".rstrip()


@dataclass(frozen=True)
class Layer:
    """A layer of an engine as TensorRT built it."""

    name: str
    type: str
    tactic: str = ""
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def attention(self) -> bool:
        """Whether this is a fused attention kernel."""
        words = f"{self.tactic} {self.type} {self.name if self.name.startswith(('_', '{')) else ''}"
        return bool(ATTENTION.search(words))

    @property
    def reformat(self) -> bool:
        """Whether this only moves or casts numbers."""
        return bool(REFORMAT.search(self.type) or MOVES.search(self.tactic) or "Reformatting" in self.name)

    @property
    def fp32_convolution(self) -> bool:
        """Whether this is a convolution over float32."""
        return bool(CONVOLUTION.search(self.type)) and bool(self.inputs) and self.inputs[0].dtype == "FLOAT"


@dataclass(frozen=True)
class Report:
    """What a build knows of one engine; `attentions` counts the attentions that its network holds."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    layers: list[Layer]
    softmaxes: int

    @property
    def fused(self) -> int:
        """How many fused attention kernels there are."""
        return sum(layer.attention for layer in self.layers)

    @property
    def reformats(self) -> int:
        """How many layers only move or cast numbers."""
        return sum(layer.reformat for layer in self.layers)

    @property
    def fp32_convolutions(self) -> int:
        """How many convolutions run in float32."""
        return sum(layer.fp32_convolution for layer in self.layers)


def write_report(folder: Path, stage: str, network: Any, flavour: Flavour, logger: Any, plan: Any, logged: str) -> None:
    """Write <stage>.layers.json for a plan that was just built; `logged` is TensorRT-RTX's list of its layers."""
    formats = flavour.trt.TensorFormat.__members__
    inputs = [bound(network.get_input(i), formats) for i in range(network.num_inputs)]
    outputs = [bound(network.get_output(i), formats) for i in range(network.num_outputs)]
    layers = logged_layers(logged) if logged else inspected_layers(engine_json(flavour, logger, plan))
    kinds = [network.get_layer(i).type.name for i in range(network.num_layers)]
    # A fused attention layer of the network is three layers to this list: its input, output and the attention itself.
    softmaxes = kinds.count("SOFTMAX") + kinds.count("ATTENTION_OUTPUT")
    report = Report(inputs, outputs, layers, softmaxes)
    write_whole(report_path(folder, stage), (json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n").encode())


def read_report(folder: Path, stage: str) -> Report | None:
    """The report of a stage, or None where the build left none; raises EngineError where it cannot be read."""
    path = report_path(folder, stage)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tensors = {key: [Tensor(**one) for one in content[key]] for key in ("inputs", "outputs")}
        layers = [
            Layer(**{**one, **{key: [Tensor(**t) for t in one[key]] for key in ("inputs", "outputs")}})
            for one in content["layers"]
        ]
        return Report(**tensors, layers=layers, softmaxes=int(content["softmaxes"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(f"{path} is damaged ({error}): delete it and the plan, and build again.") from None


def report_path(folder: Path, stage: str) -> Path:
    """Where a stage's report lies."""
    return folder / f"{stage}.layers.json"


def bound(tensor: Any, formats: Mapping[str, Any]) -> Tensor:
    """A network's input or output with those of TensorRT's formats that it allows."""
    allowed = [name for name, value in formats.items() if int(tensor.allowed_formats) >> int(value) & 1]
    which = "any" if len(allowed) == len(formats) else "/".join(allowed)
    return Tensor(tensor.name, list(tensor.shape), tensor.dtype.name, which)


def engine_json(flavour: Flavour, logger: Any, plan: Any) -> str:
    """The engine inspector's account of a plan; it needs the GPU that the plan is for, or the account has no layers."""
    runtime = flavour.trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return "{}"
    return str(engine.create_engine_inspector().get_engine_information(flavour.trt.LayerInformationFormat.JSON))


def inspected_layers(text: str) -> list[Layer]:
    """Layers from the engine inspector's JSON; only names where the engine was built without details."""
    layers = []
    for one in json.loads(text).get("Layers", []):
        if isinstance(one, str):
            layers.append(Layer(one, ""))
            continue
        tensors = {key: [inspected_tensor(t) for t in one.get(key.capitalize(), [])] for key in ("inputs", "outputs")}
        kind = str(one.get("LayerType", ""))
        if one.get("ParameterType") == "Convolution":
            kind = f"{kind} Convolution" if not CONVOLUTION.search(kind) else kind
        layers.append(Layer(str(one["Name"]), kind, str(one.get("TacticName", "")), **tensors))
    return layers


def inspected_tensor(one: Mapping[str, Any]) -> Tensor:
    """A layer's input or output; TensorRT 8.6 words type and format as one, "Row major linear FP32"."""
    words = str(one.get("Format/Datatype", one.get("Format", "")))
    kind = str(one.get("Datatype", "")).upper()
    found = re.search(r"\b(FP32|FP16|BF16|INT8|INT32|INT64|UINT8|BOOL)\b", f"{kind} {words}", re.IGNORECASE)
    dtype = INSPECTED_DTYPES[found.group(1).upper()] if found else kind
    return Tensor(str(one.get("Name", "")), list(one.get("Dimensions", [])), dtype, words)


def logged_layers(text: str) -> list[Layer]:
    """Layers from TensorRT-RTX's verbose log, a line each."""
    layers = []
    for line in text.splitlines():
        found = LOGGED_LAYER.match(line)
        if found:
            tensors = {key: logged_tensors(found[key]) for key in ("inputs", "outputs")}
            layers.append(Layer(found["name"], found["type"], found["tactic"] or "", **tensors))
    return layers


def logged_tensors(text: str) -> list[Tensor]:
    """The tensors of one list in the log."""
    return [
        Tensor(name, [int(side) for side in shape.split(",") if side], dtype.upper(), form)
        for name, shape, dtype, form in LOGGED_TENSOR.findall(text)
    ]


def condensed(tensors: Iterable[Tensor]) -> list[str]:
    """Tensors of one family on one line: "k0…k6  2×77×320, 2×77×640 half LINEAR"."""
    lines = []
    ordered = sorted(tensors, key=lambda t: (stem(t.name), t.dtype, t.format))
    for _, group in groupby(ordered, key=lambda t: (stem(t.name), t.dtype, t.format)):
        family = list(group)
        sizes = list(dict.fromkeys("×".join(map(str, t.shape)) for t in family))
        base = stem(family[0].name)
        numbers = sorted(int(t.name.removeprefix(base) or 0) for t in family)
        names = family[0].name if len(family) == 1 else f"{base}{numbers[0]}…{numbers[-1]}"
        lines.append(f"{names}  {', '.join(sizes)} {family[0].dtype.lower()} {family[0].format}".rstrip())
    return lines


def stem(name: str) -> str:
    """A tensor's name without its number."""
    return name.rstrip("0123456789")
