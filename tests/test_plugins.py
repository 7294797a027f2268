"""The GroupNorm plugin without a GPU: its kernels run in an emulator, its adapters and its build for real."""

import ctypes
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from plugins import build as building
from plugins import load as loading
from plugins.build import build, find_headers, find_nvcc
from plugins.call import GroupNorm, error, open_library, plan
from plugins.load import PluginError
from runtime.manifest import Manifest
from trt_builder.config import Options
from trt_builder.flavour import FlavourError, get_flavour

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
KERNELS = ROOT / "plugins" / "group_norm"
GUARD = 4096  # bytes before and after each array, which nothing may touch

UNET = [
    GroupNorm(batch, channels, *size, row_batch=row)
    for (channels, size), (batch, row) in itertools.product(
        [
            (320, (32, 48)), (640, (32, 48)), (960, (32, 48)), (320, (16, 24)), (640, (16, 24)), (960, (16, 24)),
            (1280, (16, 24)), (1920, (16, 24)), (640, (8, 12)), (1280, (8, 12)), (1920, (8, 12)), (2560, (8, 12)),
            (1280, (4, 6)), (2560, (4, 6)),
        ],
        [(2, 1), (1, 0)],
    )
]  # fmt: skip
VAE = [
    GroupNorm(1, channels, *size, epsilon=1e-6)
    for channels, size in [(512, (32, 48)), (512, (64, 96)), (512, (128, 192)), (256, (128, 192)), (128, (128, 192))]
]
LARGE = [GroupNorm(1, channels, 256, 384, epsilon=1e-6) for channels in (256, 128)]
ODD = [
    GroupNorm(2, 64, 8, 8), GroupNorm(1, 32, 5, 7), GroupNorm(2, 36, 5, 7, groups=4, row_batch=2),
    GroupNorm(2, 60, 5, 7, groups=6, row_batch=1), GroupNorm(3, 21, 5, 7, groups=7, silu=False),
    GroupNorm(1, 24, 1, 1, groups=3), GroupNorm(2, 330, 3, 3, groups=2), GroupNorm(1, 96, 64, 64, groups=32, row_batch=1),
]  # fmt: skip
FLOATS = [
    GroupNorm(2, 320, 16, 24, half=False), GroupNorm(1, 640, 32, 48, half=False, row_batch=1),
    GroupNorm(1, 256, 128, 192, half=False, epsilon=1e-6), GroupNorm(2, 64, 8, 8, half=False),
]  # fmt: skip
LINEAR = [
    GroupNorm(2, 320, 16, 24, half=half, channels_last=False, row_batch=row)
    for half, row in ((True, 2), (False, 0))
] + [
    GroupNorm(2, 1280, 4, 6, channels_last=False, silu=False), GroupNorm(2, 33, 5, 7, groups=3, channels_last=False, row_batch=1),
    GroupNorm(1, 32, 1, 1, channels_last=False, half=False, epsilon=0.1), GroupNorm(1, 128, 64, 96, channels_last=False),
]  # fmt: skip


