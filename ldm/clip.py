"""CLIP's text encoder (Radford et al. 2021), with the parameter names of the Hugging Face checkpoint in SD 1.x."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.tokenizer import tokenize


class CLIPAttention(nn.Module):
    """Multi-head self-attention under a causal mask: (B, T, C) → (B, T, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    """Linear, quick GELU (x · sigmoid(1.702 x)), linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width * 4)
        self.fc2 = nn.Linear(width * 4, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class CLIPEncoderLayer(nn.Module):
    """Attention and MLP, each behind a LayerNorm and a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = CLIPMLP(width)
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEmbeddings(nn.Module):
    """Token plus position embeddings: ids (B, T) → (B, T, C)."""

    def __init__(self, vocab: int, positions: int, width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, width)
        self.position_embedding = nn.Embedding(positions, width)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class CLIPEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(width, heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class CLIPTextTransformer(nn.Module):
    """Embeddings, encoder and final LayerNorm: ids (B, T) → (B, T, C)."""

    def __init__(self, vocab: int, positions: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embeddings = CLIPEmbeddings(vocab, positions, width)
        self.encoder = CLIPEncoder(width, heads, layers)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids)))


@dataclass(frozen=True)
class CLIPTextOutput:
    """What the text model returns: the last layer's states (B, T, C)."""

    last_hidden_state: Tensor


class CLIPTextModel(nn.Module):
    """The text model; call it with `input_ids` (B, T)."""

    def __init__(self, vocab: int, positions: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.text_model = CLIPTextTransformer(vocab, positions, width, heads, layers)

    def forward(self, input_ids: Tensor) -> CLIPTextOutput:
        return CLIPTextOutput(self.text_model(input_ids))


class FrozenCLIPEmbedder(nn.Module):
    """Prompts → context (B, 77, C); the defaults are the text encoder of SD 1.x."""

    def __init__(
        self, width: int = 768, layers: int = 12, heads: int = 12, max_length: int = 77, vocab: int = 49408
    ) -> None:
        super().__init__()
        self.transformer = CLIPTextModel(vocab, max_length, width, heads, layers)

    def forward(self, text: Sequence[str]) -> Tensor:
        device = self.transformer.text_model.final_layer_norm.weight.device
        ids = torch.from_numpy(tokenize(text)).to(device)
        return self.transformer(input_ids=ids).last_hidden_state

    def encode(self, text: Sequence[str]) -> Tensor:
        """The same as calling it."""
        return self(text)
