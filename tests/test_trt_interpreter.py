"""Each layer of the interpreter alone against torch; one wrong attribute must give another result."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trt_interpreter import evaluate

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed: no network can be defined")

from trt_interpreter.cases import (  # noqa: E402
    CASES,
    ELEMENT,
    POSITIVE,
    UNARY,
    UNIT,
    T,
    X,
    array,
    const,
    convolution,
    randn,
    setting,
)

LOGGER = trt.Logger(trt.Logger.ERROR)
TYPES = {torch.float32: trt.float32, torch.int32: trt.int32, torch.uint8: trt.uint8, torch.bool: trt.bool}


@pytest.fixture
def network() -> Iterator[Any]:
    builder = trt.Builder(LOGGER)
    yield builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def output(network: Any, define: Callable[..., Any], *xs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the interpreter makes of the layer that `define(network, *tensors)` returns."""
    tensors = [network.add_input(f"in{i}", TYPES[x.dtype], tuple(x.shape)) for i, x in enumerate(xs)]
    network.mark_output(define(network, *tensors).get_output(0))
    (result,) = evaluate(network, {f"in{i}": x for i, x in enumerate(xs)}, dtype).values()
    return result


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_layer(network: Any, name: str) -> None:
    define, xs, expected, _ = CASES[name]
    assert same(output(network, define, *xs), expected)


@pytest.mark.parametrize("name", CASES)
def test_wrong_attribute_changes_the_result(network: Any, name: str) -> None:
    _, xs, expected, wrong = CASES[name]
    assert not same(output(network, wrong, *xs), expected)


REFERENCE_ELEMENTWISE: dict[str, Callable[[Any, Any], Any]] = {
    "SUM": lambda a, b: a + b, "PROD": lambda a, b: a * b, "MAX": torch.maximum, "MIN": torch.minimum,
    "SUB": lambda a, b: a - b, "DIV": lambda a, b: a / b, "POW": lambda a, b: a**b, "FLOOR_DIV": lambda a, b: a // b,
    "AND": lambda a, b: a & b, "OR": lambda a, b: a | b, "XOR": lambda a, b: a ^ b, "EQUAL": lambda a, b: a == b,
    "GREATER": lambda a, b: a > b, "LESS": lambda a, b: a < b,
}  # fmt: skip


@pytest.mark.parametrize("op", ELEMENT.__members__)
def test_elementwise(network: Any, op: str) -> None:
    a, b = POSITIVE, POSITIVE.flip(3)[:1, :, :, :1]
    if op in ("AND", "OR", "XOR"):
        a, b = a > 0.7, b > 0.7
    if op == "EQUAL":
        a, b = a.int(), b.int()
    result = output(network, lambda n, a, b: n.add_elementwise(a, b, getattr(ELEMENT, op)), a, b)
    assert same(result, REFERENCE_ELEMENTWISE[op](a, b))
    logical = op in ("AND", "OR", "XOR")
    a, b = (a, b) if logical else (a.float(), b.float() + 0.3)
    others = ("AND", "OR", "XOR") if logical else ELEMENT.__members__.keys() - {"AND", "OR", "XOR"}
    assert not any(same(result, REFERENCE_ELEMENTWISE[other](a, b)) for other in others if other != op)


def test_elementwise_whole_numbers_divide_towards_zero(network: Any) -> None:
    a, b = (X * 50).int(), (X.flip(3) * 3).int() * 2 + 1
    result = output(network, lambda n, a, b: n.add_elementwise(a, b, ELEMENT.DIV), a, b)
    assert same(result, (a.double() / b.double()).int())


UNARY_INPUT = {"ACOSH": POSITIVE + 1, "LOG": POSITIVE, "SQRT": POSITIVE, "NOT": X > 0}
REFERENCE_UNARY = {
    "RECIP": lambda x: 1 / x, "NOT": lambda x: ~x, "ABS": lambda x: x.abs(), "ERF": torch.special.erf,
    "ISINF": lambda x: x == math.inf, "ISNAN": lambda x: x != x,
}  # fmt: skip


@pytest.mark.parametrize("op", UNARY.__members__)
def test_unary(network: Any, op: str) -> None:
    x = UNARY_INPUT.get(op, UNIT)
    if op in ("ISINF", "ISNAN"):
        x = torch.tensor([1.0, math.inf, math.nan]).repeat(5)
    expected = REFERENCE_UNARY.get(op) or getattr(torch, op.lower())
    assert same(output(network, lambda n, x: n.add_unary(x, getattr(UNARY, op)), x), expected(x))


REFERENCE_ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "RELU": F.relu, "SIGMOID": torch.sigmoid, "TANH": torch.tanh, "LEAKY_RELU": lambda x: F.leaky_relu(x, 0.3),
    "ELU": lambda x: F.elu(x, 0.3), "SOFTSIGN": F.softsign, "CLIP": lambda x: x.clamp(0.3, 0.7),
    "SELU": lambda x: 0.7 * F.elu(x, 0.3), "SOFTPLUS": lambda x: 0.3 * (1 + (0.7 * x).exp()).log(),
    "HARD_SIGMOID": lambda x: (0.3 * x + 0.7).clamp(0, 1), "SCALED_TANH": lambda x: 0.3 * torch.tanh(0.7 * x),
    "THRESHOLDED_RELU": lambda x: F.threshold(x, 0.3, 0), "GELU_ERF": F.gelu,
    "GELU_TANH": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip


