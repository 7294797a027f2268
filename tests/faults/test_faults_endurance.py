"""Many pictures in a row by one pipeline: no growth in memory, every number finite."""

import os
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from cldm.canny2image import Staged, load_model  # noqa: E402
from cldm.stages import Tensors  # noqa: E402
from runtime.images import read_image  # noqa: E402
from runtime.schedule import Schedule  # noqa: E402

PICTURES = sorted((Path(__file__).resolve().parents[2] / "pictures").glob("*.png"))


class Watched(Staged):
    """The staged pipeline; every output of every stage is looked at."""

    def stage(self, name: str, inputs: Tensors) -> Tensors:
        outputs = super().stage(name, inputs)
        for tensor, value in outputs.items():
            assert torch.isfinite(value).all(), f"{name}.{tensor} is not finite"
        return outputs


def resident() -> float:
    """Megabytes of memory that this process holds."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        pytest.skip("memory is measured by /proc, which this system lacks")
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def grows(count: int, warm: int) -> tuple[float, float]:
    """Make `count` pictures; the growth in kilobytes a picture after the first `warm`, by least squares, and in all."""
    pipeline = Watched(load_model("tiny"), Schedule.parse("19,9", 20))
    inputs = [read_image(path) for path in PICTURES]
    held = []
    for number in range(count):
        (picture,) = pipeline.process(
            inputs[number % len(inputs)], f"bird number {number}", "best quality", "lowres", 1, 64, 20,
            number % 3 == 0, 1.0, 9.0, number, number % 2 * 0.5, 100, 200,
        )  # fmt: skip
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8 and picture.std() > 1
        held.append(resident())
    rest = np.array(held[warm:])
    return 1000 * float(np.polyfit(np.arange(len(rest)), rest, 1)[0]), float(rest[-1] - rest[0])


def test_100_pictures_in_a_row(tally):
    endure(tally, 100, 40, 60.0)


@pytest.mark.slow
def test_1000_pictures_in_a_row(tally):
    endure(tally, 1000, 200, 5.0)


def endure(tally, count: int, warm: int, most: float) -> None:
    """Make the pictures; memory may grow by `most` kilobytes a picture, a hundredth of what one picture takes."""
    one = tally(f"{count} pictures in a row")
    one.injected += count
    slope, growth = grows(count, warm)
    said = f"all finite; memory from picture {warm} on: {growth:+.1f} MB in all, {slope:+.2f} kB a picture"
    assert slope < most and growth < 10, said
    one.survived += count
    one.said[said] += 1
