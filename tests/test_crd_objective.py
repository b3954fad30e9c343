from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_rows import DOUBLE, SHAPE, make_outputs, make_rows, pick_outputs, pick_rows
from torch import Tensor, nn

from crd.errors import CRDError
from crd.objectives import OBJECTIVES
from crd.objectives.base import DenoiserOutputs, Rows
from crd.objectives.crd import CRD, CRDInputs, CRDObjectiveConfig, crd_loss, implicit_reward

VARIANTS = [
    CRDObjectiveConfig(centering=centering, form=form, residual=residual, weighting=weighting, beta=0.7)
    for centering, form, residual, weighting in itertools.product(
        ("uniform", "tempered"),
        ("squared", "cross_entropy"),
        ("per_draw", "leave_one_out"),
        ("adaptive", "unit", "likelihood"),
    )
]
# Centered over two prompts, or not at all: log Z stays in, but rows are coupled as exactly.
OTHER_SETS = [
    CRDObjectiveConfig(centering_prompts=prompts, residual=residual, weighting="unit")
    for prompts, residual in itertools.product((2, 0), ("per_draw", "leave_one_out"))
]


class World:
    """A small real network, its fixed inputs, and the gradient of one update in two ways."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.rows = make_rows()
        self.rest = make_outputs(len(self.rows))
        self.x_t = torch.randn(len(self.rows), *SHAPE, dtype=DOUBLE)
        self.net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 3, padding=1)).double()

    def outputs(self, index: Tensor) -> DenoiserOutputs:
        return dataclasses.replace(pick_outputs(self.rest, index), policy=self.net(self.x_t[index]))

    def gradient(self) -> Tensor:
        flat = torch.cat([p.grad.flatten() for p in self.net.parameters() if p.grad is not None])
        self.net.zero_grad()
        return flat

    def at_once(self, config: CRDObjectiveConfig) -> tuple[float, Tensor]:
        out = crd_loss(CRDInputs(self.outputs(torch.arange(len(self.rows))), self.rows), config)
        out.loss.backward()
        return out.loss.item(), self.gradient()

    def in_shards(self, config: CRDObjectiveConfig, shards: list[Tensor]) -> tuple[float, Tensor]:
        """What an engine does: all terms without gradient, dloss/dterms, each shard again with gradient."""
        objective = CRD(config)
        with torch.no_grad():
            parts = [objective.terms(self.outputs(index)) for index in shards]
        terms = {name: torch.cat([part[name] for part in parts]).requires_grad_() for name in parts[0]}
        out = objective.loss(terms, pick_rows(self.rows, torch.cat(shards)))
        slopes = dict(zip(terms, torch.autograd.grad(out.loss, list(terms.values())), strict=True))
        start = 0
        for index in shards:
            shard = objective.terms(self.outputs(index))
            share = sum((slopes[name][start : start + len(index)] * shard[name]).sum() for name in shard)
            assert isinstance(share, Tensor)
            share.backward()
            start += len(index)
        return out.loss.item(), self.gradient()


@pytest.mark.parametrize(
    "config",
    VARIANTS + OTHER_SETS,
    ids=lambda c: f"{c.centering}{c.centering_prompts}-{c.form}-{c.residual}-{c.weighting}",
)
def test_micro_batches_ranks_and_order_change_neither_loss_nor_gradient(config: CRDObjectiveConfig) -> None:
    world = World()
    n = len(world.rows)
    loss, gradient = world.at_once(config)
    assert gradient.norm() > 1e-3
    everything, shuffled = torch.arange(n), torch.randperm(n, generator=torch.Generator().manual_seed(3))
    splits = [list(everything.split(size)) for size in (1, 3, 7, n)]
    splits += [list(shuffled.split(size)) for size in (1, 3, 7, n)]
    splits.append([everything[0::2], everything[1::2]])  # two ranks that interleave the rows
    for shards in splits:
        other_loss, other_gradient = world.in_shards(config, shards)
        assert other_loss == pytest.approx(loss, rel=1e-9, abs=1e-9)
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-9, atol=1e-9)


@settings(max_examples=30)
@given(st.sampled_from(VARIANTS), st.integers(0, 2), st.floats(-3, 3), st.floats(-3, 3))
def test_constants_of_one_prompt_change_nothing(
    config: CRDObjectiveConfig, which: int, of_advantage: float, of_implicit: float
) -> None:
    rows, config = make_rows(), dataclasses.replace(config, kl_max=0.0)
    values = torch.randn(len(rows), dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    group = (rows.group_id == rows.group_id.unique()[which]).double()

    def result(r: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        terms = {"implicit_reward": r.clone().requires_grad_()}
        loss = CRD(config).loss(terms, dataclasses.replace(rows, advantage=advantage)).loss
        return loss.detach(), torch.autograd.grad(loss, terms["implicit_reward"])[0]

    plain = result(values, rows.advantage)
    moved = result(values + of_implicit * group, rows.advantage + of_advantage * group)
    for got, expected in zip(moved, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_a_constant_of_one_draw_of_a_prompt_changes_nothing_either() -> None:
    # All rows of (group, draw) share one t: an offset that depends on t only must cancel.
    rows = make_rows()
    values = torch.randn(len(rows), dtype=DOUBLE)
    moved = values + 5.0 * ((rows.group_id == -3) & (rows.draw == 1))
    for config in (CRDObjectiveConfig(kl_max=0), CRDObjectiveConfig(kl_max=0, residual="leave_one_out")):
        before = CRD(config).loss({"implicit_reward": values}, rows).loss
        torch.testing.assert_close(CRD(config).loss({"implicit_reward": moved}, rows).loss, before)


def test_only_centering_within_a_prompt_cancels_its_log_z() -> None:
    rows = make_rows()
    values = torch.randn(len(rows), dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    ids = rows.group_id.unique()
    of_one, of_two = (0.5 * torch.isin(rows.group_id, ids[:count]) for count in (1, 2))

    def loss(prompts: int, implicit: Tensor) -> float:
        config = CRDObjectiveConfig(kl_max=0.0, centering_prompts=prompts)
        return CRD(config).loss({"implicit_reward": implicit}, rows).loss.item()

    assert loss(1, values + of_one) == pytest.approx(loss(1, values), rel=1e-12)
    assert loss(2, values + of_two) == pytest.approx(loss(2, values), rel=1e-12)
    for prompts, offset in ((2, of_one), (0, of_one), (0, of_two)):
        assert abs(loss(prompts, values + offset) - loss(prompts, values)) > 0.05


@pytest.mark.parametrize("weighting", ["adaptive", "unit", "likelihood"])
def test_policy_equal_to_old_gives_zero_exactly(weighting: str) -> None:
    out = make_outputs(6)
    for dtype in (torch.bfloat16, torch.float32, DOUBLE):
        v, target = out.policy.to(dtype), out.target.to(dtype)
        reward = implicit_reward(v, v.clone(), target, out.t, weighting)
        assert reward.dtype == DOUBLE
        assert reward.tolist() == [0.0] * 6


def test_at_old_the_gradient_is_advantage_weighted_matching() -> None:
    # dloss/dR = 5/β · 2β (β·0 - A_c) / N = -10 A_c / N: the gradient of a matching loss weighted by A_c.
    rows, outputs = make_rows(), make_outputs(27)
    v = outputs.old.clone().requires_grad_() if outputs.old is not None else outputs.policy
    inputs = CRDInputs(dataclasses.replace(outputs, policy=v), rows)
    crd_loss(inputs, CRDObjectiveConfig(kl_max=0.0, weighting="unit")).loss.backward()
    centered = rows.advantage.clone()
    for group in rows.group_id.unique():
        centered[rows.group_id == group] -= centered[rows.group_id == group].mean()
    expected = 20 * centered.reshape(-1, 1, 1, 1) * (v.detach() - outputs.target) / (27 * math.prod(SHAPE))
    torch.testing.assert_close(v.grad, expected)


def test_implicit_reward_hand_worked() -> None:
    v_policy, v_old = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 2.0]])
    target, t = torch.zeros(1, 2), torch.tensor([0.25])
    # Squared errors 1 + 9 and 4 + 4; mean absolute errors 2 and 2; (1 - t) / t = 3.
    assert implicit_reward(v_policy, v_old, target, t, "unit").item() == -1.0
    assert implicit_reward(v_policy, v_old, target, t, "adaptive").item() == -0.5
    assert implicit_reward(v_policy, v_old, target, t, "likelihood").item() == -6.0
    # A perfect prediction: s is clipped at 1e-5, so R = 4 / 2 - 0 / 1e-5.
    assert implicit_reward(target, v_old, target, t, "adaptive").item() == 2.0


def test_adaptive_scale_carries_no_gradient() -> None:
    v = torch.tensor([[1.0, 3.0]], dtype=DOUBLE, requires_grad=True)
    implicit_reward(v, torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0.5]), "adaptive").sum().backward()
    assert v.grad is not None
    assert v.grad.tolist() == [[-0.5, -1.5]]  # -2 v / (2 dims · s = 2)


def hand_rows() -> Rows:
    """One prompt, two images, two draws, A = (0.3, 0.7), reward (0, 1)."""
    image = torch.tensor([0, 0, 1, 1])
    return Rows(
        group_id=torch.full((4,), 9),
        image_id=image,
        draw=torch.tensor([0, 1, 0, 1]),
        advantage=torch.tensor([0.3, 0.3, 0.7, 0.7], dtype=DOUBLE),
        reward=image.double(),
        kl_gate=image.double(),
        has_signal=torch.ones(4, dtype=torch.bool),
    )


# Draw 0: R = (-1, 3), centered (-2, 2). Draw 1: R = (0, 2), centered (-1, 1). A_c = (-0.2, 0.2).
HAND_R = torch.tensor([-1.0, 0.0, 3.0, 2.0], dtype=DOUBLE)


def test_hand_worked_squared_losses() -> None:
    config = CRDObjectiveConfig(beta=0.5, kl_max=0.0)
    out = CRD(config).loss({"implicit_reward": HAND_R}, hand_rows())
    # β R_c - A_c = -+(1 - 0.2) and -+(0.5 - 0.2): mean of 0.64 and 0.09.
    assert out.metrics["loss_policy"] == pytest.approx(0.365)
    assert out.loss.item() == pytest.approx(5 / 0.5 * 0.365)
    assert out.metrics["residual_rms"] == pytest.approx(0.365**0.5)
    assert out.metrics["implicit_reward_correlation"] == pytest.approx(1.2 / (0.16 * 10 * 0.25) ** 0.5 / 2)
    assert out.metrics["implicit_reward_mean"] == 1.0
    assert out.metrics["implicit_reward_std"] == pytest.approx(2.5**0.5)
    loo = CRD(dataclasses.replace(config, residual="leave_one_out")).loss({"implicit_reward": HAND_R}, hand_rows())
    assert loo.metrics["loss_policy"] == pytest.approx(0.8 * 0.3)
    assert loo.metrics["squared_loss_unbiased"] == pytest.approx(0.8 * 0.3)


@pytest.mark.parametrize(
    ("prompts", "policy"),
    [
        (1, 0.81),  # β R_c - A_c = -+0.9 in each prompt
        (2, (4 * 0.81 + 2 * 7.29) / 6),  # -+2.7 and -+0.9 in the two of the lowest ids, -+0.9 in the third
        (3, (46.74 - 12.8**2 / 6) / 6),  # R - A = (-0.2, 1.6, 3.4, 5.2, 0.5, 2.3) less their mean
        (0, 61.04 / 6),  # R - (A - 1/2) = (0.3, 2.1, 3.9, 5.7, 1.0, 2.8)
    ],
)
def test_hand_worked_prompts_centered_together(prompts: int, policy: float) -> None:
    """Ids -3, 2, 7 with R (0, 2), (4, 6), (1, 3) and A (.2, .4), (.6, .8), (.5, .7); rows of the prompts interleave."""
    rows = Rows(
        group_id=torch.tensor([7, 2, -3, -3, 7, 2]),
        image_id=torch.arange(6),
        draw=torch.zeros(6, dtype=torch.int64),
        advantage=torch.tensor([0.5, 0.6, 0.2, 0.4, 0.7, 0.8], dtype=DOUBLE),
        reward=torch.zeros(6, dtype=DOUBLE),
        kl_gate=torch.zeros(6, dtype=DOUBLE),
        has_signal=torch.ones(6, dtype=torch.bool),
    )
    implicit = torch.tensor([1.0, 4.0, 0.0, 2.0, 3.0, 6.0], dtype=DOUBLE)
    out = CRD(CRDObjectiveConfig(kl_max=0.0, centering_prompts=prompts)).loss({"implicit_reward": implicit}, rows)
    assert out.metrics["loss_policy"] == pytest.approx(policy)


def test_hand_worked_leave_one_out_without_centering() -> None:
    config = CRDObjectiveConfig(kl_max=0.0, centering_prompts=0, residual="leave_one_out")
    out = CRD(config).loss({"implicit_reward": HAND_R}, hand_rows())
    # R - (A - 1/2) = (-0.8, 0.2) in the draws of image 0, (2.8, 1.8) in those of image 1.
    assert out.metrics["loss_policy"] == pytest.approx((-0.8 * 0.2 + 2.8 * 1.8) / 2)


def test_hand_worked_cross_entropy() -> None:
    config = CRDObjectiveConfig(kl_max=0.0, form="cross_entropy", loss_scale=1.0)
    sigmoid = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    q = sigmoid(0.2)
    value = sum(-q * math.log(sigmoid(x)) - (1 - q) * math.log(1 - sigmoid(x)) for x in (2.0, 1.0)) / 2
    terms = {"implicit_reward": HAND_R.clone().requires_grad_()}
    out = CRD(config).loss(terms, hand_rows())
    assert out.loss.item() == pytest.approx(value)
    # Of image 1 at draw 0: (sigmoid(2) - q) / 4 rows, and centering two images doubles ±1/2 to 1.
    gradient = torch.autograd.grad(out.loss, terms["implicit_reward"])[0]
    assert gradient[2].item() == pytest.approx((sigmoid(2) - q) / 4)
    loo = CRD(dataclasses.replace(config, residual="leave_one_out")).loss(terms, hand_rows())
    assert loo.loss.item() == pytest.approx(value)
    gradient = torch.autograd.grad(loo.loss, terms["implicit_reward"])[0]
    assert gradient.tolist() == pytest.approx(
        [(-1) ** (i < 2) * (sigmoid(x) - q) / 4 for i, x in enumerate((1, 2, 1, 2))]
    )


def test_hand_worked_kl() -> None:
    # λ = (1e-4, 1e-4, 0.1, 0.1), KL = (1, 1, 2, 4).
    terms = {"implicit_reward": torch.zeros(4, dtype=DOUBLE), "kl": torch.tensor([1.0, 1.0, 2.0, 4.0])}
    out = CRD(CRDObjectiveConfig()).loss(terms, hand_rows())
    assert out.metrics["loss_kl"] == pytest.approx((2e-4 + 0.6) / 4)
    assert out.metrics["kl_strength_mean"] == pytest.approx((1e-4 + 0.1) / 2)
    assert out.metrics["kl"] == 2.0
    assert out.metrics["implicit_reward_correlation"] == 0.0
    # The policy term at R = 0 is 0.2² · 5.
    assert out.loss.item() == pytest.approx(0.04 * 5 + (2e-4 + 0.6) / 4)


@pytest.mark.parametrize("form", ["squared", "cross_entropy"])
def test_leave_one_out_gradient_is_the_stopgrad_formula(form: str) -> None:
    rows, beta, draws = make_rows(draws=4), 0.7, 4
    r = torch.randn(len(rows), dtype=DOUBLE, requires_grad=True)
    config = CRDObjectiveConfig(beta=beta, form=form, residual="leave_one_out", kl_max=0.0, loss_scale=beta)
    got = torch.autograd.grad(CRD(config).loss({"implicit_reward": r}, rows).loss, r)[0]
    # Plain implementation, one row at a time.
    total = torch.zeros((), dtype=DOUBLE)
    for i in torch.nonzero(rows.has_signal)[:, 0].tolist():
        peers = (rows.group_id == rows.group_id[i]) & (rows.draw == rows.draw[i])
        others = []
        for k in torch.nonzero(peers)[:, 0].tolist():
            same_image = (rows.group_id == rows.group_id[k]) & (rows.image_id == rows.image_id[k])
            others.append((r[same_image].sum() - r[k]) / (draws - 1))
            if k == i:
                mine = others[-1]
        x_other = (beta * (mine - torch.stack(others).mean())).detach()
        a = rows.advantage[i] - rows.advantage[peers].mean()
        residual = 2 * (x_other - a) if form == "squared" else x_other.sigmoid() - a.sigmoid()
        total = total + residual * beta * (r[i] - r[peers].mean()) / len(rows)
    torch.testing.assert_close(got, torch.autograd.grad(total, r)[0], rtol=1e-9, atol=1e-12)


def test_leave_one_out_is_unbiased_and_per_draw_is_not() -> None:
    # R̂ = ρ + noise of deviation 2: per_draw is too high by β² Var R̂_c = 4 (1 - 1/2) = 2.
    copies = 40_000
    base = hand_rows()
    rows = Rows(*(getattr(base, f.name).repeat(copies) for f in dataclasses.fields(Rows)))
    rows = dataclasses.replace(rows, group_id=torch.arange(copies).repeat_interleave(4))
    truth = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=DOUBLE).repeat(copies)
    noise = torch.randn(4 * copies, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    exact = (0.5 - 0.2) ** 2
    per_draw, loo = (
        CRD(CRDObjectiveConfig(kl_max=0.0, residual=residual)).loss({"implicit_reward": truth + 2 * noise}, rows)
        for residual in ("per_draw", "leave_one_out")
    )
    assert per_draw.metrics["loss_policy"] == pytest.approx(exact + 2, abs=0.06)
    assert loo.metrics["loss_policy"] == pytest.approx(exact, abs=0.06)


@pytest.mark.parametrize(
    ("of_image_1", "mean_square", "variance"), [((0.0, 3.0, 6.0), 1.5**2, 1.5), ((-3.0, 0.0, 3.0), 0.0, 1.5)]
)
@pytest.mark.parametrize("independent", [False, True])
def test_leave_one_out_with_dependent_draws_pays_for_variance_over_t(
    of_image_1: tuple[float, ...], mean_square: float, variance: float, independent: bool
) -> None:
    # Image 1 has R = (0, 3, 6) at the S = 3 grid points, image 0 has 0, A = 1/2: β R_c - A_c of image 1 is
    # (0, 1.5, 3), mean 1.5, variance 1.5. Over all pairs of different points: 1.5² - 1.5 / (S - 1), which in the other
    # case is below 0, the loss of the optimum, and falls without end as R is scaled up. Over all pairs: the square.
    pairs = list(itertools.product(of_image_1, repeat=2) if independent else itertools.permutations(of_image_1, 2))
    base = hand_rows()
    rows = Rows(*(getattr(base, f.name).repeat(len(pairs)) for f in dataclasses.fields(Rows)))
    group_id = torch.arange(len(pairs)).repeat_interleave(4)
    rows = dataclasses.replace(rows, group_id=group_id, advantage=torch.full((len(rows),), 0.5, dtype=DOUBLE))
    r = torch.tensor([[0.0, 0.0, first, second] for first, second in pairs], dtype=DOUBLE).flatten()
    out = CRD(CRDObjectiveConfig(kl_max=0.0, residual="leave_one_out")).loss({"implicit_reward": r}, rows)
    assert out.metrics["loss_policy"] == pytest.approx(mean_square - (0.0 if independent else variance / 2))


def test_tempered_centering_with_a_large_tau_equals_uniform() -> None:
    inputs = CRDInputs(make_outputs(27), make_rows())
    for residual in ("per_draw", "leave_one_out"):
        uniform = crd_loss(inputs, CRDObjectiveConfig(residual=residual)).loss.item()
        far = crd_loss(inputs, CRDObjectiveConfig(residual=residual, centering="tempered", tau=1e12)).loss.item()
        near = crd_loss(inputs, CRDObjectiveConfig(residual=residual, centering="tempered", tau=0.1)).loss.item()
        assert far == pytest.approx(uniform, rel=1e-9)
        assert abs(near - uniform) > 1e-3


def test_groups_without_signal_feel_only_the_kl() -> None:
    rows, silent = make_rows(), ~make_rows().has_signal
    outputs = make_outputs(len(rows))
    gradients = {}
    for kl_max in (0.0, 0.1):
        v = outputs.policy.clone().requires_grad_()
        inputs = CRDInputs(dataclasses.replace(outputs, policy=v), rows)
        out = crd_loss(inputs, CRDObjectiveConfig(kl_max=kl_max))
        out.loss.backward()
        assert out.metrics["signal_fraction"] == pytest.approx(15 / 27)
        assert v.grad is not None
        gradients[kl_max] = v.grad[silent].abs().sum().item()
    assert gradients[0.0] == 0.0
    assert gradients[0.1] > 0


@pytest.mark.parametrize("residual", ["per_draw", "leave_one_out"])
def test_gradcheck(residual: str) -> None:
    rows = make_rows((2, 2), draws=2)
    out = make_outputs(len(rows))
    # The scale of "adaptive" is a stop-gradient, which finite differences would see.
    for weighting in ("unit", "likelihood"):
        config = CRDObjectiveConfig(residual=residual, weighting=weighting, centering="tempered")

        def loss(v: Tensor, config: CRDObjectiveConfig = config) -> Tensor:
            return crd_loss(CRDInputs(dataclasses.replace(out, policy=v), rows), config).loss

        assert torch.autograd.gradcheck(loss, out.policy.clone().requires_grad_())


def test_half_precision_velocities_of_nearly_equal_models() -> None:
    # In bfloat16 arithmetic the squares would round to the same number and R to 0.
    target = torch.full((1, 4), 3.0, dtype=torch.bfloat16)
    old, policy = torch.full_like(target, 2.0), torch.full_like(target, 2.015625)
    expected = 1 - (3 - 2.015625) ** 2
    reward = implicit_reward(policy, old, target, torch.tensor([0.5]), "unit")
    assert reward.item() == pytest.approx(expected, rel=1e-12)


def test_needs_and_registry() -> None:
    assert CRD(CRDObjectiveConfig()).needs == {"old", "anchor"}
    assert CRD(CRDObjectiveConfig(kl_max=0.0)).needs == {"old"}
    assert OBJECTIVES["crd"]().build() == CRD()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centering": "mean"}, "uniform, tempered"),
        ({"form": "bce"}, "squared, cross_entropy"),
        ({"residual": "loo"}, "per_draw, leave_one_out"),
        ({"weighting": "snr"}, "adaptive, unit, likelihood"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"tau": -1.0}, "tau must be above 0"),
        ({"centering_prompts": -1}, "centering_prompts of crd must be a whole number of at least 0, got -1"),
        ({"centering_prompts": 1.5}, "whole number"),
        ({"centering_prompts": 2, "centering": "tempered"}, "set centering_prompts=1, or use uniform"),
        ({"centering_prompts": 0, "centering": "tempered"}, "set centering_prompts=1, or use uniform"),
        ({"loss_scale": float("nan")}, "loss_scale must be above 0"),
        ({"kl_min": 0.2}, "kl_min <= kl_max"),
        ({"kl_max": -0.1}, "kl_min <= kl_max"),
    ],
)
def test_bad_settings_are_told(change: dict[str, float | str], message: str) -> None:
    with pytest.raises(CRDError, match=message):
        CRDObjectiveConfig(**change)  # type: ignore[arg-type]


def test_bad_inputs_are_told() -> None:
    rows, outputs = make_rows(), make_outputs(27)
    terms = {"implicit_reward": torch.zeros(27, dtype=DOUBLE)}
    without_kl = CRD(CRDObjectiveConfig(kl_max=0.0))
    with pytest.raises(CRDError, match="needs an anchor"):
        CRD().terms(dataclasses.replace(outputs, anchor=None))
    with pytest.raises(CRDError, match="needs the term `kl`"):
        CRD().loss(terms, rows)
    with pytest.raises(CRDError, match="`old`"):
        CRD().terms(dataclasses.replace(outputs, old=None))
    loo = CRD(CRDObjectiveConfig(kl_max=0.0, residual="leave_one_out"))
    with pytest.raises(CRDError, match="2 or more draws an image, got 1"):
        loo.loss({"implicit_reward": torch.zeros(9)}, make_rows(draws=1))
    with pytest.raises(ValueError, match="terms must be"):
        without_kl.loss({"implicit_reward": torch.zeros(26)}, rows)
    with pytest.raises(ValueError, match="complete groups"):
        without_kl.loss({"implicit_reward": torch.zeros(26)}, pick_rows(rows, torch.arange(26)))
    twice = pick_rows(rows, torch.cat([torch.arange(27), torch.tensor([0])]))
    with pytest.raises(ValueError, match="repeated"):
        without_kl.loss({"implicit_reward": torch.zeros(28)}, twice)
    with pytest.raises(ValueError, match="target must be"):
        dataclasses.replace(outputs, target=outputs.target[:1])
    with pytest.raises(ValueError, match="advantage must be"):
        dataclasses.replace(rows, advantage=rows.advantage[:, None])
    with pytest.raises(ValueError, match=r"t in \(0, 1\]"):
        implicit_reward(outputs.policy, outputs.target, outputs.target, torch.zeros(27), "likelihood")
    with pytest.raises(CRDError, match="adaptive, unit, likelihood"):
        implicit_reward(outputs.policy, outputs.target, outputs.target, outputs.t, "snr")
