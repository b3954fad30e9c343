"""The stochastic sampler, its densities, and the trajectories that Flow-GRPO is trained on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from objective_rows import make_outputs
from tiny_families import tiny_family
from torch.distributions import Normal, kl_divergence

from crd.backbones import load_backbone
from crd.config import CRDConfig
from crd.errors import CRDError
from crd.objectives.flow_grpo import FlowGRPOObjectiveConfig
from crd.records import Rollout
from crd.run_parts import check_settings, check_times
from crd.sde import SDESteps, log_density
from crd.trainer import CRDTrainer
from crd.trajectories import Trajectories

DOUBLE = torch.float64
GRID = torch.tensor([0.8, 0.6, 0.0], dtype=DOUBLE)


def test_a_step_by_hand() -> None:
    # σ² = 0.25 · 0.8 / 0.2 = 1 and Δt = -0.2.
    sde = SDESteps.of(GRID, noise=0.5)
    assert sde.x_weight[0].item() == pytest.approx(1 - 0.2 / 1.6)
    assert sde.v_weight[0].item() == pytest.approx(-0.2 * (1 + 0.2 / 1.6))
    assert sde.std[0].item() == pytest.approx(math.sqrt(0.2))
    x, v, noise = (torch.tensor([[value]], dtype=DOUBLE) for value in (2.0, 1.0, -1.0))
    assert sde.step(0, x, v, noise).item() == pytest.approx(0.875 * 2 - 0.225 - math.sqrt(0.2))
    # At t = 1 the second time of the grid stands for 1 - t.
    clamped = SDESteps.of(torch.tensor([1.0, 0.8, 0.0]), noise=0.5)
    assert clamped.std[0].item() == pytest.approx(0.5 * math.sqrt(1 / 0.2 * 0.2), rel=1e-6)
    assert clamped.v_weight[0].item() == pytest.approx(-0.2, rel=1e-6)


def test_without_noise_a_step_is_that_of_the_ode() -> None:
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0], dtype=DOUBLE)
    sde, (x, v) = SDESteps.of(sigmas, noise=0.0), torch.randn(2, 5, 3, dtype=DOUBLE)
    for index in range(3):
        euler = x + (sigmas[index + 1] - sigmas[index]) * v
        torch.testing.assert_close(sde.step(index, x, v, torch.randn_like(x)), euler)


def test_densities_and_divergence_are_those_of_the_gaussian() -> None:
    sde = SDESteps.of(GRID, noise=0.7)
    x, x_next, v, other = torch.randn(4, 2, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([0, 1])
    target, precision = sde.target(index, x, x_next), sde.precision(index)
    means = [sde.x_weight[index, None] * x + sde.v_weight[index, None] * one for one in (v, other)]
    here, there = (Normal(mean, sde.std[index, None]) for mean in means)
    wanted = (here.log_prob(x_next) - there.log_prob(x_next)).mean(1)
    torch.testing.assert_close(log_density(v, target, precision) - log_density(other, target, precision), wanted)
    torch.testing.assert_close(precision / 2 * (v - other).square().mean(1), kl_divergence(here, there).mean(1))
    # The form in which Flow-GRPO writes it.
    t, dt = GRID[:-1], GRID.diff()
    sigma = 0.7 * (t / (1 - t)).sqrt()
    torch.testing.assert_close(precision, -dt * (sigma * (1 - t) / (2 * t) + 1 / sigma).square())


def test_the_sampler_keeps_the_marginals_of_the_ode() -> None:
    """Data N(0, 1/4), whose velocity is known: every x_t has the variance of the path."""
    g, steps, data = torch.Generator().manual_seed(0), 200, 0.25
    sigmas = torch.linspace(1, 0, steps + 1, dtype=DOUBLE)
    sde, x = SDESteps.of(sigmas, noise=0.7), torch.randn(20_000, dtype=DOUBLE, generator=g)
    for index, t in enumerate(sigmas[:-1].tolist()):
        variance = (1 - t) ** 2 * data + t**2
        if index in (50, 100, 150):
            assert x.var().item() == pytest.approx(variance, rel=0.05)
        v = (t - (1 - t) * data) / variance * x
        x = sde.step(index, x, v, torch.randn(len(x), dtype=DOUBLE, generator=g))
    assert x.var().item() == pytest.approx(data, rel=0.05)


@pytest.fixture
def run(config: CRDConfig) -> CRDConfig:
    """Four steps, of which each image is trained on two, its own ones; its policy is what drew them."""
    return replace(
        config, objective="flow_grpo", sampler_start=0.0, sampler_slope=0.0, rollout_steps=4, timestep_fraction=1.0,
        share_timesteps=False, clip_range=1e-3, micro_batch=3, eval_prompts=None,
    )  # fmt: skip


def trajectories(rollout: Rollout) -> Trajectories:
    assert rollout.trajectories is not None
    return rollout.trajectories


def test_trajectories_are_kept_where_they_are_trained(run: CRDConfig) -> None:
    trainer = CRDTrainer(args=run)
    plan = trainer.plan(0)
    rollout = trainer.rollout(plan)
    kept = trajectories(rollout)
    assert kept.states.shape[:2] == (8, 4)  # two steps have at most four ends
    steps = torch.cat([kept.sde.index(times).view(2, -1).T for times in plan.times])
    image = torch.cat(list(plan.steps))
    seen = set()
    for step in steps.T:
        taken = kept.at(image, step)
        for row, (place, index) in enumerate(zip(image.tolist(), step.tolist(), strict=True)):
            if index == 3:
                assert torch.equal(taken.x_next[row], rollout.x0[place])
            if kept.slot[place, min(index + 2, 4)] >= 0 and index + 1 in steps[image == place]:
                following = kept.at(torch.tensor([place]), torch.tensor([index + 1]))
                assert torch.equal(following.x[0], taken.x_next[row])
            seen.add(index)
        # x_next lies as far from its mean as the noise: standard normal, mean over 256 numbers.
        assert bool(((-2 * taken.log_density - 1).abs() < 0.5).all())
    assert seen == {0, 1, 2, 3}
    ode = CRDTrainer(args=replace(run, objective="crd", clip_range=1e-4))
    assert ode.rollout(ode.plan(0)).trajectories is None
    # Noise belongs to the image, whoever is drawn with it.
    alone = trajectories(CRDTrainer(args=replace(run, rollout_batch=1)).rollout(plan))
    torch.testing.assert_close(alone.at(image, steps[:, 0]).x, kept.at(image, steps[:, 0]).x, rtol=1e-4, atol=1e-4)


def test_the_ratio_is_one_where_the_policy_is_the_sampler(run: CRDConfig) -> None:
    trainer = CRDTrainer(args=replace(run, optimizer_steps=1, finetune="full"))
    first = trainer.update()
    assert (first["ratio_mean"], first["outside_clip"]) == (pytest.approx(1, abs=1e-5), 0)
    assert first["ratio_std"] < 1e-5
    second = trainer.update()  # the policy has moved, and the sampler with it
    assert second["ratio_std"] < 1e-5
    # A second step on the images of one update is off-policy, and the clip has something to do.
    moved = CRDTrainer(args=replace(run, optimizer_steps=2, finetune="full", clip_range=1e-5)).update()
    assert moved["ratio_std"] > 1e-5
    assert moved["outside_clip"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": 5}, "got draws=5 of 4 steps with timestep_fraction=1; set draws=4"),
        ({"rollout_guidance": 3.0}, "got rollout_guidance=3; set rollout_guidance=1"),
    ],
    ids=str,
)
def test_what_the_model_and_its_grid_do_not_allow(run: CRDConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CRDError) as error:
        CRDTrainer(args=replace(run, **change))
    assert message in str(error.value)


def test_of_a_grid_that_is_not_known_all_steps_may_be_kept(run: CRDConfig) -> None:
    grid = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    half = replace(run, timestep_fraction=0.5, draws=4)
    with pytest.raises(CRDError, match="got draws=4 of 3 steps"):
        check_times(half, grid, exact=True)
    check_times(half, grid, exact=False)
    with pytest.raises(CRDError, match="got draws=5 of 4 steps"):
        check_times(replace(half, draws=5), grid, exact=False)


@pytest.mark.parametrize("objective", ["nft", "flow_grpo"])
def test_ddpm_models_are_refused(objective: str) -> None:
    backbone = load_backbone(tiny_family("SDXL"))
    config = CRDConfig(objective=objective, sampler_slope=0.0, anchor_guidance=1.0)
    with pytest.raises(CRDError, match=f"objective={objective} is for flow matching, got a DDPM model; use crd"):
        check_settings(backbone, config)


def test_noised_images_are_no_steps() -> None:
    outputs = replace(make_outputs(3), steps=None)
    with pytest.raises(ValueError, match="steps of trajectories"):
        FlowGRPOObjectiveConfig().build().terms(outputs)
