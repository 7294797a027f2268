"""The plugins without a GPU: their build, what was built, and the adapters as TensorRT calls them."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from plugins import build as building
from plugins import load as loading
from plugins.build import build, find_headers, find_nvcc
from plugins.call import GroupNorm, open_library, plan
from plugins.conv_calls import Conv, ConvPlan
from plugins.load import PluginError
from runtime.manifest import Manifest
from trt_builder.config import Options
from trt_builder.flavour import Flavour, FlavourError, get_flavour

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

# -- the build --------------------------------------------------------------------------------------------------------


def refused(action: Callable[[], Any]) -> str:
    with pytest.raises(PluginError) as caught:
        action()
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text
    return text


@pytest.fixture
def headers(tmp_path: Path) -> Path:
    """A folder that passes for TensorRT 8.6's headers."""
    folder = tmp_path / "include"
    folder.mkdir()
    numbers = (("MAJOR", 8), ("MINOR", 6), ("PATCH", 1))
    (folder / "NvInferVersion.h").write_text("".join(f"#define NV_TENSORRT_{name} {n} //!<\n" for name, n in numbers))
    (folder / "NvInferRuntime.h").write_text("")
    return folder


def nvcc(folder: Path) -> Path:
    """A program that answers as nvcc does and compiles nothing."""
    path = folder / "nvcc"
    path.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "release 12.8, V12" || printf "compute_80\\ncompute_90\\n"\n'
    )
    path.chmod(0o755)
    return path


