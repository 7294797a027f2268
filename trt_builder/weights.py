"""Weights as numpy arrays by checkpoint name, memory-mapped, and what a model needs of them. No torch in here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from trt_builder.config import Block, ModelConfig, UNetConfig, VAEConfig

Shapes = dict[str, tuple[int, ...]]

# The types of a .safetensors file; numpy has no bfloat16, so those are read as integers and widened to float32.
_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


class WeightsError(ValueError):
    """Weights that do not fit the model or cannot be read; the message is one sentence."""


class Weights(Mapping[str, np.ndarray]):
    """Arrays by checkpoint name.

    TensorRT keeps pointers to the weights it is given, so every array handed to it (by `cast`, or through `keep`) is
    held until `release`, which a builder calls when a stage's plan is there.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], source: str = "the weights") -> None:
        self._arrays = dict(arrays)
        self._source = source
        self._kept: list[np.ndarray] = []
        self._bfloat16: set[str] = set()

    @classmethod
    def from_dict(cls, arrays: Mapping[str, np.ndarray]) -> Weights:
        """Weights from arrays in memory."""
        return cls(arrays)

    @classmethod
    def open(cls, path: str | Path) -> Weights:
        """Weights of a .safetensors file, memory-mapped: nothing is read before it is used.

        Raises FileNotFoundError, or WeightsError where the file is no whole .safetensors file.
        Source: the format's description in the safetensors repository.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there are no weights at {path}")
        if path.suffix != ".safetensors":
            raise WeightsError(f"{path} is no .safetensors file: convert it first (python preprocess.py does)")
        try:
            with safe_open(path, framework="numpy"):  # which checks every size and place in the header
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: (_TYPES[e["dtype"]], tuple(e["shape"]), 8 + length + e["data_offsets"][0], e["dtype"] == "BF16")
                for name, e in header.items()
            }
        except SafetensorError as error:
            raise WeightsError(f"{path} is damaged or cut short ({error}): copy or download it again") from None
        except KeyError as error:
            raise WeightsError(f"{path} holds weights of the type {error}, which is not read") from None
        data = np.memmap(path, np.uint8, "r")
        arrays = {name: _view(data, *entry[:3]) for name, entry in entries.items()}
        weights = cls(arrays, str(path))
        weights._bfloat16 = {name for name, entry in entries.items() if entry[3]}
        return weights

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._stored(name)
        return (array.astype(np.uint32) << 16).view(np.float32) if name in self._bfloat16 else array

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, of which nothing is read."""
        return self._stored(name).shape

    def _stored(self, name: str) -> np.ndarray:
        try:
            return self._arrays[name]
        except KeyError:
            raise WeightsError(f"{self._source} has no {name}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def cast(self, names: str | tuple[str, ...], dtype: type[np.floating]) -> np.ndarray:
        """A weight, or several joined along their first axis, as `dtype`, held until `release`.

        A single weight that has this type already is a view of the file. Raises WeightsError where a value is too
        large for float16.
        """
        names = (names,) if isinstance(names, str) else names
        parts = [_cast(self[name], dtype, name) for name in names]
        return self.keep(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def keep(self, array: np.ndarray) -> np.ndarray:
        """Hold an array that TensorRT has a pointer to, until `release`; it is made contiguous where it is not."""
        self._kept.append(np.ascontiguousarray(array))
        return self._kept[-1]

    def release(self) -> None:
        """Let go of every array that was held; the networks made of them must be gone."""
        self._kept.clear()

    def check(self, config: ModelConfig) -> None:
        """Compare with what the stages of a model need, and read all of it; names that no stage needs are left alone.

        Raises WeightsError that names the first ten missing, of the wrong shape, and with NaN or infinite numbers.
        """
        expected = expected_shapes(config)
        missing = [name for name in expected if name not in self]
        wrong = [
            f"{name} {self._arrays[name].shape} instead of {shape}"
            for name, shape in expected.items()
            if name in self and self._arrays[name].shape != shape
        ]
        infinite = [] if missing or wrong else [name for name in expected if not np.isfinite(self[name]).all()]
        found = [
            f"{len(names)} {kind}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"
            for kind, names in (("missing", missing), ("wrong-shaped", wrong), ("with NaN or infinity", infinite))
            if names
        ]
        if found:
            raise WeightsError(f"{self._source} does not fit the model {config.name}: {'; '.join(found)}")


def _view(data: np.ndarray, dtype: type, shape: tuple[int, ...], start: int) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64))
    part = data[start : start + count * np.dtype(dtype).itemsize]
    # The format leaves arrays unaligned where an earlier one has an odd length; TensorRT wants them aligned.
    aligned = part if start % np.dtype(dtype).itemsize == 0 else part.copy()
    return aligned.view(dtype).reshape(shape)


