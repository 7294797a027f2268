"""Everything that differs between TensorRT 8.6, TensorRT 10 and 11, and TensorRT-RTX; nothing else asks for versions.

What the networks need of a flavour are the fields of `Flavour`; the rest is how a builder is driven.

Proved: TensorRT-RTX 1.7 builds every stage in the tests. TensorRT 8.6.0's bindings have every call made here.
Not proved, for want of a machine that runs it, on TensorRT 10 and 11:
  - that the strongly typed networks build: they are those of TensorRT-RTX, and the API has the same names;
  - that attention at 40, 80 and 160 channels a head becomes one kernel, as it does on TensorRT-RTX;
  - the accuracy of half-precision normalisation where `add_normalization` takes half and no precision can be set;
  - our GroupNorm plugin, in either form of the API (V2 in 8.6, V3 from 10 on);
  - the timing cache and the progress monitor.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from plugins.load import ADD, ATTENTION_WIDTHS, FIELDS_VERSION, GROUP_NORM, TRANSFORMER, VERSION, load
from trt_builder.config import Options

if TYPE_CHECKING:
    import tensorrt

log = logging.getLogger(__name__)

MODULES = ("tensorrt", "tensorrt_rtx")

# Channels that TensorRT 8.6's own GroupNorm kernel divides into whole blocks; it also wants 32 groups, half
# precision, and at most 32 rows (its workspace is that small, which it does not check).
BUILT_IN_CHANNELS = frozenset((128, 256, 320, 512, 640, 960, 1280, 1920, 2560))
BUILT_IN_ROWS = 32


class FlavourError(ValueError):
    """A flavour that is not installed, or cannot do what is asked; the message is one sentence."""


@dataclass(frozen=True)
class Flavour:
    """A TensorRT and what it can do.

    strongly_typed: each layer runs in the types of its inputs; otherwise layers are given their precision.
    needs_gpu: whether building needs one.
    attention: the network's method for one attention layer, or None where there is only the plain form.
    scale_scores: the plain form scales Q·Kᵀ, the pattern that 8.6 fuses; otherwise it scales Q, which 10 asks for.
    normalization: the network's method; `add_normalization_v2` takes a GroupNorm's scale per channel, not per group.
    gelu: whether GELU is an activation; otherwise it is spelt out with erf.
    timing_cache, progress: whether a builder has them.
    """

    name: str
    trt: Any
    version: tuple[int, ...]
    strongly_typed: bool
    needs_gpu: bool
    attention: str | None
    scale_scores: bool
    normalization: str
    gelu: bool
    timing_cache: bool
    progress: bool

    @property
    def label(self) -> str:
        """Name and version, as a manifest holds them: "tensorrt 8.6.0"."""
        return f"{self.name} {self.trt.__version__}"

    @property
    def rtx(self) -> bool:
        """Whether this is TensorRT for RTX."""
        return self.name == "tensorrt_rtx"

    # -- what networks ask --------------------------------------------------------------------------------------------

    def channels_last(self, precision: str) -> int:
        """The bit mask of the format of channels-last feature maps: by eights in half precision, plain in single."""
        formats = self.trt.TensorFormat
        return 1 << int(formats.HWC8 if precision == "fp16" else formats.HWC)

    def linear(self) -> int:
        """The bit mask of the row-major format."""
        return 1 << int(self.trt.TensorFormat.LINEAR)

    def needs_cast(self, x: tensorrt.ITensor, to: Any) -> bool:
        """Whether x is to be cast to get this type.

        In a weakly typed network the precision of layers says in which float type something is computed.
        """
        floats = self.trt.DataType.HALF, self.trt.DataType.FLOAT
        return x.dtype != to and (self.strongly_typed or x.dtype not in floats or to not in floats)

    def set_precision(self, layer: Any, dtype: Any) -> None:
        """Weakly typed networks: constrain a layer to what strong typing would have it compute in."""
        kinds, types = self.trt.LayerType, self.trt.DataType
        floats = types.FLOAT, types.HALF
        if layer.type in (kinds.CAST, kinds.PLUGIN_V2) or layer.get_output(0).dtype not in floats:
            return
        if dtype == np.float32:
            layer.precision = types.FLOAT
            layer.set_output_type(0, types.FLOAT)
        elif layer.type != kinds.CONSTANT:
            layer.precision = types.HALF

    def set_output_type(self, y: Any, to: Any) -> None:
        """Weakly typed networks: tell a network's output its type, which strong typing infers."""
        if not self.strongly_typed:
            y.dtype = to

    def add_attention(
        self,
        network: tensorrt.INetworkDefinition,
        q: tensorrt.ITensor,
        k: tensorrt.ITensor,
        v: tensorrt.ITensor,
        mask: tensorrt.ITensor | None,
    ) -> Any:
        """Attention of q over k, v (B, heads, T, d) as one layer; q is scaled already, the mask is added to q·kᵀ."""
        softmax = self.trt.AttentionNormalizationOp.SOFTMAX
        not_causal = self.trt.CausalMaskKind.NONE if self.attention == "add_attention_v2" else False
        layer = getattr(network, str(self.attention))(q, k, v, softmax, not_causal)
        if layer is not None:
            # TensorRT-RTX has one kernel for half-precision heads of these widths wherever they occur (wider ones it
            # takes in some places only), so that there losing it is an error and not a slow engine.
            has_kernel = q.dtype == self.trt.DataType.HALF and 16 <= q.shape[3] <= 160
            layer.decomposable = not (self.rtx and has_kernel)
            if mask is not None:
                layer.mask = mask
        return layer

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
        needed += [ADD] * (options.residual == "own")
        if needed and self.rtx:
            raise FlavourError("TensorRT-RTX takes no plugins: use another --group-norm and --attention than own")
        return dict.fromkeys(needed, load(self.trt).source) if needed else {}

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

    def has_transformer_plugins(self, width: int, options: Options) -> bool:
        """Whether our plugins serve a SpatialTransformer with heads of this width.

        Raises FlavourError where they are demanded and cannot be had at all.
        """
        if options.attention != "own":
            return False
        for plugin in TRANSFORMER:
            self._need(plugin, "attention")
        if width in ATTENTION_WIDTHS and options.precision == "fp16":
            return True
        _say_once(f"attention of {options.precision} heads {width} wide is TensorRT's own: the plugin has none for it")
        return False

    def has_add_plugin(self, options: Options) -> bool:
        """Whether our plugin adds the residuals of ResBlocks; raises FlavourError where it cannot be had."""
        if options.residual != "own" or options.precision != "fp16":
            return False
        self._need(ADD, "residual")
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

    # -- driving a builder --------------------------------------------------------------------------------------------

    def create_builder(self, logger: Any) -> tensorrt.Builder:
        """A builder. Raises FlavourError where there is none to be had, which is where a GPU is needed and missing."""
        if not self.rtx:
            self.trt.init_libnvinfer_plugins(logger, "")
        try:
            builder = self.trt.Builder(logger)
        except (TypeError, RuntimeError):  # what the binding raises where the library returns null
            builder = None
        if not builder:
            raise FlavourError(f"{self.label} gives no builder: it needs an NVIDIA GPU and its driver, or tensorrt_rtx")
        return builder

    def create_network(self, builder: tensorrt.Builder) -> tensorrt.INetworkDefinition:
        """An empty network of this flavour's kind."""
        flags = self.trt.NetworkDefinitionCreationFlag
        return builder.create_network(1 << int(flags.STRONGLY_TYPED if self.strongly_typed else flags.EXPLICIT_BATCH))

    def create_config(
        self,
        builder: tensorrt.Builder,
        options: Options,
        targets: Sequence[str] = (),
        timing_cache: bytes = b"",
        monitor: Any = None,
        detailed: bool = True,
    ) -> tensorrt.IBuilderConfig:
        """A builder's configuration for networks of `options`.

        targets: compute capabilities as "sm86", for TensorRT-RTX only; none means the GPU of this machine, or without
        one every capability that TensorRT-RTX knows. detailed: the plan can tell its layers' tactics.
        Raises FlavourError for a target that is unknown.
        """
        trt_ = self.trt
        config = builder.create_builder_config()
        if detailed:
            config.profiling_verbosity = trt_.ProfilingVerbosity.DETAILED
        if options.precision == "fp32":
            config.clear_flag(trt_.BuilderFlag.TF32)
        if not self.strongly_typed:
            if options.precision == "fp16":
                config.set_flag(trt_.BuilderFlag.FP16)
            config.set_flag(trt_.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
            # Without cuBLAS and cuDNN: plugins do not ask for them, and a build takes a fraction of the time.
            sources = trt_.TacticSource.EDGE_MASK_CONVOLUTIONS, trt_.TacticSource.JIT_CONVOLUTIONS
            config.set_tactic_sources(sum(1 << int(source) for source in sources))
        if monitor is not None and self.progress:
            config.progress_monitor = monitor
        if self.timing_cache:
            self.take_timing_cache(config, timing_cache)
        self._set_targets(config, targets)
        return config

    def take_timing_cache(self, config: Any, content: bytes) -> None:
        """Give a configuration a timing cache, an empty one where this one is damaged or of another GPU or TensorRT."""
        cache = config.create_timing_cache(content)
        if cache is None or not config.set_timing_cache(cache, False):
            log.warning("The timing cache is damaged or of another GPU or TensorRT: a new one is begun.")
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def _set_targets(self, config: Any, targets: Sequence[str]) -> None:
        known = self.targets()
        unknown = [target for target in targets if target.lower() not in known]
        if unknown:
            which = f"it knows {', '.join(known)}" if known else "it builds for the GPU of this machine only"
            raise FlavourError(f"{self.label} cannot build for {', '.join(unknown)}: {which}")
        if targets:
            config.num_compute_capabilities = len(targets)
            for i, target in enumerate(targets):
                config.set_compute_capability(self.trt.ComputeCapability.__members__[target.upper()], i)

    def targets(self) -> tuple[str, ...]:
        """The compute capabilities that can be built for without the GPU, as "sm86"; empty for all but RTX."""
        if not self.rtx:
            return ()
        return tuple(name.lower() for name in self.trt.ComputeCapability.__members__ if name.startswith("SM"))

    def serialize(
        self, builder: tensorrt.Builder, network: tensorrt.INetworkDefinition, config: tensorrt.IBuilderConfig
    ) -> Any:
        """The plan, as a buffer; None where TensorRT could not build it and has said why to the logger."""
        return builder.build_serialized_network(network, config)

    def saved_timing_cache(self, config: tensorrt.IBuilderConfig) -> bytes:
        """What a build has learnt of its kernels' times, for the next `create_config`; empty where there is none."""
        return bytes(config.get_timing_cache().serialize()) if self.timing_cache else b""

    # -- driving an engine --------------------------------------------------------------------------------------------

    def create_context(self, engine: Any) -> Any:
        """An execution context without activation memory, which the caller gives it; None where there is none."""
        if self.strongly_typed:
            return engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        return engine.create_execution_context_without_device_memory()

    def activation_bytes(self, engine: Any) -> int:
        """How much activation memory a context of this engine needs."""
        return int(engine.device_memory_size_v2 if self.strongly_typed else engine.device_memory_size)

    def set_activation_memory(self, context: Any, address: int, size: int) -> None:
        """Give a context its activation memory; the address is a multiple of 256."""
        if self.strongly_typed:
            context.set_device_memory(address, size)
        else:
            context.device_memory = address


def get_flavour(name: str | None = None) -> Flavour:
    """The flavour "tensorrt" (8.6, 10 or 11, whichever is installed) or "tensorrt_rtx"; by default the first found.

    Raises FlavourError where it is unknown or not installed.
    """
    if name is not None and name not in MODULES:
        raise FlavourError(f"there is no flavour {name!r}: take one of {', '.join(MODULES)}")
    for module in MODULES if name is None else (name,):
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise FlavourError(f"{module} is installed, but not the module {error.name} that it needs") from None
            continue
        except (ImportError, OSError) as error:
            raise FlavourError(f"{module} is installed, but cannot be loaded: {error}") from None
        if hasattr(found, "INetworkDefinition"):  # a folder of type stubs has this name too
            return _flavour(module, found)
    wanted = "no TensorRT" if name is None else f"no {name}"
    package = "tensorrt" if name == "tensorrt" else "tensorrt-rtx-cu13"
    raise FlavourError(f"{wanted} is installed in this interpreter: pip install {package}")


def _flavour(name: str, module: Any) -> Flavour:
    network, rtx = module.INetworkDefinition, name == "tensorrt_rtx"
    version = tuple(int(part) for part in module.__version__.split(".") if part.isdigit())
    if not rtx and version < (8, 6):
        raise FlavourError(f"TensorRT {module.__version__} is too old: the networks need 8.6 or newer")
    strongly_typed = rtx or version >= (10,)
    return Flavour(
        name=name,
        trt=module,
        version=version,
        strongly_typed=strongly_typed,
        needs_gpu=not rtx,
        attention=_first(network, "add_attention_v2", "add_attention"),
        scale_scores=not strongly_typed,
        normalization=_first(network, "add_normalization_v2", "add_normalization") or "",
        gelu=hasattr(module.ActivationType, "GELU_ERF"),
        timing_cache=not rtx,  # TensorRT-RTX chooses its kernels where it runs
        progress=hasattr(module, "IProgressMonitor"),
    )


def _first(owner: Any, *names: str) -> str | None:
    return next((name for name in names if hasattr(owner, name)), None)


@cache
def _say_once(message: str) -> None:
    log.warning(message)
