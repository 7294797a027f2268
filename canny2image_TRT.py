"""The entry point of TensorRT Hackathon 2023: class `hackathon` with `initialize` and `process`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cldm.canny2image import Staged, load_model
from runtime.schedule import Schedule

log = logging.getLogger(__name__)


class hackathon:  # noqa: N801 (the competition's spelling)
    """Pictures along the edges of a picture, by the fastest backend of this version."""

    def initialize(self, model: str = "sd15", weights: Path | None = None, schedule: str = "hackathon-10") -> None:
        """Load the model ("sd15", "tiny" or a .yaml file), once.

        Raises FileNotFoundError where its weights are not there, ValueError where they do not fit.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.schedule = load_model(model, weights, device), schedule
        log.warning("TensorRT is not in this version: PyTorch on %s makes the pictures.", device)

    def process(
        self, input_image: NDArray[np.uint8], prompt: str, a_prompt: str, n_prompt: str, num_samples: int,
        image_resolution: int, ddim_steps: int, *rest: Any, **named: Any,
    ) -> list[NDArray[np.uint8]]:  # fmt: skip
        """`num_samples` pictures (H, W, 3) uint8; the arguments are those of `cldm.canny2image.Reference.process`."""
        staged = Staged(self.model, Schedule.parse(self.schedule, ddim_steps))
        return staged.process(
            input_image, prompt, a_prompt, n_prompt, num_samples, image_resolution, ddim_steps, *rest, **named
        )
