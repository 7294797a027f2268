"""bench.step: which kernels, in which order, and what they are given. Times are taken on a GPU."""

import ctypes
import importlib
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from bench.attention import attentions
from bench.conv import convolutions, is_ours
from bench.group_norm import norms
from bench.step import MAP, OURS, STAGES, Kernel, Memory, kernels, launches
from plugins.call import Attention, GroupNorm
from plugins.conv_calls import Conv
from plugins.cross_calls import Cross, scores, values
from plugins.end_calls import First, Last
from plugins.token_calls import JoinNorm
from runtime.memory import aligned
from trt_builder.config import ModelConfig, Shape

SHAPE = Shape(256, 384, 1)
CONFIG = ModelConfig.load("sd15")


@pytest.fixture(scope="module")
def stages() -> dict[str, list[Kernel]]:
    return kernels(CONFIG, SHAPE)


def test_every_convolution_and_attention_of_a_step_is_there(stages: dict[str, list[Kernel]]) -> None:
    made = [one for some in stages.values() for one in some]
    ours = {one: count for one, count in convolutions(CONFIG, SHAPE, OURS).items() if is_ours(one, OURS)}
    assert Counter(one for one in made if isinstance(one, Conv)) == ours
    over_itself = Counter({one: count for one, count in attentions(CONFIG, SHAPE).items() if one.joined})
    assert Counter(one for one in made if isinstance(one, Attention)) == over_itself
    assert sum(isinstance(one, Cross) for one in made) == 2 * over_itself.total()


def test_every_group_norm_is_there(stages: dict[str, list[Kernel]]) -> None:
    expected = norms(CONFIG, SHAPE)
    for stage in STAGES:
        made = [one.norm if isinstance(one, JoinNorm) else one for one in stages[stage]]
        sizes = Counter((one.batch, one.channels, one.moved) for one in made if isinstance(one, GroupNorm))
        wanted = Counter((one.batch, one.channels, one.moved) for one in expected[stage].elements())
        assert sizes == wanted, stage


def test_kernels_follow_each_other_as_in_the_networks(stages: dict[str, list[Kernel]]) -> None:
    """The first ResBlock and transformer of the UNet: each reads as many channels as the one before it made."""
    first, *rest = stages["unet_encoder"]
    res, transformer = rest[:4], rest[4:14]
    assert first == First(1, 4, 32, 48, 320, repeat=2)
    names = [type(one).__name__ for one in (*res, *transformer)]
    assert names[:4] == ["GroupNorm", "Conv", "GroupNorm", "Conv"]
    of_transformer = ["GroupNorm", "Conv", "Conv", "Attention", "Conv", "Cross", "Cross", "Conv", "Conv", "GroupNorm"]
    assert names[4:] == of_transformer
    qkv, over_itself = transformer[2:4]
    assert isinstance(qkv, Conv) and isinstance(over_itself, Attention)
    assert qkv.filters == 3 * over_itself.channels and over_itself.joined


def test_the_ends_of_a_step(stages: dict[str, list[Kernel]]) -> None:
    """ControlNet's first output reads both halves of the batch; the last one is of the UNet's own first width."""
    first, output = stages["control"][:2]
    assert first == First(1, 4, 32, 48, 320, hint_batch=1, repeat=2)
    assert isinstance(output, Conv) and (output.batch, output.size, output.filters) == (2, 1, 320)
    assert stages["unet_decoder"][-1] == Last(1, 320, 32, 48)
    assert sum(isinstance(one, First | Last) for some in stages.values() for one in some) == 3


def test_what_each_is_given(stages: dict[str, list[Kernel]]) -> None:
    """Every address that a kernel wants, maps in turn, weights one after the other, and maps that have room."""
    used: list[Conv] = []

    def weights(one: Conv) -> int:
        used.append(one)
        return 1 << 20

    memory: Any = SimpleNamespace(maps=[[1 << 30, 2 << 30, 3 << 30]] * 2, floats=1 << 10, weights=weights)
    functions = dict.fromkeys(
        (f"canny_{name}" for name in ("conv", "attention", "join_norm", "group_norm", "first", "last")), lambda *_: 0
    )
    library: Any = SimpleNamespace(**functions, canny_max_cluster=lambda: 8)
    for i, stage in enumerate(STAGES):
        made = launches(library, stages[stage], memory, i % 2, beside=i < 2)
        assert len(made) == len(stages[stage])
        for n, (one, launch) in enumerate(zip(stages[stage], made, strict=True)):
            call: Any = launch.call
            assert getattr(call, "e" if isinstance(one, Last) else "y") == (2 << 30 if n % 2 == 0 else 1 << 30)
            pointers = {name for name, kind in call._fields_ if kind is ctypes.c_void_p}
            missing = {name for name in pointers if not getattr(call, name)}
            if isinstance(one, Conv):
                unwanted = {"residual": not one.residual_batch, "second": not one.second, "weight_sums": not one.norm}
                assert missing == {name for name, gone in unwanted.items() if gone}
                assert call.beside == (i < 2) and 2 * one.rows * max(one.channels, one.filters) < MAP
            elif isinstance(one, JoinNorm):
                assert missing == {"x_residual", "x_scales"} and one.norm.moved // 2 < MAP // 4
            elif isinstance(one, First):
                assert missing == (set() if one.hint_batch else {"hint"})
            elif isinstance(one, Last):
                assert missing == {"kept"}
            elif isinstance(one, GroupNorm):
                assert missing == (set() if one.row_batch else {"row"})
            else:
                assert not missing
            launch(0)
    assert used == [one for stage in STAGES for one in stages[stage] if isinstance(one, Conv)]


def test_both_halves_of_a_cross_attention_read_one_text() -> None:
    memory = Memory.__new__(Memory)
    memory._weights, memory._used, memory._last = 1 << 20, 0, 0
    plain, first, second = Conv(2, 64, 4, 6, 64), scores(2, 320, 4, 6, 8, 1), values(2, 320, 4, 6, 8, 1)
    at = [memory.weights(one) for one in (plain, first, second, plain)]
    assert at[1] == at[2] == at[0] + plain.weights and at[3] == at[1] + aligned(first.weights)


@pytest.mark.parametrize("name", ["attention", "conv", "group_norm", "step"])
def test_without_a_gpu_a_bench_says_so(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.group_norm.gpu", lambda: None)
    assert importlib.import_module(f"bench.{name}").main([]) == 2
    said = capsys.readouterr().err
    assert said == f"bench.{name}: kernels are measured on an NVIDIA GPU, and cuda-python sees none here.\n"
