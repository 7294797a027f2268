"""The two halves of a cross-attention over a text that is multiplied out, without TensorRT; as `plugins.conv_calls`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from plugins.conv_calls import CannyConv, Conv
from plugins.load import CROSS_WORDS, text_columns


@dataclass(frozen=True)
class Cross(Conv):
    """One half, a 1×1 convolution by weights that are a text's, for each row of the batch its own.

    cross 1: x (b, h, w, C), b rows taken in turn, to the softmax of scores (B, h, w, heads · 80), x_batch being b.
    cross 2: such weights of words to the sum of values (B, h, w, C), with a residual.
    """

    size: int = 1
    cross: int = 1
    words: int = 77
    x_batch: int = 1

    @property
    def heads(self) -> int:
        """Heads of the attention."""
        return (self.filters if self.cross == 1 else self.channels) // CROSS_WORDS

    @property
    def map_channels(self) -> int:
        """Channels of the map that the attention is of."""
        return self.channels if self.cross == 1 else self.filters

    @property
    def text_pitch(self) -> int:
        """Numbers that the text has for each word."""
        return text_columns(self.heads, self.map_channels)

    @property
    def weights(self) -> int:
        """Bytes of the text; either half reads one half of it."""
        return 2 * self.batch * self.words * self.text_pitch

    @property
    def flop(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.filters * self.channels

    def call(self) -> CannyConv:
        """The call, without addresses."""
        call: Any = super().call()
        call.text_pitch = self.text_pitch
        return call

    def arrays(self, seed: int = 0, mean: float = 0.0) -> dict[str, np.ndarray]:
        """A text (B, words, columns) that makes scores of a deviation of about 2; and random x (b, h, w, C) of a mean
        and deviation 1, or the weights of words (B, h, w, heads · 80), bias (C) and residual.
        """
        rng, heads, channels = np.random.default_rng(seed), self.heads, self.map_channels
        text = rng.standard_normal((self.batch, self.words, self.text_pitch), np.float32)
        keys = text[..., : heads * channels].reshape(self.batch, self.words, heads, channels)
        keys *= np.float32(2 * channels**-0.5)
        keys -= keys.mean(3, keepdims=True)
        text[..., : heads * channels] = keys.reshape(self.batch, self.words, -1)
        text[..., 2 * heads * channels + heads :] = 0
        made = {"weight": text.astype(np.float16)}
        if self.cross == 1:
            x = rng.standard_normal((self.x_batch, *self.out[1:3], channels), np.float32) + np.float32(mean)
            return made | {"x": x.astype(np.float16)}
        of_words = np.exp2(rng.standard_normal((*self.out[:3], heads, CROSS_WORDS), np.float32))
        of_words[..., self.words :] = 0
        of_words /= of_words.sum(4, keepdims=True)
        made["x"] = of_words.reshape(*self.out[:3], -1).astype(np.float16)
        made["residual"] = rng.standard_normal((self.residual_batch, *self.out[1:]), np.float32).astype(np.float16)
        return made | {"bias": rng.standard_normal(channels, np.float32)}

    def expected(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """y (B, h, w, heads · 80 or C) in float64."""
        heads, channels, (batch, h, w, _) = self.heads, self.map_channels, self.out
        lines = arrays["weight"].astype(np.float64)
        x = arrays["x"].astype(np.float64)
        parts = (lines[..., i * heads * channels :][..., : heads * channels] for i in range(2))
        keys, values = (part.reshape(batch, self.words, heads, channels) for part in parts)
        if self.cross == 1:
            mean, variance = (f(x, axis=3, keepdims=True) for f in (np.mean, np.var))
            x = np.concatenate([(x - mean) / np.sqrt(variance + self.epsilon)] * (batch // self.x_batch))
            scores = np.einsum("byxc,bshc->byxhs", x, keys)
            scores += lines[..., 2 * heads * channels :][..., :heads].swapaxes(1, 2)[:, None, None]
            weights = np.exp2(scores - scores.max(4, keepdims=True))
            y = np.zeros((batch, h, w, heads, CROSS_WORDS))
            y[..., : self.words] = weights / weights.sum(4, keepdims=True)
            return y.reshape(self.out)
        weights = x.reshape(batch, h, w, heads, CROSS_WORDS)[..., : self.words]
        residual = np.concatenate([arrays["residual"].astype(np.float64)] * (batch // self.residual_batch))
        return np.einsum("byxhs,bshc->byxc", weights, values) + arrays["bias"] + residual

    def memory(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What lies in memory."""
        return {**arrays, "y": np.full(self.out, np.nan, np.float16)}


def scores(batch: int, channels: int, height: int, width: int, heads: int, x_batch: int, words: int = 77) -> Cross:
    """The half from a map (x_batch, C, h, w) to the weights of a text's words."""
    return Cross(batch, channels, height, width, heads * CROSS_WORDS, cross=1, words=words, x_batch=x_batch)


def values(batch: int, channels: int, height: int, width: int, heads: int, x_batch: int, words: int = 77) -> Cross:
    """The half from those to the map (B, C, h, w), with a residual of x_batch rows."""
    columns = heads * CROSS_WORDS
    return Cross(batch, columns, height, width, channels, residual_batch=x_batch, cross=2, words=words)
