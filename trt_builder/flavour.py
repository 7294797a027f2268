"""Everything that differs between TensorRT 8.6, TensorRT 10 and 11, and TensorRT-RTX; nothing else asks for versions.

What the networks need of a flavour are the fields of `Flavour`; the rest is how a builder is driven.

Proved: TensorRT-RTX 1.7 builds every stage in the tests; TensorRT 8.6.0 has built, verified and run them on an H200.
Not proved, for want of a machine that runs it, on TensorRT 10 and 11:
  - that the strongly typed networks build: they are those of TensorRT-RTX, and the API has the same names;
  - that attention at 40, 80 and 160 channels a head becomes one kernel, as it does on TensorRT-RTX;
  - the accuracy of half-precision normalisation where `add_normalization` takes half and no precision can be set;
  - our plugins, in the form of the API that they have there (V3);
  - the timing cache and the progress monitor.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trt_builder.config import Options
from trt_builder.plugin_layers import FlavourError, PluginLayers

if TYPE_CHECKING:
    import tensorrt

log = logging.getLogger(__name__)

MODULES = ("tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class Flavour(PluginLayers):
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
        config.clear_flag(trt_.BuilderFlag.TF32)  # what is in single precision is so for its digits
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
