"""Seeded random weights for a whole model: the same numbers in every interpreter, of a size that hides no fault.

Each tensor has its own Philox4x64 stream, keyed by (seed, name), so that any subset gives the same numbers. A 64-bit
draw gives two numbers, each the sum of two 16-bit words: integers with a triangular distribution. Only one float32
multiplication, at most one addition and the rounding to float16 follow, which IEEE 754 fixes to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from runtime.schedule import noise_schedule

Shapes = Mapping[str, Sequence[int]]
VERSION = 1  # raise it with every change of the numbers
CHUNK = 1 << 21
TRIANGULAR_STD = math.sqrt((2**32 - 1) / 6)  # of the sum of two 16-bit words
JITTER = 0.1  # of the biases around 0, and of the norms' weights around 1
SILU = 1.7  # SiLU of unit normals has an rms of 0.6, GELU and its like of 0.65

# A matrix has the standard deviation gain / sqrt(fan in), with the gain of the first pattern found in its name. They
# keep activations near 1, attention sharp enough to matter, and every residual branch at about half of its stream.
GAINS: list[tuple[str, float]] = [
    (r"\.emb_layers\.1\.|\.time_embed\.2\.|\.in_layers\.2\.|\.conv1\.", SILU),
    (r"\.out_layers\.3\.|\.conv2\.", 0.5 * SILU),
    (r"\.time_embed\.0\.", 1.4),
    (r"diffusion_model\.out\.2\.|encoder\.conv_out\.", SILU),
    (r"decoder\.conv_out\.", 0.4 * SILU),  # pictures mostly within [-1, 1]
    (r"\.post_quant_conv\.", 0.2),  # the latent arrives divided by 0.18
    (r"\.quant_conv\.", 4.0),  # and leaves multiplied by it
    (r"\.input_blocks\.0\.0\.", 0.5),  # x grows to 20 over the steps where e knows nothing of it
    (r"\.input_hint_block\.", 1.9),
    (r"\.zero_convs\.|\.middle_block_out\.", 0.5),
    (r"\.to_[qk]\.|\.[qk]_proj\.|\.attn_1\.[qk]\.", 1.6),
    (r"\.to_out\.0\.|\.self_attn\.out_proj\.|\.mlp\.fc2\.|\.ff\.net\.2\.", 0.8),
    (r"\.proj_out\.", 0.6),
]


def random_weights(shapes: Shapes, seed: int, threads: int | None = None) -> dict[str, np.ndarray]:
    """Weights of the given names and shapes: float16, the schedule's constants float32, `position_ids` int64.

    Raises ValueError for a negative seed or a name whose numbers are not known.
    """
    weights = {name: np.empty(shape, dtype(name)) for name, shape in shapes.items()}
    fill(weights, seed, threads)
    return weights


def write_random_weights(
    path: Path, shapes: Shapes, seed: int, tell: Callable[[int], None] = lambda size: None
) -> None:
    """Write the same weights as a .safetensors file, with the schedule's constants, without holding them in memory.

    `tell` is given the bytes of each tensor done. The file appears under its name when it is whole. Raises ValueError
    as `random_weights` does, and OSError.
    """
    header: dict[str, object] = {"__metadata__": {"source": identity(shapes, seed)}}
    shapes = {**{name: value.shape for name, value in noise_schedule().items()}, **shapes}
    places, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype(name).itemsize
        places[name] = begin
        kind = {"float16": "F16", "float32": "F32", "int64": "I64"}[dtype(name).name]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        data = np.memmap(temporary, np.uint8, "r+", 8 + len(text))
        views = {
            name: data[begin : begin + math.prod(shapes[name]) * dtype(name).itemsize]
            .view(dtype(name))
            .reshape(tuple(shapes[name]))
            for name, begin in places.items()
        }
        fill(views, seed, tell=tell)
        data.flush()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def identity(shapes: Shapes, seed: int) -> str:
    """A SHA-256 that stands for the weights of `random_weights` without making them."""
    text = json.dumps([VERSION, seed, GAINS, JITTER, sorted((name, list(shape)) for name, shape in shapes.items())])
    return hashlib.sha256(text.encode()).hexdigest()


def fill(
    weights: Mapping[str, np.ndarray],
    seed: int,
    threads: int | None = None,
    tell: Callable[[int], None] = lambda size: None,
) -> None:
    """Write every tensor's numbers into its array."""
    if seed < 0:
        raise ValueError(f"The seed of random weights is {seed}, but cannot be negative.")
    constants = noise_schedule()
    for name, array in weights.items():
        if name in constants:
            array[...] = constants[name]
        elif name.endswith(".position_ids"):
            array[...] = np.arange(array.shape[-1])
        elif not name.endswith((".weight", ".bias")):
            raise ValueError(f"There are no random numbers for {name!r}: it is neither a weight nor a bias.")
    drawn = [name for name in weights if name not in constants and not name.endswith(".position_ids")]
    # Largest first, so that no thread is left with one at the end.
    drawn.sort(key=lambda name: -weights[name].size)
    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        for name, _ in zip(drawn, pool.map(lambda name: draw(name, weights[name], seed), drawn), strict=True):
            tell(weights[name].nbytes)


def draw(name: str, out: np.ndarray, seed: int) -> None:
    """The numbers of one tensor."""
    mean, std = statistics(name, out.shape)
    scale = np.float32(std / TRIANGULAR_STD)
    key = int.from_bytes(hashlib.sha256(f"{VERSION}:{seed}:{name}".encode()).digest()[:16], "little")
    stream, flat = np.random.Philox(key=key), out.reshape(-1)
    for begin in range(0, flat.size, CHUNK):
        part = flat[begin : begin + CHUNK]
        words = np.asarray(stream.random_raw((part.size + 1) // 2)).astype("<u8", copy=False).view("<u2")
        sums = words[0::2].astype(np.int32)
        sums += words[1::2]
        sums -= 65535
        numbers = sums[: part.size].astype(np.float32) * scale
        part[:] = numbers + np.float32(mean) if mean else numbers


def statistics(name: str, shape: Sequence[int]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's numbers."""
    if len(shape) == 1:
        return (1.0 if name.endswith(".weight") else 0.0), JITTER  # only the norms' weights have one dimension
    if name.endswith("_embedding.weight"):
        return 0.0, 0.7  # token and position add up to about 1
    gain = next((gain for pattern, gain in GAINS if re.search(pattern, name)), 1.0)
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))


def dtype(name: str) -> np.dtype:
    """The type of a tensor's numbers: those of the schedule have no dot in their names."""
    return np.dtype(np.int64 if name.endswith(".position_ids") else np.float16 if "." in name else np.float32)
