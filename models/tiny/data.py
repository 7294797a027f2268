"""Pictures, edge maps and captions for the small model, made from Fluent 3D emoji on plain coloured backgrounds.

Sources, both from the npm registry and pinned: `@lobehub/fluent-emoji-3d` (pictures, MIT) and `emojibase-data`
(labels and tags, MIT). `python models/tiny/data.py --preview out.png` draws forty samples to look at.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also runs as a script

from models.tiny.captions import caption, subject, with_article  # noqa: E402
from models.tiny.fluent import TONE, Emoji, load_emoji, stable_fraction  # noqa: E402

log = logging.getLogger(__name__)

SIZE = 128  # pixels a side of every picture made here
CHUNK = 256  # samples that one worker makes at a time, with a random stream of its own

# fmt: off
# Any two are at least 29 apart in CIE Lab (L 0..100), so the nearest name survives jitter and a blurry model.
COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255), "grey": (152, 152, 152), "dark grey": (78, 78, 78), "black": (10, 10, 10),
    "red": (226, 28, 36), "dark red": (128, 6, 30), "orange": (255, 132, 16), "yellow": (255, 222, 32),
    "olive": (128, 128, 16), "green": (28, 156, 56), "light green": (150, 240, 136), "dark green": (10, 72, 34),
    "teal": (0, 132, 132), "turquoise": (56, 224, 208), "light blue": (150, 206, 255), "blue": (28, 90, 235),
    "dark blue": (20, 24, 110), "purple": (132, 36, 172), "lavender": (192, 160, 246), "pink": (255, 164, 204),
    "magenta": (236, 32, 170), "brown": (136, 84, 40), "beige": (232, 208, 164)}
# fmt: on
COLOUR_NAMES = tuple(COLOURS)
PAIRS = 0.25  # share of samples with a second emoji before the first: shapes and edges that no single one has
HUE = 30  # degrees that an emoji's hue is turned at most, where its label names no colour
JITTER = 8  # a background differs from its named colour by at most this much a channel

# Weight of a base when samples are drawn, by subgroup; 1 where not named. There are 248 flags much alike, and few
# birds, which is what the benchmark asks for ("a bird").
WEIGHTS = {"country-flag": 0.25, "subdivision-flag": 0.25, "animal-bird": 3.0}


@dataclass
class Pool:
    """Samples: image (n, 128, 128, 3) uint8 RGB, edges (n, 128, 128) uint8 0/255, n captions, emoji (n,) indices."""

    image: np.ndarray
    edges: np.ndarray
    caption: list[str]
    emoji: np.ndarray

    def __len__(self) -> int:
        return len(self.caption)


@dataclass(frozen=True)
class EvalItem:
    """One held-out picture: image (128, 128, 3) uint8 RGB, edges (128, 128) uint8 0/255."""

    emoji: Emoji
    colour: str
    caption: str
    image: np.ndarray
    edges: np.ndarray


# ---------------------------------------------------------------------------------------------------------- pictures
def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE Lab (L 0..100, D65) of sRGB colours 0..255: (n, 3) → (n, 3) float32."""
    return cv2.cvtColor((np.asarray(rgb, np.float32) / 255).reshape(1, -1, 3), cv2.COLOR_RGB2LAB)[0]


def nearest_colours(rgb: np.ndarray) -> list[str]:
    """The named colour nearest in Lab to each of (n, 3) sRGB colours 0..255."""
    distance = np.linalg.norm(lab(rgb)[:, None] - lab(np.array(list(COLOURS.values())))[None], axis=2)
    return [COLOUR_NAMES[i] for i in distance.argmin(1)]


def compose(
    rgba: np.ndarray,
    background: Sequence[float] | np.ndarray,
    scale: float = 0.9,
    degrees: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    flip: bool = False,
    stretch: float = 1.0,
) -> np.ndarray:
    """Put a (256, 256, 4) uint8 picture on a colour (3,) or a picture (128, 128, 3): (128, 128, 3) uint8 RGB.

    `shift` is in parts of the width; `stretch` widens the upright picture and narrows its height alike.
    """
    premultiplied = cv2.cvtColor(rgba, cv2.COLOR_RGBA2mRGBA)  # else the colour of clear pixels fringes the edges
    side, centre = rgba.shape[0], (rgba.shape[0] - 1) / 2
    matrix = cv2.getRotationMatrix2D((centre, centre), degrees, scale)
    matrix[:, 2] += np.array(shift) * side
    about = np.array([[stretch, 0, centre - stretch * centre], [0, 1 / stretch, centre - centre / stretch], [0, 0, 1]])
    matrix = matrix @ about
    if flip:  # mirror first: x becomes side - 1 - x
        matrix = np.column_stack([-matrix[:, 0], matrix[:, 1], matrix[:, 2] + matrix[:, 0] * (side - 1)])
    warped = cv2.warpAffine(premultiplied, matrix, (side, side), flags=cv2.INTER_CUBIC)
    small = cv2.resize(warped, (SIZE, SIZE), interpolation=cv2.INTER_AREA).astype(np.float32)
    through = 1 - small[..., 3:] / 255
    return np.clip(small[..., :3] + through * np.asarray(background, np.float32) + 0.5, 0, 255).astype(np.uint8)


