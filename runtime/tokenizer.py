"""Prompts to CLIP's token ids, cleaned as OpenAI's CLIP cleans them."""

from __future__ import annotations

import functools
import html
import logging
import unicodedata
from collections.abc import Sequence

import numpy as np
from instant_clip_tokenizer import Tokenizer  # type: ignore[import-untyped]

LENGTH = 77
START = 49406
END = 49407
LONGEST = 10_000  # characters that are looked at: the time grows with the square of a word's length

log = logging.getLogger(__name__)


def tokenize(prompts: Sequence[str]) -> np.ndarray:
    """CLIP's token ids of each prompt: (B, 77) int32, from start 49406 to end 49407 and padded with 49407.

    Any text is accepted, the empty one too. Only 75 tokens fit between start and end: what is longer is cut, with a
    warning in the log, once for each prompt. Raises TypeError where `prompts` is a single str.
    """
    if isinstance(prompts, str):
        raise TypeError("tokenize takes a list of prompts, not one str: write tokenize([prompt]).")
    tokens = np.full((len(prompts), LENGTH), END, np.int32)
    tokens[:, 0] = START
    for row, prompt in zip(tokens, prompts, strict=True):
        ids = _encode(prompt)
        row[1 : 1 + len(ids)] = ids
    return tokens


def clean(text: str) -> str:
    """The text as CLIP's vocabulary was trained on it: lower case, single spaces, no HTML entities.

    Control characters are dropped, lone surrogates become U+FFFD, and typographic quotes, ligatures and full-width
    letters become plain ones. Source: `basic_clean` and `whitespace_clean` of OpenAI's CLIP and the parts of
    `ftfy.fix_text` that matter to typed text; its repair of wrongly decoded text is left out.
    """
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = html.unescape(html.unescape(text)).translate(_plain_characters())
    return " ".join(unicodedata.normalize("NFC", text).split()).lower()


@functools.lru_cache(maxsize=1)
def _plain_characters() -> dict[int, str | None]:
    ligatures = [0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07)]
    compatible = [*ligatures, *range(0xFF01, 0xFFF0), 0x3000]  # with the full and half widths
    controls = [*range(9), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
    return {
        **{code: unicodedata.normalize("NFKC", chr(code)) for code in compatible},
        **dict.fromkeys(controls),
        **dict.fromkeys([0x02BC, *range(0x2018, 0x201C)], "'"),
        **dict.fromkeys(range(0x201C, 0x2020), '"'),
    }


@functools.lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    return Tokenizer()


@functools.lru_cache(maxsize=1024)  # also what keeps the warning to one for each prompt
def _encode(prompt: str) -> tuple[int, ...]:
    """The prompt's ids, at most 75, without start and end."""
    text = clean(prompt)
    # The package spells CLIP's two marker tokens in its own way, which are plain words to CLIP.
    for marker in ("start_of_text>", "end_of_text>"):
        text = text.replace(f"<{marker}", f"< {marker}")
    text = text.replace("<|startoftext|>", "<start_of_text>").replace("<|endoftext|>", "<end_of_text>")

    ids = _tokenizer().encode(text[:LONGEST])
    dropped = len(ids) - (LENGTH - 2)
    if dropped > 0:
        excerpt = prompt if len(prompt) <= 40 else prompt[:40] + "…"
        more = " and more" if len(text) > LONGEST else ""
        log.warning(
            "The prompt %r has %d tokens%s, of which CLIP takes 75: %d%s dropped.",
            excerpt,
            len(ids),
            more,
            dropped,
            more,
        )
    return tuple(ids[: LENGTH - 2])
