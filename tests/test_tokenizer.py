import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.tokenizer import END, LENGTH, START, clean, tokenize


def ids(prompt: str) -> list[int]:
    """The ids between start and the first end."""
    row = tokenize([prompt])[0].tolist()
    assert row[0] == START
    return row[1 : row.index(END)]


def test_known_ids() -> None:
    tokens = tokenize(["a photo of a cat", ""])
    assert tokens.shape == (2, LENGTH) and tokens.dtype == np.int32
    assert tokens[0].tolist() == [49406, 320, 1125, 539, 320, 2368] + [49407] * 71
    assert tokens[1].tolist() == [49406] + [49407] * 76
    assert tokenize([]).shape == (0, LENGTH)


# Ids as OpenAI's SimpleTokenizer gives them (with ftfy), from its published vocabulary.
@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("Hi there", [1883, 997]),
        ("don't I'LL", [847, 713, 328, 1342]),
        ("100 km/h", [272, 271, 271, 4590, 270, 327]),
        ("日本語", [39121, 44353, 34002, 508]),
        ("😀", [7334]),
        ("\u200b", [9844]),
        ("İ", [328, 16384]),
    ],
)
def test_ids_of_the_original(prompt: str, expected: list[int]) -> None:
    assert ids(prompt) == expected


@pytest.mark.parametrize(
    "prompt, same",
    [
        ("  A\tPhoto\r\nOF a\u00a0\u3000CAT ", "a photo of a cat"),
        ("salt &amp; pepper", "salt & pepper"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("a bird’s “nest”", 'a bird\'s "nest"'),
        ("ＢＩＲＤ！ ﬁne", "bird! fine"),
        ("e\u0301clair", "éclair"),
        ("b\0ir\x1cd\ufeff", "bird"),
        ("\ud83d\ude00", "😀"),  # two halves of a pair
        ("\ud800", "\ufffd"),
    ],
)
def test_cleaning(prompt: str, same: str) -> None:
    assert clean(prompt) == same
    assert ids(prompt) == ids(same)


def test_marker_tokens_are_spelt_as_the_original_spells_them() -> None:
    assert tokenize(["x <|endoftext|> y"])[0, 1:4].tolist() == [*ids("x"), END, *ids("y")]
    assert tokenize(["<|startoftext|>"])[0, 1] == START
    assert ids("<end_of_text>!") == [*ids("<"), *ids("end"), *ids("_"), *ids("of"), *ids("_"), *ids("text"), *ids(">!")]


def test_75_tokens_fit(caplog: pytest.LogCaptureFixture) -> None:
    tokens = tokenize(["cat " * 75])
    assert tokens[0].tolist() == [START] + [2368] * 75 + [END]
    assert not caplog.records


def test_truncation_is_reported_once_for_each_prompt(caplog: pytest.LogCaptureFixture) -> None:
    long, longer = "cat " * 76, "dog " * 500
    tokens = tokenize([long, "short", longer, long])
    tokenize([longer])
    assert tokens[0].tolist() == [START] + [2368] * 75 + [END]
    assert tokens[2, -1] == END and tokens[2, -2] != END
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    first, second = caplog.messages
    assert first.startswith("The prompt 'cat cat") and first.endswith(
        "has 76 tokens, of which CLIP takes 75: 1 dropped."
    )
    assert second.endswith("has 500 tokens, of which CLIP takes 75: 425 dropped.")


def test_a_single_str_is_refused() -> None:
    with pytest.raises(TypeError, match="list of prompts"):
        tokenize("a photo of a cat")


@given(st.text(st.characters(codec=None), max_size=200))
def test_any_text_works(prompt: str) -> None:
    tokens = tokenize([prompt])
    assert tokens.shape == (1, LENGTH)
    assert tokens[0, 0] == START and tokens[0, -1] == END
    assert tokens.min() >= 0 and tokens.max() <= END
