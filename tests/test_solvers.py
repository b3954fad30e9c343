"""Grids and solvers: what of a model's scheduler is taken over, what is refused, and the order of convergence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor

from crd.backbones.solvers import Grid, read_grid, solver_scheduler
from crd.errors import CRDError


def grid(solver: str, steps: int, own: Any = None) -> Grid:
    scheduler = solver_scheduler(FlowMatchEulerDiscreteScheduler() if own is None else own, solver, flow=True)
    scheduler.set_timesteps(steps)
    return read_grid(scheduler, solver, flow=True)


def velocity(x: Tensor, t: float) -> Tensor:
    """Of a point mass blurred to N(2, 0.5²) at t=0: x0 and noise given x_t are linear in x_t."""
    variance = (1 - t) ** 2 * 0.25 + t**2
    shrink = (x - 2 * (1 - t)) / variance
    return t * shrink - (2 + 0.25 * (1 - t) * shrink)


def solve(found: Grid) -> Tensor:
    t = float(found.sigmas[0])
    x = 2 * (1 - t) + ((1 - t) ** 2 * 0.25 + t**2) ** 0.5 * torch.tensor([[-1.5], [0.3], [2.0]])
    step = found.stepper()
    for index in range(len(found.sigmas) - 1):
        x = step(index, x, velocity(x, float(found.sigmas[index])))
    return x


def test_both_solvers_converge_to_the_exact_flow_and_the_second_order_one_sooner() -> None:
    """The flow of a Gaussian moves standard deviations to standard deviations: x0 = 2 + 0.5 noise."""
    exact = 2 + 0.5 * torch.tensor([[-1.5], [0.3], [2.0]])
    errors = {
        solver: [(solve(grid(solver, steps)) - exact).abs().max().item() for steps in (20, 80)]
        for solver in ("euler", "dpmsolver++")
    }
    assert errors["euler"][1] < 0.3 * errors["euler"][0]
    assert errors["dpmsolver++"][1] < 0.2 * errors["dpmsolver++"][0]
    assert errors["dpmsolver++"][1] < 0.2 * errors["euler"][1]


def test_batches_do_not_share_the_memory_of_a_multistep_solver() -> None:
    found = grid("dpmsolver++", 8)
    assert torch.equal(solve(found), solve(found))


def test_the_shift_goes_from_one_scheduler_to_the_other() -> None:
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    multistep = solver_scheduler(euler, "dpmsolver++", flow=True)
    assert (multistep.config.flow_shift, multistep.config.use_flow_sigmas) == (3.0, True)
    assert solver_scheduler(multistep, "euler", flow=True).config.shift == 3.0
    assert solver_scheduler(multistep, "dpmsolver++", flow=True).config.flow_shift == 3.0
    assert torch.equal(grid("euler", 5, euler).times, grid("euler", 5, euler).sigmas[:-1])
    # The stock scheduler tells the model whole timesteps.
    told = grid("dpmsolver++", 5, euler).times * 1000
    torch.testing.assert_close(told, told.round())


def test_a_step_of_no_length_is_left_out() -> None:
    own = FlowMatchEulerDiscreteScheduler()
    own.sigma_min = 0.0
    found = grid("euler", 4, own)
    assert len(found.times) == 3
    assert (found.sigmas.diff() < 0).all()


def test_a_ddpm_grid_starts_where_the_stock_latents_do() -> None:
    own = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    for solver in ("euler", "dpmsolver++"):
        scheduler = solver_scheduler(own, solver, flow=False)
        scheduler.set_timesteps(10)
        found = read_grid(scheduler, solver, flow=False)
        ratio = float(scheduler.sigmas[0])
        assert found.sigmas[-1] == 0
        assert (found.sigmas.diff() < 0).all()
        assert float(found.sigmas[0]) == pytest.approx(ratio / (1 + ratio))
        # x_vp of a stock start: noise * init / sqrt(1 + ratio²) under Euler, noise under the other.
        stock = float(scheduler.init_noise_sigma) / (1 + ratio**2) ** 0.5 if solver == "euler" else 1.0
        assert found.start * (1 + ratio) / (1 + ratio**2) ** 0.5 == pytest.approx(stock, rel=1e-5)


@pytest.mark.parametrize(
    ("own", "flow", "message"),
    [
        (DDPMScheduler(), False, "got DDPMScheduler"),
        (EulerAncestralDiscreteScheduler(), False, "got EulerAncestralDiscreteScheduler"),
        (EulerDiscreteScheduler(), True, "got EulerDiscreteScheduler"),
        (FlowMatchEulerDiscreteScheduler(), False, "got FlowMatchEulerDiscreteScheduler"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), True, "stochastic_sampling=True"),
        (DPMSolverMultistepScheduler(), True, "use_flow_sigmas=False"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), False, "algorithm_type=sde-dpmsolver"),
        (DPMSolverMultistepScheduler(thresholding=True), False, "thresholding=True"),
        (EulerDiscreteScheduler(final_sigmas_type="sigma_min"), False, "final_sigmas_type=sigma_min"),
    ],
)
def test_what_is_no_plain_ode_step_is_refused(own: Any, flow: bool, message: str) -> None:
    for solver in ("euler", "dpmsolver++"):
        if message == "stochastic_sampling=True" and solver != "euler":
            continue  # the other solver has no such step
        with pytest.raises(CRDError, match=message):
            solver_scheduler(own, solver, flow)


def test_unknown_solvers_are_refused() -> None:
    with pytest.raises(CRDError, match=r"unknown solver 'heun'; known: euler, dpmsolver\+\+"):
        solver_scheduler(FlowMatchEulerDiscreteScheduler(), "heun", flow=True)
