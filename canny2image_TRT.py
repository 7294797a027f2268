"""The entry point of TensorRT Hackathon 2023: class `hackathon` with `initialize` and `process`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.pipeline import Canny2Image, usable
from runtime.schedule import Schedule

ENGINES = Path(__file__).resolve().parent / "engines"

log = logging.getLogger(__name__)


class hackathon:  # noqa: N801 (the competition's spelling)
    """Pictures along the edges of a picture: by TensorRT where there are a GPU and engines, else by PyTorch."""

    def initialize(
        self,
        model: str = "sd15",
        weights: Path | None = None,
        schedule: str = "hackathon-10",
        engines: Path = ENGINES,
    ) -> None:
        """Load the model ("sd15", "tiny" or a .yaml file), once.

        engines: an engine folder, or one that holds several; PyTorch takes `weights` instead. Raises
        FileNotFoundError where its weights are not there, ValueError where weights or engines do not fit.
        """
        self.schedule = schedule
        self.pipeline = Canny2Image(engines, schedule, model=model) if usable(engines) else None
        if self.pipeline is None:
            import torch

            from cldm.canny2image import load_model

            device = "cuda" if torch.cuda.is_available() else "cpu"
            self.model = load_model(model, weights, device)
            what = "TensorRT is not used (no GPU, or no engines in %s): PyTorch on %s makes the pictures."
            log.warning(what, engines, device)

    def process(
        self, input_image: NDArray[np.uint8], prompt: str, a_prompt: str, n_prompt: str, num_samples: int,
        image_resolution: int, ddim_steps: int, *rest: Any, **named: Any,
    ) -> list[NDArray[np.uint8]]:  # fmt: skip
        """`num_samples` pictures (H, W, 3) uint8; the arguments are those of `runtime.Canny2Image.process`."""
        makes: Any = self.pipeline
        if makes is None:
            from cldm.canny2image import Staged

            makes = Staged(self.model, Schedule.parse(self.schedule, ddim_steps))
        given = (input_image, prompt, a_prompt, n_prompt, num_samples, image_resolution, ddim_steps, *rest)
        pictures: list[NDArray[np.uint8]] = makes.process(*given, **named)
        return pictures
