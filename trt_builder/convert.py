"""A .pth or .ckpt file as .safetensors, converted once: what TensorRT's side reads weights from, without PyTorch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError, safe_open

from trt_builder.config import ModelConfig
from trt_builder.weights import Weights, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = "source"  # of the file's metadata: the SHA-256 of what it was made from


def source_of(path: Path) -> str | None:
    """The SHA-256 of what a .safetensors file was made from; None where it does not say."""
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get(SOURCE)
    except (SafetensorError, OSError):
        return None


def convert(path: Path, digest: str, config: ModelConfig, cache: Path) -> Path:
    """The .safetensors file of a checkpoint with this SHA-256, made where there is none yet, and then kept.

    It lies beside the checkpoint, or in `cache` where that folder cannot be written to. Raises WeightsError where
    PyTorch is missing, the checkpoint holds more than weights or does not fit the model, or the name is taken; OSError.
    """
    name = f"{path.stem}.safetensors"
    for made in (path.parent / name, cache / name):
        if made.is_file() and source_of(made) == digest:
            return made
    folder = path.parent if os.access(path.parent, os.W_OK) else cache
    folder.mkdir(parents=True, exist_ok=True)
    cache.parent.mkdir(parents=True, exist_ok=True)
    made = folder / name
    with FileLock(cache.parent / f".{name}.lock"):
        if made.is_file() and source_of(made) == digest:  # by another process, which held the lock
            return made
        if made.is_file() and source_of(made) is None:
            raise WeightsError(f"{made} was not made from {path}: move it away, or name it with --weights")
        free, needed = shutil.disk_usage(folder).free, path.stat().st_size
        if free < needed:
            what = f"{made} needs about {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free"
            raise WeightsError(f"{what}: make room, or convert it elsewhere")
        save(made, load(path, config), digest, path)
    return made


def load(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a checkpoint, once it is sure that they fit the model and are finite."""
    try:
        import torch
    except ImportError:
        what = f"{path} takes PyTorch to read, and this interpreter has none"
        todo = (
            f"where PyTorch is, run `python preprocess.py --weights {path.name}`, and bring the .safetensors file here"
        )
        raise WeightsError(f"{what}: {todo}") from None
    from cldm.model import load_state_dict

    tensors = load_state_dict(path)
    wide = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in tensors.items()}
    arrays: dict[str, np.ndarray] = {name: t.detach().numpy() for name, t in wide.items()}
    Weights(arrays, str(path)).check(config)
    return tensors


def save(made: Path, tensors: dict[str, Tensor], digest: str, path: Path) -> None:
    """Write a .safetensors file, as readable as `path`, under a temporary name and rename it when it is whole."""
    from safetensors.torch import save_file

    storages: set[int] = set()
    alone = {}
    for name, tensor in tensors.items():  # the format knows no tensors that share memory
        place = tensor.untyped_storage().data_ptr()
        alone[name] = tensor.detach().clone() if place in storages else tensor.detach().contiguous()
        storages.add(place)
    temporary = made.with_name(f".{made.name}.partial")
    try:
        save_file(alone, temporary, {"format": "pt", SOURCE: digest})
        shutil.copymode(path, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, made)
    except SafetensorError as error:
        raise WeightsError(f"{made} could not be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