def turn_hue(rgba: np.ndarray, degrees: float) -> np.ndarray:
    """Turn the hue of a (256, 256, 4) uint8 picture; grey stays grey."""
    hsv = cv2.cvtColor(rgba[..., :3], cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) + round(degrees / 2)) % 180  # OpenCV counts hue in steps of two degrees
    return np.dstack([cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), rgba[..., 3]])


def place(
    emoji: Emoji, background: np.ndarray, rng: np.random.Generator, scale: float, shift: float, vary: float
) -> np.ndarray:
    """Put an emoji on a colour (3,) or a picture (128, 128, 3) at random: (128, 128, 3) uint8 RGB."""
    image = emoji.image
    if emoji.may_turn_hue and rng.random() < 0.5:
        image = turn_hue(image, vary * rng.uniform(-HUE, HUE))
    return compose(
        image,
        background,
        scale * (1 + vary * rng.uniform(-0.25, 0.25)),
        vary * rng.uniform(-25, 25),
        (vary * rng.uniform(-shift, shift), vary * rng.uniform(-shift, shift)),
        emoji.may_flip and rng.random() < 0.5,
        np.exp(vary * rng.uniform(-0.2, 0.2)),
    )


def sample(
    emoji: Emoji, rng: np.random.Generator, other: Emoji | None = None, vary: float = 1.0
) -> tuple[np.ndarray, np.ndarray, str]:
    """One random training sample, maybe with a second emoji before the first.

    `vary` scales how far hue, size, angle, place and proportions are changed. Returns image (128, 128, 3) uint8 RGB,
    edges (128, 128) uint8 0/255 and caption.
    """
    colour = COLOUR_NAMES[rng.integers(len(COLOUR_NAMES))]
    background = np.clip(np.array(COLOURS[colour]) + rng.uniform(-JITTER, JITTER, 3), 0, 255)
    picture = place(emoji, background, rng, 0.88, 0.08, vary)
    if other is not None:
        picture = place(other, picture, rng, 0.45, 0.3, 1.0)
    low = rng.uniform(40, 140)
    edges = cv2.Canny(picture, low, min(low + rng.uniform(40, 160), 255))
    return picture, edges, caption(emoji, colour if rng.random() >= 0.15 else None, rng, other)


def sampling_weights(emojis: Sequence[Emoji]) -> np.ndarray:
    """The chance of each emoji, (n,) float64 summing to 1: bases alike but for `WEIGHTS`, shared within a base."""
    members = Counter(e.base for e in emojis)
    weights = np.array([WEIGHTS.get(e.subgroup, 1.0) / members[e.base] for e in emojis])
    return weights / weights.sum()


def _make_chunk(emojis: Sequence[Emoji], seed: int, vary: float, task: tuple[int, int]) -> tuple[int, list[int], list]:
    chunk, size = task
    rng = np.random.default_rng((seed, chunk))
    chosen, others = rng.choice(len(emojis), (2, size), p=sampling_weights(emojis)).tolist()
    pairs = zip(chosen, others, strict=True)
    samples = [sample(emojis[i], rng, emojis[j] if rng.random() < PAIRS * vary else None, vary) for i, j in pairs]
    return chunk, chosen, samples


_worker_chunk = None  # set in each worker process, so that the emoji travel once and not with every task


def _start_worker(emojis: Sequence[Emoji], seed: int, vary: float) -> None:
    global _worker_chunk
    cv2.setNumThreads(1)
    _worker_chunk = partial(_make_chunk, emojis, seed, vary)


def _run_worker(task: tuple[int, int]) -> tuple[int, list[int], list]:
    assert _worker_chunk is not None  # the pool's initializer ran
    return _worker_chunk(task)


