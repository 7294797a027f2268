"""bench.step on a GPU: every kernel of ours in a step is launched, by a library twice."""

from pathlib import Path

import pytest

from bench.step import STAGES, measure
from plugins.build import build
from plugins.load import CONV_CAPABILITY, PluginError
from runtime.engine import gpu
from trt_builder.config import ModelConfig, Shape

HERE = gpu()
pytestmark = pytest.mark.skipif(
    HERE is None or HERE.capability != CONV_CAPABILITY, reason="cuda-python sees no GPU of compute capability 9.0"
)


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return build()
    except PluginError as why:
        pytest.skip(str(why))


def test_a_step_is_its_halves_and_two_streams_take_less_than_one(path: Path) -> None:
    rows = measure([path], ModelConfig.load("sd15"), Shape(256, 384, 1), rounds=2, replays=10)
    assert [row["library"] for row in rows] == [str(path)] * 2
    for row in rows:
        control, encoder, decoder = (row[stage] for stage in STAGES)
        assert max(control, encoder) < row["both"] < control + encoder
        assert abs(row["step"] / (row["both"] + decoder) - 1) < 0.1
