"""The small model's data, on emoji made up here; the real packages are read only under `-m network`."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.tiny import captions, data, fluent

ENTRIES = [
    {"label": "owl", "hexcode": "1F989", "tags": ["animal", "bird"], "group": 3, "subgroup": 35},
    {"label": "penguin", "hexcode": "1F427", "tags": ["animal", "bird"], "group": 3, "subgroup": 35},
    {"label": "duck", "hexcode": "1F986", "tags": ["bird"], "group": 3, "subgroup": 35},
    {"label": "keycap: 1", "hexcode": "0031-FE0F-20E3", "tags": ["keycap"], "group": 8, "subgroup": 94},
    {
        "label": "flag: Wales",
        "hexcode": "1F3F4-E0067-E0062-E0077-E006C-E0073-E007F",
        "tags": ["flag"],
        "group": 9,
        "subgroup": 99,
    },
    {"label": "flag: Japan", "hexcode": "1F1EF-1F1F5", "tags": ["flag"], "group": 9, "subgroup": 98},
    {
        "label": "person running",
        "hexcode": "1F3C3",
        "tags": ["run"],
        "group": 1,
        "subgroup": 28,
        "skins": [{"label": "person running: dark skin tone", "hexcode": "1F3C3-1F3FF"}],
    },
    {"label": "woman running", "hexcode": "1F3C3-200D-2640-FE0F", "tags": ["run"], "group": 1, "subgroup": 28},
]
FILES = [
    "1f989",
    "1f427",
    "1f986",
    "0031-fe0f-20e3",
    "31-fe0f-20e3",
    "1f3f4-e0067_e0062_e0077_e006c_e0073",
    "1f1ef-1f1f5",
    "1f3c3",
    "1f3c3-1f3ff",
    "1f3c3-200d-2640-fe0f",
]
META = {
    "groups": {"1": "people-body", "3": "animals-nature", "8": "symbols", "9": "flags"},
    "subgroups": {
        "28": "person-sport",
        "35": "animal-bird",
        "94": "keycap",
        "98": "country-flag",
        "99": "subdivision-flag",
    },
}


def webp(seed: int) -> bytes:
    """A disc of one colour with a mark; clear pixels are pure green, so that a fringe would show."""
    colour = np.random.default_rng(seed).integers(0, 256, 3).tolist()
    picture = np.zeros((256, 256, 4), np.uint8)
    picture[..., 1] = 255
    cv2.circle(picture, (128, 128), 100, (*colour, 255), -1, cv2.LINE_AA)
    cv2.rectangle(picture, (60, 100), (110, 130 + 8 * (seed % 10)), (*(255 - np.array(colour)).tolist(), 255), -1)
    return cv2.imencode(".webp", picture, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()


def write_tarball(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def tarballs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("npm")
    pictures, labels = folder / fluent.PICTURES[2], folder / fluent.LABELS[2]
    write_tarball(pictures, {f"assets/{name}.webp": webp(i) for i, name in enumerate(FILES)})
    write_tarball(
        labels,
        {
            "en/data.json": json.dumps(ENTRIES).encode(),
            "meta/groups.json": json.dumps(META).encode(),
            "de/data.json": b"[]",
        },
    )
    return pictures, labels


@pytest.fixture(scope="module")
def emojis(tarballs: tuple[Path, Path]) -> list[fluent.Emoji]:
    return fluent.read_emoji(*tarballs)


def test_emoji_are_matched_under_every_spelling(emojis: list[fluent.Emoji]) -> None:
    labels = Counter(e.label for e in emojis)
    assert set(labels) == {*(e["label"] for e in ENTRIES), "person running: dark skin tone"}
    assert labels["keycap: 1"] == 1  # there twice, under two spellings
    runners = [e for e in emojis if e.base == "running"]
    assert len(runners) == 3 and len({e.held_out for e in runners}) == 1
    assert emojis[0].image.shape == (256, 256, 4) and emojis[0].image.dtype == np.uint8


def test_too_many_unknown_pictures_are_refused(tarballs: tuple[Path, Path], tmp_path: Path) -> None:
    write_tarball(tmp_path / "more.tgz", {"assets/1f989.webp": webp(0), "assets/1f999-1f999.webp": webp(1)})
    with pytest.raises(ValueError, match="1f999-1f999"):
        fluent.read_emoji(tmp_path / "more.tgz", tarballs[1])


def test_fetch_checks_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no npm there
    with pytest.raises(RuntimeError, match="npm is not installed"):
        fluent.fetch(tmp_path / "data")
    (tmp_path / "data" / fluent.PICTURES[2]).write_bytes(b"something else")
    with pytest.raises(ValueError, match="delete it"):
        fluent.fetch(tmp_path / "data")


def test_fetch_asks_npm_for_the_pinned_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text(
        f'#!/bin/sh\nprintf "%s" "$2" > "$(echo "$2" | sed "s/^@//; s/[/@]/-/g").tgz"\n'
        f'echo "$@" >> "{tmp_path}/calls"\n'
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    packages = [
        (*p[:3], hashlib.sha256(f"{p[0]}@{p[1]}".encode()).hexdigest()) for p in (fluent.PICTURES, fluent.LABELS)
    ]
    monkeypatch.setattr(fluent, "PICTURES", packages[0])
    monkeypatch.setattr(fluent, "LABELS", packages[1])
    found = fluent.fetch(tmp_path / "data")
    assert fluent.fetch(tmp_path / "data") == found  # the second time there is nothing to download
    assert (tmp_path / "calls").read_text().count("pack") == 2


@pytest.mark.parametrize(
    ("label", "base"),
    [
        ("man running: dark skin tone", "running"),
        ("woman running", "running"),
        ("person running", "running"),
        ("handshake: light skin tone, dark skin tone", "handshake"),
        ("woman: light skin tone, red hair", "person: red hair"),
        ("man: dark skin tone", "person"),
        ("kiss: man, man, dark skin tone", "kiss"),
        ("kiss mark", "kiss mark"),
        ("women holding hands: light skin tone", "holding hands"),
        ("family: man, girl", "family"),
        ("man’s shoe", "man’s shoe"),
        ("three o’clock", "clock face"),
        ("ten-thirty", "clock face"),
        ("light blue heart", "heart"),
        ("flag: Peru", "flag: Peru"),
        ("heart with arrow", "heart with arrow"),
        ("left arrow curving right", "arrow"),
        ("white medium-small square", "square"),
        ("mermaid", "merperson"),
        ("Mrs. Claus", "Claus"),
        ("snowman without snow", "snowman"),
        ("owl", "owl"),
    ],
)
def test_base_names(label: str, base: str) -> None:
    assert fluent.base_name(label) == base


def test_split_is_stable_and_a_tenth_with_birds() -> None:
    assert [fluent.is_held_out(b, "animal-bird") for b in ("owl", "parrot", "duck", "swan")] == [True] * 4
    assert not any(fluent.is_held_out(b, "animal-bird") for b in ("penguin", "bird", "eagle", "flamingo", "dove"))
    assert fluent.is_held_out("anchor", "transport-water") and not fluent.is_held_out("rocket", "transport-air")
    assert 0.08 < np.mean([fluent.is_held_out(f"base {i}", "") for i in range(5000)]) < 0.12


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("hourglass", "an hourglass"),
        ("unamused face", "an unamused face"),
        ("glasses", "glasses"),
        ("octopus", "an octopus"),
        ("compass", "a compass"),
        ("rhinoceros", "a rhinoceros"),
        ("face with tears of joy", "a face with tears of joy"),
        ("people hugging", "people hugging"),
        ("person lifting weights", "a person lifting weights"),
        ("broccoli", "broccoli"),
        ("SOS button", "an SOS button"),
        ("orange", "an orange"),
        ("grey", "a grey"),
    ],
)
def test_articles(name: str, phrase: str) -> None:
    assert captions.with_article(name) == phrase


def test_captions_have_the_shares_that_training_needs(emojis: list[fluent.Emoji]) -> None:
    penguin = next(e for e in emojis if e.label == "penguin")
    rng = np.random.default_rng(0)
    texts = [captions.caption(penguin, "light blue", rng) for _ in range(4000)]
    share = {
        name: np.mean([test(t) for t in texts])
        for name, test in {
            "empty": lambda t: t == "",
            "negative": lambda t: t == captions.NEGATIVE_PROMPT,
            "added": lambda t: t.endswith(captions.ADDED_PROMPT),
            "bird": lambda t: "a bird" in t,
            "label": lambda t: "a penguin" in t,
            "background": lambda t: "light blue background" in t,
        }.items()
    }
    assert share == pytest.approx(
        {"empty": 0.05, "negative": 0.05, "added": 0.45, "bird": 0.2, "label": 0.63, "background": 0.9}, abs=0.03
    )
    assert not any("background" in captions.caption(penguin, None, rng) for _ in range(200))
    assert captions.subject(next(e for e in emojis if e.label == "flag: Japan")) == "the flag of Japan"
    assert captions.subject(next(e for e in emojis if "dark" in e.label)) == "a person running with dark skin tone"


def test_colours_are_far_apart_and_survive_jitter() -> None:
    points = data.lab(np.array(list(data.COLOURS.values())))
    distance = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e3 * np.eye(len(points))
    assert distance.min() > 29
    corners = np.array(np.meshgrid(*[[-data.JITTER, 0, data.JITTER]] * 3)).reshape(3, -1).T
    for name, rgb in data.COLOURS.items():
        assert set(data.nearest_colours(np.clip(np.array(rgb) + corners, 0, 255))) == {name}


def test_compose_moves_mirrors_and_leaves_no_fringe() -> None:
    rgba = np.zeros((256, 256, 4), np.uint8)
    rgba[..., 1] = 255  # what clear pixels hide
    rgba[100:156, 40:96] = (255, 255, 255, 255)
    plain = data.compose(rgba, (255, 255, 255), 1.0)
    assert plain.shape == (128, 128, 3) and (plain == 255).all()  # white on white: any fringe would show
    black = data.compose(rgba, (0, 0, 0), 1.0)[..., 0]
    rows, columns = np.nonzero(black > 127)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (50, 77, 20, 47)
    assert np.array_equal(data.compose(rgba, (0, 0, 0), 1.0, flip=True)[..., 0], black[:, ::-1])
    moved = data.compose(rgba, (0, 0, 0), 1.0, shift=(0.125, 0))[..., 0]
    assert np.array_equal(moved[:, 16:], black[:, :-16])
    tilted = [data.compose(rgba, (0, 0, 0), 0.8, 12, flip=flip)[..., 0].astype(int) for flip in (False, True)]
    mirrored = data.compose(rgba[:, ::-1].copy(), (0, 0, 0), 0.8, 12)[..., 0]
    assert np.abs(tilted[1] - mirrored).max() <= 2 and np.abs(tilted[0] - mirrored).max() > 100


def test_pool_does_not_depend_on_workers_or_start_method(emojis: list[fluent.Emoji]) -> None:
    one = data.make_pool(emojis, 300, 7, workers=1)
    for method in ("fork", "spawn"):
        other = data.make_pool(emojis, 300, 7, workers=2, start_method=method)
        assert np.array_equal(one.image, other.image) and np.array_equal(one.edges, other.edges)
        assert one.caption == other.caption and np.array_equal(one.emoji, other.emoji)
    assert len({one.image[i].tobytes() for i in range(300)}) == 300
    assert not np.array_equal(one.image, data.make_pool(emojis, 300, 8, workers=1).image)


def test_pool_keeps_the_sides_of_the_split_apart(emojis: list[fluent.Emoji]) -> None:
    pool = data.make_pool(emojis, 200, 0, workers=1)
    held = data.make_pool(emojis, 50, 0, workers=1, held_out=True)
    assert not any(emojis[i].held_out for i in pool.emoji) and all(emojis[i].held_out for i in held.emoji)
    assert pool.image.shape == (200, 128, 128, 3) and pool.edges.shape == (200, 128, 128)
    assert set(np.unique(pool.edges)) == {0, 255} and len(pool) == 200
    with pytest.raises(ValueError, match="0 samples"):
        data.make_pool(emojis, 0, 0)
    with pytest.raises(ValueError, match="of 0 emoji"):
        data.make_pool([e for e in emojis if e.held_out], 10, 0)


def test_weights_are_shared_within_a_base(emojis: list[fluent.Emoji]) -> None:
    weights = dict(zip([e.label for e in emojis], data.sampling_weights(emojis), strict=True))
    runners = [w for label, w in weights.items() if "running" in label]
    assert len(runners) == 3 and sum(runners) == pytest.approx(weights["keycap: 1"])
    assert weights["flag: Japan"] == pytest.approx(weights["keycap: 1"] / 4)
    assert sum(weights.values()) == pytest.approx(1)


def test_what_has_a_side_is_not_mirrored(emojis: list[fluent.Emoji]) -> None:
    assert {e.label for e in emojis if not e.may_flip} == {"keycap: 1", "flag: Wales", "flag: Japan"}


def test_evaluation_set_is_fixed(emojis: list[fluent.Emoji]) -> None:
    items = data.evaluation_set(emojis, 2)
    assert {i.emoji.label for i in items} == {"owl", "duck"}
    again = data.evaluation_set(list(reversed(emojis)), 2)
    assert [i.caption for i in items] == [i.caption for i in again]
    for item in items:
        assert (
            item.caption
            == f"{captions.with_article(item.emoji.label)} on {captions.with_article(item.colour)} background"
        )
        assert np.array_equal(item.edges, cv2.Canny(item.image, 100, 200)) and item.edges.any()
        assert set(data.nearest_colours(item.image[0])) == {item.colour}
    with pytest.raises(ValueError, match="100 are needed"):
        data.evaluation_set(emojis)


@pytest.mark.network
@pytest.mark.skipif(
    "TINY_DATA" not in os.environ, reason="set TINY_DATA to a folder for the npm packages (it downloads)"
)
def test_real_packages() -> None:
    emojis = data.load_emoji(os.environ["TINY_DATA"])
    sides = {e.base: e.held_out for e in emojis}
    assert len(emojis) == 3375 and all(e.label and e.group for e in emojis)
    assert sum(sides.values()) >= 110
    items = data.evaluation_set(emojis)
    assert len(items) == 100 and len({i.emoji.base for i in items}) == 100
    assert sum(i.emoji.group == "flags" for i in items) <= 10
    assert {"owl", "parrot", "duck"} <= {i.emoji.label for i in items}
