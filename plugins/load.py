"""The compiled plugins: which there are, what they were built from, and how TensorRT gets them.

A library lies in `plugins/lib` with a JSON file beside it, which says what it was built from and vouches for its bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from runtime.manifest import EngineError

FOLDER = Path(__file__).resolve().parent
LIB = FOLDER / "lib"
SOURCES = ("CMakeLists.txt", "*.cuh", "*/*.cu", "*/*.cuh", "*/*.h", "*/*.cpp")
GROUP_NORM, ATTENTION = "CannyGroupNorm", "CannyAttention"  # in TensorRT's registry
LAYER_NORM, GEGLU = "CannyLayerNorm", "CannyGeglu"
ADD, JOIN, JOIN_NORM = "CannyAdd", "CannyJoin", "CannyJoinNorm"
CONV, CROSS = "CannyConv", "CannyCross"
FIRST, LAST = "CannyFirst", "CannyLast"
TRANSFORMER = (ATTENTION, LAYER_NORM, GEGLU)  # what a transformer over a map is made of
RESIDUALS = (ADD, JOIN, JOIN_NORM, FIRST, LAST)  # a ResBlock's sum, ControlNet's residuals, the ends of a step
VERSION = "1"
FIELDS_VERSION = 1  # of the plugins' fields, which the library checks
CONV_MULTIPLE, CONV_ROWS = 64, 8000  # of the channels and filters, and most positions, that conv/kernel.cuh takes
CONV_PLACES = 720  # positions of x that it has room for
CONV_CAPABILITY = "9.0"  # the one that it has kernels for
CROSS_WORDS, CROSS_HEADS = 80, 4  # most words of a text, each head's columns; heads must be a multiple of the latter
TEXT_MULTIPLE = 256  # of a text's columns, so that tiles of all widths can make them
LATENT_CHANNELS = 8  # of x, most that ends/ has kernels for
ATTENTION_WIDTHS = (40, 64, 80, 160)  # of the heads that attention/kernel.cuh has kernels for
CAUSAL_WIDTHS = (64,)  # and under a causal mask


class PluginError(EngineError):
    """Plugins that are missing, do not fit or cannot be built; the text is one sentence that says what to do."""


@dataclass(frozen=True)
class Library:
    """A compiled library: TensorRT's version in the headers, GPU architectures ("90"), SHA-256 of sources and file."""

    tensorrt: str
    architectures: list[str]
    source: str
    cuda: str
    sha256: str
    path: Path = Path()

    def save(self, path: Path) -> None:
        """Write what is known of the library; raises OSError."""
        content = {name: value for name, value in asdict(self).items() if name != "path"}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def library_path(major: int, folder: Path = LIB) -> Path:
    """Where the library for a TensorRT of this major version lies."""
    return folder / f"libcanny_plugins_trt{major}.so"


