"""ControlNet and the UNet it controls.

Source: Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.attention import KV, zero_module
from ldm.autoencoder import AutoencoderKL
from ldm.clip import FrozenCLIPEmbedder
from ldm.diffusion import LatentDiffusion
from ldm.unet import UNetEncoder, UNetModel, cross_kv, time_rows

HINT_CHANNELS = (16, 16, 32, 32, 96, 96, 256)


class WeightsError(ValueError):
    """Weights that do not fit the model or cannot be read; the message names them."""


def check_weights(expected: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Compare names and shapes of two state dictionaries.

    Raises WeightsError naming the first ten missing, surplus and wrong-shaped entries.
    """
    problems = {
        "missing": [k for k in expected if k not in given],
        "surplus": [k for k in given if k not in expected],
        "wrong-shaped": [
            f"{k} {tuple(given[k].shape)} instead of {tuple(v.shape)}"
            for k, v in expected.items()
            if k in given and tuple(given[k].shape) != tuple(v.shape)
        ],
    }
    found = [
        f"{len(names)} {kind}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise WeightsError(f"the weights do not fit the model: {'; '.join(found)}")


class ControlledUnetModel(UNetModel):
    """The UNet with ControlNet's residuals added to its skips and its middle block."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        control: Sequence[Tensor] | None = None,
        only_mid_control: bool = False,
    ) -> Tensor:
        """e (B, 4, h, w) of x (B, 4, h, w); `control` is one residual per skip and one for the middle, scaled."""
        blocks = [*self.encoder_blocks, *self.output_blocks]
        rows = iter(time_rows(blocks, self.embed_time(timesteps)))
        kv = iter(cross_kv(blocks, context))
        skips, middle = self.encode(x, rows, kv)
        if control is not None:
            *residuals, last = control
            middle = middle + last
            if not only_mid_control:
                skips = [skip + residual for skip, residual in zip(skips, residuals, strict=True)]
        return self.decode(skips, middle, rows, kv)


class ControlNet(UNetEncoder):
    """A trainable copy of the UNet's input half that reads a hint picture and speaks through zero convolutions."""

    def __init__(
        self,
        in_channels: int,
        hint_channels: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[int],
        num_heads: int,
        context_dim: int,
        transformer_depth: int = 1,
        hint_block_channels: Sequence[int] = HINT_CHANNELS,
    ) -> None:
        super().__init__(
            in_channels, model_channels, num_res_blocks, attention_resolutions, channel_mult, num_heads, context_dim,
            transformer_depth,
        )  # fmt: skip
        layers: list[nn.Module] = []
        before = hint_channels
        for i, width in enumerate(hint_block_channels):
            # Every second convolution after the first halves the picture: three halvings to the latent's size.
            layers += [nn.Conv2d(before, width, 3, padding=1, stride=2 if i in (2, 4, 6) else 1), nn.SiLU()]
            before = width
        layers.append(zero_module(nn.Conv2d(before, model_channels, 3, padding=1)))
        self.input_hint_block = nn.Sequential(*layers)
        self.zero_convs = nn.ModuleList(nn.Sequential(zero_module(nn.Conv2d(c, c, 1))) for c in self.channels)
        middle = self.channels[-1]
        self.middle_block_out = nn.Sequential(zero_module(nn.Conv2d(middle, middle, 1)))

    def residuals(self, x: Tensor, hint: Tensor, rows: Iterator[Tensor], kv: Iterator[KV]) -> list[Tensor]:
        """The residuals of x (B, 4, h, w), one per skip and one for the middle block.

        `hint` holds the hint features (B or 1, C, h, w) that `input_hint_block` makes of a picture.
        """
        outs: list[Tensor] = []
        for block, zero_conv in zip(self.input_blocks, self.zero_convs, strict=True):
            x = block(x, rows, kv)
            if not outs:
                x = x + hint
            outs.append(zero_conv(x))
        return [*outs, self.middle_block_out(self.middle_block(x, rows, kv))]

    def forward(self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor) -> list[Tensor]:
        """The residuals of x (B, 4, h, w) for hint pictures (B, 3, H, W) in [0, 1] and a context (B, S, D)."""
        rows = iter(time_rows(self.encoder_blocks, self.embed_time(timesteps)))
        kv = iter(cross_kv(self.encoder_blocks, context))
        return self.residuals(x, self.input_hint_block(hint), rows, kv)


class ControlLDM(LatentDiffusion):
    """Stable Diffusion with a ControlNet. `control_scales` weighs each residual, the middle block's last."""

    control_model: ControlNet

    def __init__(
        self,
        control_model: ControlNet,
        unet: ControlledUnetModel,
        first_stage: AutoencoderKL,
        cond_stage: FrozenCLIPEmbedder,
        only_mid_control: bool = False,
        **diffusion: float,
    ) -> None:
        super().__init__(unet, first_stage, cond_stage, **diffusion)  # type: ignore[arg-type]
        self.control_model = control_model
        self.only_mid_control = only_mid_control
        self.control_scales = [1.0] * (len(control_model.channels) + 1)

    @property
    def unet(self) -> ControlledUnetModel:
        """The UNet, `model.diffusion_model` in the checkpoint."""
        return self.model.diffusion_model

    def apply_model(self, x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """e (B, 4, h, w) of x (B, 4, h, w) at timesteps t (B,).

        `cond` is {"c_concat": [hint (B, 3, H, W) in [0, 1]] or None, "c_crossattn": [context (B, S, D)]}; without a
        hint the ControlNet is left out.
        """
        context = torch.cat(cond["c_crossattn"], dim=1)
        control = None
        if cond.get("c_concat") is not None:
            hint = torch.cat(cond["c_concat"], dim=1)
            residuals = self.control_model(x=x, hint=hint, timesteps=t, context=context)
            control = [c * scale for c, scale in zip(residuals, self.control_scales, strict=True)]
        return self.unet(x, t, context, control, self.only_mid_control)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights by name; CLIP's `position_ids`, which only count 0 to 76, may be there or not.

        Raises WeightsError naming the first ten missing, surplus and wrong-shaped weights.
        """
        state_dict = {k: v for k, v in state_dict.items() if not k.endswith("embeddings.position_ids")}
        if strict:
            check_weights(self.state_dict(), state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
