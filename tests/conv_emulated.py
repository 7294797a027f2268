"""The convolution kernels on a CPU: what the tests of them share."""

import ctypes
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import PLUGINS, between_guards, compile_emulator, compile_mistaken

from plugins.call import error
from plugins.conv_calls import Conv
from plugins.cross_calls import Cross

KERNELS, SOURCE = PLUGINS / "conv", "conv_emulated.cpp"


@functools.cache
def compiled() -> Any:
    """All of them, compiled once for all tests."""
    with tempfile.TemporaryDirectory() as folder:
        return compile_emulator(Path(folder), KERNELS, SOURCE)


def emulate(
    library: Any, conv: Conv, order: int = 0, mean: float = 0.5, turned: bool = False, **changed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel makes of random arrays, or those given, and what float64 does; everything else in memory stays as
    it was. turned: with tiles in the other order, see conv_emulated.cpp.
    """
    normed = conv.cross == 1 if isinstance(conv, Cross) else conv.norm
    arrays, call = conv.arrays(mean=mean if normed else 0.0) | changed, conv.call()
    run = library.emulate_conv_turned if turned else library.emulate_conv

    def launch() -> int:
        if (done := int(run(ctypes.byref(call), order))) == 3:
            raise RuntimeError(f"the kernel of {conv} was not compiled")  # which is no mistake that was found
        return done

    y = between_guards(call, conv.memory(arrays), launch)
    return y.view(np.float16).reshape(conv.out), conv.expected(arrays)


def right(library: Any, conv: Conv, order: int) -> bool:
    """Whether it is what float64 does."""
    try:
        return error(*emulate(library, conv, order)) < 1e-3
    except AssertionError:
        return False


def is_finite_of_equal_numbers(library: Any) -> bool:
    """A LayerNorm whose variance, rounded, may come out below zero."""
    conv = Conv(1, 640, 4, 6, 64, 1, norm=True, high=64, wide=64)
    x = np.linspace(1, 50, 24, dtype=np.float16).reshape(1, 4, 6, 1).repeat(640, axis=3)
    return bool(np.isfinite(emulate(library, conv, x=x)[0]).all())


def slow_unless(usual: bool, *given: Any) -> Any:
    """Parameters that the usual run has, or that it leaves out."""
    return pytest.param(*given, marks=[] if usual else pytest.mark.slow)


def alike(*mistakes: tuple[str, ...]) -> list[Any]:
    """Mistakes that are found as others are, which the usual run leaves out."""
    return [slow_unless(False, one) for one in mistakes]


def kernels_of(wide: int = 0, norm: bool = False, tall: bool = False, cross: int = 0) -> str:
    """The compiler's flags for these kernels alone, see conv_emulated.cpp."""
    cut = f"-DEMULATE_WIDE={wide} -DEMULATE_NORM={int(norm)}"
    return f"{cut} -DEMULATE_TALL={int(tall)} -DEMULATE_CROSS={cross}"


def mistaken(folder: Path, find: str, put: str, *file: str, **kernels: Any) -> Any:
    """These kernels with a mistake, in a file or the one that has what is to be replaced."""
    (name,) = file or (path.name for path in KERNELS.iterdir() if find in path.read_text())
    return compile_mistaken(folder, KERNELS, SOURCE, find, put, name, "-O1 " + kernels_of(**kernels))
