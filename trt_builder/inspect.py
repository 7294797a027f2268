"""What is inside an engine: its inputs and outputs, layers and tactics, and what became of its attentions.

A build writes <stage>.layers.json beside the plan. TensorRT tells its layers through the engine inspector, which wants
the GPU; TensorRT-RTX, which builds without one, tells them in its verbose log. TensorRT 8.6 compiles parts of a network
into regions, of which it tells two layers at the ends and nothing else; what lies in between the network tells.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from plugins.load import ATTENTION as OWN_ATTENTION
from plugins.load import CROSS
from runtime.manifest import EngineError, Manifest, write_whole
from trt_builder.flavour import Flavour

ATTENTION = re.compile(r"mha|flash|sdpa|fused_?attention", re.IGNORECASE)
CONVOLUTION = re.compile(r"conv|correlation", re.IGNORECASE)
GEMM = re.compile(r"gemm|matrix_?multiply", re.IGNORECASE)  # 1×1 convolutions that run as one, too
POINTWISE = re.compile(r"pointwise|elementwise|^scale|activation|unary", re.IGNORECASE)
GENERATED = re.compile(r"kgen|runtime_fusion")  # for several operations, by TensorRT-RTX and TensorRT 10
REFORMAT = re.compile(r"^(myelin)?reformat|^noop|^memcpy", re.IGNORECASE)
# TensorRT 8.6's name of a compiled region; "first" and "last" are not the network's order of layers.
REGION = re.compile(r"\{ForeignNode\[(?P<first>.+?)(?:\.\.\.(?P<last>.+))?\]\}")
# What is between the names of the network's layers in that of an engine's layer.
JOINED = re.compile(r" \+ | \|\| |, |PWN\(|\)")
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
    plugin: str = ""

    @property
    def attention(self) -> bool:
        """Whether this is an attention in one kernel, TensorRT's or our plugin's."""
        words = f"{self.tactic} {self.type} {self.name if self.name.startswith('_') else ''}"
        return own_attention(self) or bool(ATTENTION.search(words))

    @property
    def region(self) -> bool:
        """Whether this is a part of the network that TensorRT 8.6 compiled as a whole."""
        return bool(REGION.fullmatch(self.name))

    @property
    def kind(self) -> str:
        """What its time counts as: a plugin's type, "region", "reformat", "attention", "gemm", "convolution", … ."""
        if self.plugin:
            return self.plugin
        for kind in ("region", "reformat", "attention"):
            if getattr(self, kind):
                return kind
        patterns = {"gemm": GEMM, "convolution": CONVOLUTION, "pointwise": POINTWISE, "generated": GENERATED}
        return next((kind for kind, pattern in patterns.items() if pattern.search(self.type)), "other")

    @property
    def reformat(self) -> bool:
        """Whether this only moves or casts numbers."""
        return bool(REFORMAT.search(self.type) or MOVES.search(self.tactic) or "Reformatting" in self.name)

    @property
    def fp32_convolution(self) -> bool:
        """Whether this is a convolution over float32."""
        return bool(CONVOLUTION.search(self.type)) and bool(self.inputs) and self.inputs[0].dtype == "FLOAT"


@dataclass(frozen=True)
class Node:
    """A layer of a network as it was defined: its type in TensorRT's words, its plugin's, and its tensors' names."""

    name: str
    type: str
    plugin: str
    inputs: list[str]
    outputs: list[str]


@dataclass(frozen=True)
class Attention:
    """An attention of a network, by its softmax's or its plugin's name, and the compiled region that it is part of."""

    name: str
    region: str = ""


@dataclass(frozen=True)
class Report:
    """What a build knows of one engine."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    layers: list[Layer]
    attentions: list[Attention]

    @property
    def fused(self) -> int:
        """How many attentions are one kernel."""
        return sum(layer.attention for layer in self.layers)

    @property
    def in_regions(self) -> int:
        """How many attentions are part of a compiled region; whether one kernel does them in there is not told."""
        return sum(bool(attention.region) for attention in self.attentions)

    @property
    def spelt_out(self) -> int:
        """How many attentions are layer by layer in the engine: what is neither one kernel nor in a region."""
        return len(self.attentions) - self.fused - self.in_regions

    @property
    def reformats(self) -> int:
        """How many layers only move or cast numbers."""
        return sum(layer.reformat for layer in self.layers)

    @property
    def fp32_convolutions(self) -> int:
        """How many convolutions run in float32."""
        return sum(layer.fp32_convolution for layer in self.layers)


@dataclass(frozen=True)
class Timed:
    """A layer of a stage and its mean milliseconds."""

    stage: str
    layer: Layer
    ms: float


def write_report(folder: Path, stage: str, network: Any, flavour: Flavour, logger: Any, plan: Any, logged: str) -> None:
    """Write <stage>.layers.json for a plan that was just built; `logged` is TensorRT-RTX's list of its layers."""
    formats = flavour.trt.TensorFormat.__members__
    inputs = [bound(network.get_input(i), formats) for i in range(network.num_inputs)]
    outputs = [bound(network.get_output(i), formats) for i in range(network.num_outputs)]
    layers = logged_layers(logged) if logged else inspected_layers(engine_json(flavour, logger, plan))
    nodes = [node(network.get_layer(i), flavour.trt) for i in range(network.num_layers)]
    plugins = {n.name: n.plugin for n in nodes if n.plugin}
    layers = [replace(x, plugin=plugins.get(x.name, "")) for x in layers]
    report = Report(inputs, outputs, layers, attentions(nodes, layers))
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
        return Report(**tensors, layers=layers, attentions=[Attention(**one) for one in content["attentions"]])
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


