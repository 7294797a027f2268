"""Every stage as TensorRT holds it, evaluated by the interpreter, against its PyTorch twin; and faults that must show.

The weights are random and none is zero, so that no branch hides: a trained ControlNet's zero convolutions would.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trt_interpreter import evaluate

from cldm import stages as twins
from cldm.cldm import ControlLDM
from cldm.model import create_model

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed: no network can be defined")

from trt_builder import stages  # noqa: E402
from trt_builder.config import ModelConfig, Options, Shape  # noqa: E402
from trt_builder.flavour import get_flavour  # noqa: E402
from trt_builder.weights import Weights  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
YAMLS = {
    "tiny": ROOT / "models" / "tiny" / "tiny.yaml",
    "wide": ROOT / "tests" / "data" / "wide.yaml",
    "sd15": ROOT / "models" / "cldm_v15.yaml",
}
LOGGER = trt.Logger(trt.Logger.ERROR)
STAGES = list(twins.STAGES)
SMALL = Shape(64, 64, samples=1, steps=3)
TOLERANCE = 1e-4
PLAIN = Options("fp32", attention="plain", qkv="apart", shared_prefix=False)
FUSED = Options("fp32", attention="fused", qkv="joined", shared_prefix=True)

Tensors = dict[str, Tensor]
Arrays = dict[str, np.ndarray]


@lru_cache(maxsize=1)
def model(name: str) -> ControlLDM:
    """A model with random weights, those that start at zero included; float32 numbers that float16 can hold."""
    torch.manual_seed(0)
    made = create_model(YAMLS[name])
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.normal_(0, 1.3 * module.weight[0].numel() ** -0.5)
            elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.weight.normal_(1, 0.2)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, 0.7)
        for parameter_name, parameter in made.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.2)
            if "decoder.conv_out" in parameter_name:
                parameter.mul_(0.4)  # pictures mostly within [-1, 1]
            parameter.copy_(parameter.half())
    return made


@lru_cache(maxsize=1)
def arrays(name: str) -> Arrays:
    return {key: value.numpy() for key, value in model(name).state_dict().items()}


@lru_cache(maxsize=2)
def cases(name: str, shape: Shape) -> dict[str, tuple[Tensors, Tensors]]:
    """Inputs and the twin's outputs of every stage; a stage is fed what the stages before it made."""
    torch.manual_seed(1)
    n, h, w = shape.samples, shape.h, shape.w
    x, tokens = torch.randn(n, 4, h, w), torch.randint(0, 4096, (2 * n, 77))
    edges, picture = torch.rand(1, 3, shape.height, shape.width), torch.rand(n, shape.height, shape.width, 3)
    made: dict[str, tuple[Tensors, Tensors]] = {}

    def run(stage: str, inputs: Tensors) -> Tensors:
        with torch.no_grad():
            made[stage] = inputs, twins.STAGES[stage](model(name), inputs)
        return made[stage][1]

    rows = run("time", {"timesteps": torch.tensor([981, 7, 500])[: shape.steps]})
    shared = run("clip", {"tokens": tokens}) | {name: row[1:2] for name, row in rows.items()}

    def given(stage: str) -> Tensors:
        return {key.removeprefix(f"{stage}."): v for key, v in shared.items() if key.startswith(f"{stage}.")}

    latent = {"x": x, **run("hint", {"edges": edges})}
    encoded = run("unet_encoder", {"x": x, **given("unet_encoder")}) | run("control", latent | given("control"))
    count = sum(key.startswith("residual") for key in encoded)
    update = {"x": x, "noise": torch.randn_like(x), "e1": torch.randn_like(x), "e2": torch.randn_like(x)}
    update |= {"guidance": torch.tensor([7.3]), "coefficients": torch.tensor([0.9, -0.3, 0.2, -0.1])}
    update |= {"scales": 0.5 + torch.rand(count, 2 * n)}
    made_of_both = run("unet_decoder", {**encoded, **given("unet_decoder"), **update})

    def halved(tensors: Tensors) -> Tensors:
        return {key: tensor[:n] if len(tensor) == 2 * n else tensor for key, tensor in tensors.items()}

    half = run("unet_encoder_cond", {"x": x, **halved(given("unet_encoder"))})
    half = half | run("control_cond", latent | halved(given("control"))) | {"difference": made_of_both["difference"]}
    run("unet_decoder_cond", {**half, **halved(given("unet_decoder")), **update})
    run("vae_decoder", {"x": x})
    run("vae_encoder", {"picture": (picture * 255).to(torch.uint8)})
    return made


