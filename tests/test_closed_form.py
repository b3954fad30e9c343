"""CRD against the exact optimum p_old exp(r / β) / Z of 2-D Gaussians.

Settings of every run: `old` fixed, likelihood weighting, advantages are the raw rewards, no KL, K = 16
images a group, t ~ U(0.001, 1) shared by a group. Errors are relative, in the norms of `relative_errors`.
"""

from __future__ import annotations

import pytest
import torch
from gaussian_toy import (
    FreePolicy,
    Gaussian,
    GaussianPolicy,
    PromptedPolicy,
    QuadraticReward,
    World,
    ode_moments,
    relative_errors,
)

from crd.objectives.crd import CRDObjectiveConfig

DOUBLE = torch.float64
STANDARD = Gaussian(torch.zeros(2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE))
CORRELATED = Gaussian(torch.tensor([0.3, -0.2], dtype=DOUBLE), torch.tensor([[1.0, 0.4], [0.4, 0.8]], dtype=DOUBLE))
REWARD = QuadraticReward(torch.tensor([1.0, -0.5], dtype=DOUBLE), torch.tensor([0.5, 0.0], dtype=DOUBLE))


def config(beta: float, residual: str = "leave_one_out") -> CRDObjectiveConfig:
    return CRDObjectiveConfig(beta=beta, residual=residual, weighting="likelihood", kl_max=0.0)


def test_implicit_reward_is_the_exact_log_ratio() -> None:
    policy = GaussianPolicy(REWARD.optimum(CORRELATED, beta=1.0))
    x0 = CORRELATED.sample(20, torch.Generator().manual_seed(1))
    mean, error = World(CORRELATED, REWARD).mean_implicit_reward(policy, x0, draws=20_000, seed=2)
    exact = policy.gaussian().log_prob(x0).detach() - CORRELATED.log_prob(x0)
    z = (mean - exact) / error
    assert z.abs().max() < 4
    assert 0.4 < z.square().mean() < 2.2  # chi-square with 20 degrees, two-sided 1e-3
    assert error.max() < 0.05 * exact.std()  # a bias of a few percent would show


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_leave_one_out_reaches_the_closed_form_optimum(beta: float) -> None:
    world = World(CORRELATED, REWARD)
    policy = GaussianPolicy(CORRELATED)
    world.train(policy, config(beta), steps=500, groups=64, draws=2, lr=0.02)
    exact = REWARD.optimum(CORRELATED, beta)
    mean, covariance = relative_errors(policy.gaussian(), exact)
    start_mean, start_covariance = relative_errors(CORRELATED, exact)
    assert start_mean > 0.4
    assert start_covariance > 0.15
    assert mean < 0.05
    assert covariance < 0.05


def test_per_draw_is_shrunk_towards_old() -> None:
    # Exact: mean (0.667, -0.5), variances (0.667, 1). The published residual stops at about (0.19, -0.10) and
    # (0.92, 1): a quarter of the way that leave_one_out goes.
    policy = GaussianPolicy(STANDARD)
    World(STANDARD, REWARD).train(policy, config(1.0, "per_draw"), steps=300, groups=64, draws=2, lr=0.02)
    got = policy.gaussian()
    assert got.mean.tolist() == pytest.approx([0.19, -0.10], abs=0.04)
    assert got.covariance.diagonal().tolist() == pytest.approx([0.92, 1.0], abs=0.04)


def test_leave_one_out_is_not_shrunk_in_the_same_world() -> None:
    policy = GaussianPolicy(STANDARD)
    World(STANDARD, REWARD).train(policy, config(1.0), steps=500, groups=64, draws=2, lr=0.02)
    mean, covariance = relative_errors(policy.gaussian(), REWARD.optimum(STANDARD, 1.0))
    assert mean < 0.05
    assert covariance < 0.05


def test_a_network_over_prompts_reaches_the_optimum_of_each() -> None:
    # Mean rewards of prompts lie 8 apart, deviations within one are about 1: centering must be exact.
    prompts = (-1.0, 0.5, 1.0)
    torch.manual_seed(0)
    policy = PromptedPolicy(CORRELATED)
    World(CORRELATED, REWARD, prompts).train(policy, config(1.0), steps=600, groups=96, draws=2, lr=0.01)
    for prompt in prompts:
        got = policy.gaussian(torch.tensor(prompt, dtype=DOUBLE))
        exact = REWARD.optimum(CORRELATED, 1.0, prompt)
        assert (got.mean - exact.mean).norm() < 0.06
        assert relative_errors(got, exact)[1] < 0.08


def test_a_free_velocity_network_fits_the_log_ratio_but_not_the_density() -> None:
    """The loss fixes R, one function of x0; a free velocity is a function of x_t and t, and many have that R.

    So p* is a zero of the loss, but not the only one: the network overshoots at high noise, where the
    likelihood weight is low. Its samples end at errors of 17% in mean and covariance, from 56% and 36% at the
    start (after four times the steps 24% and 22%); a family of densities, as above, has no such freedom.
    """
    world = World(CORRELATED, REWARD)
    torch.manual_seed(0)
    policy = FreePolicy(CORRELATED)
    world.train(policy, config(1.0), steps=600, groups=32, draws=4, lr=0.01)
    x0 = CORRELATED.sample(100, torch.Generator().manual_seed(1))
    implicit = world.mean_implicit_reward(policy, x0, draws=2000, seed=2)[0]
    reward = REWARD(x0, torch.ones(100, dtype=DOUBLE))
    implicit, reward = implicit - implicit.mean(), reward - reward.mean()
    assert (implicit - reward).norm() / reward.norm() < 0.1
    exact = REWARD.optimum(CORRELATED, 1.0)
    mean, covariance = relative_errors(ode_moments(policy, 10_000, 20, seed=3), exact)
    start_mean, start_covariance = relative_errors(CORRELATED, exact)
    assert mean < min(0.25, start_mean / 2)
    assert covariance < min(0.25, start_covariance / 1.5)
    # How far the correction goes beyond the exact one at t = 0.9.
    x_t, t = torch.randn(5000, 2, dtype=DOUBLE), torch.full((5000,), 0.9, dtype=DOUBLE)
    wanted = exact.velocity(x_t, t) - CORRELATED.velocity(x_t, t)
    with torch.no_grad():
        made = policy(x_t, t, torch.ones_like(t)) - CORRELATED.velocity(x_t, t)
    assert 1.5 < (made * wanted).sum() / wanted.square().sum() < 4
