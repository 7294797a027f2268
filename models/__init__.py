"""The models by name: where their descriptions lie, and where their weights are looked for. No torch in here."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
VARIABLE = "CONTROLNET_WEIGHTS"
DESCRIPTIONS = {"sd15": FOLDER / "cldm_v15.yaml", "tiny": FOLDER / "tiny" / "tiny.yaml"}
CHECKPOINTS = {"sd15": FOLDER / "control_sd15_canny"}  # of the others: what the description is called
ENDINGS = (".safetensors", ".pth", ".ckpt")


def description(model: str | Path) -> Path:
    """The yaml of a model: "sd15", "tiny" or a yaml's path."""
    return DESCRIPTIONS.get(str(model), Path(model))


def places(model: str | Path) -> list[Path]:
    """Where the weights of a model are looked for, in this order.

    The environment variable CONTROLNET_WEIGHTS names a file, or a folder that holds a file of the usual name; the
    small model does not ask it, because its weights lie beside its description.
    """
    usual = CHECKPOINTS.get(str(model), description(model).with_suffix(""))
    found: list[Path] = []
    named = Path(os.environ.get(VARIABLE) or "")
    if named.name and str(model) != "tiny":
        found += endings(named / usual.name) if named.is_dir() else [named]
    return found + endings(usual)


def endings(path: Path) -> list[Path]:
    """The files that a path without an ending may stand for."""
    return [path.with_name(path.name + ending) for ending in ENDINGS]


def find_weights(model: str | Path, given: str | Path | None = None) -> Path:
    """The weights of a model: the file that is given, or the first of `places`.

    Raises FileNotFoundError, which says where it looked.
    """
    looked = [Path(given)] if given else places(model)
    for path in looked:
        if path.is_file():
            return path
    by_stem: dict[Path, list[str]] = {}
    for path in looked:
        by_stem.setdefault(path.with_suffix(""), []).append(path.suffix)
    where = ", ".join(f"{stem}{{{','.join(s)}}}" if len(s) > 1 else f"{stem}{s[0]}" for stem, s in by_stem.items())
    todo = "name their file with --weights" + (f" or {VARIABLE}" if str(model) != "tiny" else "")
    raise FileNotFoundError(f"model {str(model)!r} has no weights: there is nothing at {where}; {todo}")
