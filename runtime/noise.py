"""The initial noise: the normal numbers that torch draws on a CUDA device, from numpy alone."""

from __future__ import annotations

import math
import operator
import secrets

import numpy as np

THREADS_PER_BLOCK = 256
WORD = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = 0x9E3779B9, 0xBB67AE85

# cuRAND's 2^-32 and 2^-32 * 2 pi as it rounds them, to float32; float64 holds both exactly.
TO_UNIT = 2.0**-32
TO_ANGLE = float(np.float32(2 * math.pi)) * 2.0**-32


def random_seed(seed: int) -> int:
    """`seed`, or a fresh one for -1, as in the original canny2image."""
    return secrets.randbelow(2**31) if seed == -1 else seed


def philox4x32(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10: four 32-bit words of random bits for every counter.

    counter: four uint64 arrays that broadcast together, key: two integers; every value below 2^32, as in the result.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> SHIFT) ^ c1 ^ np.uint64(k0), p1 & WORD, (p0 >> SHIFT) ^ c3 ^ np.uint64(k1), p0 & WORD
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def box_muller(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two independent normal numbers from two 32-bit words: float64 arrays of the words' shape.

    u and v are rounded to float32 where cuRAND rounds them (it fuses the multiply and the add, hence once); the rest is
    done in float64, so that every processor gives the same numbers. The GPU's own sin and cos are coarser: 30 million
    numbers of an H200 differ from these by at most 3e-6.
    """
    u = (x.astype(np.float32).astype(np.float64) * TO_UNIT + TO_UNIT / 2).astype(np.float32).astype(np.float64)
    v = (y.astype(np.float32).astype(np.float64) * TO_ANGLE + TO_ANGLE / 2).astype(np.float32).astype(np.float64)
    s = np.sqrt(-2 * np.log(u))
    return s * np.sin(v), s * np.cos(v)


def cuda_randn(
    seed: int,
    shape: tuple[int, ...],
    draws_before: int = 0,
    multiprocessors: int = 132,
    threads_per_multiprocessor: int = 2048,
) -> np.ndarray:
    """The (draws_before + 1)-th `torch.randn(shape, device="cuda")` after `torch.manual_seed(seed)`, as float32.

    All draws have this one shape. torch spreads a draw over the GPU's threads, so a draw of more numbers than that GPU
    has threads (270336 on an H100 or H200, the default here) depends on the GPU; smaller ones are the same everywhere.
    Raises ValueError for a seed outside 0..2^64-1 (torch wraps negative ones), or a negative `draws_before` or side.
    Source: torch's DistributionTemplates.h and cuRAND's Philox4_32_10 with `curand_normal4`.
    """
    seed, shape = operator.index(seed), tuple(operator.index(side) for side in shape)
    if not 0 <= seed < 2**64:
        raise ValueError(f"The seed is {seed}, but must lie between 0 and 2^64 - 1 ({2**64 - 1}).")
    if draws_before < 0:
        raise ValueError(f"draws_before is {draws_before}, but cannot be negative.")
    if min(shape, default=1) < 0:
        raise ValueError(f"The shape {shape} has a negative side.")
    size = math.prod(shape)
    if size == 0:
        return np.empty(shape, np.float32)

    blocks_at_once = multiprocessors * (threads_per_multiprocessor // THREADS_PER_BLOCK)
    threads = THREADS_PER_BLOCK * min(blocks_at_once, -(-size // THREADS_PER_BLOCK))
    turns = -(-size // (4 * threads))  # of the kernel's loop, each of which uses up one counter value of every thread

    turn = np.arange(draws_before * turns, (draws_before + 1) * turns, dtype=np.uint64)[:, None]
    thread = np.arange(threads, dtype=np.uint64)[None, :]
    counter = turn & WORD, turn >> SHIFT, thread, np.zeros_like(thread)
    x, y, z, w = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    # A thread's four numbers lie `threads` apart, its turns 4 * threads apart: (turns, 4, threads), row by row.
    normals = np.stack([*box_muller(x, y), *box_muller(z, w)], axis=1, dtype=np.float32, casting="same_kind")
    return normals.reshape(-1)[:size].reshape(shape)