@pytest.mark.parametrize("kind", trt.ActivationType.__members__)
def test_activation(network: Any, kind: str) -> None:
    def define(n: Any, x: Any) -> Any:
        return setting(n.add_activation(x, getattr(trt.ActivationType, kind)), alpha=0.3, beta=0.7)

    result = output(network, define, X * 2)
    assert same(result, REFERENCE_ACTIVATION[kind](X * 2))
    assert not any(same(result, f(X * 2)) for k, f in REFERENCE_ACTIVATION.items() if k != kind)


Q, K, V = randn(2, 4, 9, 6), randn(2, 4, 5, 6), randn(2, 4, 5, 6)
MASK = randn(2, 1, 9, 5)
ALLOWED = (MASK > 0) | (torch.arange(5) == 0)  # no row without a place to attend: its result is undefined


def attention(mask: np.ndarray | None = None, causal: str = "NONE") -> Callable[..., Any]:
    def define(n: Any, q: Any, k: Any, v: Any) -> Any:
        kind = getattr(trt.CausalMaskKind, causal)
        layer = n.add_attention_v2(q, k, v, trt.AttentionNormalizationOp.SOFTMAX, kind)
        return layer if mask is None else setting(layer, mask=const(n, mask))  # a layer defined after the attention

    return define


@pytest.mark.parametrize(
    "define, mask",
    [
        (attention(), None),
        (attention(MASK.numpy()), MASK),
        (attention(ALLOWED.numpy()), ALLOWED),
        (attention(causal="UPPER_LEFT"), torch.ones(9, 5).tril().bool()),
    ],
)
def test_attention(network: Any, define: Callable[..., Any], mask: Tensor | None) -> None:
    result = output(network, define, Q, K, V)
    assert same(result, F.scaled_dot_product_attention(Q, K, V, mask, scale=1.0))
    assert not same(result, F.scaled_dot_product_attention(Q, K, V, mask))
    assert not same(result, F.scaled_dot_product_attention(Q, V, K, mask, scale=1.0))


def test_attention_causal_from_the_last_row(network: Any) -> None:
    mask = torch.ones(5, 9).tril(4).bool()
    result = output(network, attention(causal="LOWER_RIGHT"), K, Q, Q)
    assert same(result, F.scaled_dot_product_attention(K, Q, Q, mask, scale=1.0))


def test_attention_shares_heads(network: Any) -> None:
    k, v = K[:, :2], V[:, :2]
    expected = F.scaled_dot_product_attention(Q, k, v, scale=1.0, enable_gqa=True)
    assert same(output(network, attention(), Q, k, v), expected)


def test_half_precision_weights_and_float64(network: Any) -> None:
    half = array(6, 6, 1, 1).astype(np.float16)

    def define(n: Any, x: Any) -> Any:
        x = n.add_cast(x, trt.float16).get_output(0)
        return n.add_convolution_nd(x, 6, (1, 1), half, None)

    result = output(network, define, X, dtype=torch.float64)
    expected = F.conv2d(X.double(), T(half).double())
    assert result.dtype == torch.float64
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "define, what",
    [
        (lambda n, x: setting(n.add_topk(x, trt.TopKOperation.MAX, 2, 4), name="best"), "'best'.*TOPK"),
        (lambda n, x: setting(n.add_pooling_nd(x, trt.PoolingType.MAX, (2, 2)), name="pool"), "'pool'.*POOLING"),
        (
            lambda n, x: setting(
                n.add_resize(x), shape=(2, 6, 8, 8), resize_mode=trt.InterpolationMode.LINEAR, name="up"
            ),
            "'up'.*LINEAR",
        ),
        (convolution(padding_mode=trt.PaddingMode.SAME_UPPER, name="conv"), "'conv'.*SAME_UPPER"),
        (
            lambda n, x: setting(
                n.add_gather_v2(x, const(n, np.zeros((1, 4), np.int32)), trt.GatherMode.ND), name="rows"
            ),
            "'rows'.*ND",
        ),
    ],
)
def test_unknown_layer_is_named(network: Any, define: Callable[..., Any], what: str) -> None:
    with pytest.raises(NotImplementedError, match=what):
        output(network, define, X)


def test_values_that_uint8_cannot_hold(network: Any) -> None:
    with pytest.raises(ValueError, match="'low'.*UINT8"):
        output(network, lambda n, x: setting(n.add_cast(x, trt.uint8), name="low"), X * 50)


def test_inputs_must_fit(network: Any) -> None:
    x = network.add_input("x", trt.float32, (2, 3))
    network.mark_output(network.add_unary(x, UNARY.NEG).get_output(0))
    for given, what in [
        ({}, "takes \\['x'\\]"),
        ({"x": randn(3, 2)}, "shape \\(3, 2\\)"),
        ({"x": torch.zeros(2, 3, dtype=torch.int32)}, "torch.int32"),
    ]:
        with pytest.raises(ValueError, match=what):
            evaluate(network, given)
