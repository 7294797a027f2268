import pytest

from runtime.noise import cuda_randn

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

SEEDS = [0, 1, 42, 946540, 2**31 - 1, 2**32, 2**32 + 12345, 2**63 + 7, 2**64 - 1]
SHAPES = [(1, 4, 32, 48), (4, 4, 64, 64), (1, 4, 16, 16), (1,), (3, 5, 7)]


def largest_difference(seed: int, shape: tuple[int, ...], draws: int) -> float:
    """The largest |numpy - torch| over `draws` successive draws."""
    device = torch.cuda.get_device_properties(0)
    grid = device.multi_processor_count, device.max_threads_per_multi_processor
    torch.manual_seed(seed)
    drawn = [torch.randn(shape, device="cuda") for _ in range(draws)]
    ours = [torch.from_numpy(cuda_randn(seed, shape, draw, *grid)).cuda() for draw in range(draws)]
    return max((a - b).abs().max().item() for a, b in zip(drawn, ours, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_equals_torch(seed: int, shape: tuple[int, ...]) -> None:
    assert largest_difference(seed, shape, draws=3) < 1e-5


@pytest.mark.parametrize("seed", [7, 2**40 + 3])
@pytest.mark.parametrize("factor", [1.0, 1.3, 4.0, 9.7])
def test_equals_torch_over_the_grid_limit(seed: int, factor: float) -> None:
    device = torch.cuda.get_device_properties(0)
    threads = device.multi_processor_count * device.max_threads_per_multi_processor
    assert largest_difference(seed, (int(threads * factor) + 1,), draws=3) < 1e-5
