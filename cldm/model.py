"""Models from a yaml, weights from a file."""

from __future__ import annotations

import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file
from torch import Tensor, nn
from yaml import YAMLError

from cldm.cldm import ControlLDM, ControlledUnetModel, ControlNet, WeightsError
from ldm.autoencoder import AutoencoderKL
from ldm.clip import FrozenCLIPEmbedder

# A yaml names classes by their last component, so the ControlNet repository's own yaml works as it is; only these
# are ever built.
CLASSES: dict[str, type[nn.Module]] = {
    c.__name__: c for c in (ControlLDM, ControlledUnetModel, ControlNet, AutoencoderKL, FrozenCLIPEmbedder)
}

# Keys of the original yaml that concern training or choose what this project always does.
IGNORED = {
    "ControlLDM": {"num_timesteps_cond", "log_every_t", "first_stage_key", "cond_stage_key", "control_key",
                   "image_size", "channels", "cond_stage_trainable", "conditioning_key", "monitor", "use_ema"},
    "ControlNet": {"image_size", "use_checkpoint", "legacy", "use_spatial_transformer"},
    "ControlledUnetModel": {"image_size", "use_checkpoint", "legacy", "use_spatial_transformer"},
    "AutoencoderKL": {"monitor", "lossconfig"},
    "FrozenCLIPEmbedder": set(),
}  # fmt: skip

PARTS = {"control_stage_config": "control_model", "unet_config": "unet", "first_stage_config": "first_stage",
         "cond_stage_config": "cond_stage"}  # fmt: skip


def instantiate(config: dict[str, Any], where: str) -> nn.Module:
    """Build the class that a yaml node names with its parameters; raises ValueError for what it does not know."""
    name = str(config.get("target", "")).rpartition(".")[2]
    if name not in CLASSES:
        raise ValueError(f"{where}: unknown target {config.get('target')!r}; known are {', '.join(CLASSES)}")
    params = {k: v for k, v in (config.get("params") or {}).items() if k not in IGNORED[name]}
    for key in [k for k in params if k in PARTS]:
        params[PARTS[key]] = instantiate(params.pop(key), f"{where}.{key}")
    try:
        inspect.signature(CLASSES[name]).bind(**params)
    except TypeError as error:
        raise ValueError(f"{where}: {name}: {error}") from None
    return CLASSES[name](**params)


def create_model(config_path: str | Path, device: str | torch.device = "cpu") -> ControlLDM:
    """The model that a yaml describes, with fresh weights on `device` ("meta" takes no memory).

    Raises FileNotFoundError, or ValueError where the yaml names something unknown.
    """
    if not Path(config_path).is_file():
        raise FileNotFoundError(f"there is no model description {config_path}")
    try:
        config = OmegaConf.to_container(OmegaConf.load(config_path), resolve=True)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{config_path} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f"{config_path}: no `model` at its top level")
    with torch.device(device):
        model = instantiate(config["model"], str(config_path))
    if not isinstance(model, ControlLDM):
        raise ValueError(f"{config_path}: the model's target must be ControlLDM, not {type(model).__name__}")
    return model.eval()


def refused(error: Exception) -> str:
    """What an unpickler would not load; its own text advises to load it all the same."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"it asks for {named[1]}" if named else "it is no pickle of tensors"


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind where it has none."""
    return str(error).partition("\n")[0] or type(error).__name__


def load_state_dict(ckpt_path: str | Path, location: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Weights by name from a .safetensors, .pth or .ckpt file; nothing but tensors is ever unpickled.

    Raises FileNotFoundError, or WeightsError where the file cannot be read as weights, and naming the first ten that
    hold NaN or infinity: a picture made of those is black.
    """
    path = Path(ckpt_path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}")
    weights: Any
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path, device=str(location))
        else:
            weights = torch.load(path, map_location=location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is damaged or holds more than weights, and loading it could run code ({refused(error)}): use a "
            ".safetensors file"
        ) from None
    except Exception as error:  # what a damaged pickle makes torch raise: IndexError, AssertionError, MemoryError, …
        raise WeightsError(f"{path} cannot be read as weights: {first_line(error)}") from None
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise WeightsError(f"{path} holds no dictionary of tensors")
    infinite = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if infinite:
        named = f"{', '.join(infinite[:10])}{', …' if len(infinite) > 10 else ''}"
        raise WeightsError(f"{path} has {len(infinite)} weights with NaN or infinity: {named}")
    return weights
