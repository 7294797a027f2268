"""Compiles the plugins with nvcc and CMake for one TensorRT, or says in one sentence what is missing."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock

from plugins.load import FOLDER, LIB, Library, PluginError, find, library_path, source_hash

FLAVOURS = ("8.6", "10+")
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")  # of the presets
HEADER = "NvInferRuntime.h"
LAST_WORDS = 15  # lines of a compiler's complaint


def build(
    flavour: str | None = None,
    architectures: Sequence[str] = (),
    include: Path | None = None,
    output: Path = LIB,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Compile the plugins for a TensorRT, unless the library that is there fits; returns the library.

    flavour: "8.6" or "10+"; by default that of the TensorRT in this interpreter, else that of the headers.
    architectures: compute capabilities as "90"; by default the GPU's, without one all that nvcc knows.
    include: the folder of TensorRT's headers. say: takes what is done, and the compiler's words.
    Raises PluginError where nvcc, CMake, a C++ compiler or the headers are missing or the compiler fails, and OSError.
    """
    if flavour is not None and flavour not in FLAVOURS:
        raise PluginError(f"there is no flavour {flavour!r}: take one of {', '.join(FLAVOURS)}.")
    wrong = [name for name in architectures if not re.fullmatch(r"\d{2,3}[af]?", name)]
    if wrong:
        raise PluginError(f"{wrong[0]!r} is no GPU architecture: write compute capability 9.0 as 90.")
    installed = ".".join(installed_version().split(".")[:3])
    here = list(architectures) or gpu_architecture()
    if installed and here and not (force or include) and flavour in (None, flavour_of(installed)):
        if fits(installed, here, output):  # which needs no compiler
            path = library_path(int(installed.partition(".")[0]), output)
            say(f"{path} fits already.")
            return path
    headers, version = find_headers(flavour, include)
    nvcc = find_nvcc()
    cuda, known = ask_nvcc(nvcc)
    chosen = list(architectures) or usual_architectures(known)
    unknown = [name for name in chosen if name.rstrip("af") not in known]
    if unknown:
        raise PluginError(f"nvcc {cuda} ({nvcc}) knows no architecture {unknown[0]}: it knows {', '.join(known)}.")
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / ".lock"):
        path = library_path(int(version.partition(".")[0]), output)
        if not force and fits(version, chosen, output):
            say(f"{path} fits already.")
            return path
        say(f"Compiling for TensorRT {version} and compute capability {', '.join(chosen)} with CUDA {cuda}.")
        source = source_hash()
        with tempfile.TemporaryDirectory(dir=output, prefix=".build-") as folder:
            made = compile_library(nvcc, headers, version, chosen, Path(folder), say)
            library = Library(version, chosen, source, cuda, hashlib.sha256(made.read_bytes()).hexdigest())
            notes = Path(folder) / "notes.json"
            library.save(notes)
            # A process that is killed between the two leaves a library that its notes do not vouch for.
            os.replace(made, path)
            os.replace(notes, path.with_suffix(".json"))
    say(f"{path} is built.")
    return path


def fits(version: str, architectures: Sequence[str], output: Path) -> bool:
    """Whether the library that is there was built from these sources, for this TensorRT and these architectures."""
    try:
        there = find(version, output)
    except PluginError:
        return False
    return there.tensorrt == version and set(architectures) <= set(there.architectures)


def compile_library(
    nvcc: Path, headers: Path, version: str, architectures: Sequence[str], folder: Path, say: Callable[[str], None]
) -> Path:
    """Compile into a folder; returns the library there. Raises PluginError with the end of what the compiler said."""
    cmake = find_tool("cmake", "pip install cmake")
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CUDA_COMPILER": nvcc,
        "CMAKE_CUDA_ARCHITECTURES": ";".join(architectures),
        "FLAVOUR": flavour_of(version),
        "TENSORRT_INCLUDE": headers,
    }
    find_tool("c++", "install a C++ compiler")
    configure = [cmake, "-S", FOLDER, "-B", folder, *(f"-D{name}={value}" for name, value in settings.items())]
    for command in (configure, [cmake, "--build", folder, "--parallel", "2"]):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        said = done.stdout + done.stderr
        say(said.rstrip())
        if done.returncode:
            last = "\n".join(said.rstrip().splitlines()[-LAST_WORDS:])
            raise PluginError(f"the plugins could not be compiled for TensorRT {version}:\n{last}")
    return folder / "libcanny_plugins.so"


# -- what is needed ---------------------------------------------------------------------------------------------------


