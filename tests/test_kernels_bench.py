"""bench.kernels without a GPU: made-up records, and a CUPTI whose kernels are the simulator's stages."""

import json
import sys
from types import SimpleNamespace

import pytest
from simulated import cuda, engines, model  # noqa: F401

from bench import kernels as bench
from bench.ours import WARM_UP
from runtime.engine import Gpu

NOW = 1_763_668_800_123_456_789  # nanoseconds since 1970, of which a double holds every 256th


class Refused(Exception):
    """What cupti-python raises where libcupti says no."""


class FakeCupti:
    """What is called of cupti-python: each stage that a graph ran is a kernel of 10 µs, all one after the other."""

    ActivityKind = SimpleNamespace(CONCURRENT_KERNEL=10)
    cuptiError = Refused

    def __init__(self, cuda):
        self.cuda = cuda

    def activity_register_callbacks(self, requested, completed):
        assert requested() == (8 << 20, 0)
        self.completed = completed

    def activity_enable(self, kind):
        assert kind == 10
        self.enabled, self.graphs = len(self.cuda.done), len(self.cuda.executables)

    def activity_flush_all(self, flag):
        assert flag == 1 and len(self.cuda.executables) == self.graphs + 1, "the graph is still there"
        launches = {}
        for done in self.cuda.done[self.enabled :]:
            stream, _, launch = done.stream.partition("@")
            launches.setdefault(int(launch), []).append((done.name, int(stream.removeprefix("stream"))))
        made = [
            activity(launch, node, NOW + 10_000 * node, NOW + 10_000 * (node + 1), name, stream)
            for launch, stages in launches.items()
            for node, (name, stream) in enumerate(stages, 1)
        ]
        self.completed(reversed(made))
        for one in made:
            vars(one).clear()  # CUPTI has its buffer back


def activity(launch, node, begin, end, name, stream):
    """A record as cupti-python has it."""
    return SimpleNamespace(
        correlation_id=launch, graph_node_id=node, start=begin, end=end, name=name, grid_x=4, grid_y=3, grid_z=2,
        block_x=128, block_y=1, block_z=1, cluster_x=2, registers_per_thread=40, dynamic_shared_memory=1000,
        static_shared_memory=24, stream_id=stream, graph_id=1,
    )  # fmt: skip


def kernel(launch, node, begin, end, name="_ZN5canny3addE"):
    return bench.record_of(activity(launch, node, begin, end, name, 7))


@pytest.fixture
def cupti(monkeypatch, cuda):
    """cupti-python, and a GPU to name."""
    made = FakeCupti(cuda)
    monkeypatch.setitem(sys.modules, "cupti", SimpleNamespace(cupti=made))
    monkeypatch.setattr("bench.kernels.gpu", lambda: Gpu("fake", "9.0"))
    return made


def test_three_stages_a_step_are_recorded_and_shown(cupti, engines, tmp_path, capsys):
    output = tmp_path / "kernels.json"
    assert bench.main([str(engines / "tiny-64x64-n1-fp32"), "--runs", "3", "--output", str(output)]) == 0
    content = json.loads(output.read_text())
    rows = content.pop("rows")
    assert content == {"gpu": "fake", "engines": "tiny-64x64-n1-fp32", "launches": 3, "traced_ms": 0.25 / 3}
    assert [row["name"] for row in rows] == 3 * ["control", "unet_encoder", "unet_decoder"]
    assert rows[0]["stream"] == rows[2]["stream"] != rows[1]["stream"]
    assert rows[4] == rows[1] | {"node": 5, "begin": 40.0, "end": 50.0}
    facts = {"node": 2, "grid": [4, 3, 2], "threads": 128, "cluster": 2, "registers": 40, "shared": 1024}
    assert rows[1] == rows[1] | facts
    said = capsys.readouterr().out
    assert "0.083 ms a step while recorded" in said and "Medians of 3 launches, of 3;" in said and str(output) in said
    lines = [line.replace("│", " ").replace("┃", " ").split() for line in said.splitlines()]
    assert ["unet_decoder", "1", "10.0", "10.0"] in lines and ["sum", "3", "30.0", "30.0"] in lines


def test_only_whole_launches_after_the_first_few_count():
    found = [kernel(100 + i, node, NOW, NOW + i) for i in range(WARM_UP + 4) for node in (30, 4, 200)]
    lost = found.pop(3 * (WARM_UP + 1))
    stray = kernel(WARM_UP + 200, 0, NOW, NOW + 1, "copy")
    made = bench.whole([stray, *reversed(found)])
    assert [one[0].launch for one in made] == [100 + WARM_UP + i for i in (0, 2, 3)] and lost.launch == 101 + WARM_UP
    assert all([one.node for one in kernels] == [4, 30, 200] for kernels in made)
    with pytest.raises(ValueError, match=f"none of {WARM_UP} launches, of which {WARM_UP} do not count: take more --r"):
        bench.whole(found[: 3 * WARM_UP])


