"""How good the small model is: edges kept, the right emoji, the right background, on held-out emoji.

    python models/tiny/evaluate.py --data data --output runs/tiny/evaluation

Each of 100 held-out pictures is made anew from its edges (Canny 100, 200) and its caption, once with the ControlNet and
once without (strength 0). Written: metrics.json, sheet.png (twelve pictures) and sheet_all.png.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also runs as a script

from bench.perceptual import InceptionFeatures  # noqa: E402
from cldm.canny2image import load_model  # noqa: E402
from cldm.cldm import ControlLDM  # noqa: E402
from cldm.ddim_hacked import DDIMSampler  # noqa: E402
from cldm.stages import STAGES  # noqa: E402
from models.tiny.captions import NEGATIVE_PROMPT  # noqa: E402
from models.tiny.data import SIZE, EvalItem, evaluation_set, load_emoji, nearest_colours  # noqa: E402
from runtime.noise import cuda_randn  # noqa: E402
from runtime.schedule import control_scales  # noqa: E402

Picture = np.ndarray  # (H, W, 3) uint8 RGB

BATCH = 25
TOLERANCE = 2.0  # pixels an edge may move
FRAME = 4  # pixels of border that show the background
TARGETS = {"edges_f1": 0.55, "retrieval_top1": 0.60, "colour": 0.80}
# The twelve of the small sheet; others step in where a run has fewer.
SHOWN = ("owl", "parrot", "duck", "swan", "dog", "panda", "dolphin", "bell pepper", "motor scooter", "crown", "anchor",
         "mage")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- metrics
def edge_f1(found: np.ndarray, wanted: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """F1 of two edge maps (H, W), nonzero where an edge is, that may lie `tolerance` pixels (Euclidean) apart.

    Precision is the share of found pixels with a wanted one near, recall the reverse (as in BSDS, without matching).
    """

    def near(a: np.ndarray, b: np.ndarray) -> float:
        if not a.any() or not b.any():
            return float(not a.any() and not b.any())
        distance = cv2.distanceTransform((b == 0).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        return float((distance[a > 0] <= tolerance + 1e-3).mean())

    precision, recall = near(found, wanted), near(wanted, found)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def retrieval_ranks(results: NDArray[np.float32], truths: NDArray[np.float32]) -> NDArray[np.int64]:
    """For each of n results, how many truths are nearer to it than its own: 0 where it is found at once, (n,).

    Both (n, d) features; nearness is the cosine after the truths' mean is taken off both.
    """
    mean = truths.mean(0)
    a, b = (x.astype(np.float64) - mean for x in (results, truths))
    a /= np.linalg.norm(a, axis=1, keepdims=True) + 1e-12
    b /= np.linalg.norm(b, axis=1, keepdims=True) + 1e-12
    likeness = a @ b.T
    return (likeness > likeness.diagonal()[:, None]).sum(1)


def background_colour(picture: Picture, frame: int = FRAME) -> str:
    """The named colour nearest to the median of the picture's border, `frame` pixels wide."""
    border = np.ones(picture.shape[:2], bool)
    border[frame:-frame, frame:-frame] = False
    return nearest_colours(np.median(picture[border], axis=0)[None])[0]


def measure(pictures: Sequence[Picture], items: Sequence[EvalItem], truths: NDArray[np.float32],
            inception: InceptionFeatures) -> list[dict[str, Any]]:  # fmt: skip
    """Edges kept, retrieval rank and background of each picture, one dictionary a picture."""
    ranks = retrieval_ranks(inception.features(pictures), truths)
    return [
        {
            "edges_f1": edge_f1(cv2.Canny(picture, 100, 200), item.edges),
            "retrieval_rank": int(rank),
            "background": background_colour(picture),
        }
        for picture, item, rank in zip(pictures, items, ranks, strict=True)
    ]


def summary(rows: Sequence[dict[str, Any]], items: Sequence[EvalItem]) -> dict[str, float]:
    """The means over all pictures."""
    ranks = np.array([row["retrieval_rank"] for row in rows])
    return {
        "edges_f1": float(np.mean([row["edges_f1"] for row in rows])),
        "retrieval_top1": float((ranks < 1).mean()),
        "retrieval_top5": float((ranks < 5).mean()),
        "colour": float(np.mean([row["background"] == item.colour for row, item in zip(rows, items, strict=True)])),
    }


