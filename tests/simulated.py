"""The TensorRT pipeline on the CUDA simulator: its fixtures, and the pictures to expect of it."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_simulator import Cuda
from fake_tensorrt import FakeFlavour, write_engines

from cldm.canny2image import Staged
from cldm.model import create_model
from runtime.engine import Gpu
from runtime.images import read_image
from runtime.schedule import Schedule
from trt_builder.config import Shape

ROOT = Path(__file__).resolve().parents[1]
TIMESTEPS = 7  # fewer than either schedule has: the rows come in several parts
USUAL = {
    "input_image": read_image(ROOT / "pictures/owl.png"),
    "prompt": "an owl", "a_prompt": "sharp", "n_prompt": "blurred",
    "num_samples": 1, "image_resolution": 64, "ddim_steps": 20, "guess_mode": False, "strength": 1.0, "scale": 7.5,
    "seed": 5, "eta": 0.0, "low_threshold": 100, "high_threshold": 200,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """The tiny model with random weights, none of them zero, so that every path is seen."""
    torch.manual_seed(1)
    made = create_model(ROOT / "models/tiny/tiny.yaml").requires_grad_(False)
    for p in made.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return made


@pytest.fixture(scope="module")
def engines(model, tmp_path_factory):
    """Folders of fake plans for one sample and for two, feature maps channels-last as the real ones are."""
    folder = tmp_path_factory.mktemp("engines")
    for samples in (1, 2):
        write_engines(folder / f"tiny-64x64-n{samples}-fp32", model, Shape(64, 64, samples, TIMESTEPS))
    return folder


@pytest.fixture
def cuda(monkeypatch, model):
    """The simulator in place of CUDA and TensorRT; at the end nothing may be left."""
    made = Cuda()
    for module in ("engine", "memory"):
        monkeypatch.setattr(f"runtime.{module}.cuda_runtime", lambda: made)
    for module in ("engine", "pipeline"):
        monkeypatch.setattr(f"runtime.{module}.gpu", lambda: Gpu("fake", "9.0"))
    monkeypatch.setattr("trt_builder.flavour.get_flavour", lambda name: FakeFlavour(made, model))
    yield made
    gc.collect()
    assert made.leaks() == {}


class Dense(Staged):
    """`Staged` with tensors dense between stages and as many timesteps at once as the engine embeds, as engines see
    them: in PyTorch both move the last bits.
    """

    def stage(self, name, inputs):
        inputs = {key: tensor.contiguous() for key, tensor in inputs.items()}
        if name != "time":
            return super().stage(name, inputs)
        parts = []
        for part in inputs["timesteps"].split(TIMESTEPS):
            whole = torch.cat([part, part[-1:].expand(TIMESTEPS - len(part))])
            rows = super().stage(name, {"timesteps": whole})
            parts.append({key: tensor[: len(part)] for key, tensor in rows.items()})
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def staged(model, schedule="hackathon-10", kind=Dense, **changes):
    return kind(model, Schedule.parse(schedule, 20)).process(**USUAL | changes)


def assert_same(pictures, expected):
    assert len(pictures) == len(expected)
    for picture, other in zip(pictures, expected, strict=True):
        assert picture.shape == other.shape and picture.dtype == np.uint8 and picture.std() > 10
        np.testing.assert_array_equal(picture, other)
