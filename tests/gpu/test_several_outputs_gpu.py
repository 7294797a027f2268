"""The plugins of several outputs in TensorRT: engines of one layer, in the formats that it has between convolutions."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from plugins.call import error
from plugins.end_calls import First, Last
from plugins.load import FIRST, JOIN_NORM, LAST, first_blocks, last_rows
from plugins.token_calls import Join, JoinNorm
from runtime.engine import Engine, gpu
from trt_builder.config import Options
from trt_builder.flavour import Flavour, FlavourError, get_flavour
from trt_builder.layers import own_outputs
from trt_builder.net import Net
from trt_builder.weights import Weights

pytestmark = pytest.mark.skipif(gpu() is None, reason="cuda-python sees no NVIDIA GPU")

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def flavour(library: Any) -> Flavour:
    try:
        return get_flavour("tensorrt")
    except FlavourError as why:
        pytest.skip(str(why))


def formats(flavour: Flavour, tensor: Any, maps: bool) -> None:
    """Maps are by eights channels-last, all others in the order of their shape."""
    tensor.allowed_formats = flavour.channels_last("fp16") if maps else flavour.linear()


def one_layer(
    flavour: Flavour, inputs: Arrays, constants: Mapping[str, np.ndarray], maps: set[str], names: list[str],
    define: Callable[[Net, dict[str, Any]], list[Any]], kind: Any = None,
) -> bytes:  # fmt: skip
    """The plan of what `define` makes of these inputs and of constants in float; outputs have the first one's type, or
    this one.
    """
    options = Options(group_norm="own", residual="own")
    flavour.load_plugins(options)
    builder = flavour.create_builder(flavour.trt.Logger(flavour.trt.Logger.ERROR))
    network = flavour.create_network(builder)
    net = Net(network, flavour, Weights.from_dict({}), options, "test", "", np.float16)
    tensors = {}
    for name, array in inputs.items():
        tensors[name] = network.add_input(name, net.type(array.dtype.type), array.shape)
        formats(flavour, tensors[name], name in maps)
    for name, array in constants.items():
        tensors[name] = net.float32().constant(array, array.shape, name)
    kind = kind or next(iter(inputs.values())).dtype.type
    for name, y in zip(names, define(net, tensors), strict=True):
        y.name = name
        network.mark_output(y)
        flavour.set_output_type(y, net.type(kind))
        formats(flavour, y, name in maps)
    made = flavour.serialize(builder, network, flavour.create_config(builder, options))
    assert made is not None
    return bytes(memoryview(made))


def same_results(flavour: Flavour, plan: bytes, inputs: Arrays) -> Arrays:
    """The outputs, which are the same bits ten times, without a reformat."""
    with Engine(plan, flavour) as engine:
        first = {name: y.copy() for name, y in engine.run(inputs).items()}
        for _ in range(10):
            assert all(y.tobytes() == first[name].tobytes() for name, y in engine.run(inputs).items())
        assert "reformat" not in engine.layers_json().lower()
    return first


@pytest.mark.parametrize(
    "join", [Join(2, 96, 1280, 1280, True), Join(2, 96, 1280, 640), Join(2, 96, 40, 24, True)], ids=str
)
def test_a_join_and_its_group_norm(flavour: Flavour, join: Join) -> None:
    what, index, x_index = JoinNorm(join), 3, 12 if join.both else -1
    arrays = what.arrays(3.0)
    scales = np.zeros((13, join.batch), np.float32)
    scales[index] = arrays["scales"]
    if join.both:
        scales[x_index] = arrays["x_scales"]
    maps: list[str] = [name for name in ("x", "skip", "residual", "x_residual") if name in arrays]
    inputs = {name: arrays[name].reshape(join.batch, 8, 12, -1).transpose(0, 3, 1, 2) for name in maps}
    inputs["scales"] = scales
    names = ["x", "skip", "residual", "scales", *maps[3:], "gamma", "beta"]

    def define(net: Net, tensors: dict[str, Any]) -> list[Any]:
        chosen = [tensors[name] for name in names]
        return own_outputs(
            net, JOIN_NORM, chosen, 2, index=index, x_index=x_index, groups=what.groups, silu=1, epsilon=what.epsilon
        )

    constants = {name: arrays[name] for name in ("gamma", "beta")}
    plan = one_layer(flavour, inputs, constants, {*maps, "joined", "y"}, ["joined", "y"], define)
    made = same_results(flavour, plan, inputs)
    joined, y = (made[name].transpose(0, 2, 3, 1).reshape(join.tokens, -1) for name in ("joined", "y"))
    assert error(joined, join.expected(arrays)) < 1e-3
    assert error(y, what.expected(arrays, joined)) < 2e-3


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("cond", [False, True])
def test_the_end_of_a_step(flavour: Flavour, samples: int, cond: bool) -> None:
    what = Last(samples, 320, 8, 12, cond=cond)
    arrays = what.arrays()
    inputs = {name: array for name, array in arrays.items() if name not in ("weight", "bias")}
    inputs = {"x": inputs.pop("x")} | inputs
    names = ["x", "h", "weight", "bias", "guidance", "e1", "e2", "noise", "coefficients", *(("kept",) if cond else ())]
    results = ["e", "x_next", "difference"][: 2 if cond else 3]

    def define(net: Net, tensors: dict[str, Any]) -> list[Any]:
        rows = last_rows(arrays["weight"])
        tensors = tensors | {"weight": net.constant(rows, rows.shape, "weight")}
        return own_outputs(net, LAST, [tensors[name] for name in names], len(results), cond=int(cond))

    plan = one_layer(flavour, inputs, {"bias": arrays["bias"]}, {"h"}, results, define)
    made, expected = same_results(flavour, plan, inputs), what.expected(arrays)
    for name in results:
        assert error(made[name], expected[name]) < 2e-6


@pytest.mark.parametrize(
    "what",
    [
        First(1, 4, 8, 12, 320, hint_batch=1, repeat=2), First(1, 4, 8, 12, 320, repeat=2),
        First(2, 4, 8, 12, 320, hint_batch=1, repeat=2), First(1, 4, 8, 12, 320, hint_batch=1),
    ],
    ids=str,
)  # fmt: skip
def test_the_first_convolution(flavour: Flavour, what: First) -> None:
    """Of a latent in float, to maps in half precision of two sizes."""
    arrays = what.arrays()
    inputs = {name: array for name, array in arrays.items() if name in ("x", "hint")}
    constants = {"weight": first_blocks(arrays["weight"]), "bias": arrays["bias"]}
    results = list(what.results)

    def define(net: Net, tensors: dict[str, Any]) -> list[Any]:
        chosen = [tensors[name] for name in ("x", "weight", "bias", *(("hint",) if what.hint_batch else ()))]
        hint = int(what.hint_batch > 0)
        return own_outputs(net, FIRST, chosen, len(results), hint=hint, repeat=what.repeat)

    plan = one_layer(flavour, inputs, constants, {"hint", *results}, results, define, np.float16)
    made, y = same_results(flavour, plan, inputs), what.expected(arrays)
    for name in results:
        assert error(made[name], np.concatenate([y] * (len(made[name]) // len(y)))) < 5e-4
