"""A text as engines have it that multiply it out once a picture, of the K and V that the twins in stages.py take."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cldm.cldm import ControlLDM
from cldm.stages import consumers
from ldm.attention import BasicTransformerBlock


def transformer_blocks(model: ControlLDM, stage: str) -> list[BasicTransformerBlock]:
    """Those of a stage, one per K and V, in the order in which they run."""
    return [m for block in consumers(model)[stage] for m in block.modules() if isinstance(m, BasicTransformerBlock)]


def text_map(block: BasicTransformerBlock, k: Tensor, v: Tensor, columns: int) -> Tensor:
    """The map (B, columns, 1, S) of K and V (B, S, C): all that a cross-attention multiplies by but x.

    For each head and channel what the normalised x is multiplied by for the head's score, which is one of powers of
    two, less the mean over channels, so that the mean of x need not be taken away; for each head and channel what the
    head adds for a word; for each head what the LayerNorm's bias makes of its score; and zeros up to `columns`.
    """
    attn, norm = block.attn2, block.norm2
    k, v = attn.split(k), attn.split(v)  # (B, heads, S, d)
    to_q = attn.to_q.weight.unflatten(0, (attn.heads, -1))  # (heads, d, C)
    to_out = cast(nn.Linear, attn.to_out[0]).weight.unflatten(1, (attn.heads, -1))  # (C, heads, d)
    scores = torch.einsum("hdc,bhsd->bhcs", to_q, k) * (k.shape[3] ** -0.5 * math.log2(math.e))
    keys = scores * norm.weight[:, None]
    keys = keys - keys.mean(2, keepdim=True)
    values = torch.einsum("chd,bhsd->bhcs", to_out, v)
    biases = torch.einsum("c,bhcs->bhs", norm.bias, scores)
    text = torch.cat([keys.flatten(1, 2), values.flatten(1, 2), biases], 1)
    return F.pad(text, (0, 0, 0, columns - text.shape[1])).unsqueeze(2)
