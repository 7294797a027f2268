"""The few-step solvers where the exact answer is known; `test_against_diffusers.py` has their whole trajectories."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cldm.samplers import dpm_solver_pp_2m, even_timesteps, unipc
from runtime.schedule import alphas_cumprod

DEVIATION = 0.6  # of the pictures, all of them one Gaussian: then x only shrinks, by what its deviation shrinks


def wrong_by(solver, count: int) -> float:
    abar = alphas_cumprod()

    def deviation(t: int) -> float:
        return float((abar[t] * DEVIATION**2 + 1 - abar[t]) ** 0.5)

    def denoise(x: Tensor, t: int) -> Tensor:
        return x * (1 - abar[t]) ** 0.5 / deviation(t) ** 2

    lam = 0.5 * np.log(abar / (1 - abar))
    timesteps = [int(np.abs(lam - point).argmin()) for point in np.linspace(lam[999], lam[0], count + 1)[:-1]]
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    result = solver(denoise, x, timesteps, abar)
    return float((result / (x * deviation(0) / deviation(999)) - 1).abs().max())


@pytest.mark.parametrize("solver", [dpm_solver_pp_2m, unipc])
def test_errors_fall_with_the_square_of_the_steps(solver) -> None:
    errors = [wrong_by(solver, count) for count in (10, 20)]
    assert errors[0] < 0.05 and errors[0] / errors[1] > 2.5  # 4 in the limit; DDIM, of first order, halves them


@pytest.mark.parametrize("count, expected", [(1, [999]), (2, [999, 500]), (4, [999, 749, 500, 250])])
def test_even_timesteps(count: int, expected: list[int]) -> None:
    assert even_timesteps(count) == expected
    assert all(np.diff(even_timesteps(20)) < 0) and even_timesteps(20)[-1] > 0