def verdicts(with_control: dict[str, float], without: dict[str, float]) -> dict[str, tuple[float, str, bool]]:
    """What is asked of the model: name → (value, target, reached)."""
    f1, off = with_control["edges_f1"], without["edges_f1"]
    return {
        "edges F1, strength 1": (f1, f"≥ {TARGETS['edges_f1']:.2f}", f1 >= TARGETS["edges_f1"]),
        "edges F1, strength 0": (off, f"≤ {f1 / 2:.2f}", off <= f1 / 2),
        **{
            name: (with_control[key], f"≥ {TARGETS[key]:.0%}", with_control[key] >= TARGETS[key])
            for name, key in (("right emoji first", "retrieval_top1"), ("right background", "colour"))
        },
    }


# ---------------------------------------------------------------------------------------------------------- pictures
@torch.inference_mode()
def generate(model: ControlLDM, items: Sequence[EvalItem], strength: float, scale: float, steps: int,
             seed: int) -> list[Picture]:  # fmt: skip
    """A picture (128, 128, 3) for each item; item i starts from seed + i, so that it does not depend on the others."""
    model.control_scales = control_scales(len(model.control_scales), strength, False)
    shape = (1, 4, SIZE // 8, SIZE // 8)
    pictures: list[Picture] = []
    for start in tqdm(range(0, len(items), BATCH), desc=f"strength {strength:g}", unit="batch"):
        batch = items[start : start + BATCH]
        edges = torch.from_numpy(np.stack([item.edges for item in batch])).to(model.device)
        hint = [edges[:, None].expand(-1, 3, -1, -1) / 255] if strength else None
        texts = [item.caption for item in batch], [NEGATIVE_PROMPT] * len(batch)
        cond, uncond = ({"c_concat": hint, "c_crossattn": [model.get_learned_conditioning(t)]} for t in texts)
        noise = np.concatenate([cuda_randn(seed + start + i, shape) for i in range(len(batch))])
        x, _ = DDIMSampler(model).sample(
            steps,
            len(batch),
            shape[1:],
            cond,
            x_T=torch.from_numpy(noise),
            unconditional_guidance_scale=scale,
            unconditional_conditioning=uncond,
        )
        pictures += list(STAGES["vae_decoder"](model, {"x": x})["picture"].cpu().numpy())
    return pictures


@torch.inference_mode()
def autoencode(model: ControlLDM, items: Sequence[EvalItem]) -> list[Picture]:
    """The true pictures through the autoencoder alone: the best that the rest of the model can do."""
    truth = torch.from_numpy(np.stack([item.image for item in items])).to(model.device)
    return [
        picture
        for batch in truth.split(BATCH)
        for picture in STAGES["vae_decoder"](model, STAGES["vae_encoder"](model, {"picture": batch}))["picture"]
        .cpu()
        .numpy()
    ]


def contact_sheet(path: Path, items: Sequence[EvalItem], rows: dict[str, Sequence[Picture]], columns: int) -> None:
    """Write a PNG of named rows of pictures, an item a column with its caption below, in bands of `columns`."""
    gap, label, text = 4, 84, 46  # pixels
    band = len(rows) * (SIZE + gap) + text
    columns = min(columns, len(items))
    bands = math.ceil(len(items) / columns)
    sheet = np.full((bands * band, label + columns * (SIZE + gap), 3), 255, np.uint8)
    figure = Figure(figsize=(sheet.shape[1] / 100, sheet.shape[0] / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    for i, item in enumerate(items):
        x, top = label + i % columns * (SIZE + gap), i // columns * band
        for r, (name, pictures) in enumerate(rows.items()):
            y = top + r * (SIZE + gap)
            sheet[y : y + SIZE, x : x + SIZE] = pictures[i]
            if i % columns == 0:
                axes.text(6, y + SIZE / 2, name, size=7, va="center")
        lines = textwrap.wrap(item.caption, 27)[:3]
        axes.text(x + SIZE / 2, top + band - text + 1, "\n".join(lines), size=6, ha="center", va="top", linespacing=1.3)
    axes.imshow(sheet, interpolation="nearest", extent=(0, sheet.shape[1], sheet.shape[0], 0))
    axes.axis("off")
    figure.savefig(path)


def chosen(items: Sequence[EvalItem], count: int = 12) -> list[int]:
    """Indices of the items on the small sheet: those of `SHOWN`, then others in their order."""
    labels = {item.emoji.label: i for i, item in enumerate(items)}
    first = [labels[label] for label in SHOWN if label in labels]
    return (first + [i for i in range(len(items)) if i not in first])[:count]


# -------------------------------------------------------------------------------------------------------------- main
def show(found: dict[str, dict[str, float]], checks: dict[str, tuple[float, str, bool]], count: int) -> None:
    """Print what was found and whether it is enough."""
    table = Table(title=f"The small model on {count} held-out emoji")
    for heading in ("", "found", "target", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, (value, target, reached) in checks.items():
        value_text = f"{value:.2f}" if "F1" in name else f"{value:.0%}"
        table.add_row(name, value_text, target, "[green]pass[/]" if reached else "[red]FAIL[/]")
    top5, ceiling = found["strength 1"]["retrieval_top5"], found["autoencoder"]
    table.add_row("right emoji among first 5", f"{top5:.0%}", "", "")
    table.add_row("autoencoder alone: edges F1", f"{ceiling['edges_f1']:.2f}", "", "")
    table.add_row("autoencoder alone: right emoji first", f"{ceiling['retrieval_top1']:.0%}", "", "")
    Console().print(table)


def evaluate(options: argparse.Namespace) -> None:
    """Make the pictures, measure them, and write everything into the output folder."""
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model("tiny", options.weights, device)
    items = evaluation_set(load_emoji(options.data))[: options.limit]
    inception = InceptionFeatures(device)
    options.output.mkdir(parents=True, exist_ok=True)
    pictures = {
        "strength 1": generate(model, items, 1.0, options.scale, options.steps, options.seed),
        "strength 0": generate(model, items, 0.0, options.scale, options.steps, options.seed),
        "autoencoder": autoencode(model, items),
    }
    truths = inception.features([item.image for item in items])
    rows = {name: measure(made, items, truths, inception) for name, made in pictures.items()}
    found = {name: summary(part, items) for name, part in rows.items()}
    checks = verdicts(found["strength 1"], found["strength 0"])

    sheet: dict[str, Sequence[Picture]] = {
        "held out": [item.image for item in items],
        "its edges": [cv2.cvtColor(item.edges, cv2.COLOR_GRAY2RGB) for item in items],
        "model": pictures["strength 1"],
        "without edges": pictures["strength 0"],
    }
    few = chosen(items)
    contact_sheet(options.output / "sheet.png", [items[i] for i in few],
                  {name: [row[i] for i in few] for name, row in sheet.items()}, 12)  # fmt: skip
    contact_sheet(options.output / "sheet_all.png", items, sheet, 10)
    report = {
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "metrics": found,
        "targets": {name: {"value": v, "target": t, "reached": bool(r)} for name, (v, t, r) in checks.items()},
        "pictures": [
            {"hexcode": item.emoji.hexcode, "caption": item.caption, "colour": item.colour}
            | {name: part[i] for name, part in rows.items()}
            for i, item in enumerate(items)
        ],
    }
    (options.output / "metrics.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    show(found, checks, len(items))
    print(f"written to {options.output}: metrics.json, sheet.png, sheet_all.png")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path(__file__).with_name("tiny.safetensors"))
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the npm tarballs (default: data)")
    parser.add_argument("--output", type=Path, default=Path("runs/tiny/evaluation"), help="folder for what is written")
    parser.add_argument("--scale", type=float, default=2.0, help="guidance (default: 2)")
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=positive, default=100, help="how many of the 100 emoji")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    try:
        evaluate(parser.parse_args())
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"evaluate: {error}") from error


if __name__ == "__main__":
    main()
