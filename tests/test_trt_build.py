"""Every stage becomes a plan: TensorRT-RTX builds for GPUs that this machine does not have."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trt_builder.config import ModelConfig, Options, Shape
from trt_builder.flavour import Flavour, FlavourError, get_flavour
from trt_builder.stages import STAGES, define
from trt_builder.text import cross_attentions
from trt_builder.weights import Weights, WeightsError, expected_shapes

pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13")

FP16, FP32 = Options(), Options(precision="fp32")
SQUARE, WIDE = Shape(128, 128, samples=1), Shape(128, 192, samples=2)


class Bench:
    """One builder for all tests, and the tiny model with random weights."""

    def __init__(self) -> None:
        self.flavour: Flavour = get_flavour("tensorrt_rtx")
        trt = self.flavour.trt

        class Log(trt.ILogger):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.lines: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.WARNING:
                    self.lines.append(message)

        self.log = Log()
        self.builder = self.flavour.create_builder(self.log)
        self.config = ModelConfig.load("tiny")
        self.weights = random_weights(self.config)

    def network(self, stage: str, shape: Shape, options: Options, **changes: Any) -> Any:
        network = self.flavour.create_network(self.builder)
        define(stage, network, replace(self.flavour, **changes), self.config, self.weights, shape, options)
        return network

    def plan(self, network: Any, options: Options, *targets: str) -> Any:
        self.log.lines.clear()
        config = self.flavour.create_config(self.builder, options, targets)
        return self.flavour.serialize(self.builder, network, config)


def random_weights(config: ModelConfig) -> Weights:
    rng = np.random.default_rng(0)
    fan_in = {name: max(1, int(np.prod(shape[1:]))) for name, shape in expected_shapes(config).items()}
    return Weights.from_dict(
        {
            name: (rng.standard_normal(shape, np.float32) * fan_in[name] ** -0.5).astype(np.float16)
            for name, shape in expected_shapes(config).items()
        }
    )


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.weights.release()


@pytest.mark.parametrize("target", ["sm86", "sm89", "sm120"])
@pytest.mark.parametrize("shape", [SQUARE, WIDE], ids=["128x128-n1", "128x192-n2"])
@pytest.mark.parametrize("options", [FP16, FP32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_serialises(bench: Bench, stage: str, options: Options, shape: Shape, target: str) -> None:
    network = bench.network(stage, shape, options)
    plan = bench.plan(network, options, target)
    assert plan is not None, bench.log.lines
    assert plan.nbytes > 100_000
    assert not bench.log.lines  # nothing refused, nothing unused, nothing converted behind our back


@pytest.mark.parametrize(
    "options",
    [
        Options(attention="plain"),
        Options(qkv="apart"),
        Options(shared_prefix=False),
        Options(group_norm="native"),
        Options(precision="fp32", attention="plain", qkv="apart", shared_prefix=False),
    ],
    ids=lambda o: "-".join(str(v) for v in o.as_dict().values()),
)
@pytest.mark.parametrize("stage", ["clip", "control", "unet_decoder"])
def test_every_switch_serialises(bench: Bench, stage: str, options: Options) -> None:
    assert bench.plan(bench.network(stage, WIDE, options), options, "sm86") is not None, bench.log.lines


@pytest.mark.parametrize("stage", STAGES)
def test_older_forms_serialise(bench: Bench, stage: str) -> None:
    """What the definition writes where the API has no attention, no GELU and no GroupNorm per channel."""
    old = {"attention": None, "scale_scores": True, "normalization": "add_normalization", "gelu": False}
    assert bench.plan(bench.network(stage, SQUARE, FP16, **old), FP16, "sm86") is not None, bench.log.lines


def test_stages_are_those_of_the_twins() -> None:
    twins = pytest.importorskip("cldm.stages")
    assert tuple(twins.STAGES) == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_definition_is_deterministic_and_names_are_unique(bench: Bench, stage: str) -> None:
    def names() -> list[str]:
        network = bench.network(stage, SQUARE, FP16)
        return [network.get_layer(i).name for i in range(network.num_layers)]

    first = names()
    assert first == names()
    assert len(set(first)) == len(first)
    assert all(name.startswith(stage) for name in first)


def test_layers_carry_checkpoint_names(bench: Bench) -> None:
    network = bench.network("unet_encoder", SQUARE, FP16)
    names = {network.get_layer(i).name for i in range(network.num_layers)}
    assert "unet_encoder/input_blocks.1.0/in_layers.2" in names
    assert "unet_encoder/input_blocks.1.1/transformer_blocks.0/attn2/to_out.0" in names


@pytest.mark.parametrize("options", [FP16, FP32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("stage", STAGES)
def test_types_and_layouts_of_the_boundary(bench: Bench, stage: str, options: Options) -> None:
    trt = bench.flavour.trt
    half = trt.float16 if options.precision == "fp16" else trt.float32
    last = 1 << int(trt.TensorFormat.HWC8 if options.precision == "fp16" else trt.TensorFormat.HWC)
    exact = {"x", "e", "e1", "e2", "difference", "x_next", "noise", "scales", "guidance", "coefficients"}
    types = {"tokens": trt.int32, "timesteps": trt.int32, "picture": trt.uint8} | dict.fromkeys(exact, trt.float32)
    network = bench.network(stage, WIDE, options)
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    for tensor in tensors:
        is_map = tensor.name.rstrip("0123456789") in ("hint", "residual", "skip", "middle")
        assert tensor.dtype == types.get(tensor.name, half), tensor.name
        assert tensor.allowed_formats == (last if is_map else 1 << int(trt.TensorFormat.LINEAR)), tensor.name


def count(network: Any, kind: str) -> int:
    return sum(network.get_layer(i).type.name == kind for i in range(network.num_layers))


def test_switches_change_what_they_say(bench: Bench) -> None:
    def built(**options: Any) -> Any:
        return bench.network("unet_encoder", WIDE, Options(**options))

    usual = built()
    attentions = 2 * len(cross_attentions(bench.config, "unet_encoder"))
    assert count(usual, "ATTENTION_INPUT") == attentions
    assert count(built(attention="plain"), "SOFTMAX") == attentions
    # Apart, each self-attention has three products instead of one, and needs no three slices.
    assert count(built(qkv="apart"), "MATRIX_MULTIPLY") == count(usual, "MATRIX_MULTIPLY") + attentions
    assert count(built(qkv="apart"), "SLICE") == count(usual, "SLICE") - 3 * attentions // 2

    def first_map(network: Any) -> tuple[int, ...]:
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        return next(tuple(x.get_output(0).shape) for x in layers if x.name.endswith("input_blocks.1.0/in_layers.2"))

    def formats(network: Any) -> set[int]:
        return {network.get_output(i).allowed_formats for i in range(network.num_outputs)}

    assert len(formats(usual)) == 1 and formats(usual) != formats(built(boundary="linear"))
    assert first_map(usual)[0] == WIDE.samples
    assert first_map(built(shared_prefix=False))[0] == WIDE.batch


def test_weights_are_used_in_place(bench: Bench) -> None:
    """Weights that have the network's precision already are handed over as they are: only joined ones are copied."""
    weights = bench.weights
    weights.release()
    network = bench.network("unet_encoder", SQUARE, Options(qkv="apart"))
    own = [id(weights[name]) for name in weights]
    large = [array for array in weights._kept if array.size > 10_000]
    assert large and all(id(array) in own for array in large)
    del network
    weights.release()


