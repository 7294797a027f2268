"""The stages of a step with our plugins, spelt out in TensorRT's own layers, against their PyTorch twins."""

import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed: no network can be defined")

import plugin_stand_ins  # noqa: E402
from test_networks import SMALL, Defined, Tensors, arrays, cases, check, model  # noqa: E402

from bench.attention import attentions  # noqa: E402
from bench.conv import convolutions  # noqa: E402
from cldm.text import text_map, transformer_blocks  # noqa: E402
from plugins import load as loading  # noqa: E402
from plugins.call import Attention  # noqa: E402
from plugins.conv_calls import Conv  # noqa: E402
from plugins.load import fold_norm, text_columns  # noqa: E402
from trt_builder.clip import has_own_encoder  # noqa: E402
from trt_builder.config import CLIPConfig, ModelConfig, Options, Shape  # noqa: E402
from trt_builder.flavour import Flavour, get_flavour  # noqa: E402
from trt_builder.layers import upsample  # noqa: E402
from trt_builder.net import Net  # noqa: E402
from trt_builder.text import folded_texts  # noqa: E402
from trt_builder.unet import one_after_the_other  # noqa: E402
from trt_builder.weights import Weights  # noqa: E402


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
    assert (added.count("CannyFirst"), added.count("CannyLast")) == ((0, 1) if "decoder" in stage else (1, 0))


