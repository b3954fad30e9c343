"""The DDPM path seen from the straight one: the same points, the same predictions, the same steps."""

from __future__ import annotations

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from crd.backbones.vp import flow_time, target_scale, velocity_from_prediction, vp_norm, vp_timestep
from crd.errors import CRDError

T = torch.tensor([0.01, 0.3, 0.5, 0.93, 0.9998], dtype=torch.float64)


def point(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x0, noise and x_t of the straight path, float64."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, len(T), 3, 4, generator=generator, dtype=torch.float64)
    return x0, noise, (1 - T)[:, None, None] * x0 + T[:, None, None] * noise


def alpha_sigma() -> tuple[Tensor, Tensor]:
    return ((1 - T) / vp_norm(T))[:, None, None], (T / vp_norm(T))[:, None, None]


def test_the_points_are_those_of_a_variance_preserving_path() -> None:
    x0, noise, x_t = point()
    alpha, sigma = alpha_sigma()
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(alpha))
    torch.testing.assert_close(x_t / vp_norm(T)[:, None, None], alpha * x0 + sigma * noise)
    torch.testing.assert_close(flow_time((sigma / alpha).flatten()), T)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_true_prediction_is_the_true_velocity_and_errors_scale(kind: str) -> None:
    x0, noise, x_t = point()
    alpha, sigma = alpha_sigma()
    truth = noise if kind == "epsilon" else alpha * noise - sigma * x0
    torch.testing.assert_close(velocity_from_prediction(truth, x_t, T, kind), noise - x0, rtol=1e-9, atol=1e-9)
    wrong = truth + torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    error = velocity_from_prediction(wrong, x_t, T, kind) - (noise - x0)
    torch.testing.assert_close(error * target_scale(T, kind)[:, None, None], wrong - truth, rtol=1e-9, atol=1e-9)


def test_v_prediction_has_a_velocity_at_pure_noise() -> None:
    t = torch.ones(1, dtype=torch.float64)
    noise, x0 = torch.tensor([[0.5, -2.0]]).double(), torch.tensor([[1.0, 3.0]]).double()
    v = velocity_from_prediction(-x0, noise, t, "v_prediction")  # alpha = 0, sigma = 1
    torch.testing.assert_close(v, noise - x0)
    assert target_scale(t, "v_prediction").item() == 1.0


def test_an_euler_step_is_a_ddim_step() -> None:
    """DDIM: x_vp' = alpha' x0 + sigma' epsilon with x0 = (x_vp - sigma epsilon) / alpha."""
    _, _, x_t = point()
    alpha, sigma = alpha_sigma()
    epsilon, after = point(seed=5)[1], 0.6 * T
    v = velocity_from_prediction(epsilon, x_t, T, "epsilon")
    ours = (x_t + (after - T)[:, None, None] * v) / vp_norm(after)[:, None, None]
    x0 = (x_t / vp_norm(T)[:, None, None] - sigma * epsilon) / alpha
    ddim = ((1 - after) / vp_norm(after))[:, None, None] * x0 + (after / vp_norm(after))[:, None, None] * epsilon
    torch.testing.assert_close(ours, ddim, rtol=1e-9, atol=1e-9)


def test_by_hand() -> None:
    """t = 0.2: n² = 0.68; epsilon 1 at x_t = 0.6 points to x0 = (0.6 - 0.2) / 0.8 = 0.5, so v = 0.5."""
    t, x_t, one = torch.tensor([0.2]).double(), torch.tensor([[0.6]]).double(), torch.ones(1, 1).double()
    assert vp_norm(t).square().item() == pytest.approx(0.68)
    assert velocity_from_prediction(one, x_t, t, "epsilon").item() == pytest.approx(0.5)
    # v_vp = (0.8 * 1 - 0.2 * 0.5) / n = 0.7 / n
    v_vp = 0.7 / vp_norm(t)[:, None]
    assert velocity_from_prediction(v_vp, x_t, t, "v_prediction").item() == pytest.approx(0.5)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_timesteps_of_a_float32_grid_come_back_whole(zero_snr: bool) -> None:
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_snr
    )
    kept = scheduler.alphas_cumprod
    ratios = ((1 - kept) / kept).sqrt()
    found = vp_timestep(flow_time(ratios.double()).float(), ratios)
    assert torch.equal(found, torch.arange(1000.0))
    between = vp_timestep(flow_time((ratios[10] * ratios[11]).sqrt())[None], ratios)
    assert between.item() == 10.5
    outside = vp_timestep(torch.tensor([1e-6, 0.9999999]), ratios)
    assert outside.tolist() == [0.0, 999.0]


def test_other_predictions_are_refused() -> None:
    with pytest.raises(CRDError, match="must be one of epsilon, v_prediction, got 'sample'"):
        target_scale(T, "sample")
    with pytest.raises(CRDError, match="got 'sample'"):
        velocity_from_prediction(T, T, T, "sample")