def _cast(array: np.ndarray, dtype: type[np.floating], name: str) -> np.ndarray:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype == np.float16 and not np.isfinite(result).all():
        largest = float(np.abs(array.astype(np.float64)).max())
        raise WeightsError(f"{name} holds {largest:.4g}, which float16 cannot (65504 at most): build with fp32")
    return result


def expected_shapes(config: ModelConfig) -> Shapes:
    """Name and shape of every weight that the stages of a model need, as in its checkpoint."""
    control = config.control
    hint = [config.hint_channels, *config.hint_block_channels, control.model_channels]
    shapes = _encoder(control)
    for i, (before, after) in enumerate(zip(hint, hint[1:], strict=False)):
        shapes |= _conv(f"control_model.input_hint_block.{2 * i}", before, after, 3)
    for i, ch in enumerate(control.channels):
        shapes |= _conv(f"control_model.zero_convs.{i}.0", ch, ch, 1)
    shapes |= _conv("control_model.middle_block_out.0", control.channels[-1], control.channels[-1], 1)
    unet = config.unet
    shapes |= _encoder(unet) | _blocks(unet, unet.output_blocks)
    last = unet.output_blocks[-1][-1].out_channels
    shapes |= _norm(f"{unet.prefix}out.0", last) | _conv(f"{unet.prefix}out.2", last, unet.out_channels, 3)
    return shapes | _vae(config.vae) | _clip(config)


def _norm(prefix: str, channels: int) -> Shapes:
    return {f"{prefix}.weight": (channels,), f"{prefix}.bias": (channels,)}


def _conv(prefix: str, before: int, after: int, kernel: int) -> Shapes:
    return {f"{prefix}.weight": (after, before, kernel, kernel), f"{prefix}.bias": (after,)}


def _linear(prefix: str, before: int, after: int, bias: bool = True) -> Shapes:
    return {f"{prefix}.weight": (after, before)} | ({f"{prefix}.bias": (after,)} if bias else {})


def _encoder(unet: UNetConfig) -> Shapes:
    emb = unet.emb_channels
    time = _linear(f"{unet.prefix}time_embed.0", unet.model_channels, emb)
    return time | _linear(f"{unet.prefix}time_embed.2", emb, emb) | _blocks(unet, unet.encoder_blocks)


def _blocks(unet: UNetConfig, blocks: list[Block]) -> Shapes:
    shapes: Shapes = {}
    for prefix, kind, before, after in ((x.prefix, x.kind, x.channels, x.out_channels) for b in blocks for x in b):
        if kind == "conv":
            shapes |= _conv(prefix, before, after, 3)
        elif kind in ("down", "up"):
            shapes |= _conv(f"{prefix}.{'op' if kind == 'down' else 'conv'}", before, after, 3)
        elif kind == "res":
            shapes |= _norm(f"{prefix}.in_layers.0", before) | _conv(f"{prefix}.in_layers.2", before, after, 3)
            shapes |= _linear(f"{prefix}.emb_layers.1", unet.emb_channels, after)
            shapes |= _norm(f"{prefix}.out_layers.0", after) | _conv(f"{prefix}.out_layers.3", after, after, 3)
            if before != after:
                shapes |= _conv(f"{prefix}.skip_connection", before, after, 1)
        else:
            shapes |= _norm(f"{prefix}.norm", before)
            shapes |= _conv(f"{prefix}.proj_in", before, before, 1) | _conv(f"{prefix}.proj_out", before, before, 1)
            for i in range(unet.transformer_depth):
                shapes |= _transformer_block(f"{prefix}.transformer_blocks.{i}", before, unet.context_dim)
    return shapes


