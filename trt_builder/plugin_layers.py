"""The plugins that networks are made of, ours and the one that TensorRT 8.6 has, as a flavour gives them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from plugins.load import (
    ATTENTION_WIDTHS,
    CAUSAL_WIDTHS,
    CONV,
    CONV_CAPABILITY,
    CONV_MULTIPLE,
    CROSS,
    CROSS_WORDS,
    FIELDS_VERSION,
    GROUP_NORM,
    RESIDUALS,
    TRANSFORMER,
    VERSION,
    PluginError,
    find,
    has_conv_kernel,
    has_cross_kernel,
    has_end_kernels,
    load,
)
from runtime.engine import gpu
from trt_builder.config import Options

if TYPE_CHECKING:
    import tensorrt

log = logging.getLogger(__name__)

# Channels that TensorRT 8.6's own GroupNorm kernel divides into whole blocks; it also wants 32 groups, half
# precision, and at most 32 rows (its workspace is that small, which it does not check).
BUILT_IN_CHANNELS = frozenset((128, 256, 320, 512, 640, 960, 1280, 1920, 2560))
BUILT_IN_ROWS = 32

# Numbers of the result up to which convolutions are our plugin's, by their size: with more there are tiles enough for
# TensorRT's own to keep a GPU busy. Those of size 1 spare a launch: of a LayerNorm, a gate or another product.
CONV_NUMBERS = {1: 7_864_320, 3: 983_040}
# The same of those of a doubled map, where TensorRT makes that first, and more than twice the products.
UP_NUMBERS = 3_145_728

# By how much wider than x the weights of a text's words may be, of all heads: the products with them take the place of
# to_q's and to_out's, and must not become much larger. Of SD 1.5 those over 320 channels are twice as wide, and won.
CROSS_GROWTH = 2


def conv_wins(rows: int, weight: Sequence[int], up: bool = False) -> bool:
    """Whether our plugin was measured to win over TensorRT 8.6's own convolution to this many positions, B·h·w.

    weight: the shape (D, C, size, size). up: of a doubled map. Source: the measurements in plugins/README.md.
    """
    filters, _, size, _ = weight
    return rows * filters <= (UP_NUMBERS if up else CONV_NUMBERS.get(size, 0))


def cross_fits(shape: Sequence[int], heads: int, words: int, options: Options) -> bool:
    """Whether a cross-attention that makes maps (B, C, h, w) is over a text that is multiplied out, by the options and
    by what our plugins have kernels for. Its other linear layers must be theirs, too.
    """
    batch, channels, h, w = shape
    linear, rows = (channels, channels, 1, 1), batch * h * w
    return (
        (options.cross_attention, options.precision) == ("folded", "fp16")
        and channels // heads in ATTENTION_WIDTHS
        and has_conv_kernel(shape, linear, 1)
        and conv_wins(rows, linear)
        and has_cross_kernel(shape, batch, heads, words)
        and heads * CROSS_WORDS <= CROSS_GROWTH * channels
    )


class FlavourError(ValueError):
    """A flavour that is not installed, or cannot do what is asked; the message is one sentence."""


class PluginLayers:
    """What `Flavour` knows of plugins."""

    name: str
    trt: Any
    strongly_typed: bool

    @property
    def label(self) -> str:
        """Name and version, as a manifest holds them: "tensorrt 8.6.0"."""
        return f"{self.name} {self.trt.__version__}"

    @property
    def rtx(self) -> bool:
        """Whether this is TensorRT for RTX."""
        return self.name == "tensorrt_rtx"

    def plugins_win(self, precision: str, capability: str | None) -> bool:
        """Whether our plugins are the usual choice: where they were measured to win, if compiled for this GPU.

        That is TensorRT 8.6 in half precision. Says once why not where they could be had.
        """
        if self.strongly_typed or precision != "fp16":
            return False
        try:
            library = find(self.trt.__version__)
        except PluginError as why:
            _say_once(f"Without our plugins, which take a third off a step: {why}")
            return False
        if capability is None or capability.replace(".", "") not in library.architectures:
            _say_once(f"Without our plugins: {library.path} is not for compute capability {capability}")
            return False
        return True

    def group_norm_plugin(self, channels: int, rows: int, options: Options) -> Literal["own", "builtin"] | None:
        """Which GroupNorm(+SiLU) plugin serves this many channels and rows; None where TensorRT's own layer does.

        Raises FlavourError where a plugin is demanded and cannot be had.
        """
        if options.group_norm == "native":
            return None
        if options.group_norm == "own":
            self._need(GROUP_NORM, "group-norm")
            return "own"
        reason = self._no_built_in(channels, rows, options)
        if reason is None:
            return "builtin"
        if options.group_norm == "builtin":
            raise FlavourError(f"there is no built-in GroupNorm: {reason}; use the option group_norm=auto or native")
        if not self.rtx:
            _say_once(f"GroupNorm is TensorRT's own layer here: {reason}")
        return None

    def load_plugins(self, options: Options) -> dict[str, str]:
        """Load the plugins that networks of these options need; returns their names with the SHA-256 of their sources.

        Raises FlavourError or PluginError where they cannot be had.
        """
        needed = [GROUP_NORM] * (options.group_norm == "own") + list(TRANSFORMER) * (options.attention == "own")
        needed += list(RESIDUALS) * (options.residual == "own") + [CONV] * (options.conv == "own")
        needed += [CROSS] * (options.cross_attention == "folded")
        if needed and self.rtx:
            raise FlavourError("TensorRT-RTX takes no plugins: use another --group-norm and --attention than own")
        if not needed:
            return {}
        library = load(self.trt)
        here = gpu()
        other_gpu = here is not None and here.capability != CONV_CAPABILITY
        if options.conv == "own" and (other_gpu or not {"90", "90a"} & set(library.architectures)):
            what = f"{here.name if here and other_gpu else library.path} has no convolutions of ours"
            raise FlavourError(f"{what}: they are for compute capability {CONV_CAPABILITY}; use --conv builtin")
        return dict.fromkeys(needed, library.source)

    def _no_built_in(self, channels: int, rows: int, options: Options) -> str | None:
        if self.rtx:
            return "TensorRT-RTX takes no plugins"
        if self._built_in() is None:
            return f"{self.label} has none of its own"
        if options.precision != "fp16":
            return f"the one in {self.label} is for fp16 only"
        if channels not in BUILT_IN_CHANNELS:
            return f"the one in {self.label} does not take {channels} channels"
        if rows > BUILT_IN_ROWS:
            return f"the one in {self.label} takes {BUILT_IN_ROWS} rows at most, not {rows}"
        return None

    def _built_in(self) -> Any:
        if self.strongly_typed:  # its V2 interface has no place in the newer API
            return None
        self.trt.init_libnvinfer_plugins(None, "")
        return self._creator("GroupNorm", "1")

    def _creator(self, name: str, version: str) -> Any:
        registry = self.trt.get_plugin_registry()
        return (registry.get_creator if self.strongly_typed else registry.get_plugin_creator)(name, version, "")

    def add_built_in(
        self,
        network: tensorrt.INetworkDefinition,
        inputs: Sequence[tensorrt.ITensor],
        name: str,
        epsilon: float,
        silu: bool,
    ) -> tensorrt.ILayer:
        """Add TensorRT 8.6's own GroupNorm plugin over x, scale and bias; it knows 32 groups only."""
        trt_, kinds = self.trt, self.trt.PluginFieldType
        fields = [
            trt_.PluginField("epsilon", np.array([epsilon], np.float32), kinds.FLOAT32),
            trt_.PluginField("bSwish", np.array([silu], np.int32), kinds.INT32),
        ]
        plugin = self._built_in().create_plugin(name, trt_.PluginFieldCollection(fields))
        return network.add_plugin_v2(list(inputs), plugin)

    def has_transformer_plugins(self, width: int, options: Options, causal: bool = False) -> bool:
        """Whether our plugins serve a transformer over a map with heads of this width, under a causal mask or not.

        Raises FlavourError where they are demanded and cannot be had at all.
        """
        if options.attention != "own":
            return False
        for plugin in TRANSFORMER:
            self._need(plugin, "attention")
        if width in (CAUSAL_WIDTHS if causal else ATTENTION_WIDTHS) and options.precision == "fp16":
            return True
        what = f"{options.precision} heads {width} wide{' under a causal mask' if causal else ''}"
        _say_once(f"attention of {what} is TensorRT's own: the plugin has none for it")
        return False

    def has_residual_plugins(self, options: Options) -> bool:
        """Whether our plugins add ResBlocks' and ControlNet's residuals; FlavourError where they cannot be had."""
        if options.residual != "own" or options.precision != "fp16":
            return False
        for plugin in RESIDUALS:
            self._need(plugin, "residual")
        return True

    def has_end_plugins(self, weight: Sequence[int], options: Options) -> bool:
        """Whether our plugins do a step's first or last convolution, by a weight (D, C, 3, 3), and what goes with it.

        Raises FlavourError where they are demanded and cannot be had at all.
        """
        latent, channels = sorted(weight[:2])
        return self.has_residual_plugins(options) and has_end_kernels(latent, channels)

    def has_conv_plugin(
        self,
        shape: Sequence[int],
        weight: Sequence[int],
        stride: int,
        options: Options,
        second: int = 0,
        up: bool = False,
    ) -> bool:
        """Whether our plugin serves a convolution of a map (B, C, h, w) by a weight (D, C, size, size), by the option.

        second: channels of a second map, of a 1×1 weight, that it does in the same launch, at stride 1. up: of the map
        doubled along both axes. Raises FlavourError where it cannot be had.
        """
        if options.conv != "own" or options.precision != "fp16":
            return False
        self._need(CONV, "conv")
        rows = shape[0] * -(-shape[2] // stride) * -(-shape[3] // stride) * (4 if up else 1)
        beside = not second or (stride == 1 and not second % CONV_MULTIPLE)
        return beside and has_conv_kernel(shape, weight, stride, up) and conv_wins(rows, weight, up)

    def has_cross_plugin(self, shape: Sequence[int], heads: int, words: int, options: Options) -> bool:
        """Whether our plugin serves a cross-attention, as `cross_fits` has it; FlavourError where it cannot be had."""
        if not cross_fits(shape, heads, words, options):
            return False
        self._need(CROSS, "cross-attention")
        return True

    def _need(self, plugin: str, option: str) -> None:
        if self.rtx or self._creator(plugin, VERSION) is None:
            why = "TensorRT-RTX takes no plugins" if self.rtx else "it was not loaded"
            raise FlavourError(f"there is no plugin {plugin}: {why}; use another --{option}")

    def add_own(
        self, network: Any, plugin: str, inputs: Sequence[tensorrt.ITensor], name: str, **numbers: float
    ) -> tensorrt.ILayer:
        """Add one of our plugins with its fields, int32 or float as the number is an int or a float."""
        trt_, kinds = self.trt, self.trt.PluginFieldType
        fields = []
        for field, value in {"version": FIELDS_VERSION, **numbers}.items():
            whole = isinstance(value, int)
            array = np.array([value], np.int32 if whole else np.float32)
            fields.append(trt_.PluginField(field, array, kinds.INT32 if whole else kinds.FLOAT32))
        collection, creator = trt_.PluginFieldCollection(fields), self._creator(plugin, VERSION)
        if not self.strongly_typed:
            return network.add_plugin_v2(list(inputs), creator.create_plugin(name, collection))
        made = creator.create_plugin(name, collection, trt_.TensorRTPhase.BUILD)
        return network.add_plugin_v3(list(inputs), [], made)


@cache
def _say_once(message: str) -> None:
    log.warning(message)
