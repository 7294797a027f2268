"""The metrics of the small model on made-up pictures, and a whole run with made-up pictures instead of a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.tiny import data, evaluate, fluent


def square(shift: int) -> np.ndarray:
    edges = np.zeros((128, 128), np.uint8)
    cv2.rectangle(edges, (30 + shift, 30 + shift), (90 + shift, 90 + shift), 255, 1)
    return edges


def test_edge_f1_tolerates_two_pixels() -> None:
    assert evaluate.edge_f1(square(0), square(0)) == 1.0
    assert evaluate.edge_f1(square(1), square(0)) == 1.0
    assert evaluate.edge_f1(square(2), square(0)) > 0.95  # diagonal corners are just outside
    assert evaluate.edge_f1(square(3), square(0)) < 0.2
    assert evaluate.edge_f1(square(5), square(0)) < 0.2


def test_edge_f1_weighs_precision_and_recall_alike() -> None:
    half = square(0)
    half[:, 60:] = 0  # all found is right (precision 1), half of it is missing
    share = (square(0) > 0)[:, :62].sum() / (square(0) > 0).sum()
    expected = 2 * share / (1 + share)
    assert evaluate.edge_f1(half, square(0)) == pytest.approx(expected)
    assert evaluate.edge_f1(square(0), half) == pytest.approx(expected)


def test_edge_f1_of_nothing() -> None:
    empty = np.zeros((128, 128), np.uint8)
    assert evaluate.edge_f1(empty, empty) == 1.0
    assert evaluate.edge_f1(empty, square(0)) == 0.0 == evaluate.edge_f1(square(0), empty)


def test_retrieval_ranks() -> None:
    rng = np.random.default_rng(0)
    truths = (rng.normal(size=(20, 64)) + 100).astype(np.float32)  # the common part must not decide
    noisy = truths + rng.normal(size=truths.shape).astype(np.float32) * 0.1
    assert (evaluate.retrieval_ranks(noisy, truths) == 0).all()
    swapped = truths.copy()
    swapped[[0, 1]] = truths[[1, 0]]
    assert evaluate.retrieval_ranks(swapped, truths).tolist()[2:] == [0] * 18
    assert evaluate.retrieval_ranks(swapped, truths)[0] >= 1
    # A result that is nothing but the mean fits nowhere better than elsewhere: no division by zero.
    assert np.isfinite(evaluate.retrieval_ranks(np.repeat(truths.mean(0, keepdims=True), 20, 0), truths)).all()


def test_background_colour_looks_at_the_border_only() -> None:
    picture = np.full((128, 128, 3), data.COLOURS["light blue"], np.uint8)
    picture[4:-4, 4:-4] = data.COLOURS["red"]
    assert evaluate.background_colour(picture) == "light blue"
    picture[:4, :60] = data.COLOURS["red"]  # a wing that reaches the border
    assert evaluate.background_colour(picture) == "light blue"


def test_verdicts() -> None:
    good = {"edges_f1": 0.6, "retrieval_top1": 0.6, "colour": 0.8}
    assert [ok for *_, ok in evaluate.verdicts(good, good | {"edges_f1": 0.3}).values()] == [True] * 4
    bad = {"edges_f1": 0.54, "retrieval_top1": 0.59, "colour": 0.79}
    assert [ok for *_, ok in evaluate.verdicts(bad, bad | {"edges_f1": 0.28}).values()] == [False] * 4


class FakeInception:
    def __init__(self, device: str) -> None:
        assert device == "cpu"

    def features(self, pictures: list[np.ndarray]) -> np.ndarray:
        return np.stack([cv2.resize(p, (8, 8), interpolation=cv2.INTER_AREA).ravel() for p in pictures]).astype("f4")


def items(count: int) -> list[data.EvalItem]:
    made = []
    for i, name in zip(range(count), data.COLOUR_NAMES, strict=False):
        picture = np.full((128, 128, 3), data.COLOURS[name], np.uint8)
        cv2.circle(picture, (30 + 5 * i, 60), 20, (255 - picture[0, 0]).tolist(), -1)
        emoji = fluent.Emoji(str(i), "owl" if i == 3 else f"thing {i}", (), "", "", str(i), True, b"")
        made.append(data.EvalItem(emoji, name, f"Türkiye {i}", picture, cv2.Canny(picture, 100, 200)))
    return made


def test_a_run_writes_metrics_and_sheets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = items(13)
    blank = [np.full((128, 128, 3), 90, np.uint8)] * 13
    monkeypatch.setattr(evaluate, "InceptionFeatures", FakeInception)
    monkeypatch.setattr(evaluate, "load_model", lambda *_: None)
    monkeypatch.setattr(evaluate, "load_emoji", lambda root: [])
    monkeypatch.setattr(evaluate, "evaluation_set", lambda emojis: truth)
    monkeypatch.setattr(evaluate, "autoencode", lambda *_: blank)
    monkeypatch.setattr(
        evaluate, "generate", lambda m, t, strength, *_: [i.image for i in t] if strength else blank[: len(t)]
    )
    options = argparse.Namespace(
        weights=Path("w"), data=tmp_path, output=tmp_path / "out", scale=5.0, steps=20, seed=0, limit=13, device="cpu"
    )
    evaluate.evaluate(options)
    report = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    best = {"edges_f1": 1.0, "retrieval_top1": 1.0, "retrieval_top5": 1.0, "colour": 1.0}
    assert report["metrics"]["strength 1"] == pytest.approx(best)
    assert report["metrics"]["strength 0"]["edges_f1"] == 0
    assert len(report["pictures"]) == 13 and all(t["reached"] for t in report["targets"].values())
    for name in ("sheet.png", "sheet_all.png"):
        assert np.std(np.asarray(cv2.imread(str(tmp_path / "out" / name)))) > 10
    assert "pass" in capsys.readouterr().out
    assert evaluate.chosen(truth)[0] == 3 and len(evaluate.chosen(truth)) == 12  # the owl comes first


def test_missing_weights_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--weights", str(tmp_path / "none.safetensors")])
    with pytest.raises(SystemExit, match="no weights"):
        evaluate.main()