def _transformer_block(prefix: str, channels: int, context: int) -> Shapes:
    shapes: Shapes = {}
    for attn, source in (("attn1", channels), ("attn2", context)):
        shapes |= _linear(f"{prefix}.{attn}.to_q", channels, channels, bias=False)
        shapes |= _linear(f"{prefix}.{attn}.to_k", source, channels, bias=False)
        shapes |= _linear(f"{prefix}.{attn}.to_v", source, channels, bias=False)
        shapes |= _linear(f"{prefix}.{attn}.to_out.0", channels, channels)
    shapes |= _linear(f"{prefix}.ff.net.0.proj", channels, 8 * channels)
    shapes |= _linear(f"{prefix}.ff.net.2", 4 * channels, channels)
    for i in (1, 2, 3):
        shapes |= _norm(f"{prefix}.norm{i}", channels)
    return shapes


def _vae(vae: VAEConfig) -> Shapes:
    z, embed, blocks, top = vae.z_channels, vae.embed_dim, vae.num_res_blocks, vae.ch * vae.ch_mult[-1]
    at = "first_stage_model."
    widths = [vae.ch, *(vae.ch * m for m in vae.ch_mult)]
    shapes = _conv(f"{at}encoder.conv_in", vae.in_channels, vae.ch, 3)
    for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        shapes |= _level(f"{at}encoder.down.{i}", before, after, blocks)
        if i < len(vae.ch_mult) - 1:
            shapes |= _conv(f"{at}encoder.down.{i}.downsample.conv", after, after, 3)
    shapes |= _mid(f"{at}encoder", top) | _conv(f"{at}encoder.conv_out", top, 2 * z, 3)
    widths = [*widths[1:], top]
    shapes |= _conv(f"{at}decoder.conv_in", z, top, 3) | _mid(f"{at}decoder", top, norm_out=widths[0])
    for i, (after, before) in enumerate(zip(widths, widths[1:], strict=False)):
        shapes |= _level(f"{at}decoder.up.{i}", before, after, blocks + 1)
        if i:
            shapes |= _conv(f"{at}decoder.up.{i}.upsample.conv", after, after, 3)
    shapes |= _conv(f"{at}decoder.conv_out", widths[0], vae.out_ch, 3)
    return shapes | _conv(f"{at}quant_conv", 2 * z, 2 * embed, 1) | _conv(f"{at}post_quant_conv", embed, z, 1)


def _level(prefix: str, before: int, after: int, blocks: int) -> Shapes:
    shapes: Shapes = {}
    for i in range(blocks):
        shapes |= _resnet(f"{prefix}.block.{i}", after if i else before, after)
    return shapes


def _resnet(prefix: str, before: int, after: int) -> Shapes:
    shapes = _norm(f"{prefix}.norm1", before) | _conv(f"{prefix}.conv1", before, after, 3)
    shapes |= _norm(f"{prefix}.norm2", after) | _conv(f"{prefix}.conv2", after, after, 3)
    return shapes | (_conv(f"{prefix}.nin_shortcut", before, after, 1) if before != after else {})


def _mid(prefix: str, channels: int, norm_out: int | None = None) -> Shapes:
    shapes = _resnet(f"{prefix}.mid.block_1", channels, channels) | _norm(f"{prefix}.mid.attn_1.norm", channels)
    for name in ("q", "k", "v", "proj_out"):
        shapes |= _conv(f"{prefix}.mid.attn_1.{name}", channels, channels, 1)
    shapes |= _resnet(f"{prefix}.mid.block_2", channels, channels)
    return shapes | _norm(f"{prefix}.norm_out", norm_out or channels)


def _clip(config: ModelConfig) -> Shapes:
    clip, at = config.clip, "cond_stage_model.transformer.text_model."
    shapes: Shapes = {
        f"{at}embeddings.token_embedding.weight": (clip.vocab, clip.width),
        f"{at}embeddings.position_embedding.weight": (clip.max_length, clip.width),
    }
    for i in range(clip.layers):
        layer = f"{at}encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", clip.width, clip.width)
        shapes |= _norm(f"{layer}.layer_norm1", clip.width) | _norm(f"{layer}.layer_norm2", clip.width)
        shapes |= _linear(f"{layer}.mlp.fc1", clip.width, 4 * clip.width)
        shapes |= _linear(f"{layer}.mlp.fc2", 4 * clip.width, clip.width)
    return shapes | _norm(f"{at}final_layer_norm", clip.width)
