"""What a yaml says of a model, the shape that an engine is built for, and the options of its definition.

Nothing here needs torch or TensorRT. The names of layers and blocks are those of the checkpoint.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from models import DESCRIPTIONS, description

LARGEST_SIDE, MOST_SAMPLES, MOST_STEPS = 8192, 1000, 1000  # beyond the first two no GPU, beyond the last no model goes
HINT_CHANNELS = (16, 16, 32, 32, 96, 96, 256)

Kind = Literal["conv", "res", "transformer", "down", "up"]


@dataclass(frozen=True)
class Layer:
    """One layer of a UNet block: its checkpoint prefix, what it is, and its channels in and out."""

    prefix: str
    kind: Kind
    channels: int
    out_channels: int


Block = tuple[Layer, ...]


@dataclass(frozen=True)
class UNetConfig:
    """The sizes of a UNet, or of the half of one that a ControlNet is; `prefix` ends in a dot."""

    prefix: str
    in_channels: int
    model_channels: int
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    channel_mult: tuple[int, ...]
    num_heads: int
    context_dim: int
    transformer_depth: int = 1
    out_channels: int = 0

    @property
    def emb_channels(self) -> int:
        """Width of the time embedding."""
        return self.model_channels * 4

    @property
    def input_blocks(self) -> list[Block]:
        """The input blocks, in the order in which they run."""
        blocks: list[Block] = [self._block("input_blocks", 0, [("conv", self.in_channels, self.model_channels)])]
        ch, scale = self.model_channels, 1
        for level, mult in enumerate(self.channel_mult):
            for _ in range(self.num_res_blocks):
                layers: list[tuple[Kind, int, int]] = [("res", ch, mult * self.model_channels)]
                ch = mult * self.model_channels
                if scale in self.attention_resolutions:
                    layers.append(("transformer", ch, ch))
                blocks.append(self._block("input_blocks", len(blocks), layers))
            if level < len(self.channel_mult) - 1:
                blocks.append(self._block("input_blocks", len(blocks), [("down", ch, ch)]))
                scale *= 2
        return blocks

    @property
    def channels(self) -> list[int]:
        """The skips' channels, one per input block."""
        return [block[-1].out_channels for block in self.input_blocks]

    @property
    def scales(self) -> list[int]:
        """By what each skip's height and width are smaller than the latent's, one per input block."""
        scales = [1]
        for block in self.input_blocks[1:]:
            scales.append(scales[-1] * (2 if block[-1].kind == "down" else 1))
        return scales

    @property
    def middle_block(self) -> Block:
        """ResBlock, transformer, ResBlock at the lowest resolution."""
        ch = self.channels[-1]
        layers: list[tuple[Kind, int, int]] = [("res", ch, ch), ("transformer", ch, ch), ("res", ch, ch)]
        return tuple(Layer(f"{self.prefix}middle_block.{i}", *layer) for i, layer in enumerate(layers))

    @property
    def output_blocks(self) -> list[Block]:
        """The output blocks, in the order in which they run."""
        skips, blocks = self.channels, list[Block]()
        ch = skips[-1]
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                layers: list[tuple[Kind, int, int]] = [("res", ch + skips.pop(), mult * self.model_channels)]
                ch = mult * self.model_channels
                if 2**level in self.attention_resolutions:
                    layers.append(("transformer", ch, ch))
                if level and i == self.num_res_blocks:
                    layers.append(("up", ch, ch))
                blocks.append(self._block("output_blocks", len(blocks), layers))
        return blocks

    @property
    def encoder_blocks(self) -> list[Block]:
        """Input blocks and middle block, in the order in which they run."""
        return [*self.input_blocks, self.middle_block]

    def walk(self, blocks: Sequence[Block]) -> Iterator[tuple[Layer, int, int]]:
        """Each layer of the encoder's or the output blocks, in order, with by what the map that it gets and the one
        that it makes are smaller than the latent.
        """
        scale = self.scales[-1] if blocks == self.output_blocks else 1
        for layer in (layer for block in blocks for layer in block):
            given, scale = scale, {"down": scale * 2, "up": scale // 2}.get(layer.kind, scale)
            yield layer, given, scale

    def _block(self, part: str, index: int, layers: list[tuple[Kind, int, int]]) -> Block:
        return tuple(Layer(f"{self.prefix}{part}.{index}.{i}", *layer) for i, layer in enumerate(layers))


@dataclass(frozen=True)
class VAEConfig:
    """The sizes of the autoencoder."""

    embed_dim: int
    z_channels: int
    in_channels: int
    out_ch: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int


@dataclass(frozen=True)
class CLIPConfig:
    """The sizes of the text encoder; the defaults are those of SD 1.x."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    max_length: int = 77
    vocab: int = 49408


@dataclass(frozen=True)
class ModelConfig:
    """Everything that a yaml says of a model."""

    name: str
    control: UNetConfig
    unet: UNetConfig
    vae: VAEConfig
    clip: CLIPConfig
    hint_channels: int
    hint_block_channels: tuple[int, ...]
    scale_factor: float

    @staticmethod
    def load(path_or_name: str | Path) -> ModelConfig:
        """The model named "sd15" or "tiny", or the one that a yaml file describes, the ControlNet repository's too.

        Raises FileNotFoundError, or ValueError where the yaml names something unknown or leaves something out.
        """
        path = description(path_or_name)
        if not path.is_file():
            raise FileNotFoundError(f"there is no model description {path}; known names are {', '.join(DESCRIPTIONS)}")
        try:
            config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
            raise ValueError(f"{path}: no `model` at its top level")
        model = _params(config["model"], str(path))
        if not isinstance(model, _Model):
            raise ValueError(f"{path}: the model's target must be ControlLDM, not {config['model']['target']}")
        name = next((n for n, file in DESCRIPTIONS.items() if file == path), path.stem)
        return model.config(name)

    def consumers(self) -> dict[str, list[Block]]:
        """The blocks of each stage that takes K/V and time rows, in the order in which they run."""
        return {
            "control": self.control.encoder_blocks,
            "unet_encoder": self.unet.encoder_blocks,
            "unet_decoder": self.unet.output_blocks,
        }

    def rows(self, stage: str) -> list[Layer]:
        """The ResBlocks of a stage, one per time row, in the order in which they run."""
        return [layer for block in self.consumers()[stage] for layer in block if layer.kind == "res"]


# The yaml's nodes. A node names its class by the last component of `target`; each class below takes that node's
# parameters, less those that concern training or choose what this project always does.


@dataclass(frozen=True)
class _UNet:
    in_channels: int
    out_channels: int
    model_channels: int
    num_res_blocks: int
    attention_resolutions: list[int]
    channel_mult: list[int]
    num_heads: int
    context_dim: int
    transformer_depth: int = 1

    def config(self, prefix: str) -> UNetConfig:
        sizes = asdict(self) | {
            "attention_resolutions": tuple(self.attention_resolutions),
            "channel_mult": tuple(self.channel_mult),
        }
        return UNetConfig(prefix=prefix, **sizes)


def _control(
    in_channels: int,
    hint_channels: int,
    model_channels: int,
    num_res_blocks: int,
    attention_resolutions: list[int],
    channel_mult: list[int],
    num_heads: int,
    context_dim: int,
    transformer_depth: int = 1,
    hint_block_channels: tuple[int, ...] = HINT_CHANNELS,
) -> tuple[UNetConfig, int, tuple[int, ...]]:
    unet = _UNet(
        in_channels, 0, model_channels, num_res_blocks, attention_resolutions, channel_mult, num_heads, context_dim,
        transformer_depth,
    )  # fmt: skip
    return unet.config("control_model."), hint_channels, tuple(hint_block_channels)


def _vae(ddconfig: dict[str, Any], embed_dim: int) -> VAEConfig:
    names = ("z_channels", "in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks")
    missing = [name for name in names if name not in ddconfig]
    if missing:
        raise TypeError(f"ddconfig leaves out {', '.join(missing)}")
    return VAEConfig(embed_dim, **{n: ddconfig[n] for n in names} | {"ch_mult": tuple(ddconfig["ch_mult"])})


@dataclass(frozen=True)
class _Model:
    control_stage_config: tuple[UNetConfig, int, tuple[int, ...]]
    unet_config: _UNet
    first_stage_config: VAEConfig
    cond_stage_config: CLIPConfig
    only_mid_control: bool = False
    linear_start: float = 0.00085
    linear_end: float = 0.0120
    timesteps: int = 1000
    scale_factor: float = 0.18215

    def config(self, name: str) -> ModelConfig:
        control, hint_channels, hint_block_channels = self.control_stage_config
        unet = self.unet_config.config("model.diffusion_model.")
        return ModelConfig(
            name, control, unet, self.first_stage_config, self.cond_stage_config, hint_channels, hint_block_channels,
            self.scale_factor,
        )  # fmt: skip


_CLASSES: dict[str, Callable[..., Any]] = {
    "ControlLDM": _Model,
    "ControlledUnetModel": _UNet,
    "ControlNet": _control,
    "AutoencoderKL": _vae,
    "FrozenCLIPEmbedder": CLIPConfig,
}

_TRAINING_UNET = {"image_size", "use_checkpoint", "legacy", "use_spatial_transformer"}
_IGNORED: dict[str, set[str]] = {
    "ControlLDM": {"num_timesteps_cond", "log_every_t", "first_stage_key", "cond_stage_key", "control_key",
                   "image_size", "channels", "cond_stage_trainable", "conditioning_key", "monitor", "use_ema"},
    "ControlNet": _TRAINING_UNET,
    "ControlledUnetModel": _TRAINING_UNET,
    "AutoencoderKL": {"monitor", "lossconfig"},
    "FrozenCLIPEmbedder": set(),
}  # fmt: skip


def _params(node: dict[str, Any], where: str) -> Any:
    """What a yaml node describes; raises ValueError for what it does not know."""
    name = str(node.get("target", "")).rpartition(".")[2]
    if name not in _CLASSES:
        raise ValueError(f"{where}: unknown target {node.get('target')!r}; known are {', '.join(_CLASSES)}")
    params = {k: v for k, v in (node.get("params") or {}).items() if k not in _IGNORED[name]}
    for key in [k for k in params if k.endswith("stage_config") or k == "unet_config"]:
        params[key] = _params(params[key], f"{where}.{key}")
    try:
        inspect.signature(_CLASSES[name]).bind(**params)
        return _CLASSES[name](**params)
    except TypeError as error:
        raise ValueError(f"{where}: {name}: {error}") from None


@dataclass(frozen=True)
class Shape:
    """What an engine is built for: a picture's height and width in pixels, and how many samples at once.

    `steps` is the number of timesteps that the `time` stage embeds; no other stage depends on it. Raises ValueError
    where a side is no multiple of 64 from 64 to 8192, or a number does not lie between 1 and 1000.
    """

    height: int
    width: int
    samples: int = 1
    steps: int = 20

    def __post_init__(self) -> None:
        for name, value in (("height", self.height), ("width", self.width)):
            if not 64 <= value <= LARGEST_SIDE or value % 64:
                nearest = min(max(64, (value + 32) // 64 * 64), LARGEST_SIDE)
                raise ValueError(f"the {name} is {value}, but must be a multiple of 64 from 64 to {LARGEST_SIDE} "
                                 f"(the nearest: {nearest})")  # fmt: skip
        for name, value, most in (("samples", self.samples, MOST_SAMPLES), ("steps", self.steps, MOST_STEPS)):
            if not 1 <= value <= most:
                raise ValueError(f"the number of {name} is {value}, but must lie between 1 and {most}")

    @property
    def h(self) -> int:
        """The latent's height."""
        return self.height // 8

    @property
    def w(self) -> int:
        """The latent's width."""
        return self.width // 8

    @property
    def batch(self) -> int:
        """Rows of the UNet: the samples with the prompt, then the samples with the negative prompt."""
        return 2 * self.samples


@dataclass(frozen=True)
class Options:
    """How the networks are defined; each is a switch so that its gain can be measured.

    precision: of weights, feature maps and matrix products; the guidance and the update stay in float32.
    attention: "fused" is the form that TensorRT has one kernel for, "plain" two matrix products around a softmax; with
        "own" the UNet's transformers stay channels-last maps, of 1×1 convolutions and the plugins of plugins/ for
        LayerNorm, attention and GEGLU, where those serve, and elsewhere the fused form; so does CLIP, if conv is "own".
    qkv: Q, K and V of a self-attention in one matrix product, or apart.
    shared_prefix: what comes before the first cross-attention once for both halves of the batch.
    boundary: feature maps between stages as convolutions want them, "channels-last", or "linear".
    residual: who adds a ResBlock's input to what its last convolution made, and ControlNet's residuals to the skips:
        TensorRT ("fused"; 8.6 then takes slower convolutions), or the plugins of plugins/ ("own"), which then also do
        the first convolution, with the hint, and the last one, of which they make e and x.
    group_norm: "own" (the plugin of plugins/), "builtin" (TensorRT 8.6's), "native" (TensorRT's own layer), or "auto":
        the built-in plugin where it can be had, else the layer.
    conv: convolutions of small maps by TensorRT ("builtin"), or by the plugin of plugins/ where it was measured to win
        ("own"; compute capability 9.0), which adds their residuals and makes the gate of GEGLU.
    layer_norm: "apart", or "folded" into the linear layers behind it where these all are convolutions of ours.
    cross_attention: "apart", over K and V of the text, or "folded": the stage `clip` multiplies the text by all linear
        layers around it, where our plugins do the rest in two launches.
    upsample: nearest neighbours and the convolution of them "apart", or "folded" into one transposed convolution by
        sums of its taps; where the convolution is ours they are always one.
    """

    precision: Literal["fp16", "fp32"] = "fp16"
    attention: Literal["fused", "plain", "own"] = "fused"
    qkv: Literal["joined", "apart"] = "joined"
    shared_prefix: bool = True
    boundary: Literal["channels-last", "linear"] = "channels-last"
    residual: Literal["fused", "own"] = "fused"
    group_norm: Literal["auto", "own", "builtin", "native"] = "auto"
    conv: Literal["builtin", "own"] = "builtin"
    layer_norm: Literal["apart", "folded"] = "apart"
    cross_attention: Literal["apart", "folded"] = "apart"
    upsample: Literal["apart", "folded"] = "apart"

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Options).items():
            allowed = get_args(kind) or (True, False)
            if getattr(self, name) not in allowed:
                raise ValueError(f"the option {name} is {getattr(self, name)!r}, but must be one of {allowed}")
        if self.layer_norm == "folded" and (self.attention, self.conv) != ("own", "own"):
            raise ValueError(
                "the option layer_norm is 'folded', but must be 'apart' unless attention and conv are 'own'"
            )
        if self.cross_attention == "folded" and self.layer_norm != "folded":
            raise ValueError("the option cross_attention is 'folded', but must be 'apart' unless layer_norm is, too")

    def as_dict(self) -> dict[str, str | bool]:
        """The options by name, as a manifest holds them."""
        return asdict(self)
