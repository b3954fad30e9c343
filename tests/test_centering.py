from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crd.centering import center, group_std, tempered_weights

DOUBLE = torch.float64


@st.composite
def grouped(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (B,) and arbitrary, interleaved group ids (B,)."""
    group_id = draw(st.lists(st.sampled_from([-7, 0, 3, 2**40]), min_size=1, max_size=24))
    numbers = st.floats(-10, 10, allow_nan=False, width=32)
    values = draw(st.lists(numbers, min_size=len(group_id), max_size=len(group_id)))
    return torch.tensor(values, dtype=DOUBLE), torch.tensor(group_id)


def test_hand_worked() -> None:
    values = torch.tensor([1.0, 10.0, 3.0, 20.0, 5.0])
    group_id = torch.tensor([4, -1, 4, -1, 4])
    assert center(values, group_id).tolist() == [-2.0, -5.0, 0.0, 5.0, 2.0]
    # Group 4: (1 + 2*3 + 5) / 4 = 3; group -1: (10*3 + 20) / 4 = 12.5.
    weights = torch.tensor([1.0, 3.0, 2.0, 1.0, 1.0])
    assert center(values, group_id, weights).tolist() == [-2.0, -2.5, 0.0, 7.5, 2.0]
    assert group_std(values, group_id).tolist() == pytest.approx([(8 / 3) ** 0.5, 5, (8 / 3) ** 0.5, 5, (8 / 3) ** 0.5])


@settings(max_examples=50)
@given(grouped(), st.randoms(use_true_random=False))
def test_permuting_rows_permutes_the_result(data: tuple[torch.Tensor, torch.Tensor], random: object) -> None:
    values, group_id = data
    order = torch.tensor(random.sample(range(len(values)), len(values)))  # type: ignore[attr-defined]
    weights = tempered_weights(values, group_id, 2.0)
    torch.testing.assert_close(
        center(values[order], group_id[order], weights[order]), center(values, group_id, weights)[order]
    )


@settings(max_examples=50)
@given(grouped(), st.floats(-100, 100))
def test_a_constant_added_to_one_group_changes_nothing(
    data: tuple[torch.Tensor, torch.Tensor], constant: float
) -> None:
    values, group_id = data
    shifted = values + constant * (group_id == group_id[0])
    for weights in (None, tempered_weights(values, group_id, 0.5)):
        torch.testing.assert_close(
            center(shifted, group_id, weights), center(values, group_id, weights), rtol=0, atol=1e-11
        )
    torch.testing.assert_close(
        tempered_weights(shifted, group_id, 0.5), tempered_weights(values, group_id, 0.5), rtol=0, atol=1e-10
    )


@settings(max_examples=50)
@given(grouped(), st.floats(0.05, 50))
def test_tempered_weights_sum_to_one_and_center_to_zero(data: tuple[torch.Tensor, torch.Tensor], tau: float) -> None:
    values, group_id = data
    weights = tempered_weights(values, group_id, tau)
    centered = center(values, group_id, weights)
    for group in group_id.unique():
        rows = group_id == group
        assert weights[rows].sum().item() == pytest.approx(1, abs=1e-12)
        assert (weights * centered)[rows].sum().item() == pytest.approx(0, abs=1e-10)


def test_tempered_weights_hand_worked() -> None:
    # softmax(0, ln 3) = (1/4, 3/4) and softmax(0, -ln 3) = (3/4, 1/4): two images always weigh the same.
    log3 = torch.tensor(3.0, dtype=DOUBLE).log().item()
    two = tempered_weights(torch.tensor([0.0, log3], dtype=DOUBLE), torch.tensor([0, 0]), 1.0)
    assert two.tolist() == pytest.approx([0.5, 0.5])
    # softmax(-ln 3, 0, ln 3) = (1, 3, 9) / 13, averaged with its mirror image: (5, 3, 5) / 13.
    three = tempered_weights(torch.tensor([-log3, 0.0, log3], dtype=DOUBLE), torch.tensor([0, 0, 0]), 1.0)
    assert three.tolist() == pytest.approx([5 / 13, 3 / 13, 5 / 13])


def test_a_large_tau_equals_uniform_and_a_small_one_stays_finite() -> None:
    values, group_id = torch.randn(12, dtype=DOUBLE), torch.arange(12) % 3
    weights = tempered_weights(values, group_id, 1e12)
    torch.testing.assert_close(center(values, group_id, weights), center(values, group_id), rtol=0, atol=1e-10)
    extreme = tempered_weights(torch.tensor([0.0, 1.0, 5.0]), torch.tensor([0, 0, 0]), 1e-6)
    assert extreme.tolist() == [0.5, 0.0, 0.5]


def test_dtype_is_kept_and_float32_does_not_lose_small_differences() -> None:
    values = torch.full((1000,), 1e6) + torch.tensor([0.0, 1.0]).repeat(500)
    centered = center(values, torch.zeros(1000, dtype=torch.int64))
    assert centered.dtype == torch.float32
    assert centered.unique().tolist() == [-0.5, 0.5]


def test_gradcheck() -> None:
    group_id = torch.tensor([2, 0, 2, 0, 1])
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0], dtype=DOUBLE)
    values = torch.randn(5, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: center(v, group_id), values)
    assert torch.autograd.gradcheck(lambda v: center(v, group_id, weights), values)


@pytest.mark.parametrize(
    ("values", "group_id", "weights", "message"),
    [
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), None, "must both be"),
        (torch.zeros(3), torch.zeros(3), None, "int64"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.ones(2), "weights must be"),
        (torch.zeros(2), torch.arange(2), torch.tensor([1.0, 0.0]), "positive sum"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.tensor([2.0, -1.0]), "non-negative"),
    ],
)
def test_misuse_is_told(
    values: torch.Tensor, group_id: torch.Tensor, weights: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        center(values, group_id, weights)
    with pytest.raises(ValueError, match="tau"):
        tempered_weights(torch.zeros(1), torch.zeros(1, dtype=torch.int64), 0.0)