@pytest.mark.parametrize("shared_prefix", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("shape", [SMALL, Shape(64, 128, samples=3)], ids=["1", "3"])
@pytest.mark.parametrize("stage", ["control", "unet_encoder", "control_cond", "unet_encoder_cond"])
def test_the_first_convolution(
    monkeypatch: pytest.MonkeyPatch, stage: str, shape: Shape, shared_prefix: bool
) -> None:  # fmt: skip
    """Of x as it comes; it adds the hint and repeats what all rows of the batch want: nothing else is left to do."""
    given: list[tuple[Any, ...]] = []

    def first(network: Any, x: Any, *inputs: Any, hint: int, repeat: int) -> Any:
        given.append((x.name, x.shape[0], [one.name for one in inputs[2:]], hint, repeat))
        return plugin_stand_ins.first(network, x, *inputs, hint=hint, repeat=repeat)

    plugin_stand_ins.use(monkeypatch)
    monkeypatch.setitem(plugin_stand_ins.MAKE, "CannyFirst", first)
    options = Options("fp32", residual="own", shared_prefix=shared_prefix)
    check(stage, "tiny", shape, options)
    of_control, whole = "control" in stage, "cond" not in stage
    repeat = 2 if whole and shared_prefix else 0
    ((name, rows, hints, hint, repeated),) = given
    assert (hints, hint, repeated) == (["hint"] * of_control, int(of_control), repeat)
    assert rows == (shape.batch if whole and not shared_prefix else shape.samples)
    names = [layer.name for layer in Defined(stage, "tiny", shape, options, arrays("tiny")).layers]
    matched = [one for one in names if one.startswith(f"{stage}:")]
    assert (name == "x") == (not matched) == (rows == shape.samples) and not any("add_hint" in one for one in names)


def test_a_batch_is_repeated_where_the_plugin_does_not_serve() -> None:
    """By TensorRT's own layers: where the first convolution is its own, too."""
    for stage in ("control", "unet_encoder"):
        layers = Defined(stage, "tiny", SMALL, Options("fp32"), arrays("tiny")).layers
        assert sum(layer.name == f"{stage}:match_batch" for layer in layers) == 1


def test_which_ends_are_our_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a latent of up to 8 channels and maps by eights, in half precision, with --residual own."""
    monkeypatch.setattr(Flavour, "_need", lambda self, plugin, option: None)
    serves, own = get_flavour("tensorrt_rtx").has_end_plugins, Options(residual="own")
    assert serves((320, 4, 3, 3), own) and serves((4, 320, 3, 3), own) and serves((72, 8, 3, 3), own)
    assert not serves((320, 9, 3, 3), own) and not serves((324, 4, 3, 3), own) and not serves((4, 324, 3, 3), own)
    assert not serves((320, 4, 3, 3), Options()) and not serves((320, 4, 3, 3), Options("fp32", residual="own"))


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


@pytest.mark.parametrize(("ours", "instead"), [(True, "--conv builtin"), (False, "--upsample apart")])
def test_sums_of_taps_must_fit(monkeypatch: pytest.MonkeyPatch, ours: bool, instead: str) -> None:
    """By our plugin, and as a transposed convolution."""
    monkeypatch.setattr(Flavour, "has_conv_plugin", lambda *given: ours)
    given = {"up.conv.weight": np.full((64, 64, 3, 3), 2e4), "up.conv.bias": np.ones(64)}
    options = Options(upsample="folded")
    net = Net(None, get_flavour("tensorrt_rtx"), Weights.from_dict(given), options, "", "", np.float16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"sums of taps of up.conv are too large for float16: use {instead}."):
        upsample(net.at("up"), SimpleNamespace(shape=(1, 64, 4, 4)))  # type: ignore[arg-type]


@pytest.mark.parametrize("qkv", ["joined", "apart"])
@pytest.mark.parametrize("shape", [SMALL, Shape(64, 128, samples=1, steps=3)], ids=["64", "128"])
@pytest.mark.parametrize("stage", ["control", "unet_encoder", "unet_decoder"])
def test_layer_norms_in_our_convolutions(monkeypatch: pytest.MonkeyPatch, stage: str, shape: Shape, qkv: Any) -> None:
    """All of them where every convolution is small enough, else those of the deeper maps."""
    added = plugin_stand_ins.use(monkeypatch)
    check(stage, "tiny", shape, Options("fp32", attention="own", qkv=qkv, conv="own", layer_norm="folded"))
    norms, all_of_them = added.count("CannyLayerNorm"), 3 * added.count("CannyAttention") // 2
    assert norms == 0 if shape == SMALL else 0 < norms < all_of_them


FOLDED = Options("fp32", attention="own", conv="own", layer_norm="folded", cross_attention="folded")


def with_texts(stage: str, shape: Shape) -> tuple[Tensors, Tensors]:
    """A stage's case with the texts that are multiplied out in place of their K and V."""
    folded = folded_texts(stage, ModelConfig.load("tiny"), shape, FOLDED)
    places = {name.replace("text", "k"): (name, name.replace("text", "v"), *place) for name, place in folded.items()}
    values = {v for _, v, *_ in places.values()}

    def replaced(tensors: Tensors) -> Tensors:
        made = {}
        for name, tensor in tensors.items():
            if name in places:
                text, v, consumer, i = places[name]
                block = transformer_blocks(model("tiny"), consumer)[i]
                columns = text_columns(block.attn2.heads, tensor.shape[2])
                made[text] = text_map(block, tensor, tensors[v], columns).detach()
            elif name not in values:
                made[name] = tensor
        return made

    inputs, expected = cases("tiny", shape)[stage]
    return replaced(inputs), replaced(expected)


@pytest.mark.parametrize(
    "shape", [SMALL, Shape(64, 64, samples=3), Shape(64, 128)], ids=["64", "64 and 3 samples", "128"]
)
@pytest.mark.parametrize(
    "stage",
    ["control", "unet_encoder", "unet_decoder", "control_cond", "unet_encoder_cond", "unet_decoder_cond"],
)
def test_texts_that_are_multiplied_out(monkeypatch: pytest.MonkeyPatch, stage: str, shape: Shape) -> None:
    """Two launches a cross-attention where the map is small enough for our plugins; elsewhere it is as it was."""
    added = plugin_stand_ins.use(monkeypatch)
    check(stage, "tiny", shape, FOLDED, case=with_texts(stage, shape))
    folded = len(folded_texts(stage, ModelConfig.load("tiny"), shape, FOLDED))
    blocks = added.count("CannyCross") // 2 + (added.count("CannyAttention") - folded) // 2
    assert added.count("CannyCross") == 2 * folded and added.count("CannyAttention") == 2 * blocks - folded
    assert folded == blocks if shape == SMALL else 0 < folded < blocks


@pytest.mark.parametrize("own", [True, False], ids=["own", "builtin"])
@pytest.mark.parametrize("shape", [SMALL, Shape(64, 64, samples=3), Shape(64, 128)], ids=str)
def test_clip_multiplies_texts_out(monkeypatch: pytest.MonkeyPatch, shape: Shape, own: bool) -> None:
    """By our convolution or TensorRT's, of the context as one map for all."""
    added = plugin_stand_ins.use(monkeypatch)
    monkeypatch.setattr(loading, "CONV_MULTIPLE", 8)  # the small model's context has 40 channels
    monkeypatch.setattr(
        Flavour, "has_conv_plugin", lambda self, shape, weight, stride, options, second=0, up=False: own
    )
    check("clip", "tiny", shape, FOLDED, case=with_texts("clip", shape))
    folded = folded_texts("clip", ModelConfig.load("tiny"), shape, FOLDED)
    assert folded and added == ["CannyConv"] * len(folded) * own
    names = [layer.name for layer in Defined("clip", "tiny", shape, FOLDED, arrays("tiny")).layers]
    assert sum(name.endswith("context_to_map") for name in names) == 1


def test_attention_of_our_plugins_with_q_k_and_v_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    added = plugin_stand_ins.use(monkeypatch)
    check("unet_encoder", "tiny", SMALL, Options("fp32", attention="own", qkv="apart"))
    assert "CannyConv" not in added and added.count("CannyLayerNorm") == 3 * added.count("CannyGeglu") > 0


def of_any_size(
    flavour: Flavour, shape: Any, weight: Any, stride: int, options: Options, second: int = 0, up: bool = False
) -> bool:  # fmt: skip
    """`has_conv_plugin` for stand-ins over every map."""
    return options.conv == "own"


OWN_TEXT = {"CannyAttention": 2, "CannyConv": 8, "CannyLayerNorm": 5}  # of two layers, with every LayerNorm apart


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({}, OWN_TEXT), ({"layer_norm": "folded"}, OWN_TEXT | {"CannyLayerNorm": 1}),
        ({"layer_norm": "folded", "qkv": "apart"}, OWN_TEXT | {"CannyLayerNorm": 1, "CannyConv": 12}),
        ({"conv": "builtin"}, {}), ({"attention": "fused"}, {}),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("samples", [1, 3])
def test_the_text_encoder(
    monkeypatch: pytest.MonkeyPatch, samples: int, switches: dict[str, Any], expected: dict[str, int]
) -> None:
    """Four convolutions and an attention a layer, which do everything but quick GELU; the last LayerNorm is left."""
    added = plugin_stand_ins.use(monkeypatch)
    monkeypatch.setattr(Flavour, "has_conv_plugin", of_any_size)
    options = Options("fp32", **{"attention": "own", "conv": "own", **switches})
    shape = Shape(64, 64, samples=samples, steps=3)
    check("clip", "wide", shape, options)
    assert Counter(added) == expected
    names = [layer.name for layer in Defined("clip", "wide", shape, options, arrays("wide")).layers]
    turned = [sum(name.endswith(f":{what}") for name in names) for what in ("to_map", "to_tokens")]
    assert turned == [bool(expected)] * 2


def test_a_text_encoder_without_its_mask_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(network: Any, *inputs: Any, causal: int, **fields: Any) -> Any:
        assert causal
        return plugin_stand_ins.attention(network, *inputs, causal=0, **fields)

    plugin_stand_ins.use(monkeypatch)
    monkeypatch.setattr(Flavour, "has_conv_plugin", of_any_size)
    monkeypatch.setitem(plugin_stand_ins.MAKE, "CannyAttention", attention)
    with pytest.raises(AssertionError, match="context"):
        check("clip", "wide", SMALL, Options("fp32", attention="own", conv="own"))


def test_the_small_text_encoder_has_heads_that_our_plugin_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    added = plugin_stand_ins.use(monkeypatch)
    monkeypatch.setattr(Flavour, "has_conv_plugin", of_any_size)
    check("clip", "tiny", SMALL, Options("fp32", attention="own", conv="own", layer_norm="folded"))
    assert not added


def test_which_text_encoders_are_our_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with heads 64 wide, as SD 1.5 has, in half precision, with as many samples as our convolutions win for."""
    monkeypatch.setattr(Flavour, "_need", lambda self, plugin, option: None)

    def served(samples: int = 1, width: int = 768, heads: int = 12, **switches: Any) -> bool:
        layer, ours = "encoder.layers.0.", {"attention": "own", "conv": "own"}
        sizes = {"self_attn.out_proj": (width, width), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        weights = Weights.from_dict({f"{layer}{name}.weight": np.zeros(size) for name, size in sizes.items()})
        net = Net(None, get_flavour("tensorrt_rtx"), weights, Options(**ours | switches), "", "", np.float16)  # type: ignore[arg-type]
        return has_own_encoder(net, CLIPConfig(width, 1, heads), (2 * samples, width, 1, 77))

    assert served() and served(16) and served(width=512, heads=8) and served(qkv="apart", layer_norm="folded")
    assert not served(17) and not served(heads=16) and not served(width=200, heads=5) and not served(precision="fp32")
    assert not served(conv="builtin") and not served(attention="fused")


def test_a_fold_needs_our_convolutions_and_numbers_that_fit() -> None:
    with pytest.raises(ValueError, match="unless attention and conv are 'own'"):
        Options(attention="own", layer_norm="folded")
    weight, row = np.full((64, 64, 1, 1), 300.0, np.float16), np.full(64, 300.0, np.float32)
    with pytest.raises(ValueError, match="too large for float16"):
        fold_norm(weight, row, row, row)
    folded, bias, sums = fold_norm(weight, row, row / 300, row)
    assert folded.dtype == np.float16 and (folded == weight).all()
    assert (sums == 300 * 64).all() and (bias == 300 + 300 * 300 * 64).all()


def test_the_builder_gives_attention_to_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-attentions are one convolution of three times the width, cross-attentions three tensors."""
    config, shape = ModelConfig.load("tiny"), Shape(128, 128)
    found: Counter[Attention] = Counter()

    def attention(network: Any, q: Any, *kv: Any, heads: int, joined: int, **fields: Any) -> Any:
        (batch, channels, h, w), keys = q.shape, kv[0].shape[1] if kv else q.shape[2] * q.shape[3]
        rows, width = kv[0].shape[0] if kv else batch, channels // heads // (3 if joined else 1)
        found[Attention(rows, heads, h * w, keys, width, bool(joined), rows // batch)] += 1
        return plugin_stand_ins.attention(network, q, *kv, heads=heads, joined=joined, **fields)

    plugin_stand_ins.use(monkeypatch)
    monkeypatch.setitem(plugin_stand_ins.MAKE, "CannyAttention", attention)
    plugin_stand_ins.define_step(config, shape, Options("fp32", attention="own"))
    assert found == attentions(config, shape)


@pytest.mark.parametrize(("qkv", "layer_norm"), [("joined", "apart"), ("joined", "folded"), ("apart", "folded")])
def test_the_builder_gives_convolutions_to_the_plugin(
    monkeypatch: pytest.MonkeyPatch, qkv: Any, layer_norm: Any
) -> None:
    """Those that bench.conv finds, each residual and gate and, if folded, each LayerNorm in the plugin."""
    flavour, config, shape = get_flavour("tensorrt_rtx"), ModelConfig.load("tiny"), Shape(128, 128)
    found: Counter[Conv] = Counter()

    def add(network: Any, x: Any, weight: Any, bias: Any, *rest: Any, size: int, stride: int, **fields: Any) -> Any:
        (batch, channels, h, w), added = x.shape, rest[-1].shape[0] if fields["residual"] else 0
        norm, gate, second = bool(fields["norm"]), bool(fields["gate"]), fields["second"]
        of_second = rest[fields["norm"]].shape[1] if second else 0
        one = Conv(batch, channels, h, w, bias.shape[0], size, stride, added, norm, of_second, gate=gate)
        found[replace(one, up=bool(fields["up"]))] += 1
        return plugin_stand_ins.conv(network, x, weight, bias, *rest, size=size, stride=stride, **fields)

    plugin_stand_ins.use(monkeypatch)
    monkeypatch.setitem(plugin_stand_ins.MAKE, "CannyConv", add)
    options = Options("fp32", "own", qkv, residual="own", conv="own", layer_norm=layer_norm)
    plugin_stand_ins.define_step(config, shape, options)
    fits = {}
    for one, count in convolutions(config, shape, options).items():
        size, weight = (one.batch, one.channels, one.height, one.width), (one.filters, one.channels, one.size, one.size)
        if plugin_stand_ins.has_conv(flavour, size, weight, one.stride, options, one.second, one.up):
            fits[one] = count
    assert found == fits and len(found) > 10
    assert all(any(getattr(one, what) for one in found) for what in ("second", "gate", "up"))
    assert any(one.norm for one in found) == (layer_norm == "folded")