def source_hash() -> str:
    """The SHA-256 of the sources of all plugins."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in FOLDER.glob(pattern)):
        digest.update(path.relative_to(FOLDER).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def find(version: str, folder: Path = LIB) -> Library:
    """The library for a TensorRT version as "8.6.0", whole and built from the sources that are here.

    Raises PluginError where there is none, it was changed, or it is older than its sources.
    """
    major = int(version.partition(".")[0])
    path = library_path(major, folder)
    build = f"run `python -m plugins build --flavour {'8.6' if major == 8 else '10+'}`"
    try:
        content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        binary = path.read_bytes()
    except FileNotFoundError:
        raise PluginError(f"there are no plugins for TensorRT {version} in {folder}: {build}.") from None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PluginError(f"the plugins {path} cannot be read ({reason}): {build} --force.") from None
    names = {field.name for field in fields(Library)} - {"path"}
    if not isinstance(content, dict) or content.keys() != names:
        raise PluginError(f"{path.with_suffix('.json')} is not what a build wrote: {build} --force.")
    library = Library(**content, path=path)
    if hashlib.sha256(binary).hexdigest() != library.sha256:
        raise PluginError(f"the plugins {path} were changed after they were built: {build} --force.")
    if library.source != source_hash():
        raise PluginError(f"the plugins {path} were built from other sources than {FOLDER} has: {build}.")
    return library


_loaded: dict[Path, str] = {}  # the SHA-256 of each library that TensorRT has


def load(trt: Any, folder: Path = LIB) -> Library:
    """Give TensorRT (its module) the plugins, once a process, and tell which.

    Raises PluginError as `find` does, or where TensorRT does not take the library.
    """
    library = find(trt.__version__, folder)
    if library.path in _loaded:
        if _loaded[library.path] != library.sha256:
            raise PluginError(f"the plugins {library.path} were built anew since they were loaded: start again.")
        return library
    if not trt.get_plugin_registry().load_library(str(library.path)):
        what = f"TensorRT {trt.__version__} does not take the plugins {library.path}"
        raise PluginError(f"{what}; it has said why, else run `python -m plugins build --force`.")
    _loaded[library.path] = library.sha256
    return library


def require(needed: Mapping[str, str], trt: Any, folder: Path = LIB) -> None:
    """Load the plugins that engines need, given by name with the SHA-256 of the sources that they were built with.

    Raises PluginError as `load` does, and where the plugins here are others.
    """
    unknown = sorted(needed.keys() - {GROUP_NORM, CONV, CROSS, *TRANSFORMER, *RESIDUALS})
    if unknown:
        raise PluginError(f"the engines need the plugin {unknown[0]}, which is not among those here: build them again.")
    if not needed:
        return
    library = load(trt, folder)
    others = [source for source in needed.values() if source != library.source]
    if others:
        theirs, ours = others[0][:12], library.source[:12]
        what = f"the engines were built with other plugins (sources {theirs}…) than are here ({ours}…)"
        raise PluginError(f"{what}: run `python -m trt_builder build` again.")


def has_conv_kernel(shape: Sequence[int], weight: Sequence[int], stride: int, up: bool = False) -> bool:
    """Whether conv/kernel.cuh serves a convolution of a map (B, C, h, w) by a weight (D, C, size, size); up: of the map
    doubled along both axes.
    """
    (batch, _, h, w), (filters, channels, size, _) = shape, weight
    sizes = (3,) if up else (1, 3)
    if size not in sizes or stride not in (1, 2) or filters % CONV_MULTIPLE or channels % CONV_MULTIPLE:
        return False
    lines, columns = -(-h // stride), -(-w // stride)
    # Its smallest tile has 64 positions in a row: from the first of x to the last, and a border of a line and one.
    places = 1 + 63 * stride + (stride - 1) * w * -(-64 // columns) + size // 2 * 2 * (w + 1)
    return batch * lines * columns * (4 if up else 1) <= CONV_ROWS and min(places, batch * h * w) <= CONV_PLACES


def has_cross_kernel(shape: Sequence[int], batch: int, heads: int, words: int) -> bool:
    """Whether conv/kernel.cuh does both halves of a cross-attention of a map (b, C, h, w), taken in turn for `batch`
    texts of so many words.
    """
    rows, channels, h, w = shape
    fits = not channels % CONV_MULTIPLE and not heads % CROSS_HEADS and 0 < words <= CROSS_WORDS
    return fits and not batch % rows and batch * h * w <= CONV_ROWS


def text_columns(heads: int, channels: int) -> int:
    """How wide a line of the map is that `CannyCross` takes of each word: what its key makes of the channels for each
    head, then what its value makes of them, then what each head's score has by itself, and zeros.
    """
    return 2 * heads * channels + TEXT_MULTIPLE


def conv_blocks(*weights: np.ndarray) -> np.ndarray:
    """A weight (D, C, size, size) as the convolution plugin reads it: (D / 64, C / 64 · size·size, 64, 64).

    That of a second map (D, E, 1, 1) comes behind it, for each 64 filters: E / 64 more along the second axis.
    Each block has rows of 64 channels for 64 filters; the 8 channels number c of row r are at c xor r mod 8, which is
    how products of a warpgroup find them in shared memory without bank conflicts (the 128-byte swizzle of the PTX ISA).
    """
    n, made = CONV_MULTIPLE, []
    row, chunk = np.ogrid[:n, : n // 8]
    for weight in weights:
        filters, channels, *size = weight.shape
        blocks = weight.reshape(filters // n, n, channels // n, n // 8, 8, size[0] * size[1])
        swizzled = blocks.transpose(0, 2, 5, 1, 3, 4)[:, :, :, row, chunk ^ row % (n // 8)]
        made.append(swizzled.reshape(filters // n, -1, n, n))
    return np.concatenate(made, 1)


def rounded(exact: np.ndarray, dtype: Any, what: str, instead: str) -> np.ndarray:
    """What was made of weights, in the type that a kernel reads it in.

    Raises ValueError where a number becomes too large for that: what they are, and which option does without.
    """
    with np.errstate(over="ignore"):
        made = exact.astype(dtype)
    if not np.isfinite(made).all():
        raise ValueError(f"{what} too large for {np.dtype(dtype)}: use {instead}.")
    return made


def up_phases(weight: np.ndarray) -> np.ndarray:
    """A weight (D, C, 3, 3) of a map that is doubled along both axes, as those of its four phases: (4·D, C, 2, 2).

    Phases are even lines and even columns, even and odd, odd and even, odd and odd. Of three taps along an axis two
    fall on the same position of the map itself. Their sums are in float32, to be rounded once.
    """

    def halves(weight: np.ndarray, axis: int) -> np.ndarray:
        first, middle, last = np.split(weight, 3, axis)
        even, odd = (first, middle + last), (first + middle, last)
        return np.stack([np.concatenate(phase, axis) for phase in (even, odd)])

    phases = halves(halves(weight.astype(np.float32), -2), -1).swapaxes(0, 1)
    return phases.reshape(-1, *phases.shape[3:])


def up_taps(weight: np.ndarray) -> np.ndarray:
    """The same as one transposed convolution of stride 2 within a border of one: (C, D, 4, 4)."""
    filters, channels = weight.shape[:2]
    phases = up_phases(weight).reshape(2, 2, filters, channels, 2, 2)
    # Even lines have taps 3 and 1 of its four, odd ones 2 and 0.
    taps = np.empty((channels, filters, 4, 4), np.float32)
    for line, column in np.ndindex(2, 2):
        taps[:, :, 3 - line :: -2, 3 - column :: -2] = phases[line, column].swapaxes(0, 1)
    return taps


def has_end_kernels(latent: int, channels: int) -> bool:
    """Whether ends/ does convolutions between a latent and a map of so many channels."""
    return latent <= LATENT_CHANNELS and not channels % 8


def first_blocks(weight: np.ndarray) -> np.ndarray:
    """A weight (D, C, 3, 3) as `CannyFirst` reads it: (D / 64, 18 or 36, 128), with zeros beyond D, and beyond C up to
    4 or 8 channels.

    For each 64 filters and two of the numbers that a filter has, a channel's nine in a row, they lie side by side: of
    every two filters the first number, then the second one.
    """
    filters, channels = weight.shape[:2]
    padded = np.zeros((-(-filters // 64) * 64, 4 if channels <= 4 else 8, 9), weight.dtype)
    padded[:filters, :channels] = weight.reshape(filters, channels, 9)
    pairs = padded.reshape(len(padded) // 64, 32, 2, -1, 2)  # filters by two, their numbers by two
    return np.ascontiguousarray(pairs.transpose(0, 3, 1, 4, 2)).reshape(len(pairs), -1, 128)


def last_rows(weight: np.ndarray) -> np.ndarray:
    """A weight (D, C, 3, 3) as `CannyLast` reads it: (9, D, C)."""
    return np.ascontiguousarray(weight.transpose(2, 3, 0, 1)).reshape(9, *weight.shape[:2])


def by_eights(array: np.ndarray) -> np.ndarray:
    """A weight (D, …) or bias (D) that makes (a, b) side by side, as the convolution plugin's gate wants it: 8 of a,
    8 of b, 8 of a, … .
    """
    return np.ascontiguousarray(array.reshape(2, -1, 8, *array.shape[1:]).swapaxes(0, 1)).reshape(array.shape)


def fold_norm(
    weight: np.ndarray, bias: np.ndarray, gamma: np.ndarray, beta: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A convolution (D, C, 1, 1), (D) behind a LayerNorm's scale and bias (C), as one of x by mean and deviation alone.

    Returns its weight in the type that it had, its bias and the sums of each filter's weights, which the convolution
    plugin takes the mean away by, (D) in float32. Raises ValueError where a weight becomes too large for its type.
    """
    exact = weight[:, :, 0, 0].astype(np.float64)
    folded = rounded(exact * gamma, weight.dtype, "a weight times its LayerNorm's scale is", "--layer-norm apart")
    sums = folded.astype(np.float64).sum(1).astype(np.float32)
    return folded.reshape(weight.shape), (bias + exact @ beta).astype(np.float32), sums
