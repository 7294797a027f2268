"""Texts that are multiplied out: which, their numbers, where they lie, and what `verify` compares them with."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cldm.text import text_map, transformer_blocks
from plugins.load import CROSS, text_columns
from runtime.manifest import EngineError, Manifest, StagePlan
from runtime.session import buffer_name
from trt_builder import build as building
from trt_builder import plugin_layers, text, verify
from trt_builder.config import ModelConfig, Options, Shape
from trt_builder.net import Net
from trt_builder.plugin_layers import FlavourError, PluginLayers, cross_fits
from trt_builder.text import cross_attentions, folded_texts, text_weight
from trt_builder.verify import FOLDED, case, input_shapes, of_engine, random_inputs, stored_reference
from trt_builder.weights import Weights

TINY, SD15 = ModelConfig.load("tiny"), ModelConfig.load("sd15")
CONSUMERS = ("control", "unet_encoder", "unet_decoder")
TEXT = re.compile(r"\btext\d+$")
SIZES = {"height": 64, "width": 64, "samples": 1, "steps": 3}


# -- which ------------------------------------------------------------------------------------------------------------


def test_where_cross_attentions_are() -> None:
    """Each stage's by channels and scale, in order; with a depth of two each block of a transformer."""
    encoder = [(320, 1)] * 2 + [(640, 2)] * 2 + [(1280, 4)] * 2 + [(1280, 8)]
    decoder = [(1280, 4)] * 3 + [(640, 2)] * 3 + [(320, 1)] * 3
    for stage, expected in zip(CONSUMERS, (encoder, encoder, decoder), strict=True):
        found = cross_attentions(SD15, stage)
        assert [(one.channels, one.scale) for one in found] == expected and {one.heads for one in found} == {8}
        assert all(one.block.endswith(".transformer_blocks.0") for one in found)
    assert cross_attentions(SD15, "control")[2].size(Shape(256, 384, 3)) == (6, 640, 16, 24)
    deep = replace(TINY, unet=replace(TINY.unet, transformer_depth=2))
    blocks = [one.block for one in cross_attentions(deep, "unet_decoder")]
    assert len(blocks) == 2 * len(cross_attentions(TINY, "unet_decoder"))
    assert [block[-1] for block in blocks] == ["0", "1"] * (len(blocks) // 2)


def test_which_texts_are_multiplied_out() -> None:
    """All of SD 1.5 at 256×384; at 512×512 not those over the largest maps; none unless the options say so."""
    usual = Shape(256, 384)
    assert len(folded_texts("clip", SD15, usual, FOLDED)) == 23
    assert list(folded_texts("unet_encoder_cond", SD15, usual, FOLDED)) == [f"text{i}" for i in range(7)]
    assert folded_texts("unet_decoder", SD15, Shape(512, 512), FOLDED) == {
        f"text{i}": ("unet_decoder", i) for i in range(6)
    }
    for options in (replace(FOLDED, cross_attention="apart"), replace(FOLDED, precision="fp32"), Options()):
        assert not folded_texts("clip", SD15, usual, options)
    for stage in ("hint", "time", "vae_decoder", "vae_encoder"):
        assert not folded_texts(stage, SD15, usual, FOLDED)
    assert cross_fits((2, 320, 32, 48), 8, 77, FOLDED) and not cross_fits((2, 320, 32, 48), 8, 81, FOLDED)
    assert not cross_fits((6, 320, 32, 48), 8, 77, FOLDED)  # more positions than the kernel takes
    assert not cross_fits((2, 640, 8, 8), 16, 77, replace(FOLDED, cross_attention="apart"))
    assert cross_fits((2, 640, 8, 8), 16, 77, FOLDED) and not cross_fits((2, 640, 8, 8), 10, 77, FOLDED)  # 4 at a time
    assert not cross_fits((2, 320, 8, 8), 16, 77, FOLDED)  # heads 20 wide
    assert not cross_fits((2, 1280, 8, 8), 32, 77, replace(FOLDED, precision="fp32"))


def test_the_words_weights_must_not_be_much_wider_than_x(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cross_fits((2, 640, 8, 8), 16, 77, FOLDED)  # 1280 by 640
    monkeypatch.setattr(plugin_layers, "CROSS_GROWTH", 1.9)
    assert not cross_fits((2, 640, 8, 8), 16, 77, FOLDED) and cross_fits((2, 640, 8, 8), 8, 77, FOLDED)


def test_the_plugin_is_loaded_and_said_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    flavour: Any = PluginLayers()
    flavour.name, flavour.strongly_typed = "tensorrt", False
    registry = SimpleNamespace(get_plugin_creator=lambda name, version, space: None)
    flavour.trt = SimpleNamespace(get_plugin_registry=lambda: registry)
    assert not flavour.has_cross_plugin((2, 320, 32, 48), 8, 77, Options())
    with pytest.raises(FlavourError, match=f"no plugin {CROSS}: it was not loaded; use another --cross-attention"):
        flavour.has_cross_plugin((2, 320, 32, 48), 8, 77, FOLDED)
    library = SimpleNamespace(architectures=["90"], path="lib.so", source="0")
    monkeypatch.setattr(plugin_layers, "gpu", lambda: None)
    monkeypatch.setattr(plugin_layers, "load", lambda trt: library)
    assert CROSS in flavour.load_plugins(FOLDED)
    assert CROSS not in flavour.load_plugins(replace(FOLDED, cross_attention="apart"))


def test_the_option_needs_layer_norms_that_are_folded() -> None:
    assert Options().cross_attention == "apart"
    with pytest.raises(ValueError, match="cross_attention is 'folded', but must be 'apart' unless layer_norm is, too"):
        Options(attention="own", conv="own", cross_attention="folded")
    with pytest.raises(ValueError, match="cross_attention is 'own', but must be one of"):
        Options(cross_attention="own")  # type: ignore[arg-type]


def test_room_for_what_is_multiplied_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The weights of SD 1.5 for it are more than those of the text encoder."""
    monkeypatch.setattr(building.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    found = []
    for options in (FOLDED, replace(FOLDED, cross_attention="apart")):
        request: Any = SimpleNamespace(options=options, config=SD15, manifest=SimpleNamespace(folder=tmp_path))
        with pytest.raises(building.BuildError) as caught:
            building.check_space(request, ["clip"])
        found.append(float(re.findall(r"need about ([\d.]+) GB", str(caught.value))[0]))
    assert found == [pytest.approx(1.0, abs=0.2), pytest.approx(0.4, abs=0.1)]


# -- their numbers ----------------------------------------------------------------------------------------------------


def net(weights: Weights, dtype: Any, block: str) -> Net:
    here = Net(None, None, weights, Options(), "clip", "", dtype)  # type: ignore[arg-type]
    return here.at(block) if block else here


def test_each_part_is_what_it_makes_of_k_and_v() -> None:
    """Of a context, against PyTorch's of K and V; the parts one by one, as the largest would hide the others."""
    model = verify.load_twin(manifest(Path()), "cpu")
    one, block = cross_attentions(TINY, "unet_encoder")[1], transformer_blocks(model, "unet_encoder")[1]
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    place = net(Weights.from_dict(state), np.float32, one.block)
    weight = text_weight(place.at("attn2"), place.at("norm2"), one.heads)
    context = torch.randn(2, 77, TINY.unet.context_dim, generator=torch.manual_seed(0))
    made = torch.einsum("pd,bsd->bps", torch.from_numpy(weight[:, :, 0, 0]), context)
    expected = text_map(block, *block.attn2.kv(context), text_columns(one.heads, one.channels))[:, :, 0]
    assert expected.shape == made.shape
    wide = one.heads * one.channels
    for begin, end in ((0, wide), (wide, 2 * wide), (2 * wide, 2 * wide + one.heads)):
        error = (made - expected)[:, begin:end].norm() / expected[:, begin:end].norm()
        assert error < 1e-5 and expected[:, begin:end].abs().max() > 1e-2
    assert not made[:, 2 * wide + one.heads :].any() and not expected[:, 2 * wide + one.heads :].any()
    means = made[:, :wide].unflatten(1, (one.heads, -1)).mean(2)
    assert means.abs().max() < 1e-6


def test_all_of_them_must_fit() -> None:
    shapes = {"attn2.to_q": (64, 64), "attn2.to_k": (64, 64), "attn2.to_v": (64, 64), "attn2.to_out.0": (64, 64)}
    row = np.linspace(0.5, 1.5, 64)
    for large in ("attn2.to_q", "attn2.to_out.0", "norm2.bias", ""):
        given = {f"{name}.weight": np.full(shape, 1e4 if name == large else 1.0) for name, shape in shapes.items()}
        given |= {"norm2.weight": row, "norm2.bias": row * (1e4 if large == "norm2.bias" else 1)}
        place = net(Weights.from_dict(given), np.float16, "")
        if not large:
            weight = text_weight(place.at("attn2"), place.at("norm2"), 4)
            assert weight.dtype == np.float16 and weight.shape == (text_columns(4, 64), 64, 1, 1)
            continue
        with pytest.raises(ValueError, match="the weights of attn2 times each other are too large for float16: use"):
            text_weight(place.at("attn2"), place.at("norm2"), 4)


# -- where they lie ---------------------------------------------------------------------------------------------------


def test_buffers_are_named_as_clip_names_them() -> None:
    assert buffer_name("unet_encoder", "text0") == buffer_name("unet_encoder_cond", "text0") == "unet_encoder.text0"
    assert buffer_name("control", "text12") == buffer_name("clip", "control.text12") == "control.text12"
    assert buffer_name("control", "k3") == "control.k3" and buffer_name("unet_decoder_cond", "v3") == "unet_decoder.v3"
    assert buffer_name("clip", "context") == "context" and buffer_name("control", "texts") == "texts"


# -- what they are compared with --------------------------------------------------------------------------------------


def manifest(folder: Path, options: Options = FOLDED, stages: tuple[str, ...] = ()) -> Manifest:
    plans = dict.fromkeys(stages, StagePlan("", "", 0, 0.0))
    return Manifest(
        "tiny", "", "", None, None, [], "random:0", "0" * 64, SIZES, options.as_dict(), stages=plans, folder=folder
    )


@pytest.fixture
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-attentions of the small model, those over its largest maps left out."""
    monkeypatch.setattr(
        text, "cross_fits", lambda shape, heads, words, options: options.cross_attention == "folded" and shape[2] < 8
    )


def test_inputs_of_engines(smaller: None) -> None:
    shape = Shape(**SIZES)
    for stage, rows in (("unet_encoder", 2), ("unet_encoder_cond", 1)):
        names = input_shapes(stage, TINY, shape, FOLDED)
        channels = [one.channels for one in cross_attentions(TINY, "unet_encoder")]
        assert names["k0"] == names["v0"] == (rows, 77, channels[0]) and "text0" not in names and "k1" not in names
        assert names["text1"] == (rows, text_columns(4, channels[1]), 1, 77)
        assert random_inputs(stage, TINY, shape, 0, FOLDED)["text1"].shape == names["text1"]
        assert "text1" not in input_shapes(stage, TINY, shape)


def test_a_reference_has_the_texts_that_engines_take(smaller: None, tmp_path: Path) -> None:
    """Beside K and V, of which the twin makes the outputs; and a folder that takes none finds none."""
    stages = ("clip", "unet_encoder", "unet_encoder_cond", "hint")
    folded, apart = manifest(tmp_path, FOLDED, stages), manifest(tmp_path, Options(), stages)
    files = {}
    for name, one in (("folded", folded), ("apart", apart)):
        files[name] = tmp_path / f"{name}.npz"
        verify.make_reference(one, files[name], 0, "cpu", lambda stage: None)
    with np.load(files["folded"]) as file:
        made = {key: file[key] for key in file.files}
    texts = Counter(key.partition("/")[0] for key in made if TEXT.search(key))
    assert texts == {"clip": len(folded_texts("clip", TINY, Shape(**SIZES), FOLDED)), "unet_encoder": 2,
                     "unet_encoder_cond": 2}  # fmt: skip
    with np.load(files["apart"]) as file:
        assert made.keys() - set(file.files) == set(filter(TEXT.search, made))
        assert all((file[key] == made[key]).all() for key in file.files)

    model = verify.load_twin(folded, "cpu")
    block = transformer_blocks(model, "unet_encoder")[1]
    for where, at in (("clip/out/", "unet_encoder."), ("unet_encoder_cond/in/", "")):
        k, v = (torch.from_numpy(made[f"{where}{at}{kind}1"]) for kind in "kv")
        expected = text_map(block, k, v, text_columns(4, block.attn2.to_q.weight.shape[0])).detach().half().numpy()
        found = made[f"{where}{at}text1"]
        assert found.dtype == np.float16 and (found == expected).all() and np.isfinite(found).all()

    assert [stage for stage, *_ in stored_reference(folded, files["folded"])] == list(stages)
    assert [stage for stage, *_ in stored_reference(apart, files["folded"])] == list(stages)
    with pytest.raises(EngineError, match=r"apart.npz lacks control.text1 of the stage clip: write it .*--make-ref"):
        list(stored_reference(folded, files["apart"]))


def test_what_is_expected_of_an_engine(smaller: None) -> None:
    """Of one that makes texts these, of another K and V; what neither makes is missed."""
    one = manifest(Path())
    _, expected = case(verify.load_twin(one, "cpu"), one, "clip", 0)
    texts = set(filter(TEXT.search, expected))
    assert texts
    others = {name.replace("text", kind) for name in texts for kind in "kv"}
    assert of_engine(expected, dict.fromkeys(expected.keys() - others)).keys() == expected.keys() - others  # type: ignore[arg-type]
    assert of_engine(expected, dict.fromkeys(expected.keys() - texts)).keys() == expected.keys() - texts  # type: ignore[arg-type]
    assert of_engine(expected, {}).keys() == expected.keys() - texts
