"""`inspect` on excerpts of what TensorRT 8.6's inspector tells of the engines of SD 1.5, built on an H200; no GPU."""

import hashlib
import io
import json
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from runtime.engine import Gpu
from runtime.manifest import EngineError, Manifest, StagePlan
from trt_builder import __main__ as cli
from trt_builder.inspect import (
    Attention,
    Layer,
    Node,
    Report,
    Timed,
    attentions,
    node,
    profile,
    read_report,
    write_report,
)
from trt_builder.terminal import kinds_table, short

EXCERPTS = json.loads((Path(__file__).parent / "data" / "tensorrt86_layers.json").read_text())
E11, D11, V = "unet_encoder/input_blocks.1.1", "unet_decoder/output_blocks.11.1", "vae_decoder/decoder/mid/attn_1"
E_REGION = f"{{ForeignNode[{E11}:to_tokens...{E11}:to_map]}}"
D_REGION = f"{{ForeignNode[unet_decoder:coefficients...{D11}:to_map]}}"

# The network's layers around those of the excerpts, in its order: name, type, inputs, output.
TRANSFORMER = [
    ("/norm", "PLUGIN_V2", "x", "normed"), ("/proj_in", "CONVOLUTION", "normed", "map"),
    (":to_tokens", "SHUFFLE", "map", "t0"),
    ("/transformer_blocks.0/attn1:softmax", "SOFTMAX", "t0", "t1"),
    ("/transformer_blocks.0:match_batch", "CONCATENATION", "t1", "t2"),
    ("/transformer_blocks.0/attn2:softmax", "SOFTMAX", "t2 k0", "t3"),
    (":to_map", "SHUFFLE", "t3", "back"), ("/proj_out", "CONVOLUTION", "back", "out"),
]  # fmt: skip
NETWORKS: dict[str, list[tuple[str, ...]]] = {
    "unet_encoder": [
        *((E11 + name, *rest) for name, *rest in TRANSFORMER),
        (f"{E11}:match_batch", "CONCATENATION", "x", "x2"), (f"{E11}:add", "ELEMENTWISE", "out x2", "skip1"),
    ],
    "unet_decoder": [
        *((D11 + name, *rest) for name, *rest in TRANSFORMER),
        (f"{D11}:add", "ELEMENTWISE", "out x", "y"),
        ("unet_decoder/out.0", "PLUGIN_V2", "y", "n"), ("unet_decoder/out.2", "CONVOLUTION", "n", "e"),
        ("unet_decoder:coefficients", "SHUFFLE", "coefficients", "c"), ("unet_decoder:a_x", "ELEMENTWISE", "c z", "ax"),
        ("unet_decoder:b_e", "ELEMENTWISE", "c e", "be"), ("unet_decoder:add_e", "ELEMENTWISE", "ax be", "x_next"),
    ],
    "vae_decoder": [
        (f"{V}/norm", "PLUGIN_V2", "x", "n"), (f"{V}/q", "CONVOLUTION", "n", "q"),
        (f"{V}:scores", "MATRIX_MULTIPLY", "q k", "s"), (f"{V}:softmax", "SOFTMAX", "s", "w"),
        (f"{V}:values", "MATRIX_MULTIPLY", "w v", "a"), (f"{V}/proj_out", "CONVOLUTION", "a", "o"),
    ],
}  # fmt: skip


class BareLayer:
    """A layer as a network gives it: what its type has is there only after the downcast."""

    def __init__(self, name: str, kind: str, inputs: str, output: str) -> None:
        self.name, self.type = name, SimpleNamespace(name=kind)
        self.inputs = [SimpleNamespace(name=word) for word in inputs.split()] + [None]  # an optional one left out
        self.num_inputs, self.num_outputs = len(self.inputs), 1
        self.get_input, self.get_output = self.inputs.__getitem__, [SimpleNamespace(name=output)].__getitem__


class PluginLayer(BareLayer):
    plugin = SimpleNamespace(plugin_type="GroupNorm")


def flavour(layers: list[dict[str, str]]) -> Any:
    """As much of TensorRT 8.6 as a report needs; its inspector tells of `layers`."""
    inspector = SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": layers}))
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    trt = SimpleNamespace(
        TensorFormat=IntEnum("TensorFormat", "LINEAR HWC8"),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine),
        LayerInformationFormat=SimpleNamespace(JSON=0),
        IPluginV2Layer=PluginLayer,
    )
    return SimpleNamespace(trt=trt)