def compile_emulator(folder: Path, kernels: Path = KERNELS, optimise: str = "-O2") -> Any:
    """The kernels for the CPU, as a library."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the emulator of the kernels with")
    library = folder / "libemulated.so"
    flags = f"-std=c++17 {optimise} -Wall -Werror -Wno-unknown-pragmas -U_FORTIFY_SOURCE -shared -fPIC".split()
    include = [f"-I{TESTS}", f"-I{kernels}"]
    command = [compiler, *flags, *include, str(TESTS / "group_norm_emulated.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return open_library(library)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compile_emulator(tmp_path_factory.mktemp("emulator"))


def emulate(
    library: Any, norm: GroupNorm, mean: float = 0.0, cluster: int = 8, force: int = 0, order: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """What the kernels make of random arrays, and what float64 does; everything else in memory stays as it was."""
    arrays = norm.arrays(mean)
    call = norm.call(cluster, force)
    stored = {name: norm.pack(array) if name == "x" else array for name, array in arrays.items()}
    stored["y"] = np.full_like(stored["x"], np.nan)
    stored["workspace"] = np.full(library.canny_group_norm_workspace(ctypes.byref(call)), 255, np.uint8)
    memory = {}
    for name, array in stored.items():
        memory[name] = held = np.full(array.nbytes + 2 * GUARD, 255, np.uint8)
        held[GUARD : GUARD + array.nbytes] = array.reshape(-1).view(np.uint8)
        setattr(call, name, held.ctypes.data + GUARD)
    before = {name: held.copy() for name, held in memory.items()}
    assert library.emulate_group_norm(ctypes.byref(call), order) == 0
    for name, held in memory.items():
        inside = slice(GUARD, -GUARD) if name in ("y", "workspace") else slice(0, 0)
        before[name][inside] = held[inside]
        np.testing.assert_array_equal(held, before[name], err_msg=f"{name} was written to where it must not be")
    y = memory["y"][GUARD:-GUARD].view(norm.dtype).reshape(norm.stored_shape)
    assert not norm.channels_last or (y[..., norm.channels :] == 0).all(), "the padding is not zero"
    return norm.unpack(y), norm.expected(arrays)


# -- the kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("norm", [*UNET, *VAE, *ODD], ids=str)
def test_half_precision_is_within_its_rounding(emulator: Any, norm: GroupNorm, mean: float) -> None:
    """The bar is 2e-3; rounding the result to half makes up to 4.9e-4 of the largest value."""
    assert error(*emulate(emulator, norm, mean)) < 5e-4


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("norm", FLOATS, ids=str)
def test_single_precision(emulator: Any, norm: GroupNorm, mean: float) -> None:
    assert error(*emulate(emulator, norm, mean)) < (2e-6 if mean == 0 else 2e-5)


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("norm", LINEAR, ids=str)
def test_maps_with_channels_first(emulator: Any, norm: GroupNorm, mean: float) -> None:
    assert error(*emulate(emulator, norm, mean)) < (5e-4 if norm.half else 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("norm", LARGE, ids=str)
def test_the_largest_maps(emulator: Any, norm: GroupNorm) -> None:
    assert error(*emulate(emulator, norm, 100.0)) < 5e-4


@pytest.mark.parametrize("force", [1, 2, 4, 8, -1])
@pytest.mark.parametrize("norm", [UNET[6], ODD[0], ODD[2], FLOATS[0]], ids=str)
def test_every_way_to_cut_a_map_gives_the_same(emulator: Any, norm: GroupNorm, force: int) -> None:
    cut = plan(emulator, norm.call(8, force))
    if cut.path == "none":
        assert force == 1 and norm.height * norm.width > 100, "only a map too large for one block has no plan"
        return
    assert cut.path == ("two launches" if force < 0 else "one launch")
    assert error(*emulate(emulator, norm, 100.0, force=force)) < 5e-4


@pytest.mark.parametrize("norm", [UNET[0], UNET[20], VAE[3], ODD[0], FLOATS[0], LINEAR[0]], ids=str)
def test_the_order_of_threads_changes_no_bit(emulator: Any, norm: GroupNorm) -> None:
    """Threads in another order between barriers: a result that depends on it lacks a barrier."""
    first, _ = emulate(emulator, norm)
    for order in (1, 2, 3):
        again, _ = emulate(emulator, norm, order=order)
        assert first.tobytes() == again.tobytes(), order


@pytest.mark.parametrize(
    ("find", "put"),
    [
        ("    thread.put(shared, records);\n    __syncthreads();", "    thread.put(shared, records);"),
        ("        cluster_arrive();\n        cluster_wait();", "        __syncthreads();"),
        ("c >= cut", "c > cut"),
        ("delta * delta * a.count * weight", "delta * delta * weight"),
        ("sum[c] = to_float(row.value[c]) * float(count);", "sum[c] = 0.f;"),
        ("if (wide < kWidth) data[v].clear(wide);", ""),
    ],
)
def test_the_emulator_finds_mistakes(tmp_path: Path, find: str, put: str) -> None:
    kernels = shutil.copytree(KERNELS, tmp_path / "kernels")
    found = 0
    for name in ("channels_last.cuh", "records.cuh"):
        text = (kernels / name).read_text()
        found += find in text
        (kernels / name).write_text(text.replace(find, put))
    assert found == 1, f"{find!r} is not in the kernels any more"
    library = compile_emulator(tmp_path, kernels, "-O1")
    bad = False
    for norm, order in ((UNET[6], 0), (UNET[6], 1), (ODD[2], 1)):
        try:
            bad |= not error(*emulate(library, norm, 100.0, order=order)) < 5e-4
        except AssertionError:
            bad = True
    assert bad


@pytest.mark.parametrize("norm", [*UNET, *VAE, *LARGE, *ODD, *FLOATS, *LINEAR], ids=str)
@pytest.mark.parametrize("cluster", [8, 1])
def test_plans_fit_a_gpu(emulator: Any, norm: GroupNorm, cluster: int) -> None:
    cut = plan(emulator, norm.call(cluster))
    assert cut.path != "none"
    assert cut.threads % 32 == 0 and 32 <= cut.threads <= 512 and cut.shared <= 48 << 10
    assert cut.path != "one launch" or (cut.grid[0] <= cluster and cut.held <= 6)


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 330}, {"groups": 0}, {"height": 0}, {"batch": 70_000}, {"row_batch": 3},
        {"half": False, "channels": 36, "groups": 4}, {"channels": 10_007 * 2, "groups": 2},
        {"height": 100_000, "width": 100_000},
    ],
)  # fmt: skip
def test_shapes_that_have_no_plan(emulator: Any, changes: dict[str, Any]) -> None:
    norm = GroupNorm(**({"batch": 2, "channels": 320, "height": 4, "width": 4} | changes))
    assert plan(emulator, norm.call(8)).path == "none"
    assert emulator.emulate_group_norm(ctypes.byref(norm.call(8)), 0) == 1


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


def test_a_manifest_keeps_the_plugins_that_plans_need(tmp_path: Path) -> None:
    needs = {"CannyGroupNorm": "a" * 64}
    Manifest("tiny", "tensorrt", "8.6.0", "H", "9.0", [], "random:0", "b" * 64, {}, {}, needs, folder=tmp_path).save()
    assert Manifest.load(tmp_path).plugins == needs


# -- TensorRT's side --------------------------------------------------------------------------------------------------


def test_tensorrt_rtx_has_no_plugins() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")
    flavour, own = get_flavour("tensorrt_rtx"), Options(group_norm="own")
    for action in (lambda: flavour.load_plugins(own), lambda: flavour.group_norm_plugin(320, 2, own)):
        with pytest.raises(FlavourError, match="TensorRT-RTX takes no plugins"):
            action()
    assert flavour.load_plugins(Options()) == {}


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
    yield build(request.param, ["90"], folder, out), folder
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
        "epsilon is nan", "silu is 7", "row is 2", "must be one number, given once",
    ):  # fmt: skip
        assert sentence in done.stdout, sentence


def test_the_library_runs_without_tensorrt(adapter: tuple[Path, Path]) -> None:
    """Every symbol is there, and its C functions plan as the emulator does."""
    library = open_library(adapter[0])
    assert plan(library, UNET[0].call(8)).grid == (8, 8, 2)
    assert library.canny_max_cluster() in (1, 8)


def test_the_command_says_what_it_did(adapter: tuple[Path, Path]) -> None:
    library, headers = adapter
    flavour = "8.6" if library.stem.endswith("trt8") else "10+"
    arguments = [
        "build",
        "--flavour",
        flavour,
        "--arch",
        "sm90",
        "--include",
        str(headers),
        "--output",
        str(library.parent),
    ]
    done = subprocess.run([sys.executable, "-m", "plugins", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{library} fits already.\n")
    listed = [sys.executable, "-m", "plugins", "list", "--output", str(library.parent)]
    assert f"{library}: TensorRT" in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True).stdout
    done = subprocess.run([*listed[:3], "build", "--arch", "ninety"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'ninety' is no GPU architecture" in done.stderr
