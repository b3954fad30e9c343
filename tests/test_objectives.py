"""The objectives beside crd: hand-worked numbers, plain autograd references, and what must change nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from objective_rows import DOUBLE, make_outputs, make_rows, pick_outputs, pick_rows
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from crd.config import CRDConfig
from crd.errors import CRDError
from crd.objectives import OBJECTIVES
from crd.objectives.awm import AWMObjectiveConfig
from crd.objectives.base import DenoiserOutputs, Rows
from crd.objectives.crd import CRDObjectiveConfig
from crd.objectives.flow_grpo import FlowGRPOObjectiveConfig
from crd.objectives.kl import ObjectiveConfig
from crd.objectives.nft import NFTObjectiveConfig
from crd.objectives.raft import RAFTObjectiveConfig, best_rows

CONFIGS: dict[str, ObjectiveConfig] = {
    "nft": NFTObjectiveConfig(beta=0.3),
    "nft-unit": NFTObjectiveConfig(weighting="unit", kl_max=0.0),
    "awm": AWMObjectiveConfig(clip_range=0.2),
    "awm-huber": AWMObjectiveConfig(matching_loss="huber", clip_range=0.05, kl_max=0.0),
    "flow_grpo": FlowGRPOObjectiveConfig(clip_range=0.03),
    "raft": RAFTObjectiveConfig(best_of=2),
}
ON_POLICY: dict[str, object] = {"objective": "flow_grpo", "sampler_slope": 0.0}


def gradient(config: ObjectiveConfig, outputs: DenoiserOutputs, rows: Rows) -> tuple[float, Tensor]:
    """Loss of all rows at once, and its gradient by the velocity of the policy."""
    policy = outputs.policy.clone().requires_grad_()
    objective = config.build()
    loss = objective.loss(objective.terms(dataclasses.replace(outputs, policy=policy)), rows).loss
    return loss.item(), torch.autograd.grad(loss, policy)[0]


def near_old(outputs: DenoiserOutputs, size: float = 0.1) -> DenoiserOutputs:
    """The same with a policy close to `old`, so that some ratios are inside of the clip and some outside."""
    return dataclasses.replace(outputs, policy=outputs.of_old() + size * (outputs.policy - outputs.of_old()))


# Plain references: one row at a time, straight from the formulas, in other words than the package's.


def nft_row(config: NFTObjectiveConfig, v: Tensor, o: DenoiserOutputs, rows: Rows, i: int) -> Tensor:
    b, t, a = config.beta, o.t[i], rows.advantage[i]
    noise = torch.randn(v.shape, generator=torch.Generator().manual_seed(i), dtype=DOUBLE)
    x0 = noise - o.target[i]
    x_t = (1 - t) * x0 + t * noise
    total = torch.zeros((), dtype=DOUBLE)
    for weight, mixed in ((a, (1 - b) * o.old[i] + b * v), (1 - a, (1 + b) * o.old[i] - b * v)):  # type: ignore[index]
        found = x_t - t * mixed
        scale = (found - x0).abs().mean().item() if config.weighting == "adaptive" else 1.0
        total = total + weight * ((found - x0) ** 2).mean() / max(scale, 1e-5)
    return config.loss_scale * total / b


def awm_row(config: AWMObjectiveConfig, v: Tensor, o: DenoiserOutputs, rows: Rows, i: int) -> Tensor:
    def likelihood(velocity: Tensor) -> Tensor:
        e = ((velocity - o.target[i]) ** 2).mean()
        return -e if config.matching_loss == "squared" else -4 * o.t[i] * ((e + 1e-10).sqrt().sqrt() - 1e-10**0.25)

    return clipped(torch.exp(likelihood(v) - likelihood(o.old[i])), rows.advantage[i], config)  # type: ignore[index]


def clipped(ratio: Tensor, advantage: Tensor, config: AWMObjectiveConfig | FlowGRPOObjectiveConfig) -> Tensor:
    a, low, high = (advantage - 0.5) * 2 * config.loss_scale, 1 - config.clip_range, 1 + config.clip_range
    return -torch.min(a * ratio, a * torch.clip(ratio, low, high))


def flow_grpo_row(config: FlowGRPOObjectiveConfig, v: Tensor, o: DenoiserOutputs, rows: Rows, i: int) -> Tensor:
    """The step as a Gaussian of the velocity that it took; `old` drew it."""
    spread = o.steps.precision[i] ** -0.5  # type: ignore[union-attr]
    new, old = (Normal(mean, spread).log_prob(o.target[i]).mean() for mean in (v, o.old[i]))  # type: ignore[index]
    return clipped(torch.exp(new - old), rows.advantage[i], config)


def raft_row(config: RAFTObjectiveConfig, v: Tensor, o: DenoiserOutputs, rows: Rows, i: int) -> Tensor:
    rivals = {
        (reward, -image)
        for group, image, reward in zip(
            rows.group_id.tolist(), rows.image_id.tolist(), rows.reward.tolist(), strict=True
        )
        if group == int(rows.group_id[i])
    }
    mine = (rows.reward[i].item(), -int(rows.image_id[i]))
    kept = sum(other > mine for other in rivals) < config.best_of
    kept_of_all = sum(min(config.best_of, images) for images in (3, 2, 4)) / 9  # of `make_rows`
    return kept * ((v - o.target[i]) ** 2).mean() / kept_of_all


def kl_row(config: ObjectiveConfig, v: Tensor, o: DenoiserOutputs, i: int) -> Tensor:
    anchor = o.anchor[i]  # type: ignore[index]
    if not isinstance(config, FlowGRPOObjectiveConfig):
        return ((v - anchor) ** 2).mean()
    spread = o.steps.precision[i] ** -0.5  # type: ignore[union-attr]
    return kl_divergence(Normal(v, spread), Normal(anchor, spread)).mean()


REFERENCES: dict[type, Callable[..., Tensor]] = {
    NFTObjectiveConfig: nft_row,
    AWMObjectiveConfig: awm_row,
    FlowGRPOObjectiveConfig: flow_grpo_row,
    RAFTObjectiveConfig: raft_row,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_are_those_of_a_plain_reference(name: str) -> None:
    config, rows = CONFIGS[name], make_rows()
    outputs = near_old(make_outputs(len(rows)))
    policy = outputs.policy.clone().requires_grad_()
    reference = REFERENCES[type(config)]
    total = torch.zeros((), dtype=DOUBLE)
    for i in range(len(rows)):
        if rows.has_signal[i]:
            total = total + reference(config, policy[i], outputs, rows, i)
        if config.kl_max > 0:
            strength = config.kl_min + (config.kl_max - config.kl_min) * rows.kl_gate[i]
            total = total + strength * kl_row(config, policy[i], outputs, i)
    wanted = torch.autograd.grad(total / len(rows), policy)[0]
    loss, found = gradient(config, outputs, rows)
    assert loss == pytest.approx(total.item() / len(rows), rel=1e-10)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_order_and_split_of_rows_change_nothing(name: str) -> None:
    config, rows = CONFIGS[name], make_rows()
    outputs = near_old(make_outputs(len(rows)))
    loss, wanted = gradient(config, outputs, rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))
    other, found = gradient(config, pick_outputs(outputs, order), pick_rows(rows, order))
    assert other == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(found, wanted[order], rtol=1e-10, atol=1e-14)
    objective = config.build()
    whole = objective.terms(outputs)
    parts = [objective.terms(pick_outputs(outputs, index)) for index in torch.arange(len(rows)).split(4)]
    for term, values in whole.items():
        torch.testing.assert_close(torch.cat([part[term] for part in parts]), values, rtol=1e-12, atol=1e-14)


def hand(policy: float, advantage: float, t: float = 0.5) -> tuple[DenoiserOutputs, Rows]:
    """One group of two images, one draw each, of one number: v_old = 0, v = 1, anchor 0; the second image is at old."""
    column = torch.tensor([[policy], [0.0]], dtype=DOUBLE)
    zeros, ones = torch.zeros(2, 1, dtype=DOUBLE), torch.ones(2, 1, dtype=DOUBLE)
    rows = Rows(
        group_id=torch.zeros(2, dtype=torch.long), image_id=torch.tensor([0, 1]), draw=torch.zeros(2, dtype=torch.long),
        advantage=torch.tensor([advantage, 1 - advantage], dtype=DOUBLE), reward=torch.tensor([1.0, 0.0], dtype=DOUBLE),
        kl_gate=torch.ones(2, dtype=DOUBLE), has_signal=torch.ones(2, dtype=torch.bool),
    )  # fmt: skip
    return DenoiserOutputs(column, zeros, zeros, ones, t=torch.full((2,), t, dtype=DOUBLE)), rows


def test_nft_by_hand() -> None:
    # v⁺ = 0.4, v⁻ = -0.4; x̂0 - x0 = (1 - v̂) / 2 = 0.3 and 0.7. Adaptive weighting of one number gives its size.
    outputs, rows = hand(policy=0.8, advantage=0.75)
    expected = (0.75 * 0.3 + 0.25 * 0.7 + 0.5) / 2  # the second image: 0.5 on both sides
    config = NFTObjectiveConfig(beta=0.5, kl_max=0.1)
    assert gradient(config, outputs, rows)[0] == pytest.approx(5 / 0.5 * expected + 0.1 * 0.8**2 / 2)
    # Unit weighting: 0.09 and 0.49.
    expected = (0.75 * 0.09 + 0.25 * 0.49 + 0.25) / 2
    config = NFTObjectiveConfig(beta=0.5, kl_max=0.0, weighting="unit")
    assert gradient(config, outputs, rows)[0] == pytest.approx(5 / 0.5 * expected)


def test_awm_by_hand() -> None:
    # Errors (0.5 - 1)² = 0.25 and 1: log-ratio 0.75, ratio above the clip, and 1 for the second image.
    outputs, rows = hand(policy=0.5, advantage=0.7)
    config = AWMObjectiveConfig(clip_range=0.2, loss_scale=1.0, kl_max=0.0)
    loss, slope = gradient(config, outputs, rows)
    assert loss == pytest.approx((-0.4 * 1.2 + 0.4) / 2)
    assert slope[0].item() == 0  # clipped: nothing more to gain from this image
    # The loser of the pair is never clipped from that side.
    outputs, rows = hand(policy=0.5, advantage=0.3)
    loss, slope = gradient(config, outputs, rows)
    assert loss == pytest.approx((0.4 * math.exp(0.75) - 0.4) / 2)
    assert slope[0].item() == pytest.approx(0.4 * math.exp(0.75) * 2 * 0.5 / 2)
    terms = AWMObjectiveConfig(matching_loss="huber", kl_max=0.0).build().terms(outputs)
    assert terms["log_ratio"][0].item() == pytest.approx(2 * (1 - 0.25**0.25), rel=1e-4)


def test_raft_by_hand() -> None:
    outputs, rows = hand(policy=0.4, advantage=0.9)
    assert gradient(RAFTObjectiveConfig(kl_max=0.0), outputs, rows)[0] == pytest.approx(0.6**2)


def test_ties_go_to_the_lower_image_id_in_any_order() -> None:
    rows = Rows(
        group_id=torch.tensor([4, 4, 4, 4, 4, 4, 9, 9]), image_id=torch.tensor([8, 2, 5, 2, 8, 5, 1, 3]),
        draw=torch.tensor([0, 0, 0, 1, 1, 1, 0, 0]), advantage=torch.full((8,), 0.5),
        reward=torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.2, 0.3]), kl_gate=torch.zeros(8),
        has_signal=torch.ones(8, dtype=torch.bool),
    )  # fmt: skip
    for order in (torch.arange(8), torch.tensor([4, 7, 0, 2, 6, 3, 5, 1])):
        shuffled = pick_rows(rows, order)
        pairs = zip(shuffled.group_id.tolist(), shuffled.image_id.tolist(), strict=True)
        kept = {pair for pair, best in zip(pairs, best_rows(shuffled, 1).tolist(), strict=True) if best}
        assert kept == {(4, 2), (9, 3)}


def test_raft_ranks_by_advantage_and_then_by_reward() -> None:
    """Rewards on one scale may rank otherwise than their plain sum; what the clip made equal, that sum ranks."""
    rows = Rows(
        group_id=torch.zeros(4, dtype=torch.int64), image_id=torch.arange(4), draw=torch.zeros(4, dtype=torch.int64),
        advantage=torch.tensor([0.2, 1.0, 1.0, 0.9]), reward=torch.tensor([9.0, 1.0, 2.0, 8.0]),
        kl_gate=torch.zeros(4), has_signal=torch.ones(4, dtype=torch.bool),
    )  # fmt: skip
    assert best_rows(rows, 1).tolist() == [False, False, True, False]
    assert best_rows(rows, 3).tolist() == [False, True, True, True]


@pytest.mark.parametrize("weighting", ["adaptive", "unit"])
def test_at_old_nft_and_crd_are_advantage_weighted_matching(weighting: str) -> None:
    """Row by row the same direction; NFT measures errors of x0, which are t times those of the velocity."""
    rows = make_rows((4, 4), draws=2)
    # Advantages with mean 1/2 in each group, as they are without clipping.
    sign = torch.where(rows.image_id % 2 == 0, 1.0, -1.0).to(DOUBLE)
    rows = dataclasses.replace(
        rows, advantage=0.5 + 0.3 * sign * (1 + rows.image_id // 2) / 2, has_signal=torch.ones(16, dtype=torch.bool)
    )
    outputs = make_outputs(16)
    outputs = dataclasses.replace(outputs, policy=outputs.of_old().clone())
    nft = gradient(NFTObjectiveConfig(weighting=weighting, kl_max=0.0), outputs, rows)[1].flatten(1)
    crd = gradient(CRDObjectiveConfig(weighting=weighting, kl_max=0.0), outputs, rows)[1].flatten(1)
    t = outputs.t[:, None] if weighting == "adaptive" else outputs.t[:, None] ** 2
    torch.testing.assert_close(nft, t * crd, rtol=1e-9, atol=1e-14)
    error = (outputs.of_old() - outputs.target).flatten(1)
    scale = error.abs().mean(1) if weighting == "adaptive" else torch.ones(16, dtype=DOUBLE)
    matching = (rows.advantage - 0.5)[:, None] * 2 * error / scale[:, None] / error.shape[1]
    torch.testing.assert_close(crd, 10 * matching / 16, rtol=1e-9, atol=1e-14)


def test_awm_without_a_clip_is_advantage_weighted_matching_too() -> None:
    rows, outputs = make_rows((4, 4)), make_outputs(24)
    outputs = dataclasses.replace(outputs, policy=outputs.of_old().clone())
    found = gradient(AWMObjectiveConfig(kl_max=0.0), outputs, rows)[1].flatten(1)
    error = (outputs.of_old() - outputs.target).flatten(1)
    weight = (2 * rows.advantage - 1) * rows.has_signal
    torch.testing.assert_close(found, 5 * weight[:, None] * 2 * error / error.shape[1] / 24, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", CONFIGS)
def test_groups_without_signal_get_the_kl_alone(name: str) -> None:
    config, rows = CONFIGS[name], make_rows()
    outputs = near_old(make_outputs(len(rows)))
    found = gradient(config, outputs, rows)[1][~rows.has_signal]
    assert bool((found == 0).all()) == (config.kl_max == 0)
    without = dataclasses.replace(config, kl_max=0.0)
    silent = dataclasses.replace(rows, has_signal=torch.zeros_like(rows.has_signal))
    loss, slope = gradient(without, outputs, silent)
    assert loss == 0
    assert not slope.any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_settings_have_the_defaults_of_the_run(name: str) -> None:
    run = {field.name: field.default for field in dataclasses.fields(CRDConfig)}
    for field in dataclasses.fields(OBJECTIVES[name]):
        assert run[field.name] == field.default, field.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"objective": "nft", "centering": "tempered"},
            "centering=tempered is not read by objective nft; leave",
        ),
        ({"objective": "awm", "weighting": "unit"}, "weighting=unit is not read by objective awm"),
        ({"objective": "raft", "beta": 0.1}, "beta=0.1 is not read by objective raft"),
        ({"best_of": 2}, "best_of=2 is not read by objective crd"),
        ({"objective": "nft", "weighting": "likelihood"}, "weighting must be one of adaptive, unit, got 'likelihood'"),
        ({"objective": "nft", "beta": 0.0}, "beta must be above 0"),
        ({"objective": "awm", "clip_range": 0.0}, "clip_range must be above 0"),
        ({"objective": "awm", "matching_loss": "l1"}, "matching_loss must be one of squared, huber"),
        ({"objective": "raft", "best_of": 24}, "best_of=24 keeps every image of group_size=24; lower it"),
        ({"objective": "raft", "best_of": 0}, "best_of must be at least 1"),
        ({"objective": "raft", "kl_min": 1.0}, "kl_min <= kl_max"),
        ({"objective": "nft", "sde_noise": 0.1}, "sde_noise=0.1 is not read by objective nft"),
        ({"objective": "flow_grpo"}, "got sampler_slope=0.0075; set sampler_slope=0.0"),
        ({"objective": "flow_grpo", "decouple_sampler": False}, "got old_start=0.25; set old_start=0.0"),
        ({**ON_POLICY, "timesteps": "uniform"}, "got timesteps=uniform; set timesteps=rollout_grid"),
        ({**ON_POLICY, "solver": "dpmsolver++"}, "got solver=dpmsolver++; set solver=euler"),
        ({**ON_POLICY, "sde_noise": 0.0}, "sde_noise must be above 0"),
        ({"objective": "cdr"}, "unknown objective 'cdr'; choose one of: crd, "),
    ],
    ids=str,
)
def test_what_an_objective_does_not_read_or_take_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(CRDError) as error:
        CRDConfig(**change)  # type: ignore[arg-type]
    assert message in str(error.value)
    assert "\n" not in str(error.value)