class Defined:
    """A stage's network; it holds the weights and the builder, which must outlive it."""

    def __init__(
        self, stage: str, name: str, shape: Shape, options: Options, weights: Mapping[str, np.ndarray]
    ) -> None:
        flavour = get_flavour("tensorrt_rtx")
        self.weights = Weights.from_dict(weights)
        self.builder = flavour.create_builder(LOGGER)
        self.network: Any = flavour.create_network(self.builder)
        config = ModelConfig.load(YAMLS[name])
        stages.define(stage, self.network, flavour, config, self.weights, shape, options)
        self.outputs = [self.network.get_output(i) for i in range(self.network.num_outputs)]

    @property
    def layers(self) -> list[Any]:
        return [self.network.get_layer(i) for i in range(self.network.num_layers)]

    def named(self, end: str) -> Any:
        """The one layer whose name ends so."""
        (found,) = [layer for layer in self.layers if layer.name.endswith(end)]
        return found

    def remove(self, layer: Any) -> None:
        """Let those that read a layer's output read its first input instead."""
        output = layer.get_output(0).name
        for other in self.layers:
            for i in range(other.num_inputs):
                if other.get_input(i).name == output:
                    other.set_input(i, layer.get_input(0))


def error(result: Tensor, expected: Tensor) -> float:
    """‖a − b‖ / ‖b‖; of whole numbers, where truncation makes a step of the last bit, what is more than 1 in 1000."""
    difference = result.double() - expected.double()
    if not expected.is_floating_point() and difference.abs().max() <= 1:
        return float((difference != 0).double().mean() > 1e-3)
    return float(difference.norm() / expected.double().norm())


def errors(stage: str, defined: Defined) -> dict[str, float]:
    """The relative error of each output of the small model's network against the twin's."""
    inputs, expected = cases("tiny", SMALL)[stage]
    result = evaluate(defined.network, inputs)
    return {key: error(result[key], expected[key]) for key in expected}


def check(
    stage: str, name: str, shape: Shape, options: Options, tolerance: float = TOLERANCE,
    case: tuple[Tensors, Tensors] | None = None,
) -> None:  # fmt: skip
    """Names, order, shapes and types of the outputs, and their values; of this case, or of the stage's."""
    inputs, expected = case or cases(name, shape)[stage]
    defined = Defined(stage, name, shape, options, arrays(name))
    floats = {torch.float32: {"FLOAT"} | ({"HALF"} if options.precision == "fp16" else set()), torch.uint8: {"UINT8"}}
    assert [o.name for o in defined.outputs] == list(expected)
    assert [tuple(o.shape) for o in defined.outputs] == [tuple(v.shape) for v in expected.values()]
    assert all(o.dtype.name in floats[expected[o.name].dtype] for o in defined.outputs)
    result = evaluate(defined.network, inputs)
    found = {key: error(result[key], expected[key]) for key in expected}
    assert max(found.values()) < tolerance, found


# -- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [FUSED, PLAIN], ids=["fused", "plain"])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("size", [(64, 64), (128, 192)], ids=["64x64", "128x192"])
@pytest.mark.parametrize("stage", STAGES)
def test_tiny(stage: str, size: tuple[int, int], samples: int, options: Options) -> None:
    check(stage, "tiny", Shape(*size, samples=samples, steps=3), options)


