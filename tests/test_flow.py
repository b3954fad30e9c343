from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from crd.errors import CRDError
from crd.flow import TIMESTEP_MODES, draw_timesteps, interpolate, velocity_target, x0_from_velocity

GRID = torch.linspace(1, 0, 11, dtype=torch.float64)  # a 10-step rollout


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_velocity_leads_back_to_x0_and_to_noise() -> None:
    x0, noise = torch.randn(5, 2, 3, 4, dtype=torch.float64), torch.randn(5, 2, 3, 4, dtype=torch.float64)
    t = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
    x_t, v = interpolate(x0, noise, t), velocity_target(x0, noise)
    torch.testing.assert_close(x0_from_velocity(x_t, v, t), x0)
    torch.testing.assert_close(x_t + (1 - t).reshape(5, 1, 1, 1) * v, noise)
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[4], noise[4])


def test_hand_worked() -> None:
    x0, noise, t = torch.tensor([[2.0, -4.0]]), torch.tensor([[6.0, 0.0]]), torch.tensor([0.25])
    assert interpolate(x0, noise, t).tolist() == [[3.0, -3.0]]
    assert velocity_target(x0, noise).tolist() == [[4.0, 4.0]]


def test_shapes_never_broadcast() -> None:
    x0 = torch.zeros(4, 3)
    wrong: list[Callable[[], torch.Tensor]] = [
        lambda: interpolate(x0, torch.zeros(1, 3), torch.zeros(4)),
        lambda: interpolate(x0, x0, torch.zeros(1)),
        lambda: interpolate(x0, x0, torch.zeros(4, 1)),
        lambda: velocity_target(x0, torch.zeros(3)),
        lambda: x0_from_velocity(x0, torch.zeros(4, 1), torch.zeros(4)),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match="must be"):
            call()


def test_rollout_grid_trains_every_step_without_replacement() -> None:
    t = draw_timesteps("rollout_grid", GRID, units=7, draws=10, fraction=0.99, generator=generator())
    assert t.shape == (10, 7)
    assert t.dtype == torch.float32
    expected = GRID[:-1].float().flip(0)
    for unit in range(7):
        assert torch.equal(t[:, unit].sort().values, expected)
    assert not torch.equal(t[:, 0], t[:, 1])


def test_rollout_grid_with_fewer_draws_reaches_every_step_equally_often() -> None:
    t = draw_timesteps("rollout_grid", GRID, units=5000, draws=2, fraction=0.99, generator=generator())
    values, counts = t.unique(return_counts=True)
    assert torch.equal(values, GRID[:-1].float().flip(0))
    # Expected 1000 each, standard deviation 28.
    assert bool(((counts - 1000).abs() < 150).all())
    assert bool((t[0] != t[1]).all())


def test_rollout_grid_with_more_draws_than_points_repeats_evenly() -> None:
    grid = torch.tensor([1.0, 0.7, 0.4, 0.0])
    t = draw_timesteps("rollout_grid", grid, units=3, draws=7, fraction=1.0, generator=generator())
    for unit in range(3):
        counts = t[:, unit].unique(return_counts=True)[1]
        assert sorted(counts.tolist()) == [2, 2, 3]


def test_the_step_that_draws_nothing_is_left_out() -> None:
    stock = torch.tensor([1.0, 0.889, 0.778, 0.667, 0.556, 0.445, 0.334, 0.223, 0.112, 0.001, 0.0])
    t = draw_timesteps("rollout_grid", stock, units=1, draws=9, fraction=0.99, generator=generator())
    torch.testing.assert_close(t[:, 0].sort(descending=True).values, stock[:9])


@pytest.mark.parametrize(
    ("steps", "fraction", "kept"), [(10, 0.99, 10), (40, 0.99, 40), (200, 0.99, 199), (10, 0.5, 6)]
)
def test_fraction_keeps_the_noisiest_steps(steps: int, fraction: float, kept: int) -> None:
    grid = torch.linspace(1, 0, steps + 1)
    t = draw_timesteps("rollout_grid", grid, units=1, draws=kept, fraction=fraction, generator=generator())
    torch.testing.assert_close(t[:, 0].sort(descending=True).values, grid[:kept])


def test_independent_grid_draws_reach_every_step_and_may_repeat() -> None:
    t = draw_timesteps("rollout_grid_independent", GRID, units=5000, draws=2, fraction=0.99, generator=generator())
    values, counts = t.unique(return_counts=True)
    assert torch.equal(values, GRID[:-1].float().flip(0))
    # Of 10,000 draws of 10 points 1000 each, deviation 30; of 5000 pairs a tenth alike, deviation 21.
    assert bool(((counts - 1000).abs() < 150).all())
    assert abs(int((t[0] == t[1]).sum()) - 500) < 100


def test_uniform_fills_the_noisy_range() -> None:
    t = draw_timesteps("uniform", GRID, units=4000, draws=2, fraction=0.5, generator=generator())
    assert t.min() >= 0.5
    assert t.max() <= 1.0
    assert t.mean().item() == pytest.approx(0.75, abs=0.01)
    assert torch.corrcoef(t)[0, 1].abs() < 0.06


def test_stratified_has_one_draw_in_each_stratum_in_random_order() -> None:
    t = draw_timesteps("stratified", GRID, units=400, draws=4, fraction=0.99, generator=generator())
    stratum = ((t.double() - 0.01) / 0.99 * 4).floor().long()
    assert torch.equal(stratum.sort(dim=0).values, torch.arange(4).unsqueeze(1).expand(4, 400))
    # Each draw visits all strata, so that no draw is always the noisy one.
    assert bool((torch.stack([torch.bincount(row, minlength=4) for row in stratum]) > 50).all())


@pytest.mark.parametrize("mode", TIMESTEP_MODES)
def test_the_seed_decides(mode: str) -> None:
    def once(seed: int) -> torch.Tensor:
        return draw_timesteps(mode, GRID, units=3, draws=4, fraction=0.99, generator=generator(seed))

    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1), once(2))


def test_bad_input_is_told() -> None:
    def call(mode: str = "uniform", sigmas: torch.Tensor = GRID, units: int = 2, fraction: float = 0.99) -> None:
        draw_timesteps(mode, sigmas, units=units, draws=2, fraction=fraction, generator=generator())

    with pytest.raises(CRDError, match="rollout_grid, rollout_grid_independent, uniform, stratified"):
        call(mode="grid")
    for fraction in (0.0, 1.5):
        with pytest.raises(CRDError, match="fraction must lie"):
            call(fraction=fraction)
    with pytest.raises(CRDError, match=r"keeps no rollout step; use 0\.1 or more"):
        call(sigmas=GRID * 0.9, fraction=0.05)
    for sigmas in (GRID.flip(0), GRID[:-1], GRID * 1000, torch.tensor([1.0, 1.0, 0.0])):
        with pytest.raises(ValueError, match="decrease from at most 1 to 0"):
            call(sigmas=sigmas)
    with pytest.raises(ValueError, match=r"\(S\+1,\)"):
        call(sigmas=GRID[None])
    with pytest.raises(ValueError, match="units"):
        call(units=0)