def test_refusals_are_sentences(bench: Bench) -> None:
    with pytest.raises(ValueError, match="there is no stage 'unet'"):
        bench.network("unet", SQUARE, FP16)
    with pytest.raises(FlavourError, match="TensorRT-RTX takes no plugins; use the option"):
        bench.network("vae_decoder", SQUARE, Options(group_norm="builtin"))
    with pytest.raises(FlavourError, match="cannot build for sm90: it knows sm75, sm80"):
        bench.flavour.create_config(bench.builder, FP16, ["sm90"])
    with pytest.raises(FlavourError, match="there is no flavour 'onnx'"):
        get_flavour("onnx")
    for sides in ((100, 128), (128, 0), (128, -64)):
        with pytest.raises(ValueError, match="must be a multiple of 64 from 64"):
            Shape(*sides)
    with pytest.raises(ValueError, match="the number of samples is 0"):
        Shape(64, 64, samples=0)
    with pytest.raises(ValueError, match="the option precision is 'int8'"):
        Options(precision="int8")  # type: ignore[arg-type]
    large = {name: np.asarray(bench.weights[name]) for name in bench.weights}
    name = "control_model.input_hint_block.0.bias"
    large[name] = np.full_like(large[name], 1, np.float32) * 1e5
    network = bench.flavour.create_network(bench.builder)
    with pytest.raises(WeightsError, match=f"{name} holds 1e\\+05, which float16 cannot"):
        define("hint", network, bench.flavour, bench.config, Weights.from_dict(large), SQUARE, FP16)


