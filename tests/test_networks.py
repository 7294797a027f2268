"""Every stage as TensorRT holds it, evaluated by the interpreter, against its PyTorch twin; and faults that must show.

The weights are random and none is zero, so that no branch hides: a trained ControlNet's zero convolutions would.
"""

import re
from collections import Counter
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

import plugin_stand_ins  # noqa: E402

from plugins.load import fold_norm  # noqa: E402
from trt_builder import stages  # noqa: E402
from trt_builder.config import ModelConfig, Options, Shape  # noqa: E402
from trt_builder.flavour import get_flavour  # noqa: E402
from trt_builder.layers import Net  # noqa: E402
from trt_builder.unet import one_after_the_other  # noqa: E402
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


def errors(stage: str, defined: Defined, name: str = "tiny", shape: Shape = SMALL) -> dict[str, float]:
    """The relative error of each output, the network's against the twin's."""
    inputs, expected = cases(name, shape)[stage]
    result = evaluate(defined.network, inputs)
    return {key: error(result[key], expected[key]) for key in expected}


def check(stage: str, name: str, shape: Shape, options: Options, tolerance: float = TOLERANCE) -> None:
    """Names, order, shapes and types of the outputs, and their values."""
    _, expected = cases(name, shape)[stage]
    defined = Defined(stage, name, shape, options, arrays(name))
    floats = {torch.float32: {"FLOAT"} | ({"HALF"} if options.precision == "fp16" else set()), torch.uint8: {"UINT8"}}
    assert [o.name for o in defined.outputs] == list(expected)
    assert [tuple(o.shape) for o in defined.outputs] == [tuple(v.shape) for v in expected.values()]
    assert all(o.dtype.name in floats[expected[o.name].dtype] for o in defined.outputs)
    found = errors(stage, defined, name, shape)
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


@pytest.mark.parametrize("shape", [SMALL, Shape(64, 128, samples=3)], ids=["1", "3"])
@pytest.mark.parametrize("conv", ["builtin", "own"])
@pytest.mark.parametrize("stage", ["control", "unet_encoder", "unet_decoder", "unet_decoder_cond"])
def test_with_our_plugins(monkeypatch: pytest.MonkeyPatch, stage: str, conv: Any, shape: Shape) -> None:
    """What they get and what is done with it, the plugins themselves being spelt out."""
    added = plugin_stand_ins.use(monkeypatch)
    check(stage, "tiny", shape, Options("fp32", attention="own", group_norm="own", residual="own", conv=conv))
    gates, blocks = added.count("CannyGeglu"), added.count("CannyAttention") // 2
    assert blocks and added.count("CannyLayerNorm") == 3 * blocks
    assert gates == blocks if conv == "builtin" else gates == 0 if shape == SMALL else 0 < gates <= blocks
    assert added.count("CannyGroupNorm") > blocks and (added.count("CannyConv") > 3) == (conv != "builtin")
    assert conv != "builtin" or ("CannyAdd" in added) == ("decoder" not in stage)
    assert ("CannyJoinNorm" in added) == ("decoder" in stage) and "CannyJoin" not in added
    assert added.count("CannyUpdate") == ("decoder" in stage)


def test_joins_without_our_group_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    added = plugin_stand_ins.use(monkeypatch)
    check("unet_decoder", "tiny", SMALL, Options("fp32", residual="own"))
    assert "CannyJoin" in added and "CannyJoinNorm" not in added


