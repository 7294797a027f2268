"""CUDA kernels on a CPU: compiled as they are written, run between guards, and with mistakes put in."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plugins.call import open_library

TESTS = Path(__file__).resolve().parent
PLUGINS = TESTS.parent / "plugins"
GUARD = 4096  # bytes before and after each array, which nothing may touch


def compile_emulator(folder: Path, kernels: Path, source: str, optimise: str = "-O2") -> Any:
    """The kernels of a folder for the CPU, as a library."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the emulator of the kernels with")
    library = folder / "libemulated.so"
    flags = f"-std=c++17 {optimise} -fno-strict-aliasing -Wall -Werror -Wno-unknown-pragmas -U_FORTIFY_SOURCE".split()
    flags += ["-shared", "-fPIC"]
    include = [f"-I{TESTS}", f"-I{kernels}", f"-I{kernels.parent}"]
    command = [compiler, *flags, *include, str(TESTS / source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return open_library(library)


def compile_mistaken(
    folder: Path, kernels: Path, source: str, find: str, put: str, file: str = "kernel.cuh", optimise: str = "-O1"
) -> Any:
    """The same with `find`, which stands once in a file of theirs, replaced."""
    changed = shutil.copytree(PLUGINS, folder / "plugins", ignore=shutil.ignore_patterns("lib")) / kernels.name
    text = (changed / file).read_text()
    assert text.count(find) == 1, f"{find!r} is not once in {file}"
    (changed / file).write_text(text.replace(find, put))
    return compile_emulator(folder, changed, source, optimise)


def between_guards(
    call: ctypes.Structure, arrays: Mapping[str, np.ndarray], run: Callable[[], int], written: Sequence[str] = ("y",)
) -> np.ndarray:
    """The bytes of y after `run`, which must change nothing but the arrays `written`; it gets their addresses."""
    return all_between_guards(call, arrays, run, written)["y"]


def all_between_guards(
    call: ctypes.Structure, arrays: Mapping[str, np.ndarray], run: Callable[[], int], written: Sequence[str]
) -> dict[str, np.ndarray]:
    """The same of all arrays that are written."""
    memory = {}
    for name, array in arrays.items():
        memory[name] = held = np.full(array.nbytes + 2 * GUARD, 255, np.uint8)
        held[GUARD : GUARD + array.nbytes] = array.reshape(-1).view(np.uint8)
        setattr(call, name, held.ctypes.data + GUARD)
    before = {name: held.copy() for name, held in memory.items()}
    assert run() == 0
    for name, held in memory.items():
        inside = slice(GUARD, -GUARD) if name in written else slice(0, 0)
        before[name][inside] = held[inside]
        np.testing.assert_array_equal(held, before[name], err_msg=f"{name} was written to where it must not be")
    return {name: memory[name][GUARD:-GUARD].copy() for name in written}