@pytest.fixture
def engines(tmp_path) -> Path:
    """A folder of three engines that only their reports tell of."""
    sizes = {"height": 256, "width": 384, "samples": 1, "steps": 20}
    manifest = Manifest(
        "sd15", "tensorrt", "8.6.0", "H200", "9.0", [], "random:0", "0" * 64, sizes, {}, folder=tmp_path
    )
    for stage, defined in NETWORKS.items():
        tensors = [SimpleNamespace(name="x", allowed_formats=2, shape=(2, 4, 8, 8), dtype=SimpleNamespace(name="HALF"))]
        network = SimpleNamespace(
            num_inputs=1, get_input=tensors.__getitem__, num_outputs=0, num_layers=len(defined),
            get_layer=lambda i, defined=defined: BareLayer(*defined[i]),
        )  # fmt: skip
        write_report(tmp_path, stage, network, flavour(EXCERPTS[stage]), None, b"", "")
        manifest.plan_path(stage).write_bytes(stage.encode())
        digest = hashlib.sha256(stage.encode()).hexdigest()
        manifest = manifest.with_stage(stage, StagePlan("", digest, len(stage), 0.0))
    manifest.save()
    return tmp_path


def report_of(folder: Path, stage: str) -> Report:
    report = read_report(folder, stage)
    assert report is not None
    return report


def counts(report: Report) -> tuple[int, ...]:
    return len(report.attentions), report.fused, report.in_regions, report.spelt_out


def test_attentions_that_tensorrt_8_compiles_are_found_in_their_regions(engines):
    encoder, decoder = report_of(engines, "unet_encoder"), report_of(engines, "unet_decoder")
    assert counts(encoder) == (2, 0, 2, 0)
    blocks = "/transformer_blocks.0/"
    assert encoder.attentions == [Attention(f"{E11}{blocks}attn{i}:softmax", E_REGION) for i in (1, 2)]
    # This region begins with a layer that the network has after it, and joins two parts that are not connected.
    assert decoder.attentions == [Attention(f"{D11}{blocks}attn{i}:softmax", D_REGION) for i in (1, 2)]
    assert counts(report_of(engines, "vae_decoder")) == (1, 0, 0, 1)


def test_a_region_ends_where_the_engine_names_a_layer(engines):
    nodes = [Node("a:to_tokens", "SHUFFLE", "", ["x"], ["1"]), Node("a:softmax", "SOFTMAX", "", ["1"], ["2"]),
             Node("b", "CONVOLUTION", "", ["2"], ["3"]), Node("c:softmax", "SOFTMAX", "", ["3"], ["4"])]  # fmt: skip
    region = Layer("{ForeignNode[a:to_tokens...a:softmax]}", "Myelin")
    for name in ("b", "z + b", "b || z", "PWN(PWN(z), b)"):
        assert [a.region for a in attentions(nodes, [region, Layer(name, "x")])] == [region.name, ""]
    reformat = Layer(f"Reformatting CopyNode for Input Tensor 0 to {region.name}", "Reformat")
    assert [a.region for a in attentions(nodes, [reformat, Layer("b", "x"), Layer("a:softmax", "x")])] == ["", ""]
    side = [*nodes, Node("a:side", "SHUFFLE", "", ["1"], ["5"])]  # neither end comes after the softmax
    region = Layer("{ForeignNode[a:to_tokens...a:side]}", "Myelin")
    assert [a.region for a in attentions(side, [region, Layer("b", "x")])] == [region.name, ""]
    alone = Layer("{ForeignNode[c:softmax]}", "Myelin")
    assert [a.region for a in attentions(nodes, [alone, Layer("b", "x")])] == ["", alone.name]


def test_an_attention_of_our_plugin_is_one_kernel():
    nodes = [Node("a:own", "PLUGIN_V2", "CannyAttention", ["q"], ["y"]), Node("n", "PLUGIN_V2", "GroupNorm", [], [])]
    layers = [Layer(n.name, "PluginV2", plugin=n.plugin) for n in nodes]
    assert counts(Report([], [], layers, attentions(nodes, layers))) == (1, 1, 0, 0)
    assert [x.kind for x in layers] == ["CannyAttention", "GroupNorm"]


