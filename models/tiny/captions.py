"""The words of the small model's data: what an emoji is called, and captions."""

from __future__ import annotations

import re

import numpy as np

from models.tiny.fluent import BIRD_PARTS, TONE, Emoji

# fmt: off
# The competition's added and negative prompts.
ADDED_PROMPT = "best quality, extremely detailed"
NEGATIVE_PROMPT = ("longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, "
                   "worst quality, low quality")

# What one picture of a subgroup is also called; "a bird" alone must mean something to the model.
NOUNS: dict[str, tuple[str, ...]] = {
    "animal-bird": ("bird", "bird", "bird", "animal"), "animal-mammal": ("animal",), "animal-amphibian": ("animal",),
    "animal-reptile": ("animal", "reptile"), "animal-marine": ("sea animal", "animal"), "animal-bug": ("bug",),
    "cat-face": ("cat", "cat face"), "monkey-face": ("monkey",), "plant-flower": ("flower",), "plant-other": ("plant",),
    "food-fruit": ("fruit",), "food-vegetable": ("vegetable",), "food-prepared": ("meal",), "food-asian": ("meal",),
    "food-sweet": ("dessert",), "drink": ("drink",), "place-building": ("building",), "place-religious": ("building",),
    "transport-water": ("boat",), "transport-air": ("aircraft",), "musical-instrument": ("musical instrument",),
    "face-smiling": ("face", "happy face"), "face-affection": ("face", "happy face"), "face-tongue": ("face",),
    "face-neutral-skeptical": ("face",), "face-concerned": ("face", "sad face"), "face-unwell": ("face", "sick face"),
    "heart": ("heart",), "country-flag": ("flag",), "subdivision-flag": ("flag",), "person": ("person",),
    "person-role": ("person",), "person-gesture": ("person",), "person-sport": ("person",), "clothing": ("garment",),
    "person-activity": ("person",), "person-fantasy": ("person",), "arrow": ("arrow",), "tool": ("tool",)}

UNCOUNTABLE = frozenset(
    "bread bacon broccoli butter fire flatbread food fog foggy garlic ice mate oden popcorn rice sake salt soap "
    "spaghetti sushi tennis badminton bowling lacrosse hockey breast-feeding".split())
PROPER = ("nail polish", "Santa Claus", "Mrs. Claus", "Mx Claus", "mount fuji", "ping pong", "palms up together")
AN = re.compile(r"(?!uni|eu|ewe|one\b|U\.)[aeiouAEIOU]|hour|x-ray|SOS|NG")
# Symbols named by a bare adjective or number word read better as "a prohibited sign".
SIGNS = ("math", "zodiac", "transport-sign", "warning")
TEMPLATES = ("{0} on {1} background", "{0} on {1} background", "{0} on {1} background", "{0}, {2} background",
             "{2} background, {0}", "{0} in front of {1} background", "a picture of {0} on {1} background",
             "an emoji of {0} on {1} background")
PLAIN_TEMPLATES = ("{0}", "{0}", "a picture of {0}", "an emoji of {0}")
# fmt: on


def with_article(name: str) -> str:
    """'an owl', 'a unicorn', 'glasses': the indefinite article where the name takes one."""
    head = re.split(r" (?:with|on|of|in|and|without|showing|holding back) ", name)[0]
    last = head.split(" ")[-1]
    several = re.match(r"(people|men|women)\b", name) or (
        re.search(r"[^suio]s$", last) and not re.match(r"(person|man|woman|level|lens|baggage) ", name)
    )
    if several or name in PROPER or last in UNCOUNTABLE:
        return name
    return ("an " if AN.match(name) else "a ") + name


def subject(emoji: Emoji) -> str:
    """The label as a noun phrase: 'the flag of Japan', 'a man running with dark skin tone', 'a woman with red hair'."""
    head, _, rest = emoji.label.partition(": ")
    if (emoji.subgroup in SIGNS or head in ("registered", "copyright")) and not head.endswith(("sign", "symbol")):
        return with_article(f"{head} sign")
    if not rest:
        return with_article(head)
    if head == "flag":
        return f"the flag of {rest}"
    if head == "keycap":
        return f"a keycap {rest}"
    details = [{"bald": "a bald head", "beard": "a beard"}.get(part, part) for part in rest.split(", ")]
    people = head in ("family", "kiss", "couple with heart") and not TONE.search(rest)
    return f"{with_article(head)} {'of' if people else 'with'} {' and '.join(details)}"


def nouns(emoji: Emoji) -> tuple[str, ...]:
    """More general names for the emoji ('bird'); a feather is not one."""
    return () if emoji.base in BIRD_PARTS else NOUNS.get(emoji.subgroup, ())


def caption(emoji: Emoji, colour: str | None, rng: np.random.Generator, other: Emoji | None = None) -> str:
    """A random caption of an emoji, and of another before it; one in ten is dropped for classifier-free guidance.

    Colour None names no background.
    """
    if rng.random() < 0.1:
        return "" if rng.random() < 0.5 else NEGATIVE_PROMPT
    kind, general = rng.random(), nouns(emoji)
    if general and kind < 0.3:
        text = with_article(str(rng.choice(general)))
    else:
        text = subject(emoji)
        if kind > 0.8 and emoji.tags:
            text = ", ".join([text, *rng.permutation(emoji.tags)[: rng.integers(1, 3)]])
    if other is not None:
        text = f"{text} and {subject(other)}"
    if colour is None:
        text = PLAIN_TEMPLATES[rng.integers(len(PLAIN_TEMPLATES))].format(text)
    else:
        text = TEMPLATES[rng.integers(len(TEMPLATES))].format(text, with_article(colour), colour)
    return f"{text}, {ADDED_PROMPT}" if rng.random() < 0.5 else text