@pytest.mark.parametrize("options", [FUSED, PLAIN], ids=["fused", "plain"])
@pytest.mark.parametrize("stage", STAGES)
def test_wide(stage: str, options: Options) -> None:
    check(stage, "wide", SMALL, options)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("stage", ["control", "unet_encoder", "unet_decoder", "vae_decoder", "vae_encoder"])
def test_wide_not_square(stage: str, samples: int) -> None:
    check(stage, "wide", Shape(64, 128, samples=samples), FUSED)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_full_size(stage: str) -> None:
    """Half a minute for all stages, and 7 GB."""
    check(stage, "sd15", SMALL, FUSED)


@pytest.mark.parametrize("stage", STAGES)
def test_half_precision_has_the_same_graph(stage: str) -> None:
    """The types fit together; numbers differ where constants that are no weights were rounded to half precision."""
    check(stage, "tiny", SMALL, Options("fp16"), tolerance=5e-4)


@pytest.mark.parametrize("switch", [{"attention": "plain"}, {"qkv": "apart"}, {"shared_prefix": False}], ids=str)
@pytest.mark.parametrize("stage", ["clip", "control", "unet_encoder", "unet_decoder", "vae_decoder"])
def test_one_switch(stage: str, switch: Mapping[str, Any]) -> None:
    check(stage, "tiny", SMALL, Options("fp32", **switch))


@pytest.mark.parametrize("stage", ["unet_decoder", "vae_decoder"])
def test_upsampling_in_a_transposed_convolution(stage: str) -> None:
    check(stage, "tiny", SMALL, Options("fp32", upsample="folded"))
    defined = Defined(stage, "tiny", SMALL, Options("fp32", upsample="folded"), arrays("tiny"))
    kinds = [layer.type.name for layer in defined.layers]
    assert "DECONVOLUTION" in kinds and "RESIZE" not in kinds


def test_switches_change_the_network() -> None:
    def counts(options: Options) -> tuple[int, int, int]:
        defined = Defined("unet_encoder", "tiny", SMALL, options, arrays("tiny"))
        kinds = [layer.type.name for layer in defined.layers]
        first = defined.named("input_blocks.0.0").get_output(0).shape[0]
        return kinds.count("ATTENTION_INPUT"), kinds.count("MATRIX_MULTIPLY"), first

    attentions, products, rows = counts(FUSED)
    assert attentions and rows == SMALL.samples
    assert counts(Options("fp32", attention="plain")) == (0, products + 2 * attentions, rows)
    assert counts(Options("fp32", qkv="apart")) == (attentions, products + attentions, rows)  # 2 a self-attention
    assert counts(Options("fp32", shared_prefix=False)) == (attentions, products, SMALL.batch)


# -- faults that must show --------------------------------------------------------------------------------------------


def fails(stage: str, defined: Defined) -> bool:
    return max(errors(stage, defined).values()) > TOLERANCE


def changed(**weights: np.ndarray) -> Arrays:
    return {**arrays("tiny"), **weights}


BLOCK = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0."


