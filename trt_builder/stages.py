"""The pipeline's stages as TensorRT networks: the same names, shapes and order as the PyTorch twins in cldm/stages.py.

N samples, B = 2·N rows: N with the prompt, then N with the negative prompt; h, w = H/8, W/8. What the sampler reads and
writes (x, e, noise, scales, guidance, coefficients) is float32; what passes between stages has the precision of the
options, and its feature maps (B, C, h, w) are channels-last, so that a boundary costs no reformat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from plugins.load import LAST, last_rows, text_columns
from runtime.steps import COND, STEP
from trt_builder.clip import as_tokens, text_transformer
from trt_builder.config import ModelConfig, Options, Shape
from trt_builder.control import residuals
from trt_builder.flavour import Flavour
from trt_builder.hint import hint_block
from trt_builder.joins import join, own_join, scale_rows
from trt_builder.layers import (
    add,
    chunk,
    clamp,
    conv,
    linear,
    match_batch,
    mul,
    own_outputs,
    permute,
    reshape,
    scalar,
    silu,
    sub,
)
from trt_builder.net import Net
from trt_builder.text import CrossAttention, as_map, cross_attentions, text_map
from trt_builder.time import embed_time, time_rows
from trt_builder.unet import decode, encode
from trt_builder.vae import decoder, encoder
from trt_builder.weights import Weights

if TYPE_CHECKING:
    import tensorrt as trt

    from trt_builder.unet import KV, Join

CLIP = "cond_stage_model.transformer.text_model."
VAE = "first_stage_model."
BESIDE = (*STEP[:2], *COND[:2])  # of which two run at the same time


@dataclass(frozen=True)
class Stage:
    """A stage being defined: its network, the model, the shape that it is built for."""

    name: str
    network: trt.INetworkDefinition
    flavour: Flavour
    config: ModelConfig
    weights: Weights
    shape: Shape
    options: Options
    names: dict[str, int] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The stage without `_cond`: what its blocks, rows, K and V are those of."""
        return self.name.removesuffix("_cond")

    @property
    def batch(self) -> int:
        """Rows that this stage works on: both halves, or the prompt's alone."""
        return self.shape.batch if self.name == self.base else self.shape.samples

    @property
    def dtype(self) -> Any:
        """What weights, feature maps and matrix products are in."""
        return np.float16 if self.options.precision == "fp16" else np.float32

    def net(self, root: str) -> Net:
        """The place in the checkpoint whose prefix is `root`."""
        return Net(
            self.network, self.flavour, self.weights, self.options, self.name, root, self.dtype,
            beside=self.name in BESIDE, used=self.names,
        )  # fmt: skip

    def input(self, name: str, shape: Sequence[int], dtype: Any = None, channels_last: bool = False) -> trt.ITensor:
        """A named input, in the precision of the options or in another type."""
        x = self.network.add_input(name, self.net("").type(dtype or self.dtype), tuple(shape))
        x.allowed_formats = self._formats(channels_last)
        return x

    def output(self, name: str, y: trt.ITensor, dtype: Any = None, channels_last: bool = False) -> None:
        """Name y and make it an output; it has this type already, which a weakly typed network must be told."""
        y.name = name
        self.network.mark_output(y)
        self.flavour.set_output_type(y, self.net("").type(dtype or self.dtype))
        y.allowed_formats = self._formats(channels_last)

    def _formats(self, channels_last: bool) -> int:
        if channels_last and self.options.boundary == "channels-last":
            return self.flavour.channels_last(self.options.precision)
        return self.flavour.linear()

    def rows(self) -> list[trt.ITensor]:
        """The inputs row0, row1, … (1, C_i)."""
        return [self.input(f"row{i}", (1, x.out_channels)) for i, x in enumerate(self.config.rows(self.base))]

    def folds(self, one: CrossAttention) -> bool:
        """Whether a cross-attention has its text multiplied out; the same for both halves of the batch as for one."""
        words = self.config.clip.max_length
        return self.flavour.has_cross_plugin(one.size(self.shape), one.heads, words, self.options)

    def texts(self) -> list[KV]:
        """What each cross-attention has of the text: the inputs k<i>, v<i> (B, 77, C_i), or text<i> (B, P_i, 1, 77)."""
        words = self.config.clip.max_length
        made: list[KV] = []
        for i, one in enumerate(cross_attentions(self.config, self.base)):
            if self.folds(one):
                shape = (self.batch, text_columns(one.heads, one.channels), 1, words)
                made.append((self.input(f"text{i}", shape, channels_last=True),))
            else:
                made.append(tuple(self.input(f"{kind}{i}", (self.batch, words, one.channels)) for kind in "kv"))
        return made

    def latent(self, name: str) -> trt.ITensor:
        """The float32 input `name` (N, 4, h, w)."""
        return self.input(name, (self.shape.samples, self.config.unet.in_channels, self.shape.h, self.shape.w),
                          np.float32)  # fmt: skip

    def maps(self, name: str, middle: str) -> list[trt.ITensor]:
        """The channels-last inputs `name`0, `name`1, … (B, C_i, h_i, w_i), one per skip, and `middle`."""
        unet, shape = self.config.unet, self.shape
        sizes = list(zip(unet.channels, unet.scales, strict=True))
        names = [*(f"{name}{i}" for i in range(len(sizes))), middle]
        return [
            self.input(name, (self.batch, channels, shape.h // scale, shape.w // scale), channels_last=True)
            for name, (channels, scale) in zip(names, [*sizes, sizes[-1]], strict=True)
        ]

    def first_latent(self, net: Net) -> trt.ITensor:
        """The input `x`, repeated to the whole batch where what precedes the first cross-attention is not shared."""
        x = self.latent("x")
        return x if self.options.shared_prefix else match_batch(net.float32(), x, self.batch)


def clip(stage: Stage) -> None:
    """`tokens` (B, 77) → `context` (B, 77, D), and `<stage>.k<i>`, `<stage>.v<i>` (B, 77, C_i) per cross-attention.

    Or, where its text is multiplied out, `<stage>.text<i>` (B, P_i, 1, 77), which stages then take for `k<i>`, `v<i>`.
    """
    config = stage.config
    tokens = stage.input("tokens", (stage.shape.batch, config.clip.max_length), np.int32)
    net = stage.net(CLIP)
    made = text_transformer(net, config.clip, tokens)
    context = as_tokens(net, made)
    stage.output("context", context)

    @cache  # one for all who take it
    def words() -> trt.ITensor:
        return made if len(made.shape) == 4 else as_map(net, context)

    for name in config.consumers():
        for i, one in enumerate(cross_attentions(config, name)):
            block = stage.net("").at(one.block)
            if stage.folds(one):
                stage.output(f"{name}.text{i}", text_map(block, words(), one.heads), channels_last=True)
                continue
            for kind in "kv":
                stage.output(f"{name}.{kind}{i}", linear(block.at("attn2", f"to_{kind}"), context))


def hint(stage: Stage) -> None:
    """`edges` (1, 3, H, W) in [0, 1] → `hint` (1, C, h, w)."""
    edges = stage.input("edges", (1, stage.config.hint_channels, stage.shape.height, stage.shape.width))
    hint = hint_block(stage.net(stage.config.control.prefix), stage.config, edges)
    stage.output("hint", hint, channels_last=True)


def time(stage: Stage) -> None:
    """`timesteps` (S,) → `<stage>.row<i>` (S, C_i) of each ResBlock.

    In single precision up to the rows: they are made once a schedule, and every picture by it has their error.
    """
    config = stage.config
    timesteps = stage.input("timesteps", (stage.shape.steps,), np.int32)
    emb = {}
    for unet in (config.unet, config.control):
        net = stage.net("").at(unet.prefix.removesuffix(".")).float32()
        emb[unet.prefix] = silu(net.at("emb_layers.0"), embed_time(net, unet, timesteps))
    for name in config.consumers():
        unet = config.control if name == "control" else config.unet
        for i, row in enumerate(time_rows(stage.net("").float32(), config.rows(name), emb[unet.prefix])):
            output = f"{name}.row{i}"
            stage.output(output, stage.net("").at(output).cast(row))


def control(stage: Stage) -> None:
    """`x` (N, 4, h, w), `hint` (1, C, h, w), `row<i>` (1, C_i), `k<i>`, `v<i>` (B, 77, C_i) → `residual<i>`.

    One residual (B, C_i, h_i, w_i) per skip of the UNet, the middle block's last.
    """
    config, shape = stage.config.control, stage.shape
    net = stage.net(config.prefix)
    x = stage.first_latent(net)
    hint = stage.input("hint", (1, config.model_channels, shape.h, shape.w), channels_last=True)
    rows, kv = iter(stage.rows()), iter(stage.texts())
    for i, r in enumerate(residuals(net, config, x, hint, stage.batch, rows, kv)):
        stage.output(f"residual{i}", match_batch(net, r, stage.batch), channels_last=True)


def unet_encoder(stage: Stage) -> None:
    """`x` (N, 4, h, w), `row<i>` (1, C_i), `k<i>`, `v<i>` (B, 77, C_i) → `skip<i>` (B, C_i, h_i, w_i), `middle`."""
    config = stage.config.unet
    net = stage.net(config.prefix)
    x = stage.first_latent(net)
    skips, middle = encode(net, config, x, stage.batch, iter(stage.rows()), iter(stage.texts()))
    for i, s in enumerate(skips):
        stage.output(f"skip{i}", match_batch(net, s, stage.batch), channels_last=True)
    stage.output("middle", middle, channels_last=True)


def unet_decoder(stage: Stage) -> None:
    """Skips, middle and residuals → `e` (N, 4, h, w), `difference` (N, 4, h, w) and `x_next` (N, 4, h, w).

    Besides `skip<i>`, `middle`, `residual<i>`, `row<i>`, `k<i>`, `v<i>` it takes `scales` (residuals, B), one control
    scale per residual and row; `guidance` (1,); `x`, `noise` (N, 4, h, w); `e1` and `e2` (N, 4, h, w), the e of one and
    of two evaluations before; and `coefficients` (4,), the a, b0, b1, b2 of the update
    x' = a·x + b0·e + b1·e1 + b2·e2 + noise. `difference` is what guidance multiplies, cond less uncond.
    """
    h, guidance = output_half(stage)
    last = last_conv(stage)
    if last.flavour.has_end_plugins(last.shape(), last.options):
        return own_last(stage, h, guidance)
    exact = stage.net(stage.config.unet.prefix).float32()
    cond, uncond = chunk(exact, exact.cast(conv(last, h)), 2, 0)
    difference = sub(exact, cond, uncond)
    e = add(exact, uncond, mul(exact, number(exact, guidance), difference, "amplified"), "guided")
    stage.output("e", e, np.float32)
    stage.output("difference", difference, np.float32)
    update(stage, e)


def unet_decoder_cond(stage: Stage) -> None:
    """As `unet_decoder`, but of the prompt's half alone: it takes the last `difference` (N, 4, h, w) and keeps it."""
    h, guidance = output_half(stage)
    last, difference = last_conv(stage), stage.latent("difference")
    if last.flavour.has_end_plugins(last.shape(), last.options):
        return own_last(stage, h, guidance, difference)
    exact = stage.net(stage.config.unet.prefix).float32()
    guidance = number(exact, guidance)
    rest = sub(exact, guidance, scalar(exact, guidance, 1.0), "guidance_less_one")
    e = add(exact, exact.cast(conv(last, h)), mul(exact, rest, difference, "amplified"), "guided")
    stage.output("e", e, np.float32)
    update(stage, e)


def output_half(stage: Stage) -> tuple[trt.ITensor, trt.ITensor]:
    """The UNet's output half of skips and middle with the scaled residuals added, but for its last convolution
    (rows, C, h, w); the guidance (1).
    """
    config = stage.config.unet
    *skips, middle = stage.maps("skip", "middle")
    residuals = stage.maps("residual", f"residual{len(skips)}")
    rows, kv = iter(stage.rows()), iter(stage.texts())
    scales = stage.input("scales", (len(residuals), stage.shape.batch), np.float32)
    guidance = stage.input("guidance", (1,), np.float32)

    net = stage.net(config.prefix)
    joins: list[Join]
    if net.flavour.has_residual_plugins(net.options):
        joins = [partial(own_join, i, skip, residuals, scales) for i, skip in enumerate(skips)]
    else:
        if stage.batch < stage.shape.batch:
            scales = chunk(net.float32(), scales, 2, 1)[0]
        *scaled, last = scale_rows(net, residuals, scales)
        sums = (add(net, s, r, f"add_residual{i}") for i, (s, r) in enumerate(zip(skips, scaled, strict=True)))
        joins = [partial(join, one) for one in sums]
        middle = add(net, middle, last, f"add_residual{len(skips)}")
    return decode(net, config, joins, middle, rows, kv), guidance


def last_conv(stage: Stage) -> Net:
    """Where the UNet's last convolution is."""
    return stage.net(stage.config.unet.prefix).at("out.2")


def number(net: Net, guidance: trt.ITensor) -> trt.ITensor:
    """The guidance (1) as it multiplies maps."""
    return reshape(net, guidance, (1, 1, 1, 1), what="guidance")


def own_last(
    stage: Stage, h: trt.ITensor, guidance: trt.ITensor, difference: trt.ITensor | None = None
) -> None:  # fmt: skip
    """The outputs of `unet_decoder` by our plugin, of what `output_half` made; or of `unet_decoder_cond`.

    It does the last convolution, too, so that e is never rounded to half precision.
    """
    x, *others = update_inputs(stage)
    kept = [] if difference is None else [difference]
    last = last_conv(stage)
    rows, bias = last_rows(last.weight()), last.float32().weight("bias")
    weight, shift = last.constant(rows, rows.shape, "weight"), last.float32().constant(bias, bias.shape, "bias")
    inputs, names = [x, h, weight, shift, guidance, *others, *kept], ["e", "x_next", "difference"][: 3 - len(kept)]
    outputs = own_outputs(last, LAST, inputs, len(names), cond=len(kept))
    by_name = dict(zip(names, outputs, strict=True))
    for name in ("e", *names[2:], "x_next"):  # in the order of the twin
        stage.output(name, by_name[name], np.float32)


def update_inputs(stage: Stage) -> list[trt.ITensor]:
    """The inputs `x`, `e1`, `e2`, `noise` (N, 4, h, w) and `coefficients` (4,)."""
    latents = [stage.latent(name) for name in ("x", "e1", "e2", "noise")]
    return [*latents, stage.input("coefficients", (4,), np.float32)]


def update(stage: Stage, e: trt.ITensor) -> None:
    """The output `x_next`: x after the steps that the coefficients stand for."""
    exact = stage.net(stage.config.unet.prefix).float32()
    x, e1, e2, noise, coefficients = update_inputs(stage)
    factors = chunk(exact, reshape(exact, coefficients, (4, 1, 1, 1), what="coefficients"), 4, 0)
    names = ("a_x", "b_e", "b_e1", "b_e2")
    a_x, *others = (mul(exact, c, t, n) for c, t, n in zip(factors, (x, e, e1, e2), names, strict=True))
    x_next = a_x
    for term, name in zip(others, ("add_e", "add_e1", "add_e2"), strict=True):
        x_next = add(exact, x_next, term, name)
    stage.output("x_next", add(exact, x_next, noise, "add_noise"), np.float32)


def vae_decoder(stage: Stage) -> None:
    """`x` (N, 4, h, w) → `picture` (N, H, W, 3) uint8, truncated to whole numbers as the original does."""
    net = stage.net(VAE)
    exact = net.float32()
    x = stage.latent("x")
    z = net.cast(mul(exact, x, scalar(exact, x, 1 / stage.config.scale_factor), "unscale"))
    decoded = decoder(net.at("decoder"), stage.config.vae, conv(net.at("post_quant_conv"), z))
    y = permute(exact, exact.cast(decoded), (0, 2, 3, 1))
    half = scalar(exact, y, 127.5)
    y = clamp(exact, add(exact, mul(exact, y, half), half), 0, 255)
    stage.output("picture", exact.cast(y, np.uint8), np.uint8)


def vae_encoder(stage: Stage) -> None:
    """`picture` (N, H, W, 3) uint8 → `x` (N, 4, h, w), the scaled mean of the posterior."""
    shape, net = stage.shape, stage.net(VAE)
    exact = net.float32()
    picture = stage.input("picture", (shape.samples, shape.height, shape.width, 3), np.uint8)
    x = permute(exact, exact.cast(picture), (0, 3, 1, 2))
    x = sub(exact, mul(exact, x, scalar(exact, x, 1 / 127.5)), scalar(exact, x, 1.0))
    moments = conv(net.at("quant_conv"), encoder(net.at("encoder"), stage.config.vae, net.cast(x)))
    mean, _ = chunk(exact, exact.cast(moments), 2, 1)
    stage.output("x", mul(exact, mean, scalar(exact, mean, stage.config.scale_factor), "rescale"), np.float32)


_DEFINE: dict[str, Callable[[Stage], None]] = {
    "clip": clip,
    "hint": hint,
    "time": time,
    "control": control,
    "unet_encoder": unet_encoder,
    "unet_decoder": unet_decoder,
    "vae_decoder": vae_decoder,
    "vae_encoder": vae_encoder,
    "control_cond": control,
    "unet_encoder_cond": unet_encoder,
    "unet_decoder_cond": unet_decoder_cond,
}
STAGES: tuple[str, ...] = tuple(_DEFINE)
USUAL = tuple(name for name in STAGES if name not in COND)  # those of COND are built on demand


def define(
    stage: str,
    network: trt.INetworkDefinition,
    flavour: Flavour,
    config: ModelConfig,
    weights: Weights,
    shape: Shape,
    options: Options,
) -> None:
    """Define a stage in an empty network: named and typed inputs, layers, named outputs.

    Raises ValueError for an unknown stage, WeightsError for weights that are missing or too large for the precision,
    and NetworkError for a layer that TensorRT refuses. The weights hold what the network points to until `release`.
    """
    if stage not in _DEFINE:
        raise ValueError(f"there is no stage {stage!r}: take one of {', '.join(STAGES)}")
    network.name = stage
    _DEFINE[stage](Stage(stage, network, flavour, config, weights, shape, options))
