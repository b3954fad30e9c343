from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crd.advantages import group_advantages, group_normalized, kl_gate
from crd.errors import CRDError

DOUBLE = torch.float64


def test_hand_worked() -> None:
    # Raw rewards 0, 2, 5, 5: mean 3, population variance (9 + 1 + 4 + 4) / 4 = 4.5.
    out = group_advantages(torch.tensor([0.0, 5.0, 2.0, 5.0]), torch.tensor([8, 1, 8, 1]))
    step = 1 / (4.5**0.5 + 1e-4) / 10
    assert out.advantage.tolist() == pytest.approx([0.5 - step, 0.5, 0.5 + step, 0.5], abs=1e-12)
    assert out.has_signal.tolist() == [True, False, True, False]
    assert (out.zero_variance_groups, out.groups) == (1, 2)
    assert out.advantage.dtype == DOUBLE


def test_clip_bounds_the_scaled_advantage() -> None:
    # One winner among 101: advantage (1 - 1/101) / std = 10 before clipping.
    rewards = torch.zeros(101)
    rewards[7] = 1
    out = group_advantages(rewards, torch.zeros(101, dtype=torch.int64))
    assert out.advantage[7].item() == 1.0
    assert out.advantage.min().item() == pytest.approx(0.5 - 0.1 / 10, abs=1e-4)
    wide = group_advantages(rewards, torch.zeros(101, dtype=torch.int64), clip=20.0)
    assert wide.advantage[7].item() == pytest.approx(0.5 + 10 / 40, abs=1e-3)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(-2, 2)), min_size=2, max_size=20), st.floats(-5, 5))
def test_a_global_constant_and_the_order_change_nothing(data: list[tuple[float, int]], constant: float) -> None:
    # Quarters, so that adding a constant cannot merge two different rewards.
    rewards = torch.tensor([round(4 * r) / 4 for r, _ in data], dtype=DOUBLE)
    group_id = torch.tensor([g for _, g in data])
    out = group_advantages(rewards, group_id)
    shifted = group_advantages(rewards + constant, group_id)
    torch.testing.assert_close(shifted.advantage, out.advantage, rtol=0, atol=1e-9)
    flipped = group_advantages(rewards.flip(0), group_id.flip(0))
    torch.testing.assert_close(flipped.advantage.flip(0), out.advantage)
    assert torch.equal(flipped.has_signal.flip(0), out.has_signal)
    assert bool(((out.advantage >= 0) & (out.advantage <= 1)).all())


def test_equal_rewards_that_do_not_round_have_no_signal() -> None:
    # The mean of three times 0.1 is not 0.1 in binary.
    out = group_advantages(torch.tensor([0.1, 0.1, 0.1, 0.3], dtype=DOUBLE), torch.tensor([0, 0, 0, 1]))
    assert out.advantage.tolist() == [0.5] * 4
    assert not out.has_signal.any()
    assert (out.zero_variance_groups, out.groups) == (2, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rewards_that_are_not_finite_are_told(bad: float) -> None:
    with pytest.raises(CRDError, match="image 1"):
        group_advantages(torch.tensor([0.0, bad]), torch.tensor([0, 0]))
    with pytest.raises(CRDError, match="clip"):
        group_advantages(torch.zeros(2), torch.tensor([0, 0]), clip=0.0)


def test_kl_gate_kinds() -> None:
    rewards, advantage = torch.tensor([-1.0, 0.0, 3.0]), torch.tensor([0.1, 0.5, 0.9])
    assert kl_gate("reward", rewards, advantage, (-1, 3)).tolist() == [0.0, 0.25, 1.0]
    assert kl_gate("advantage", rewards, advantage, (0, 1)).tolist() == pytest.approx([0.1, 0.5, 0.9])
    assert kl_gate("constant", rewards, advantage, (0, 1)).tolist() == [1.0, 1.0, 1.0]


def test_kl_gate_allows_rounding_but_no_wrong_range() -> None:
    half = torch.tensor([0.5])
    assert kl_gate("reward", torch.tensor([1 + 1e-9], dtype=DOUBLE), half, (0, 1)).item() == 1.0
    with pytest.raises(CRDError, match=r"reward 1\.2 .*kl_reward_range \(0, 1\)"):
        kl_gate("reward", torch.tensor([1.2]), half, (0, 1))
    with pytest.raises(CRDError, match="nan"):
        kl_gate("reward", torch.tensor([float("nan")]), half, (0, 1))
    with pytest.raises(CRDError, match="lo < hi"):
        kl_gate("reward", torch.tensor([1.0]), half, (1, 1))
    with pytest.raises(CRDError, match="reward, advantage, constant"):
        kl_gate("rewards", torch.tensor([1.0]), half, (0, 1))


GROUPS = torch.tensor([8, 1, 8, 1])


def test_group_normalized_hand_worked() -> None:
    # Group 8 holds rows 0 and 2, group 1 rows 1 and 3. "a": (0, 2) has mean 1, deviation 1; (10, 30) mean 20, deviation
    # 10. "b" applies to group 8 alone: (5, 1) has mean 3, deviation 2.
    columns = {"a": torch.tensor([0.0, 10.0, 2.0, 30.0]), "b": torch.tensor([5.0, torch.nan, 1.0, torch.nan])}
    total = group_normalized(columns, {"a": 1.0, "b": 3.0}, GROUPS, eps=0.0)
    assert total.tolist() == pytest.approx([-1 + 3, -1, 1 - 3, 1], abs=1e-12)
    small, large = group_normalized(columns, {"a": 1.0, "b": 0.0}, GROUPS, eps=1.0)[[0, 1]].tolist()
    assert (small, large) == pytest.approx((-1 / 2, -10 / 11))


def test_group_normalized_does_not_see_the_scale_of_a_reward_nor_an_offset_of_a_group() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(12, dtype=DOUBLE), torch.rand(12, dtype=DOUBLE)
    group = torch.arange(12) % 3
    offset = torch.tensor([5.0, -2.0, 0.0])[group]
    weights = {"a": 1.0, "b": 0.5}
    plain = group_normalized({"a": a, "b": b}, weights, group, eps=0.0)
    moved = group_normalized({"a": 100 * a + offset, "b": b / 7}, weights, group, eps=0.0)
    torch.testing.assert_close(moved, plain)
    order = torch.randperm(12)
    shuffled = group_normalized({"a": a[order], "b": b[order]}, weights, group[order], eps=0.0)
    torch.testing.assert_close(shuffled, plain[order])


def test_group_normalized_of_equal_rewards_is_exactly_zero() -> None:
    # The mean of three 0.1 is not 0.1 in floating point.
    total = group_normalized({"a": torch.full((3,), 0.1, dtype=DOUBLE)}, {"a": 1.0}, torch.zeros(3, dtype=torch.int64))
    assert total.tolist() == [0.0, 0.0, 0.0]