def make_pool(
    emojis: Sequence[Emoji],
    count: int,
    seed: int,
    workers: int | None = None,
    held_out: bool = False,
    start_method: str | None = None,
    vary: float = 1.0,
) -> Pool:
    """Make `count` random samples of the emoji on one side of the split (training unless `held_out`), in parallel.

    The result depends on `seed` but not on `workers` (default: the CPUs this process may use). `Pool.emoji` indexes
    `emojis`; `vary` is that of `sample`. ValueError where no emoji is on that side or count is not positive.
    """
    side = [i for i, emoji in enumerate(emojis) if emoji.held_out == held_out]
    if not side or count < 1:
        raise ValueError(f"cannot make {count} samples of {len(side)} emoji with held_out={held_out}")
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tasks = [(i // CHUNK, min(CHUNK, count - i)) for i in range(0, count, CHUNK)]
    pool = Pool(
        np.empty((count, SIZE, SIZE, 3), np.uint8),
        np.empty((count, SIZE, SIZE), np.uint8),
        [""] * count,
        np.empty(count, np.int64),
    )
    chosen = [emojis[i] for i in side]

    def collect(results: Iterable[tuple[int, list[int], list]]) -> Pool:
        with tqdm(total=count, desc="samples", unit_scale=True) as progress:
            for chunk, indices, samples in results:
                for row, (index, (image, edges, text)) in enumerate(zip(indices, samples, strict=True), chunk * CHUNK):
                    pool.image[row], pool.edges[row], pool.caption[row] = image, edges, text
                    pool.emoji[row] = side[index]
                progress.update(len(samples))
        return pool

    if workers == 1:
        return collect(map(partial(_make_chunk, chosen, seed, vary), tasks))
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # OpenCV's own threads do not survive a fork, and a child that waits for them hangs
    try:
        context = multiprocessing.get_context(start_method)
        with context.Pool(min(workers, len(tasks)), _start_worker, (chosen, seed, vary)) as processes:
            return collect(processes.imap_unordered(_run_worker, tasks))
    finally:
        cv2.setNumThreads(threads)


# -------------------------------------------------------------------------------------------------------- evaluation
def evaluation_set(emojis: Sequence[Emoji], count: int = 100) -> list[EvalItem]:
    """The held-out pictures that the small model is measured on, the same ones each time.

    One emoji a base (the default skin tone), at most a tenth country flags, none nearly the same picture as another;
    birds come first, then by hash. ValueError where fewer than `count` remain.
    """
    first: dict[str, Emoji] = {}
    held_out = [e for e in emojis if e.held_out]
    for emoji in sorted(held_out, key=lambda e: (bool(TONE.search(e.label)), len(e.label), e.hexcode)):
        first.setdefault(emoji.base, emoji)
    order = sorted(first.values(), key=lambda e: (e.subgroup != "animal-bird", stable_fraction(f"order:{e.base}")))
    items: list[EvalItem] = []
    thumbnails: list[np.ndarray] = []
    flags = 0
    for emoji in order:
        is_flag = emoji.group == "flags"
        rgba = emoji.image
        grey = compose(rgba, (128, 128, 128)).astype(np.float32)
        thumbnail = cv2.resize(grey, (16, 16), interpolation=cv2.INTER_AREA)
        if (is_flag and flags >= count // 10) or any(np.abs(thumbnail - t).mean() < 6 for t in thumbnails):
            continue
        flags += is_flag
        thumbnails.append(thumbnail)
        colour = COLOUR_NAMES[int(stable_fraction(f"background:{emoji.base}") * len(COLOUR_NAMES))]
        picture = compose(rgba, COLOURS[colour])
        items.append(
            EvalItem(
                emoji,
                colour,
                f"{subject(emoji)} on {with_article(colour)} background",
                picture,
                cv2.Canny(picture, 100, 200),
            )
        )
        if len(items) == count:
            return items
    raise ValueError(f"only {len(items)} held-out emoji are distinct enough, {count} are needed; is the data complete?")


# ----------------------------------------------------------------------------------------------------------- preview
def preview(emojis: Sequence[Emoji], seed: int, count: int = 40, columns: int = 5) -> np.ndarray:
    """A sheet of random samples with their edges and captions, uint8 BGR, to look at."""
    pool = make_pool(emojis, count, seed, workers=1)
    cells = []
    for image, edges, text in zip(pool.image, pool.edges, pool.caption, strict=True):
        cell = np.full((SIZE + 46, 2 * SIZE + 8, 3), 255, np.uint8)
        cell[:SIZE, :SIZE], cell[:SIZE, SIZE : 2 * SIZE] = image[..., ::-1], edges[..., None]
        for line, words in enumerate(textwrap.wrap(text or "(no caption)", 42)[:3], 1):
            cv2.putText(cell, words, (0, SIZE + 13 * line), cv2.FONT_HERSHEY_SIMPLEX, 0.35, (0, 0, 0), 1, cv2.LINE_AA)
        cells.append(cell)
    return np.vstack([np.hstack(cells[i : i + columns]) for i in range(0, count - count % columns, columns)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the npm tarballs (default: data)")
    parser.add_argument("--preview", type=Path, required=True, help="picture to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    emojis = load_emoji(options.data)
    bases = {e.base: e.held_out for e in emojis}
    log.info("%d bases, %d of them held out", len(bases), sum(bases.values()))
    if not cv2.imwrite(str(options.preview), preview(emojis, options.seed)):
        raise SystemExit(f"cannot write {options.preview}")


if __name__ == "__main__":
    main()