def one_number(name: str) -> Arrays:
    weight = arrays("tiny")[name].copy()
    weight.flat[weight.size // 2] += 0.5
    return changed(**{name: weight})


def transposed(name: str) -> Arrays:
    return changed(**{name: np.ascontiguousarray(arrays("tiny")[name].T)})


def swapped(a: str, b: str) -> Arrays:
    return changed(**{a: arrays("tiny")[b], b: arrays("tiny")[a]})


WRONG_WEIGHTS: list[tuple[str, Callable[[], Arrays]]] = [
    ("hint", lambda: one_number("control_model.input_hint_block.4.weight")),
    ("control", lambda: one_number("control_model.zero_convs.2.0.bias")),
    ("control", lambda: transposed("control_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight")),
    ("unet_encoder", lambda: one_number("model.diffusion_model.input_blocks.1.0.in_layers.2.weight")),
    ("unet_encoder", lambda: one_number(BLOCK + "norm2.bias")),
    ("unet_encoder", lambda: transposed(BLOCK + "attn1.to_out.0.weight")),
    ("unet_encoder", lambda: transposed(BLOCK + "attn1.to_k.weight")),
    ("unet_encoder", lambda: swapped(BLOCK + "attn1.to_k.weight", BLOCK + "attn1.to_v.weight")),
    ("unet_encoder", lambda: swapped(BLOCK + "attn1.to_q.weight", BLOCK + "attn1.to_k.weight")),
    ("unet_decoder", lambda: one_number("model.diffusion_model.output_blocks.2.0.skip_connection.weight")),
    ("clip", lambda: transposed("cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight")),
    ("clip", lambda: swapped(BLOCK + "attn2.to_k.weight", BLOCK + "attn2.to_v.weight")),
    ("time", lambda: transposed("control_model.time_embed.2.weight")),
    (
        "time",
        lambda: swapped(
            "model.diffusion_model.middle_block.0.emb_layers.1.weight",
            "model.diffusion_model.middle_block.2.emb_layers.1.weight",
        ),
    ),
    ("vae_decoder", lambda: one_number("first_stage_model.decoder.up.1.upsample.conv.weight")),
    ("vae_encoder", lambda: one_number("first_stage_model.encoder.down.0.downsample.conv.weight")),
]


@pytest.mark.parametrize("stage, weights", WRONG_WEIGHTS, ids=[f"{i}-{w[0]}" for i, w in enumerate(WRONG_WEIGHTS)])
def test_wrong_weights_show(stage: str, weights: Callable[[], Arrays]) -> None:
    assert not fails(stage, Defined(stage, "tiny", SMALL, FUSED, arrays("tiny")))
    assert fails(stage, Defined(stage, "tiny", SMALL, FUSED, weights()))


@pytest.mark.parametrize(
    "stage", ["clip", "control", "unet_encoder", "unet_decoder", "unet_decoder_cond", "vae_decoder", "vae_encoder"]
)
def test_every_missing_sum_shows(stage: str) -> None:
    """Residuals, time rows, hint, biases, control's residuals, the update: each addition left out, one at a time."""
    names = [layer.name for layer in Defined(stage, "tiny", SMALL, FUSED, arrays("tiny")).layers if is_sum(layer)]
    assert len(names) > 5
    unnoticed = []
    for name in names:
        defined = Defined(stage, "tiny", SMALL, FUSED, arrays("tiny"))
        defined.remove(defined.named(name))
        if not fails(stage, defined):
            unnoticed.append(name)
    assert not unnoticed


def is_sum(layer: Any) -> bool:
    """Whether a layer is an addition whose result other layers read, with the shape of its first input."""
    if layer.type.name != "ELEMENTWISE" or layer.get_output(0).is_network_output:
        return False
    layer.__class__ = trt.IElementWiseLayer
    return layer.op == trt.ElementWiseOperation.SUM and tuple(layer.get_input(0).shape) == tuple(
        layer.get_output(0).shape
    )


@pytest.mark.parametrize("stage", ["control", "unet_encoder", "unet_decoder"])
@pytest.mark.parametrize("a, b", [("k0", "v0"), ("row1", "row2"), ("row2", "row3")])
def test_swapped_inputs_show(stage: str, a: str, b: str) -> None:
    """What a wrong order of the inputs would do, where their shapes let it pass."""
    defined = Defined(stage, "tiny", SMALL, FUSED, arrays("tiny"))
    inputs, expected = cases("tiny", SMALL)[stage]
    result = evaluate(defined.network, inputs | {a: inputs[b], b: inputs[a]})
    assert max(error(result[key], expected[key]) for key in expected) > TOLERANCE