def test_times_are_medians_since_the_launch_began_to_the_nanosecond():
    ends = (101, 103, 250)  # nanoseconds
    begun = [NOW, NOW + 1_000_003, NOW + 77_000_001]
    made = [
        [kernel(i, 1, begin + 7, begin + end), kernel(i, 2, begin, begin + 300 + end)]
        for i, (begin, end) in enumerate(zip(begun, ends, strict=True))
    ]
    first, second = bench.rows_of(made)
    assert (first["begin"], first["end"], second["begin"], second["end"]) == (0.007, 0.103, 0.0, 0.403)
    assert (first["node"], second["node"], first["name"], first["shared"]) == (1, 2, "_ZN5canny3addE", 1024)


def row(name, begin, end):
    return {"name": name, "begin": float(begin), "end": float(end)}


CONV, OTHER, LAST = "_ZN5canny4convILi2ELi128ELb1EEEvNS_8ConvWorkE", "beside", "_ZN5canny4lastE9CannyLast"


def three_steps():
    """Of 50 µs: two convolutions of which the second begins early, another kernel beside them, the last."""
    step = [(CONV, 1, 20), (CONV, 12, 35), (OTHER, 13, 30), (LAST, 34, 50)]
    return [row(name, begin + 50 * i, end + 50 * i) for i in range(3) for name, begin, end in step]


def test_exposed_times_of_the_middle_step_add_up_to_it():
    step = bench.middle_step(three_steps())
    assert [(one["name"], one["end"], one["exposed"]) for one in step] == [
        (CONV, 70, 20), (OTHER, 80, 10), (CONV, 85, 5), (LAST, 100, 15),
    ]  # fmt: skip
    assert bench.by_kind(step) == [
        {"kind": "conv<2,128,1>", "count": 2, "duration": 42, "exposed": 25},
        {"kind": "last", "count": 1, "duration": 16, "exposed": 15},
        {"kind": "beside", "count": 1, "duration": 17, "exposed": 10},
    ]


def test_steps_that_are_not_equal_are_refused():
    rows = three_steps()
    with pytest.raises(ValueError, match="the 11 kernels of a launch are not 3 equal steps"):
        bench.middle_step(rows[1:])
    with pytest.raises(ValueError, match="the 12 kernels"):
        bench.middle_step([row("first", 0, 1), *rows[1:]])


@pytest.mark.parametrize(
    "name, kind",
    [
        (CONV, "conv<2,128,1>"),
        (LAST, "last"),
        ("_ZN5canny10one_launchI6__halfLi4ELi2ENS_6ParamsEEEvT2_", "one_launch<4,2>"),
        ("_ZN5canny12_GLOBAL__N_14normILi3EEEvNS_1WE", "norm<3>"),
        ("_ZN15genericReformat16copyPackedKernelIdLb0EEEvT_", "genericReformat::copyPackedKernel"),
        ("_Z3topILi7EEvi", "top"),
        (
            "sm80_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize64x64x64_stage4_warpsize2x2x1_tensor16x8x16_kernel",
            "sm80_xmma_gemm_tilesize64x64x64_stage4",
        ),
        (
            "sm80_xmma_fprop_implicit_gemm_indexed_wo_smem_f16f16_f16f16_f16_tilesize128x32x16_stage1_warp4",
            "sm80_xmma_fprop_implicit_gemm_indexed_wo_smem_tilesize128x32x16_stage1",
        ),
        ("fmha_v2_flash_attention_fp16_S_40_sm90_kernel_nl", "fmha_v2_flash_attention_fp16_S_40_sm90_kernel_nl"),
    ],
)  # fmt: skip
def test_names_are_readable(name, kind):
    assert bench.kind_of(name) == kind


def test_what_was_recorded_is_kept_where_steps_differ(cupti, engines, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "rows_of", lambda made: [row("only", 0, 1)])
    output = tmp_path / "kernels.json"
    assert bench.main([str(engines / "tiny-64x64-n1-fp32"), "--runs", "1", "--output", str(output)]) == 2
    assert len(json.loads(output.read_text())["rows"]) == 1
    assert "bench.kernels: the 1 kernels of a launch are not 3 equal steps" in capsys.readouterr().err


def refuse(why):
    def call(*_):
        raise why

    return call


@pytest.mark.parametrize("why", [RuntimeError("Failed to dlopen libcupti"), Refused("ERROR_UNKNOWN (999)")], ids=repr)
def test_a_cupti_that_refuses_is_one_sentence(cupti, engines, tmp_path, capsys, monkeypatch, why):
    monkeypatch.setattr(cupti, "activity_enable", refuse(why))
    output = tmp_path / "kernels.json"
    assert bench.main([str(engines / "tiny-64x64-n1-fp32"), "--output", str(output)]) == 2
    said = capsys.readouterr().err
    assert f"bench.kernels: CUPTI does not record kernels here ({why}): run `pip install" in said
    assert said.count("\n") == 1 and not output.exists()


def test_without_cupti_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupti", None)
    assert bench.main([str(tmp_path), "--output", str(tmp_path / "kernels.json")]) == 2
    said = capsys.readouterr().err
    assert "NVIDIA's cupti-python" in said and "pip install cupti-python==13.0.1" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_no_runs_are_refused(tmp_path, capsys):
    assert bench.main([str(tmp_path), "--runs", "0"]) == 2
    assert capsys.readouterr().err == "bench.kernels: --runs is 0, but must be at least 1.\n"