def test_our_plugins_alone_read_the_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer of TensorRT's stands between the scales and the residuals, nor puts one on the middle block's output."""
    lines: list[int] = []

    def join(network: Any, *inputs: Any, index: int, x_index: int) -> Any:
        assert inputs[3].name == "scales" and inputs[2].name == f"residual{index}"
        assert x_index < 0 or [inputs[0].name, inputs[4].name] == ["middle", f"residual{x_index}"]
        lines.extend(line for line in (x_index, index) if line >= 0)
        return plugin_stand_ins.join(network, *inputs, index=index, x_index=x_index)

    plugin_stand_ins.use(monkeypatch)
    monkeypatch.setitem(plugin_stand_ins.MAKE, "CannyJoin", join)
    for stage in ("unet_decoder", "unet_decoder_cond"):
        defined = Defined(stage, "tiny", SMALL, Options("fp32", residual="own"), arrays("tiny"))
        assert lines == list(reversed(range(len(lines)))) and len(lines) > 4
        names = [layer.name for layer in defined.layers]
        assert not [name for name in names if re.search(r":(scales|scale\d+|add_residual\d+)$", name)]
        lines.clear()


def test_which_convolutions_take_a_second_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shortcut, and the way back from a feed-forward before the one out of its transformer, whose residual may have
    half of the batch; where they are too large each is on its own.
    """
    plugin_stand_ins.use(monkeypatch)
    found: Counter[tuple[int, int, int]] = Counter()  # by size, batch and that of the residual

    def conv(network: Any, x: Any, weight: Any, bias: Any, *rest: Any, **fields: int) -> Any:
        if fields["second"]:
            found[fields["size"], x.shape[0], rest[1].shape[0] if fields["residual"] else 0] += 1
        return plugin_stand_ins.conv(network, x, weight, bias, *rest, **fields)

    monkeypatch.setitem(plugin_stand_ins.MAKE, "CannyConv", conv)
    small = {(3, 1, 0): 1, (3, 2, 0): 1, (1, 2, 1): 1, (1, 2, 2): 2}
    wide = {(3, 1, 0): 1, (3, 2, 0): 1, (1, 2, 2): 2}
    for stage, shape, expected in (
        ("unet_encoder", SMALL, small), ("unet_encoder", Shape(64, 128), wide),
        ("unet_decoder", SMALL, {(3, 2, 0): 6, (1, 2, 2): 4}),
    ):  # fmt: skip
        found.clear()
        check(stage, "tiny", shape, Options("fp32", attention="own", conv="own"))
        assert found == expected


def test_weights_one_after_the_other_must_fit() -> None:
    given = {"a.weight": np.full((64, 256), 30.0), "a.bias": np.ones(64), "b.bias": np.full(64, 0.5)}
    for size, fits in ((1.0, True), (60.0, False)):
        weights = Weights.from_dict(given | {"b.weight": np.full((64, 64, 1, 1), size)})
        net = Net(None, get_flavour("tensorrt_rtx"), weights, Options(), "", "", np.float16)  # type: ignore[arg-type]
        if fits:
            weight, bias = one_after_the_other(net.at("a"), net.at("b"))
            assert weight.shape == (64, 256, 1, 1) and weight.dtype == np.float16 and (weight == 64 * 30).all()
            assert bias.dtype == np.float32 and (bias == 64.5).all()
            continue
        with pytest.raises(ValueError, match="weight of b times that before it is too large for float16: use --conv"):
            one_after_the_other(net.at("a"), net.at("b"))


@pytest.mark.parametrize("qkv", ["joined", "apart"])
@pytest.mark.parametrize("shape", [SMALL, Shape(64, 128, samples=1, steps=3)], ids=["64", "128"])
@pytest.mark.parametrize("stage", ["control", "unet_encoder", "unet_decoder"])
def test_layer_norms_in_our_convolutions(monkeypatch: pytest.MonkeyPatch, stage: str, shape: Shape, qkv: Any) -> None:
    """All of them where every convolution is small enough, else those of the deeper maps."""
    added = plugin_stand_ins.use(monkeypatch)
    check(stage, "tiny", shape, Options("fp32", attention="own", qkv=qkv, conv="own", layer_norm="folded"))
    norms, all_of_them = added.count("CannyLayerNorm"), 3 * added.count("CannyAttention") // 2
    assert norms == 0 if shape == SMALL else 0 < norms < all_of_them


def test_attention_of_our_plugins_with_q_k_and_v_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    added = plugin_stand_ins.use(monkeypatch)
    check("unet_encoder", "tiny", SMALL, Options("fp32", attention="own", qkv="apart"))
    assert "CannyConv" not in added and added.count("CannyLayerNorm") == 3 * added.count("CannyGeglu") > 0


def test_a_fold_needs_our_convolutions_and_numbers_that_fit() -> None:
    with pytest.raises(ValueError, match="unless attention and conv are 'own'"):
        Options(attention="own", layer_norm="folded")
    weight, row = np.full((64, 64, 1, 1), 300.0, np.float16), np.full(64, 300.0, np.float32)
    with pytest.raises(ValueError, match="too large for float16"):
        fold_norm(weight, row, row, row)
    folded, bias, sums = fold_norm(weight, row, row / 300, row)
    assert folded.dtype == np.float16 and (folded == weight).all()
    assert (sums == 300 * 64).all() and (bias == 300 + 300 * 300 * 64).all()


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