def test_the_two_launches_over_a_text_that_is_multiplied_out_are_one_attention():
    names = ("a/attn2:weights", "a/attn2/to_out.0")
    nodes = [Node(name, "PLUGIN_V2", "CannyCross", [], []) for name in names]
    layers = [Layer(n.name, "PluginV2", plugin=n.plugin) for n in nodes]
    report = Report([], [], layers, attentions(nodes, layers))
    assert counts(report) == (1, 1, 0, 0) and [x.kind for x in layers] == ["CannyCross"] * 2


def test_the_newer_interface_of_plugins_tells_their_type():
    plugin = SimpleNamespace(get_capability_interface=lambda which: SimpleNamespace(plugin_name=f"{which} name"))
    newer = type("IPluginV3Layer", (BareLayer,), {"plugin": plugin})
    trt = SimpleNamespace(IPluginV3Layer=newer, PluginCapabilityType=SimpleNamespace(CORE="core"))
    assert node(BareLayer("a", "PLUGIN_V3", "x y", "z"), trt) == Node("a", "PLUGIN_V3", "core name", ["x", "y"], ["z"])


def test_the_kinds_of_layers(engines):
    kinds = {x.name: x.kind for stage in NETWORKS for x in report_of(engines, stage).layers}
    assert kinds[f"{E11}/norm"] == kinds["unet_decoder/out.0"] == "GroupNorm"
    assert kinds[E_REGION] == "region" and kinds[f"{V}:softmax"] == "other"
    assert kinds[f"Reformatting CopyNode for Input Tensor 1 to {E_REGION}"] == "reformat"
    assert kinds[f"{E11}/proj_in"] == kinds[f"{V}:scores"] == "gemm" and kinds["unet_decoder/out.2"] == "convolution"
    pointwise = {x for x, kind in kinds.items() if kind == "pointwise"}
    assert pointwise == {f"{V}:0.04419 + {V}:scale", EXCERPTS["unet_decoder"][-1]["Name"]}
    assert Layer("a:cast", "MyelinReformat").kind == "reformat" and Layer("a:row", "NoOp").reformat
    assert Layer("__myl_AddMul_myl0_1", "kgen", "__myl_AddMul_0x1").kind == "generated"
    assert Layer("_gemm_mha_v2_myl0_3", "kgen", "_gemm_mha_v2_0x1").kind == "attention"


def test_a_layer_that_the_build_did_not_list_is_timed_all_the_same():
    report = Report([], [], [Layer("a", "CaskConvolution")], [])
    timed = profile({"hint": report, "time": None}, {"hint": {"a": 0.5, "b": 0.25}, "time": {"c": 1.0}})
    assert timed == [Timed("hint", report.layers[0], 0.5), Timed("hint", Layer("b", ""), 0.25),
                     Timed("time", Layer("c", ""), 1.0)]  # fmt: skip


def test_kernels_are_told_apart_by_their_short_names():
    tactics = [one["TacticName"] for stage in EXCERPTS for one in EXCERPTS[stage] if one["TacticName"]]
    assert short(tactics[0]) == "sm80_xmma_gemm_tilesize64x64x64_stage4"
    assert "sm90_xmma_fprop_implicit_gemm_tilesize64x64x64_cgasize4x1x1" in map(short, tactics)
    assert short("custom_kernel_f16") == "custom_kernel_f16" and len(short("x" * 90)) == 60


# -- the command ------------------------------------------------------------------------------------------------------


class FakeEngine:
    """An engine whose every layer takes as many microseconds as its name has letters."""

    def __init__(self, plan, flavour):
        self.stage = bytes(plan).decode()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def layer_times(self):
        return {one["Name"]: len(one["Name"]) / 1000 for one in EXCERPTS[self.stage]}


@pytest.fixture
def run(capsys, monkeypatch):
    """`inspect` on a machine with a GPU: status, standard output, standard error."""
    monkeypatch.setattr(cli, "ready", lambda manifest: None)
    monkeypatch.setattr(cli, "gpu", lambda: Gpu("H200", "9.0"))
    monkeypatch.setattr(cli, "Engine", FakeEngine)

    def run(*argv: object) -> tuple[int, str, str]:
        return cli.main(["inspect", *map(str, argv)]), *capsys.readouterr()

    return run