def test_what_is_missing_is_one_sentence(tmp_path: Path, headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "lib"
    assert "there is no flavour '9'" in refused(lambda: build("9"))
    assert "write compute capability 9.0 as 90" in refused(lambda: build(architectures=["9.0"]))
    assert f"{tmp_path} has no NvInferRuntime.h" in refused(lambda: build(include=tmp_path))
    sentence = refused(lambda: build("10+", include=headers))
    assert "the headers of TensorRT 10+" in sentence and f"those in {headers} are of 8.6.1" in sentence
    monkeypatch.setattr(building, "header_folders", lambda: iter([tmp_path / "none"]))
    assert "or set TENSORRT_ROOT" in refused(lambda: build("8.6"))
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(building.os, "access", lambda path, mode: Path(path).is_file() and "usr" not in str(path))
    assert "nvcc was not found: install the CUDA toolkit" in refused(lambda: build(include=headers))
    monkeypatch.setenv("CUDACXX", str(nvcc(tmp_path)))
    assert "knows no architecture 120: it knows 80, 90" in refused(
        lambda: build(include=headers, architectures=["120"], output=out)
    )
    monkeypatch.setattr(building.sys, "executable", str(tmp_path / "python"))
    assert "cmake was not found: pip install cmake" in refused(
        lambda: build(include=headers, architectures=["90"], output=out)
    )
    assert not list(out.glob("lib*")) and not list(out.glob(".build-*"))


def test_headers_are_looked_for_where_they_are_said_to_be(headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_INCLUDE", str(headers))
    assert find_headers("8.6", None) == (headers, "8.6.1")
    monkeypatch.delenv("TENSORRT_INCLUDE")
    monkeypatch.setenv("TENSORRT_ROOT", str(headers.parent))
    assert find_headers("8.6", None) == (headers, "8.6.1")
    text = (headers / "NvInferVersion.h").read_text()
    newer = text.replace("NV_TENSORRT_MAJOR 8", "TRT_MAJOR_ENTERPRISE 11").replace("NV_TENSORRT_", "TRT_")
    newer = newer.replace("TRT_MINOR", "TRT_MINOR_ENTERPRISE").replace("TRT_PATCH", "TRT_PATCH_ENTERPRISE")
    (headers / "NvInferVersion.h").write_text(newer + "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE\n")
    assert find_headers("10+", headers) == (headers, "11.6.1")


# -- what was built ---------------------------------------------------------------------------------------------------


@pytest.fixture
def lib(tmp_path: Path) -> Path:
    """A folder with a library for TensorRT 8 that is none, but whose notes vouch for it."""
    path = loading.library_path(8, tmp_path)
    path.write_bytes(b"library")
    digest = loading.hashlib.sha256(b"library").hexdigest()
    loading.Library("8.6.0", ["90"], loading.source_hash(), "13.0", digest).save(path.with_suffix(".json"))
    return tmp_path


def registry(taken: list[str] | None) -> SimpleNamespace:
    """A TensorRT 8.6.0 that takes libraries, or does not."""

    def load_library(path: str) -> bool:
        if taken is not None:
            taken.append(path)
        return taken is not None

    return SimpleNamespace(
        __version__="8.6.0", get_plugin_registry=lambda: SimpleNamespace(load_library=load_library)
    )  # fmt: skip


def test_a_library_is_loaded_once(lib: Path) -> None:
    taken: list[str] = []
    source = loading.load(registry(taken), lib).source
    loading.require({"CannyGroupNorm": source}, registry(taken), lib)
    loading.require({}, registry(None), lib / "nothing")
    assert taken == [str(lib / "libcanny_plugins_trt8.so")]
    assert "build again" not in refused(lambda: loading.require({"CannyGroupNorm": "0" * 64}, registry(taken), lib))
    assert "the plugin Attention, which is not among those here" in refused(
        lambda: loading.require({"Attention": source}, registry(taken), lib)
    )


def test_a_library_that_does_not_fit_is_refused(lib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = refused(lambda: loading.find("11.1.0", lib))
    assert "no plugins for TensorRT 11.1.0" in sentence and "--flavour 10+" in sentence
    assert "does not take the plugins" in refused(lambda: loading.load(registry(None), lib))
    path = loading.library_path(8, lib)
    notes = path.with_suffix(".json")
    monkeypatch.setattr(loading, "source_hash", lambda: "0" * 64)
    assert "built from other sources" in refused(lambda: loading.find("8.6.0", lib))
    path.write_bytes(b"Library")
    assert "changed after they were built" in refused(lambda: loading.find("8.6.0", lib))
    notes.write_text(json.dumps({"tensorrt": "8.6.0"}))
    assert "not what a build wrote" in refused(lambda: loading.find("8.6.0", lib))
    notes.write_text("{")
    assert "cannot be read" in refused(lambda: loading.find("8.6.0", lib))


def test_a_library_that_fits_needs_no_compiler(lib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "installed_version", lambda: "8.6.0.12")
    monkeypatch.setattr(building, "gpu_architecture", lambda: ["90"])
    monkeypatch.setattr(building, "find_nvcc", lambda: pytest.fail("it asked for a compiler"))
    monkeypatch.setattr(building, "header_folders", lambda: iter(()))
    assert build(output=lib) == loading.library_path(8, lib)
    monkeypatch.setattr(building, "gpu_architecture", lambda: ["120"])
    assert "the headers of TensorRT 8.6" in refused(lambda: build(output=lib))


def test_a_manifest_keeps_the_plugins_that_plans_need(tmp_path: Path) -> None:
    needs = {"CannyGroupNorm": "a" * 64}
    size = {"height": 64, "width": 64, "samples": 1, "steps": 20}
    Manifest("tiny", "tensorrt", "8.6.0", "H", "9.0", [], "random:0", "b" * 64, size, {}, needs, folder=tmp_path).save()
    assert Manifest.load(tmp_path).plugins == needs


# -- TensorRT's side --------------------------------------------------------------------------------------------------


def test_tensorrt_rtx_has_no_plugins() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")
    flavour, own = get_flavour("tensorrt_rtx"), Options(group_norm="own")
    for action in (lambda: flavour.load_plugins(own), lambda: flavour.group_norm_plugin(320, 2, own)):
        with pytest.raises(FlavourError, match="TensorRT-RTX takes no plugins"):
            action()
    assert flavour.load_plugins(Options()) == {}


def recording(strongly_typed: bool, creator: Any) -> Flavour:
    """A flavour whose TensorRT has this creator in its registry and builds nothing."""
    api = SimpleNamespace(
        __version__="11.0" if strongly_typed else "8.6.0",
        PluginField=lambda name, data, kind: (name, data.item(), data.dtype.name, kind),
        PluginFieldCollection=list,
        PluginFieldType=SimpleNamespace(INT32="int32", FLOAT32="float32"),
        TensorRTPhase=SimpleNamespace(BUILD="build"),
        get_plugin_registry=lambda: SimpleNamespace(
            **{"get_creator" if strongly_typed else "get_plugin_creator": lambda *asked: creator}
        ),
    )
    attention, normalization = None, "add_normalization"
    return Flavour(
        "tensorrt", api, (8, 6), strongly_typed, True, attention, True, normalization, False, False, False
    )  # fmt: skip


@pytest.mark.parametrize("strongly_typed", [False, True])
def test_the_builder_gives_the_plugin_its_fields(strongly_typed: bool) -> None:
    calls: list[Any] = []

    def create_plugin(*given: Any) -> str:
        calls.append(given)
        return "plugin"

    creator = SimpleNamespace(create_plugin=create_plugin)
    network = SimpleNamespace(
        add_plugin_v2=lambda inputs, plugin: ("v2", inputs, plugin),
        add_plugin_v3=lambda inputs, shapes, plugin: ("v3", inputs, plugin),
    )
    flavour = recording(strongly_typed, creator)
    assert flavour.group_norm_plugin(320, 99, Options(group_norm="own")) == "own"
    for inputs, row in ((["x", "scale", "bias"], 0), (["x", "scale", "bias", "row"], 1)):
        version, given = "v3" if strongly_typed else "v2", {"groups": 32, "silu": 1, "row": row, "epsilon": 1e-6}
        assert flavour.add_own(network, "CannyGroupNorm", inputs, "a/b", **given) == (version, inputs, "plugin")
        name, fields, *phase = calls[-1]
        assert name == "a/b" and phase == (["build"] if strongly_typed else [])
        assert all(dtype == kind for _, _, dtype, kind in fields)
        values = {field: value for field, value, _, _ in fields}
        assert values.pop("epsilon") == pytest.approx(1e-6)
        assert values == {"version": 1, "groups": 32, "silu": 1, "row": row}
    with pytest.raises(FlavourError, match="no plugin CannyGroupNorm: it was not loaded"):
        recording(strongly_typed, None).group_norm_plugin(320, 2, Options(group_norm="own"))


def test_what_our_attention_does_not_do_is_said(caplog: pytest.LogCaptureFixture) -> None:
    from trt_builder import plugin_layers

    plugin_layers._say_once.cache_clear()
    serves, own = recording(False, "creator").has_transformer_plugins, Options(attention="own")
    assert serves(40, own) and serves(64, own, causal=True) and serves(40, Options(attention="own", qkv="apart"))
    assert not caplog.text and not serves(40, Options("fp32", attention="own"))
    assert not serves(16, own) and "heads 16 wide is TensorRT's own" in caplog.text
    assert not serves(40, own, causal=True) and "40 wide under a causal mask is TensorRT's own" in caplog.text


def test_which_convolutions_are_the_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    flavour, own = recording(False, "creator"), Options(conv="own")

    def served(flavour: Flavour, positions: int, weight: tuple[int, ...], stride: int, options: Options) -> bool:
        shape = (2, weight[1], positions // 24 * stride, 12 * stride)
        return flavour.has_conv_plugin(shape, weight, stride, options)

    assert served(flavour, 48, (1280, 2560, 3, 3), 1, own)
    assert served(flavour, 48, (1280, 1280, 3, 3), 2, own)
    for rows, weight in ((3072, (320, 320, 3, 3)), (3072, (2560, 320, 1, 1)), (192, (10240, 1280, 1, 1))):
        assert served(flavour, rows, weight, 1, own)
    sides = (2, 320, 32, 48), (320, 320, 3, 3)
    assert [flavour.has_conv_plugin(*sides, 1, own, second) for second in (0, 640, 648)] == [True, True, False]
    assert not flavour.has_conv_plugin(*sides, 2, own, 640)
    for rows, weight, stride in (
        (3072, (384, 320, 3, 3), 1), (3072, (2624, 320, 1, 1), 1), (8016, (64, 64, 1, 1), 1),
        (48, (96, 1280, 3, 3), 1), (48, (1280, 4, 3, 3), 1), (48, (64, 64, 5, 5), 1), (48, (64, 64, 3, 3), 3),
    ):  # fmt: skip
        assert not served(flavour, rows, weight, stride, own)
    assert not served(flavour, 48, (1280, 1280, 3, 3), 1, Options())
    with pytest.raises(FlavourError, match="no plugin CannyConv: it was not loaded; use another --conv"):
        served(recording(False, None), 48, (1280, 1280, 3, 3), 1, own)
    library = SimpleNamespace(architectures=["80"], path="lib.so", source="0")
    monkeypatch.setattr("trt_builder.plugin_layers.gpu", lambda: None)
    monkeypatch.setattr("trt_builder.plugin_layers.load", lambda trt: library)
    with pytest.raises(FlavourError, match="lib.so has no convolutions of ours: they are for compute capability 9.0"):
        flavour.load_plugins(own)
    library.architectures.append("90")
    assert flavour.load_plugins(own) == {"CannyConv": "0"}
    monkeypatch.setattr("trt_builder.plugin_layers.gpu", lambda: SimpleNamespace(name="A100", capability="8.0"))
    with pytest.raises(FlavourError, match="A100 has no convolutions of ours"):
        flavour.load_plugins(own)


@pytest.fixture(scope="module", params=["8.6", "10+"])
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A compiled library and the headers that it was compiled with."""
    try:
        folder, version = find_headers(request.param, None)
        find_nvcc()
        building.find_tool("cmake", "pip install cmake")
    except PluginError as why:
        pytest.skip(str(why))
    out = tmp_path_factory.mktemp("lib")
    said: list[str] = []
    library = build(request.param, ["90"], folder, out, say=said.append)
    frames = re.findall(r"(\d+) bytes stack frame", "\n".join(said))
    assert len(frames) > 15 and set(frames) == {"0"}, "a kernel spills registers, or indexes them"
    assert "serialized" not in "".join(said), "products of a warpgroup wait for each other"
    yield library, folder
    assert not list(out.glob(".build-*")) and build(request.param, ["90"], folder, out).is_file()


def test_adapters_compile_and_do_what_tensorrt_asks(adapter: tuple[Path, Path], tmp_path: Path) -> None:
    """A program that calls the plugin as TensorRT does: formats, shapes, fields, serialising, what must be refused."""
    library, headers = adapter
    program = tmp_path / "probe"
    flags = ["-std=c++17", "-Xcompiler", "-Wno-deprecated-declarations", "-isystem", str(headers)]
    command = [str(find_nvcc()), *flags, str(TESTS / "plugin_probe.cpp"), "-ldl", "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program, library], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all as it must be"
    for sentence in (
        "it has no field colour", "the field epsilon is missing", "its fields are of version 2", "groups is 0",
        "epsilon is nan", "silu is 7", "row is 2", "must be one float, given once", "heads is 0", "joined is 3",
        "scale is -1", "CannyAttention: it has no field groups", "its heads are 120 wide", "Attention: causal is 2",
        "80 wide, but must be 64 where causal is 1", "causal is 1, but 77 queries have 76 keys",
        "k and v must have the shape (a multiple of 2, S, 640)", "must have the shape (B, 3 * heads * width, h, w)",
        "CannyLayerNorm: epsilon is 0.0", "CannyLayerNorm: the field epsilon is missing", "must have 320 numbers",
        "it has 4096 channels, at most 2048", "the shape (B, C, h, w), C a multiple of 16",
        "CannyAdd: its inputs must have one shape", "CannyJoin: scales must have the shape",
        "12, 2 or more)", "a residual must have the shape of", "x and skip must be of one", "CannyJoin: index is -1",
        "x_index is -2", "CannyJoinNorm: scale and bias must", "no kernel for 952 channels in 32 groups",
        "CannyFirst: x must have the shape (N, C, h, w), C up to", "CannyFirst: hint is 2", "CannyFirst: repeat is -1",
        "CannyFirst: repeat is 1, but must be 0, or 2 or more", "the weight must have the shape (D / 64, 36, 128)",
        "CannyFirst: the bias must have the shape (D), D a multiple of 8", "the hint must have the shape of the result",
        "CannyLast: x must have the shape (N, F, h, w), F up to", "CannyLast: cond is 2", "4 rows and a multiple of 8",
        "CannyLast: the weight must have the shape (9, 4, 320)", "CannyLast: the bias must have 4 numbers",
        "CannyLast: guidance must have the shape (1)", "CannyLast: e1, e2, noise and", "CannyLast: coefficients must",
        "CannyJoinNorm: groups is 0", "the field groups is missing",
        "CannyConv: size is 5", "CannyConv: stride is 3", "CannyConv: residual is 2", "CannyConv: norm is 2",
        "CannyConv: gate is 2", "gate is 1, but only convolutions of size 1 without a residual",
        "norm is 1, but only convolutions of size 1", "CannyConv: epsilon is 0.0",
        "the sums of the filters' weights must have the shape (320)", "S, 640), or be maps of 640 channels",
        "C a multiple of 64", "CannyConv: second is 2", "only convolutions of stride 1 without a LayerNorm",
        "CannyConv: up is 2", "only convolutions of size 3 and stride 1 without a residual or second map",
        "the weight must have the shape (4·D / 64, 8, 64, 64)",
        "the second map must have the shape (B, E, h, w), E a multiple of 64",
        "the weight must have the shape (D / 64, 18, 64, 64)", "the weight must have the shape (D / 64, 21, 64, 64)",
        "the residual must have the shape of the result", "CannyCross: its fields are of version 2",
        "CannyCross: values is 2", "CannyCross: beside is 3", "heads is 6, but must be a multiple of 4, up to 64",
        "heads is 68", "CannyCross: epsilon is -1.0", "CannyCross: epsilon is inf", "CannyCross: it has no field words",
        "CannyCross: the field epsilon is missing", "CannyCross: its first input must have the shape (B, C, h, w), C a",
        "CannyCross: the text must have the shape (B, P, 1, S), P at least 5128, S at most 80",
        "CannyCross: its first input must have 640 channels", "CannyCross: the bias must have the shape (C), C a",
        "CannyCross: the residual must have the shape of the result, or that of a part of the batch",
        "CannyCross: the text must have the batch of the words' weights",
        "CannyGroupNorm: its input 1 of 4 is empty, but no dimension may be 0", "CannyAttention: its input 1 of 3 is",
        "CannyConv: its input 4 of 4 is empty", "CannyCross: its input 1 of 2 is empty", "CannyCross: its input 4 of 4",
    ):  # fmt: skip
        assert sentence in done.stdout, sentence


def test_the_library_runs_without_tensorrt(adapter: tuple[Path, Path]) -> None:
    """Every symbol is there, and its C functions plan as the emulator does."""
    library = open_library(adapter[0])
    assert plan(library, GroupNorm(2, 320, 32, 48).call(8)).grid == (8, 8, 2)
    assert library.canny_max_cluster() in (1, 8)
    cut = Conv(2, 1280, 4, 6, 1280).plan(library)
    assert isinstance(cut, ConvPlan) and cut.high == 64 and cut.blocks > 66 and cut.shared < 227 << 10


def test_the_command_says_what_it_did(adapter: tuple[Path, Path]) -> None:
    library, headers = adapter
    flavour = "8.6" if library.stem.endswith("trt8") else "10+"
    arguments = ["build", *f"--flavour {flavour} --arch sm90 --include".split(), str(headers)]
    arguments += ["--output", str(library.parent)]
    done = subprocess.run([sys.executable, "-m", "plugins", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{library} fits already.\n")
    listed = [sys.executable, "-m", "plugins", "list", "--output", str(library.parent)]
    assert f"{library}: TensorRT" in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True).stdout
    done = subprocess.run([*listed[:3], "build", "--arch", "ninety"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'ninety' is no GPU architecture" in done.stderr
