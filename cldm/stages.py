"""The pipeline's stages as PyTorch functions: the CPU backend, and the oracle of every TensorRT engine.

Each stage maps tensors by name to tensors by name, and its engine has exactly these inputs and outputs. N samples,
B = 2·N rows: N with the prompt, then N with the negative prompt; h, w = H/8, W/8.

`clip` and `time` make inputs of other stages; those outputs carry the consumer's name, e.g. "control.k0".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count, takewhile

import torch
from torch import Tensor, nn

from cldm.cldm import ControlLDM
from ldm.attention import KV, match_batch
from ldm.unet import cross_kv, time_rows

Tensors = dict[str, Tensor]


def consumers(model: ControlLDM) -> dict[str, list[nn.Module]]:
    """The blocks of each stage that takes K/V and time rows, in the order in which they run."""
    unet = model.unet
    return {
        "control": model.control_model.encoder_blocks,
        "unet_encoder": unet.encoder_blocks,
        "unet_decoder": list(unet.output_blocks),
    }


def numbered(tensors: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    """The tensors name0, name1, … in order, as many as there are."""
    names = takewhile(tensors.__contains__, (f"{name}{i}" for i in count()))
    return (tensors[n] for n in names)


def keys_values(tensors: Mapping[str, Tensor]) -> Iterator[KV]:
    """The pairs (k0, v0), (k1, v1), … in order."""
    return zip(numbered(tensors, "k"), numbered(tensors, "v"), strict=True)


def clip(model: ControlLDM, inputs: Mapping[str, Tensor]) -> Tensors:
    """`tokens` (B, 77) → `context` (B, 77, D), and `<stage>.k<i>`, `<stage>.v<i>` (B, 77, C_i) per cross-attention."""
    context = model.cond_stage_model.transformer(input_ids=inputs["tokens"]).last_hidden_state
    out = {"context": context}
    for stage, blocks in consumers(model).items():
        for i, (k, v) in enumerate(cross_kv(blocks, context)):
            out |= {f"{stage}.k{i}": k, f"{stage}.v{i}": v}
    return out


def hint(model: ControlLDM, inputs: Mapping[str, Tensor]) -> Tensors:
    """`edges` (1, 3, H, W) in [0, 1] → `hint` (1, C, h, w)."""
    return {"hint": model.control_model.input_hint_block(inputs["edges"])}


def time(model: ControlLDM, inputs: Mapping[str, Tensor]) -> Tensors:
    """`timesteps` (S,) → `<stage>.row<i>` (S, C_i) of each ResBlock."""
    unet_emb = model.unet.embed_time(inputs["timesteps"])
    control_emb = model.control_model.embed_time(inputs["timesteps"])
    out: Tensors = {}
    for stage, blocks in consumers(model).items():
        rows = time_rows(blocks, control_emb if stage == "control" else unet_emb)
        out |= {f"{stage}.row{i}": row for i, row in enumerate(rows)}
    return out


def control(model: ControlLDM, inputs: Mapping[str, Tensor]) -> Tensors:
    """`x` (N, 4, h, w), `hint` (1, C, h, w), `row<i>` (1, C_i), `k<i>`, `v<i>` (B, 77, C_i) → `residual<i>`.

    One residual (B, C_i, h_i, w_i) per skip of the UNet, the middle block's last.
    """
    rows, kv = numbered(inputs, "row"), keys_values(inputs)
    residuals = model.control_model.residuals(inputs["x"], inputs["hint"], rows, kv)
    return {f"residual{i}": match_batch(r, inputs["k0"].shape[0]) for i, r in enumerate(residuals)}


def unet_encoder(model: ControlLDM, inputs: Mapping[str, Tensor]) -> Tensors:
    """`x` (N, 4, h, w), `row<i>` (1, C_i), `k<i>`, `v<i>` (B, 77, C_i) → `skip<i>` (B, C_i, h_i, w_i), `middle`."""
    rows, kv = numbered(inputs, "row"), keys_values(inputs)
    skips, middle = model.unet.encode(inputs["x"], rows, kv)
    return {f"skip{i}": match_batch(s, inputs["k0"].shape[0]) for i, s in enumerate(skips)} | {"middle": middle}


def unet_decoder(model: ControlLDM, inputs: Mapping[str, Tensor]) -> Tensors:
    """Skips, middle and residuals → `e` (N, 4, h, w), `difference` (N, 4, h, w) and `x_next` (N, 4, h, w).

    Besides `skip<i>`, `middle`, `residual<i>`, `row<i>`, `k<i>`, `v<i>` it takes `scales` (residuals, B), one control
    scale per residual and row; `guidance` (1,); `x`, `noise` (N, 4, h, w); `e1` and `e2` (N, 4, h, w), the e of one and
    of two evaluations before; and `coefficients` (4,), the a, b0, b1, b2 of the update
    x' = a·x + b0·e + b1·e1 + b2·e2 + noise. `difference` is what guidance multiplies, cond less uncond.
    """
    cond, uncond = output_half(model, inputs).float().chunk(2)
    difference = cond - uncond
    e = uncond + inputs["guidance"] * difference
    return {"e": e, "difference": difference, "x_next": update(inputs, e)}


def unet_decoder_cond(model: ControlLDM, inputs: Mapping[str, Tensor]) -> Tensors:
    """As `unet_decoder`, but of the prompt's half alone: it takes the last `difference` (N, 4, h, w) and keeps it."""
    e = output_half(model, inputs).float() + (inputs["guidance"] - 1) * inputs["difference"]
    return {"e": e, "x_next": update(inputs, e)}