@pytest.mark.slow
def test_full_size_serialises(record_property: Any, capsys: Any) -> None:
    """Stable Diffusion 1.5 at 256×384: every stage, with its seconds and the process's peak memory."""
    bench = Bench()
    bench.config = ModelConfig.load("sd15")
    bench.weights = random_weights(bench.config)
    options, shape = Options(), Shape(256, 384)
    for stage in STAGES:
        start = time.perf_counter()
        network = bench.network(stage, shape, options)
        plan = bench.plan(network, options, "sm86", "sm89", "sm120")
        seconds = time.perf_counter() - start
        assert plan is not None, (stage, bench.log.lines)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        line = f"{stage}: {seconds:.1f} s, plan {plan.nbytes / 2**20:.0f} MiB, peak {peak:.1f} GiB"
        record_property(stage, line)
        with capsys.disabled():
            print(f"\n{line}", end="")
        assert peak < 12
        del network, plan
        bench.weights.release()


@pytest.mark.parametrize("name", ["tiny", "sd15"])
def test_expected_shapes_are_those_of_the_torch_model(name: str) -> None:
    model = pytest.importorskip("cldm.model")
    from models import description

    state = model.create_model(description(name), device="meta").state_dict()
    # The schedule's constants have no dot in their names; no stage needs them.
    wanted = {key: tuple(value.shape) for key, value in state.items() if "." in key}
    assert expected_shapes(ModelConfig.load(name)) == wanted


def test_weights_from_a_file(tmp_path: Path) -> None:
    numpy_format = pytest.importorskip("safetensors.numpy")
    arrays = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.ones(3, np.int8), "c": np.eye(2)}
    path = tmp_path / "w.safetensors"
    numpy_format.save_file(arrays, path)
    weights = Weights.open(path)
    assert set(weights) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(weights[name], array)
    assert np.shares_memory(weights["a"], weights.cast("a", np.float16))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="is damaged or cut short"):
        Weights.open(path)
    path.write_bytes(b"nonsense that is no header")
    with pytest.raises(WeightsError, match="is damaged or cut short"):
        Weights.open(path)
    with pytest.raises(FileNotFoundError, match="there are no weights at"):
        Weights.open(tmp_path / "absent.safetensors")


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    array = torch.randn(4, 5).to(torch.bfloat16)
    save_file({"a": array}, tmp_path / "w.safetensors")
    np.testing.assert_array_equal(Weights.open(tmp_path / "w.safetensors")["a"], array.float().numpy())


def test_check_names_ten() -> None:
    config = ModelConfig.load("tiny")
    arrays = {name: np.zeros(shape, np.float16) for name, shape in expected_shapes(config).items()}
    Weights.from_dict(arrays).check(config)
    gone = [name for name in arrays if name.startswith("control_model.")][:12]
    rest = {name: array for name, array in arrays.items() if name not in gone}
    rest["first_stage_model.quant_conv.bias"] = np.zeros(3, np.float16)
    with pytest.raises(WeightsError) as caught:
        Weights.from_dict(rest).check(config)
    message = str(caught.value)
    assert "12 missing: " in message and gone[9] in message and gone[10] not in message
    assert "1 wrong-shaped: first_stage_model.quant_conv.bias (3,) instead of (8,)" in message


def test_bad_yaml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    text = (Path(__file__).parent.parent / "models" / "tiny" / "tiny.yaml").read_text()
    for old, new, message in [
        ("model:", "models:", "no `model` at its top level"),
        ("cldm.cldm.ControlNet", "cldm.cldm.T2I", "unknown target 'cldm.cldm.T2I'"),
        ("num_heads: 4", "heads: 4", "ControlNet: "),
        ("z_channels: 4, ", "", "AutoencoderKL: ddconfig leaves out z_channels"),
    ]:
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=message):
            ModelConfig.load(path)
    with pytest.raises(FileNotFoundError, match="there is no model description"):
        ModelConfig.load("sdxl")