def rows(out: str, title: str) -> list[list[str]]:
    """The rows of the table whose title has these words."""
    lines = [line.strip() for line in out[out.index(title) :].splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("──")) + 1
    return [line.split() for line in lines[first : lines.index("", first)] if not line.startswith("──")]


def test_times_are_summed_by_kind(run, engines):
    status, out, _ = run(engines)
    assert status == 0 and "x  2×4×8×8" not in out
    counted = {row[0]: row[3:] for row in rows(out, "tensorrt 8.6.0")}
    assert counted["unet_decoder"] == ["7", "2", "0", "2", "0", "0", "0"]
    assert counted["vae_decoder"][1:5] == ["1", "0", "0", "1"]
    heading = next(line for line in out.splitlines() if "GroupNorm" in line).split()
    assert heading[:2] == ["stage", "all"] and set(heading[2:]) == {
        "region", "reformat", "gemm", "GroupNorm", "convolution", "pointwise", "other",
    }  # fmt: skip
    table = rows(out, "µs by kind")
    encoder = [len(one["Name"]) for one in EXCERPTS["unet_encoder"]]
    assert [row[0] for row in table] == list(NETWORKS) and float(table[0][1]) == sum(encoder)
    assert f"{len(E_REGION)}.0" in table[0] and f"{encoder[0]}.0" in table[0]


def test_a_step_is_the_sum_of_its_stages():
    conv, region = Layer("a", "CaskConvolution"), Layer("{ForeignNode[a]}", "Myelin")
    timed = [Timed("control", conv, 0.5), Timed("unet_encoder", conv, 0.25), Timed("unet_decoder", region, 2.0)]
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(kinds_table([*timed, Timed("hint", conv, 4.0)]))
    assert console.export_text().split("one step")[1].split() == ["2750.0", "750.0", "2000.0"]
    console.print(kinds_table(timed[:2]))
    assert "one step" not in console.export_text()  # it is none without the decoder


def test_the_slowest_layers_of_all_stages(run, engines):
    status, out, _ = run(engines, "--slowest", 3)
    everything = sorted(((len(one["Name"]), stage) for stage in EXCERPTS for one in EXCERPTS[stage]), reverse=True)
    assert status == 0
    assert [(float(row[0]), row[1]) for row in rows(out, "the 3 slowest layers")] == everything[:3]


def test_everything_as_json(run, engines, tmp_path):
    assert run(engines, "--json", tmp_path / "all.json")[0] == 0
    content = json.loads((tmp_path / "all.json").read_text())
    assert (content["gpu"], content["version"]) == ("H200", "8.6.0")
    for stage, layers in content["stages"].items():
        assert [x["name"] for x in layers] == [x["Name"] for x in EXCERPTS[stage]]
    first = content["stages"]["unet_encoder"][0]
    assert (first["kind"], first["mean_ms"], first["type"]) == ("GroupNorm", len(f"{E11}/norm") / 1000, "PluginV2")
    status, out, err = run(engines, "--json", tmp_path / "nowhere" / "all.json")
    assert status == 2 and "nowhere" in err and not out


def test_one_stage_tells_where_its_attentions_are(run, engines):
    status, out, _ = run(engines, "--stage", "unet_encoder")
    assert status == 0 and f"attn1:softmax  in {E_REGION}" in out and "2 in regions" in out
    assert "PluginV2 GroupNorm" in out
    assert out.index("x  2×4×8×8") < out.index("8 layers") < out.index("µs by kind") and "unet_decoder" not in out


def test_inputs_and_outputs_are_listed_on_demand_and_first(run, engines):
    _, out, _ = run(engines, "--bindings")
    assert 0 < out.index("x  2×4×8×8") < out.index("tensorrt 8.6.0")


def test_times_that_cannot_be_had_are_an_error_where_they_are_asked_for(run, engines, monkeypatch, tmp_path):
    def ready(manifest):
        raise EngineError("there is no GPU.")

    monkeypatch.setattr(cli, "ready", ready)
    status, out, _ = run(engines)
    assert status == 0 and "No times" in out and "µs" not in out and "in regions" in out
    for option in (["--slowest", 5], ["--json", tmp_path / "all.json"]):
        assert run(engines, *option) == (2, "", "trt_builder: there is no GPU.\n")
    assert run(engines, "--slowest", 0)[2] == "trt_builder: --slowest is 0, but the least is 1.\n"