def node(layer: Any, trt: Any) -> Node:
    """A layer of a network."""
    inputs, outputs = (
        [tensor.name for tensor in map(get, range(count)) if tensor is not None]
        for get, count in ((layer.get_input, layer.num_inputs), (layer.get_output, layer.num_outputs))
    )
    name, kind, plugin = layer.name, layer.type.name, ""
    if kind == "PLUGIN_V2":
        layer.__class__ = trt.IPluginV2Layer  # a network gives bare layers, and the bindings downcast like this
        plugin = layer.plugin.plugin_type
    elif kind == "PLUGIN_V3":
        layer.__class__ = trt.IPluginV3Layer
        plugin = layer.plugin.get_capability_interface(trt.PluginCapabilityType.CORE).plugin_name
    return Node(name, kind, plugin, inputs, outputs)


def attentions(nodes: Sequence[Node], layers: Sequence[Layer]) -> list[Attention]:
    """The attentions of a network, and where an engine of these layers has them."""
    regions = compiled(nodes, layers)
    # A fused attention layer of the network is three layers to this list: its input, output and the attention itself.
    found = [n.name for n in nodes if n.type in ("SOFTMAX", "ATTENTION_OUTPUT") or own_attention(n)]
    return [Attention(name, regions.get(name, "")) for name in found]


def own_attention(layer: Layer | Node) -> bool:
    """Whether this is an attention by our plugins, or of one over a text that is multiplied out the first launch."""
    return layer.plugin == OWN_ATTENTION or (layer.plugin == CROSS and layer.name.endswith(":weights"))


def compiled(nodes: Sequence[Node], layers: Sequence[Layer]) -> dict[str, str]:
    """The compiled region of each layer of the network that lies in one.

    A region holds what its two ends are connected with through layers that the engine names nowhere else: those that
    lie between the ends in the network's order are other ones, as TensorRT counts in an order of its own.
    """
    apart = {name for layer in layers if not layer.region for name in JOINED.split(layer.name)}
    by_name, members = {n.name: n for n in nodes}, dict[str, str]()
    makers = {tensor: n for n in nodes for tensor in n.outputs}
    beside: dict[str, list[Node]] = defaultdict(list)
    for n in nodes:
        for maker in (makers[tensor] for tensor in n.inputs if tensor in makers):
            beside[maker.name].append(n)
            beside[n.name].append(maker)
    for layer in layers:
        found = REGION.fullmatch(layer.name)
        waiting = [by_name[end] for end in (found.groups() if found else ()) if end in by_name]
        while waiting:
            n = waiting.pop()
            if n.name not in apart and n.name not in members:
                members[n.name] = layer.name
                waiting += beside[n.name]
    return members


def profile(reports: Mapping[str, Report | None], times: Mapping[str, Mapping[str, float]]) -> list[Timed]:
    """Every layer that was timed, stage by stage; `times` are mean milliseconds by layer, by stage."""
    timed = []
    for stage, by_layer in times.items():
        report = reports[stage]
        known = {layer.name: layer for layer in report.layers} if report else {}
        timed += [Timed(stage, known.get(name, Layer(name, "")), ms) for name, ms in by_layer.items()]
    return timed


def save_profile(path: Path, manifest: Manifest, gpu: str, timed: Iterable[Timed]) -> None:
    """Write every layer that was timed as JSON, in the order in which it ran; raises OSError."""
    m, stages = manifest, dict[str, list[dict[str, Any]]]()
    for one in timed:
        line = {**asdict(one.layer), "kind": one.layer.kind, "mean_ms": one.ms}
        stages.setdefault(one.stage, []).append(line)
    content = {"gpu": gpu, "flavour": m.flavour, "version": m.version, "model": m.model, "weights": m.weights,
               "shape": m.shape, "options": m.options, "stages": stages}  # fmt: skip
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


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
        inputs, outputs = ([inspected_tensor(t) for t in one.get(key, [])] for key in ("Inputs", "Outputs"))
        kind = str(one.get("LayerType", ""))
        if one.get("ParameterType") == "Convolution":
            kind = f"{kind} Convolution" if not CONVOLUTION.search(kind) else kind
        layers.append(Layer(str(one["Name"]), kind, str(one.get("TacticName", "")), inputs, outputs))
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
            inputs, outputs = logged_tensors(found["inputs"]), logged_tensors(found["outputs"])
            layers.append(Layer(found["name"], found["type"], found["tactic"] or "", inputs, outputs))
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