def output_half(model: ControlLDM, inputs: Mapping[str, Tensor]) -> Tensor:
    """The UNet's output half of skips and middle with the scaled residuals added: (rows, 4, h, w)."""
    batch = len(inputs["middle"])
    scaled = [
        r * scale[:batch].view(-1, 1, 1, 1).to(r.dtype)
        for r, scale in zip(numbered(inputs, "residual"), inputs["scales"], strict=True)
    ]
    skips = [s + r for s, r in zip(numbered(inputs, "skip"), scaled, strict=False)]
    rows, kv = numbered(inputs, "row"), keys_values(inputs)
    return model.unet.decode(skips, inputs["middle"] + scaled[-1], rows, kv)


def update(inputs: Mapping[str, Tensor], e: Tensor) -> Tensor:
    """x after the steps that the coefficients stand for."""
    a, b0, b1, b2 = inputs["coefficients"]
    return a * inputs["x"] + b0 * e + b1 * inputs["e1"] + b2 * inputs["e2"] + inputs["noise"]


def vae_decoder(model: ControlLDM, inputs: Mapping[str, Tensor]) -> Tensors:
    """`x` (N, 4, h, w) → `picture` (N, H, W, 3) uint8, truncated to whole numbers as the original does."""
    decoded = model.decode_first_stage(inputs["x"])
    return {"picture": (decoded.float() * 127.5 + 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)}


def vae_encoder(model: ControlLDM, inputs: Mapping[str, Tensor]) -> Tensors:
    """`picture` (N, H, W, 3) uint8 → `x` (N, 4, h, w), the scaled mean of the posterior."""
    x = inputs["picture"].permute(0, 3, 1, 2).to(model.dtype) / 127.5 - 1.0
    return {"x": model.encode_first_stage(x)}


STAGES: dict[str, Callable[[ControlLDM, Mapping[str, Tensor]], Tensors]] = {
    "clip": clip,
    "hint": hint,
    "time": time,
    "control": control,
    "unet_encoder": unet_encoder,
    "unet_decoder": unet_decoder,
    "vae_decoder": vae_decoder,
    "vae_encoder": vae_encoder,
    # The prompt's half alone, for steps that reuse the last guidance difference: N rows instead of B.
    "control_cond": control,
    "unet_encoder_cond": unet_encoder,
    "unet_decoder_cond": unet_decoder_cond,
}
