"""An interpreter of TensorRT's INetworkDefinition: it evaluates, with torch on the CPU, the layers TensorRT holds.

Nothing is taken from the code that defined the network: layer types, attributes, inputs and weights are read back from
the network object. Floating point is one type throughout (float32, or float64), so casts between float types do
nothing: this proves graph and weight layout, and kernels and half precision are proved on a GPU. Casts to whole
numbers are real.

Source: the operator reference of TensorRT, and for attributes the docstrings of its Python bindings.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trt_interpreter.layers import FLOATS, HANDLERS, WHOLE, Layer, refuse


def evaluate(network: Any, inputs: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The outputs of a network of static shapes, by name.

    `inputs` holds one tensor per network input, shapes as in the network. Floating point is computed, and comes back,
    as `dtype`. Raises NotImplementedError naming a layer it cannot evaluate, ValueError for inputs that do not fit or
    a value that TensorRT leaves undefined, RuntimeError where a result's shape or type is not what TensorRT says.
    """
    trt = sys.modules[type(network).__module__]
    values = network_inputs(network, inputs, dtype)
    pending = [network.get_layer(i) for i in range(network.num_layers)]
    with torch.no_grad():
        # TensorRT keeps layers in the order of their definition, but a later one may feed an earlier one (a mask set
        # on an attention that was there before): go round until all are done.
        while pending:
            waiting = [layer for layer in pending if not run_layer(trt, layer, values, dtype)]
            if len(waiting) == len(pending):
                raise RuntimeError(f"layer {waiting[0].name!r} has an input that no layer makes")
            pending = waiting
    outputs = (network.get_output(i) for i in range(network.num_outputs))
    return {tensor.name: values[tensor.name] for tensor in outputs}


def network_inputs(network: Any, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs in the interpreter's types, after checking names, shapes and types."""
    wanted = {tensor.name: tensor for tensor in (network.get_input(i) for i in range(network.num_inputs))}
    if wanted.keys() != inputs.keys():
        raise ValueError(f"the network takes {sorted(wanted)}, not {sorted(inputs)}")
    values = {}
    for name, tensor in wanted.items():
        given = inputs[name]
        if tuple(given.shape) != tuple(tensor.shape):
            raise ValueError(f"input {name!r} has shape {tuple(given.shape)}, the network takes {tuple(tensor.shape)}")
        if given.is_floating_point() != (tensor.dtype.name in FLOATS):
            raise ValueError(f"input {name!r} is {given.dtype}, the network takes {tensor.dtype.name}")
        values[name] = given.to(WHOLE.get(tensor.dtype.name, dtype))
    return values


def run_layer(trt: Any, layer: Layer, values: dict[str, Tensor], dtype: torch.dtype) -> bool:
    """Evaluate one layer into `values`; False where an input is not there yet."""
    sources = [layer.get_input(i) for i in range(layer.num_inputs)]
    if any(s is not None and s.name not in values for s in sources):
        return False
    kind = trt.ILayer.type.fget(layer).name  # the subclasses of activations hide it behind their own `type`
    if kind not in HANDLERS or None in sources:
        refuse(layer, f"layers of type {kind}" if kind not in HANDLERS else "an input left out between others")
    class_name, handler = HANDLERS[kind]
    layer.__class__ = getattr(trt, class_name)  # get_layer returns a bare ILayer; this is how the bindings downcast
    result = handler(layer, [values[s.name] for s in sources])
    output = layer.get_output(0)
    if result.is_floating_point() and output.dtype.name in FLOATS:
        result = result.to(dtype)
    expected = dtype if output.dtype.name in FLOATS else WHOLE.get(output.dtype.name)
    if (tuple(result.shape), result.dtype) != (tuple(output.shape), expected):
        raise RuntimeError(
            f"layer {layer.name!r} ({class_name}): the interpreter made {tuple(result.shape)} {result.dtype}, "
            f"TensorRT says {tuple(output.shape)} {output.dtype.name}"
        )
    values[output.name] = result
    return True