def installed_version() -> str:
    """The version of the TensorRT in this interpreter, empty without one."""
    for package in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def flavour_of(version: str) -> str:
    """The flavour of a TensorRT version."""
    return "8.6" if version.startswith("8.") else "10+"


def find_headers(flavour: str | None, include: Path | None) -> tuple[Path, str]:
    """The folder of TensorRT's headers and their version as "8.6.0", those of the installed TensorRT before others.

    Raises PluginError where there are none of the flavour, which is the installed TensorRT's by default.
    """
    installed = installed_version()
    flavour = flavour or (flavour_of(installed) if installed else None)
    found = [(folder, v) for folder in ([include] if include else header_folders()) if (v := header_version(folder))]
    found.sort(key=lambda one: one[1].partition(".")[0] != installed.partition(".")[0])
    for folder, version in found:
        if flavour in (None, flavour_of(version)):
            return folder, version
    if include and not found:
        raise PluginError(f"{include} has no {HEADER}: --include names the folder of TensorRT's headers.")
    others = "; ".join(f"those in {folder} are of {version}" for folder, version in found)
    wanted = f"TensorRT {flavour}" if flavour else "TensorRT"
    where = "unpack https://github.com/NVIDIA/TensorRT at its tag and give `--include <that>/include`"
    missing = f"the headers of {wanted} ({HEADER}) were not found{f' ({others})' if others else ''}"
    raise PluginError(f"{missing}: {where}, or set TENSORRT_ROOT.")


def header_folders() -> Iterator[Path]:
    """Where TensorRT's headers may lie, the likeliest first."""
    if "TENSORRT_INCLUDE" in os.environ:
        yield Path(os.environ["TENSORRT_INCLUDE"])
    if "TENSORRT_ROOT" in os.environ:
        yield Path(os.environ["TENSORRT_ROOT"]) / "include"
    yield from sorted((FOLDER.parent / "third_party").glob("*/include"))
    for package in ("tensorrt", "tensorrt_libs"):
        found = importlib.util.find_spec(package)
        for place in (found.submodule_search_locations or ()) if found else ():
            yield Path(place) / "include"
    yield from map(Path, ("/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/include"))
    yield from map(Path, ("/usr/local/tensorrt/include", "/opt/tensorrt/include"))


def header_version(folder: Path) -> str | None:
    """The version as "8.6.0" of the headers in a folder, None where it has none."""
    try:
        text = (folder / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    parts = []
    for part in ("MAJOR", "MINOR", "PATCH"):
        # From TensorRT 11 on NV_TENSORRT_MAJOR stands for TRT_MAJOR_ENTERPRISE, which is the number.
        found = re.search(rf"(?:NV_TENSORRT_{part}|TRT_{part}_ENTERPRISE)\s+(\d+)", text)
        if not found:
            return None
        parts.append(found.group(1))
    return ".".join(parts) if (folder / HEADER).is_file() else None


def find_nvcc() -> Path:
    """CUDA's compiler. Raises PluginError where there is none."""
    places = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places += [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    for place in places:
        if place and os.access(place, os.X_OK):
            return Path(place)
    raise PluginError("nvcc was not found: install the CUDA toolkit, or name its folder in CUDA_HOME.")


def ask_nvcc(nvcc: Path) -> tuple[str, list[str]]:
    """nvcc's version as "13.0" and the architectures that it compiles for, as "90"; raises PluginError."""
    said = []
    for option in ("--version", "--list-gpu-arch"):
        try:
            said.append(subprocess.run([nvcc, option], capture_output=True, text=True, check=True).stdout)
        except (OSError, subprocess.CalledProcessError) as error:
            raise PluginError(f"{nvcc} {option} does not work ({error}): install the CUDA toolkit.") from None
    version = re.search(r"release (\d+\.\d+)", said[0])
    return version.group(1) if version else "?", re.findall(r"compute_(\d+)", said[1])


def usual_architectures(known: Sequence[str]) -> list[str]:
    """The architecture of this machine's GPU, without one all of the presets that nvcc knows."""
    return gpu_architecture() or [name for name in ARCHITECTURES if name in known]


def gpu_architecture() -> list[str]:
    """The architecture of this machine's GPU as ["90"], [] without one."""
    from runtime.engine import gpu

    here = gpu()
    return [here.capability.replace(".", "")] if here else []


def find_tool(name: str, advice: str) -> Path:
    """A program beside this interpreter or on the path; raises PluginError where there is none."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    found = beside or shutil.which(name)
    if not found:
        raise PluginError(f"{name} was not found: {advice}.")
    return Path(found)
