import numpy as np
import pytest

from runtime.noise import cuda_randn, philox4x32


# kat_vectors of the Random123 library: counter, key, answer.
@pytest.mark.parametrize(
    "counter, key, answer",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    words = tuple(np.array([int(word, 16)], np.uint64) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    assert [f"{word[0]:08x}" for word in philox4x32(words, (k0, k1))] == answer.split()


def test_published_values_of_seed_0() -> None:
    # Printed in the documentation of stable-diffusion-webui's `rng_philox`, which imitates torch on CUDA.
    published = [-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564]
    published += [-0.62285122, -0.32838709, -1.07454231, -0.36314407, -1.67105067, 2.26550497]
    np.testing.assert_allclose(cuda_randn(0, (3, 4)).ravel(), published, atol=1e-6)


# Printed by torch 2.11 on an H200: the first three numbers and the last of the first two draws of (1, 4, 32, 48).
@pytest.mark.parametrize(
    "seed, first, second",
    [
        (0, [-0.92466241, -0.42534423, -2.64384580, -0.79002267], [0.18082583, -0.55226278, 0.92381334, 1.23935723]),
        (42, [0.19401880, 2.16137362, -0.17205022, -0.69546509], [0.13913755, -0.10821664, -0.71742225, -0.55794710]),
        (
            2**64 - 1,
            [0.63230222, 0.03350111, 0.83908761, -0.23689848],
            [2.05555177, -1.99373329, -1.55447328, 1.15243304],
        ),
    ],
)
def test_values_of_torch(seed: int, first: list[float], second: list[float]) -> None:
    for draw, values in enumerate((first, second)):
        np.testing.assert_allclose(cuda_randn(seed, (1, 4, 32, 48), draw).ravel()[[0, 1, 2, -1]], values, atol=5e-6)


def test_values_of_torch_over_the_grid_limit() -> None:
    values = [0.19401880, 2.16137362, -0.65200323, -0.97018975, 1.86144292]
    draw = cuda_randn(42, (1, 8, 256, 256)).ravel()
    np.testing.assert_allclose(draw[[0, 1, 270335, 270336, -1]], values, atol=5e-6)


def plain(seed: int, size: int, draw: int, threads: int) -> np.ndarray:
    """The kernel's loop, one thread and one turn at a time."""
    result = np.zeros(size)
    turns = (size - 1) // (threads * 4) + 1
    for thread in range(threads):
        for turn in range(turns):
            counter = tuple(np.array([word], np.uint64) for word in (draw * turns + turn, 0, thread, 0))
            x, y, z, w = (float(word[0]) for word in philox4x32(counter, (seed % 2**32, seed // 2**32)))
            for i, (first, second, wave) in enumerate([(x, y, np.sin), (x, y, np.cos), (z, w, np.sin), (z, w, np.cos)]):
                place = turn * threads * 4 + i * threads + thread
                if place < size:
                    angle = (second + 0.5) * 2.0**-32 * 2 * np.pi
                    result[place] = np.sqrt(-2 * np.log((first + 0.5) * 2.0**-32)) * wave(angle)
    return result


@pytest.mark.parametrize("size", [1, 300, 600, 2048, 2049, 5000])
@pytest.mark.parametrize("draw", [0, 1, 3])
def test_layout_over_the_threads(size: int, draw: int) -> None:
    threads = 512 if size > 256 else 256  # of a small GPU with two blocks at once
    ours = cuda_randn(2**33 + 5, (size,), draw, multiprocessors=1, threads_per_multiprocessor=512)
    np.testing.assert_allclose(ours, plain(2**33 + 5, size, draw, threads), atol=5e-6)


def test_moments() -> None:
    draw = cuda_randn(3, (1000, 1000)).astype(np.float64)
    assert abs(draw.mean()) < 5e-3
    assert abs(draw.std() - 1) < 5e-3
    assert abs((draw**3).mean()) < 2e-2
    assert abs((draw**4).mean() - 3) < 5e-2


def test_draws_and_seeds_are_independent() -> None:
    draws = [cuda_randn(seed, (4, 64, 64), before).ravel() for seed in (5, 6, 5 + 2**32) for before in range(3)]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 0.04  # five standard deviations


def test_small_draws_are_the_same_on_every_gpu() -> None:
    np.testing.assert_array_equal(cuda_randn(1, (4, 32, 48), 2), cuda_randn(1, (4, 32, 48), 2, 20, 1536))


def test_shapes() -> None:
    assert cuda_randn(0, (2, 0, 3)).shape == (2, 0, 3)
    assert cuda_randn(0, ()).shape == ()
    draw = cuda_randn(np.uint64(2**64 - 1), (1, 4, 2, 2))  # type: ignore[arg-type]
    assert draw.shape == (1, 4, 2, 2) and draw.dtype == np.float32 and np.isfinite(draw).all()


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_refuses_seeds_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match=f"The seed is {seed}, but must lie between 0 and 2"):
        cuda_randn(seed, (4,))


def test_refuses_negative_numbers() -> None:
    with pytest.raises(ValueError, match="draws_before is -1"):
        cuda_randn(0, (4,), -1)
    with pytest.raises(ValueError, match="negative side"):
        cuda_randn(0, (4, -4))
