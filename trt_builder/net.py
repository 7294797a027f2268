"""Where a network is being written: the network definition, how to write it, and the place in the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from trt_builder.config import Options
from trt_builder.flavour import Flavour
from trt_builder.weights import Weights

if TYPE_CHECKING:
    import tensorrt as trt

Float = type[np.floating]

TYPES: dict[Any, str] = {np.float16: "HALF", np.float32: "FLOAT", np.int32: "INT32", np.uint8: "UINT8"}


class NetworkError(ValueError):
    """A layer that TensorRT refused; the message names it."""


@dataclass(frozen=True)
class Net:
    """Where a network is being written: the network, how to write it, and the place in the checkpoint.

    `root` is the part of the checkpoint's prefix that layer names leave out. `dtype` is what layers compute in.
    """

    network: trt.INetworkDefinition
    flavour: Flavour
    weights: Weights
    options: Options
    stage: str
    root: str
    dtype: Float
    path: tuple[str, ...] = ()
    beside: bool = False  # whether another stage runs at the same time
    used: dict[str, int] = field(default_factory=dict)

    @property
    def api(self) -> Any:
        """The TensorRT module."""
        return self.flavour.trt

    def at(self, *parts: str) -> Net:
        """The same network one or more steps down in the checkpoint: at("norm1"), at("net.0.proj")."""
        return replace(self, path=(*self.path, *(part.removeprefix(self.root) for part in parts)))

    def float32(self) -> Net:
        """The same place, computing in single precision."""
        return replace(self, dtype=np.float32)

    def weight(self, name: str = "weight") -> np.ndarray:
        """The weight of this name at this place, in the type that layers compute in."""
        return self.weights.cast(self.key(name), self.dtype)

    def shape(self, name: str = "weight") -> tuple[int, ...]:
        """The shape of the weight of this name at this place."""
        return self.weights.shape(self.key(name))

    def has(self, name: str) -> bool:
        """Whether there is a weight of this name at this place."""
        return self.key(name) in self.weights

    def key(self, name: str) -> str:
        """What the checkpoint calls the weight of this name at this place."""
        return self.root + ".".join((*self.path, name))

    def name(self, what: str = "") -> str:
        """A layer's name: stage, place and, where a place has several layers, what it does; unique in the network."""
        name = "/".join((self.stage, *self.path)) + (f":{what}" if what else "")
        self.used[name] = count = self.used.get(name, 0) + 1
        return name if count == 1 else f"{name}#{count}"

    def add(self, layer: trt.ILayer | None, what: str = "") -> trt.ITensor:
        """Name a layer that was just added, give it its precision, and return its output."""
        name = self.name(what)
        if layer is None:
            raise NetworkError(f"TensorRT refused the layer {name}")
        layer.name = name
        if not self.flavour.strongly_typed:
            self.flavour.set_precision(layer, self.dtype)
        return layer.get_output(0)

    def type(self, dtype: Any) -> Any:
        """TensorRT's name of a numpy type."""
        return self.api.DataType.__members__[TYPES[dtype]]

    def cast(self, x: trt.ITensor, dtype: Any = None) -> trt.ITensor:
        """x as the type that layers compute in, or as another."""
        to = self.type(dtype or self.dtype)
        return self.add(self.network.add_cast(x, to), "cast") if self.flavour.needs_cast(x, to) else x

    def constant(self, array: np.ndarray, shape: Sequence[int], what: str = "constant") -> trt.ITensor:
        """A constant of this shape, in the type that layers compute in."""
        array = self.weights.keep(np.asarray(array, self.dtype))
        return self.add(self.network.add_constant(tuple(shape), array), what)
