"""Our plugins spelt out in TensorRT's own layers, to evaluate networks with them where no plugin can be loaded."""

import math
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as trt

from plugins import load as loading
from plugins.load import (
    ADD,
    ATTENTION,
    CAUSAL_WIDTHS,
    CONV,
    CROSS,
    CROSS_WORDS,
    FIRST,
    GEGLU,
    GROUP_NORM,
    JOIN,
    JOIN_NORM,
    LAST,
    LAYER_NORM,
)
from trt_builder import plugin_layers, text
from trt_builder.config import ModelConfig, Options, Shape
from trt_builder.flavour import Flavour, get_flavour
from trt_builder.plugin_layers import conv_wins
from trt_builder.random_weights import random_weights
from trt_builder.stages import define
from trt_builder.weights import Weights, expected_shapes

ELEMENT, MATRIX = trt.ElementWiseOperation, trt.MatrixOperation


def use(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let TensorRT-RTX have the plugins; returns the list that takes the name of each that is added."""
    added: list[str] = []

    def add_own(self: Flavour, network: Any, plugin: str, inputs: Any, name: str, **fields: Any) -> Any:
        added.append(plugin)
        return MAKE[plugin](network, *inputs, **fields)

    monkeypatch.setattr(Flavour, "_need", lambda self, plugin, option: None)
    monkeypatch.setattr(Flavour, "has_transformer_plugins", has_transformer)
    monkeypatch.setattr(Flavour, "has_residual_plugins", lambda self, options: options.residual == "own")
    # The small model's channels are multiples of 32 only; the stand-in needs no half precision.
    monkeypatch.setattr(loading, "CONV_MULTIPLE", 32)
    monkeypatch.setattr(Flavour, "has_conv_plugin", has_conv)
    for module in (plugin_layers, text):
        monkeypatch.setattr(module, "cross_fits", cross_fits)
    monkeypatch.setattr(Flavour, "add_own", add_own)
    return added


def define_step(config: ModelConfig, shape: Shape, options: Options) -> None:
    """The networks of a step with random weights, for TensorRT-RTX."""
    flavour, weights = get_flavour("tensorrt_rtx"), Weights.from_dict(random_weights(expected_shapes(config), 0))
    for stage in ("control", "unet_encoder", "unet_decoder"):
        network = flavour.create_network(flavour.create_builder(flavour.trt.Logger(flavour.trt.Logger.ERROR)))
        define(stage, network, flavour, config, weights, shape, options)
        weights.release()


def has_conv(
    flavour: Flavour, shape: Any, weight: Any, stride: int, options: Any, second: int = 0, up: bool = False
) -> bool:  # fmt: skip
    """What `has_conv_plugin` says, for smaller maps and channels."""
    rows = shape[0] * -(-shape[2] // stride) * -(-shape[3] // stride) * (4 if up else 1)
    served = rows <= (512 if up else 128) and weight[2] in (1, 3) and not weight[0] % 32 and not weight[1] % 32
    beside = not second or (stride == 1 and not second % 32)
    return options.conv == "own" and served and beside and conv_wins(rows, weight, up)


def cross_fits(shape: Any, heads: int, words: int, options: Options) -> bool:
    """What `plugin_layers.cross_fits` says, for smaller maps, channels and heads."""
    batch, channels, h, w = shape
    return options.cross_attention == "folded" and batch * h * w <= 128 and not channels % 32 and words <= CROSS_WORDS


def has_transformer(flavour: Flavour, width: int, options: Options, causal: bool = False) -> bool:
    """What `has_transformer_plugins` says, for heads of every width where no mask is."""
    return options.attention == "own" and (not causal or width in CAUSAL_WIDTHS)


def out(layer: Any) -> Any:
    return layer.get_output(0)


def shuffled(network: Any, x: Any, first: tuple = (), shape: tuple = (), second: tuple = ()) -> Any:
    layer = network.add_shuffle(x)
    for attribute, value in (("first_transpose", first), ("reshape_dims", shape), ("second_transpose", second)):
        if value:
            setattr(layer, attribute, value)
    return layer


def part(network: Any, x: Any, i: int, parts: int) -> Any:
    """Part i of the channels of x (B, C, h, w)."""
    batch, channels, *size = x.shape
    size = (batch, channels // parts, *size)
    return out(network.add_slice(x, (0, i * channels // parts, 0, 0), size, (1, 1, 1, 1)))


def norm(network: Any, x: Any, scale: Any, bias: Any, axes: int, shape: tuple, epsilon: float, groups: int = 1) -> Any:
    scale, bias = (out(shuffled(network, one, shape=shape)) for one in (scale, bias))
    layer = network.add_normalization_v2(x, scale, bias, axes)
    layer.epsilon, layer.num_groups = epsilon, groups
    return layer


def group_norm(network: Any, x: Any, scale: Any, bias: Any, *added: Any, groups: int, silu: int, row: int,
               epsilon: float) -> Any:  # fmt: skip
    assert len(added) == row
    channels = x.shape[1]
    for one in added:
        x = out(network.add_elementwise(x, out(shuffled(network, one, shape=(-1, channels, 1, 1))), ELEMENT.SUM))
    layer = norm(network, x, scale, bias, 1 << 2 | 1 << 3, (1, channels, 1, 1), epsilon, groups)
    gate = network.add_activation(out(layer), trt.ActivationType.SIGMOID)
    return network.add_elementwise(out(layer), out(gate), ELEMENT.PROD) if silu else layer


def layer_norm(network: Any, x: Any, scale: Any, bias: Any, epsilon: float) -> Any:
    last = out(shuffled(network, x, (0, 2, 3, 1)))
    made = norm(network, last, scale, bias, 1 << 3, (1, 1, 1, x.shape[1]), epsilon)
    return shuffled(network, out(made), (0, 3, 1, 2))


def geglu(network: Any, x: Any) -> Any:
    gate = network.add_activation(part(network, x, 1, 2), trt.ActivationType.GELU_ERF)
    return network.add_elementwise(part(network, x, 0, 2), out(gate), ELEMENT.PROD)


def attention(network: Any, q: Any, *kv: Any, heads: int, joined: int, causal: int, scale: float) -> Any:
    assert len(kv) == (0 if joined else 2)
    k, v = [part(network, q, i, 3) for i in (1, 2)] if joined else kv
    q = part(network, q, 0, 3) if joined else q
    (_, channels, h, w), rows = q.shape, k.shape[0]
    assert scale == pytest.approx((channels // heads) ** -0.5)
    q, k, v = (
        out(shuffled(network, t, (0, 2, 3, 1) if len(t.shape) == 4 else (), (t.shape[0], -1, heads, channels // heads),
                     (0, 2, 1, 3)))
        for t in (q, k, v)
    )  # fmt: skip
    repeated = network.add_concatenation([q] * (rows // q.shape[0]))
    repeated.axis = 0
    by = out(network.add_constant((1, 1, 1, 1), np.full((1, 1, 1, 1), scale, np.float32)))
    q = out(network.add_elementwise(out(repeated), by, ELEMENT.PROD))
    scores = out(network.add_matrix_multiply(q, MATRIX.NONE, k, MATRIX.TRANSPOSE))
    if causal:
        tokens, keys = scores.shape[2:]
        HELD.append(np.triu(np.full((1, 1, tokens, keys), -1e9, np.float32), 1))
        mask = network.add_constant(HELD[-1].shape, HELD[-1])
        scores = out(network.add_elementwise(scores, out(mask), ELEMENT.SUM))
    softmax = network.add_softmax(scores)
    softmax.axes = 1 << 3
    y = out(network.add_matrix_multiply(out(softmax), MATRIX.NONE, v, MATRIX.NONE))
    y = out(shuffled(network, y, (0, 2, 1, 3), (rows, h, w, channels)))
    return shuffled(network, y, (0, 3, 1, 2))


def add(network: Any, x: Any, y: Any) -> Any:
    return network.add_elementwise(x, y, ELEMENT.SUM)


def join(network: Any, x: Any, skip: Any, residual: Any, scales: Any, *of_x: Any, index: int, x_index: int) -> Any:
    assert len(of_x) == (x_index >= 0)

    def summed(to: Any, residual: Any, line: int) -> Any:
        factor = out(network.add_slice(scales, (line, 0), (1, to.shape[0]), (1, 1)))
        factor = out(shuffled(network, factor, shape=(to.shape[0], 1, 1, 1)))
        scaled = out(network.add_elementwise(residual, factor, ELEMENT.PROD))
        return out(network.add_elementwise(to, scaled, ELEMENT.SUM))

    x = summed(x, of_x[0], x_index) if of_x else x
    joined = network.add_concatenation([x, summed(skip, residual, index)])
    joined.axis = 1
    return joined


class Several:
    """What passes for a layer with these outputs."""

    name = ""

    def __init__(self, *outputs: Any) -> None:
        self.outputs = outputs

    def get_output(self, i: int) -> Any:
        return self.outputs[i]


def join_norm(network: Any, *inputs: Any, index: int, x_index: int, **fields: Any) -> Any:
    *of_join, scale, bias = inputs
    joined = out(join(network, *of_join, index=index, x_index=x_index))
    return Several(joined, out(group_norm(network, joined, scale, bias, row=0, **fields)))


def first(network: Any, x: Any, weight: Any, bias: Any, *of_hint: Any, hint: int, repeat: int) -> Any:
    assert len(of_hint) == hint and repeat != 1
    filters, channels = bias.shape[0], x.shape[1]
    by_two = numbers(network, weight)  # for each 64 filters, two numbers and 32 lanes: two numbers of two filters
    rows = by_two.reshape(len(by_two), -1, 32, 2, 2).transpose(0, 2, 4, 1, 3).reshape(64 * len(by_two), -1, 3, 3)
    assert not rows[filters:].any() and not rows[:, channels:].any()
    HELD.append((np.ascontiguousarray(rows[:filters, :channels]), numbers(network, bias)))
    layer = network.add_convolution_nd(x, filters, (3, 3), *HELD[-1])
    layer.padding_nd = (1, 1)
    for one in of_hint:
        layer = network.add_elementwise(out(layer), one, ELEMENT.SUM)
    if not repeat:
        return layer
    repeated = network.add_concatenation([out(layer)] * repeat)
    repeated.axis = 0
    return Several(out(layer), out(repeated))


def last(network: Any, x: Any, h: Any, weight: Any, bias: Any, guidance: Any, e1: Any, e2: Any, noise: Any,
         coefficients: Any, *kept: Any, cond: int) -> Any:  # fmt: skip
    assert len(kept) == cond
    rows = numbers(network, weight)
    HELD.append((np.ascontiguousarray(rows.transpose(1, 2, 0)).reshape(*rows.shape[1:], 3, 3), numbers(network, bias)))
    layer = network.add_convolution_nd(h, len(HELD[-1][0]), (3, 3), *HELD[-1])
    layer.padding_nd = (1, 1)
    both = out(layer)

    def one(what: str, a: Any, b: Any) -> Any:
        return out(network.add_elementwise(a, b, getattr(ELEMENT, what)))

    def of(numbers: Any, i: int) -> Any:
        return out(shuffled(network, out(network.add_slice(numbers, (i,), (1,), (1,))), shape=(1, 1, 1, 1)))

    shape = tuple(x.shape)
    if kept:  # cond + guidance·difference - difference
        difference, least = kept[0], one("SUB", both, kept[0])
    else:
        first, least = (out(network.add_slice(both, (i * shape[0], 0, 0, 0), shape, (1, 1, 1, 1))) for i in (0, 1))
        difference = one("SUB", first, least)
    e = one("SUM", least, one("PROD", of(guidance, 0), difference))
    x_next = noise
    for i, term in enumerate((x, e, e1, e2)):
        x_next = one("SUM", x_next, one("PROD", of(coefficients, i), term))
    return Several(e, x_next, difference)


HELD: list[Any] = []  # TensorRT keeps no weights itself


def numbers(network: Any, constant: Any) -> np.ndarray:
    """What a constant holds."""
    for i in reversed(range(network.num_layers)):
        layer = network.get_layer(i)
        if layer.get_output(0).name == constant.name:
            layer.__class__ = trt.IConstantLayer
            return np.array(layer.weights).reshape(tuple(layer.shape))
    raise AssertionError(f"{constant.name} is no constant")


def conv(network: Any, x: Any, weight: Any, bias: Any, *rest: Any, size: int, stride: int, residual: int,
         norm: int, second: int, gate: int, beside: int, up: int, epsilon: float) -> Any:  # fmt: skip
    assert len(rest) == norm + second + residual and not (gate and residual)
    if up:
        return doubled(network, x, weight, bias)
    blocks, n, filters = numbers(network, weight), weight.shape[2], bias.shape[0]
    units = x.shape[1] // n * size * size
    HELD.append((plain(blocks[:, :units], size), numbers(network, bias) * (1 - norm)))
    layer = network.add_convolution_nd(x, filters, (size, size), *HELD[-1])
    layer.stride_nd, layer.padding_nd = (stride, stride), (size // 2, size // 2)
    if norm:
        layer = normalised(network, x, out(layer), rest[0], bias, epsilon)
    if second:
        assert rest[norm].shape[1] == n * (blocks.shape[1] - units)
        HELD.append(plain(blocks[:, units:], 1))
        beside = network.add_convolution_nd(rest[norm], filters, (1, 1), HELD[-1])
        layer = network.add_elementwise(out(layer), out(beside), ELEMENT.SUM)
    if gate:
        batch, _, h, w = x.shape
        eights = out(shuffled(network, out(layer), (), (batch, filters // 16, 2, 8 * h * w), (0, 2, 1, 3)))
        return geglu(network, out(shuffled(network, eights, (), (batch, filters, h, w))))
    if not residual:
        return layer
    repeated = network.add_concatenation([rest[-1]] * (x.shape[0] // rest[-1].shape[0]))
    repeated.axis = 0
    return network.add_elementwise(out(layer), out(repeated), ELEMENT.SUM)


def doubled(network: Any, x: Any, weight: Any, bias: Any) -> Any:
    """The four phases of a convolution of x doubled along both axes."""
    (batch, _, h, w), filters = x.shape, bias.shape[0]
    HELD.append((plain(numbers(network, weight), 2), np.tile(numbers(network, bias), 4)))
    layer = network.add_convolution_nd(x, 4 * filters, (2, 2), *HELD[-1])
    layer.padding_nd = (1, 1)
    parts = [part(network, out(layer), i, 4) for i in range(4)]
    size, ones = (batch, filters, h, w), (1, 1, 1, 1)
    phases = [out(network.add_slice(one, (0, 0, i // 2, i % 2), size, ones)) for i, one in enumerate(parts)]
    joined = network.add_concatenation(phases)
    joined.axis = 1
    apart = out(shuffled(network, out(joined), (), (batch, 2, 2, filters, h, w), (0, 3, 4, 1, 5, 2)))
    return shuffled(network, apart, shape=(batch, filters, 2 * h, 2 * w))


def plain(blocks: np.ndarray, size: int) -> np.ndarray:
    """The weight (D, C, size, size) that `plugins.load.conv_blocks` made these of."""
    tiles, units, n, _ = blocks.shape
    blocks = blocks.reshape(tiles, units // size**2, size, size, n, n // 8, 8)
    row, chunk = np.ogrid[:n, : n // 8]
    rows = blocks[:, :, :, :, row, chunk ^ row % (n // 8)].reshape(*blocks.shape[:5], n)
    return np.ascontiguousarray(rows.transpose(0, 4, 1, 5, 2, 3).reshape(tiles * n, -1, size, size))


def normalised(network: Any, x: Any, y: Any, weight_sums: Any, bias: Any, epsilon: float) -> Any:
    """The products y of x by weights, as they are of x less its mean over its deviation, and the bias."""

    def one(what: str, a: Any, b: Any) -> Any:
        return out(network.add_elementwise(a, b, getattr(ELEMENT, what)))

    def average(of: Any) -> Any:
        return out(network.add_reduce(of, trt.ReduceOperation.AVG, 1 << 1, True))

    HELD.append(np.full((1, 1, 1, 1), epsilon, np.float32))
    sums, shift = (out(shuffled(network, each, shape=(1, -1, 1, 1))) for each in (weight_sums, bias))
    mean = average(x)
    variance = one("SUB", average(one("PROD", x, x)), one("PROD", mean, mean))
    variance = one("SUM", variance, out(network.add_constant((1, 1, 1, 1), HELD[-1])))
    centred = one("SUB", y, one("PROD", mean, sums))
    scaled = one("DIV", centred, out(network.add_unary(variance, trt.UnaryOperation.SQRT)))
    return network.add_elementwise(scaled, shift, ELEMENT.SUM)


def cross(network: Any, x: Any, text: Any, *rest: Any, values: int, heads: int, beside: int, epsilon: float) -> Any:
    """Either half of a cross-attention over a text that is multiplied out; the mean of x is not taken away here."""
    batch, columns, _, words = text.shape
    channels = (columns - loading.TEXT_MULTIPLE) // heads // 2
    h, w = x.shape[2:]

    def one(what: str, a: Any, b: Any) -> Any:
        return out(network.add_elementwise(a, b, getattr(ELEMENT, what)))

    def number(value: float, *shape: int) -> Any:
        HELD.append(np.full(shape, value, np.float32))
        return out(network.add_constant(shape, HELD[-1]))

    def repeated(a: Any) -> Any:
        layer = network.add_concatenation([a] * (batch // a.shape[0]))
        layer.axis = 0
        return out(layer)

    def of_text(begin: int, count: int) -> Any:
        """Columns of the text, by head: (B, heads, count, words)."""
        cut = out(network.add_slice(text, (0, begin, 0, 0), (batch, heads * count, 1, words), (1, 1, 1, 1)))
        return out(shuffled(network, cut, shape=(batch, heads, count, words)))

    if values:
        bias, residual = rest
        assert x.shape[1] == heads * CROSS_WORDS
        x = out(shuffled(network, x, shape=(batch, heads, CROSS_WORDS, h * w)))
        x = out(network.add_slice(x, (0, 0, 0, 0), (batch, heads, words, h * w), (1, 1, 1, 1)))
        y = out(network.add_matrix_multiply(of_text(heads * channels, channels), MATRIX.NONE, x, MATRIX.NONE))
        y = out(network.add_reduce(y, trt.ReduceOperation.SUM, 1 << 1, False))
        y = out(shuffled(network, y, shape=(batch, channels, h, w)))
        y = one("SUM", y, out(shuffled(network, bias, shape=(1, channels, 1, 1))))
        return network.add_elementwise(y, repeated(residual), ELEMENT.SUM)
    assert not rest and x.shape[1] == channels
    mean = out(network.add_reduce(x, trt.ReduceOperation.AVG, 1 << 1, True))
    centred = one("SUB", x, mean)
    variance = out(network.add_reduce(one("PROD", centred, centred), trt.ReduceOperation.AVG, 1 << 1, True))
    deviation = network.add_unary(one("SUM", variance, number(epsilon, 1, 1, 1, 1)), trt.UnaryOperation.SQRT)
    scaled = repeated(one("DIV", x, out(deviation)))
    scaled = out(shuffled(network, scaled, (0, 2, 3, 1), (batch, 1, h * w, channels)))
    scores = out(network.add_matrix_multiply(scaled, MATRIX.NONE, of_text(0, channels), MATRIX.NONE))
    scores = one("SUM", scores, of_text(2 * heads * channels, 1))
    softmax = network.add_softmax(one("PROD", scores, number(math.log(2), 1, 1, 1, 1)))
    softmax.axes = 1 << 3
    padded = network.add_concatenation([out(softmax), number(0, batch, heads, h * w, CROSS_WORDS - words)])
    padded.axis = 3
    by_word = out(shuffled(network, out(padded), (0, 1, 3, 2)))
    return shuffled(network, by_word, shape=(batch, heads * CROSS_WORDS, h, w))


MAKE: dict[str, Any] = {
    ADD: add, JOIN: join, JOIN_NORM: join_norm, CONV: conv, GROUP_NORM: group_norm, LAYER_NORM: layer_norm,
    GEGLU: geglu, ATTENTION: attention, CROSS: cross, FIRST: first, LAST: last,
}  # fmt: skip
