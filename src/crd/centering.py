"""Centering within a group: the step that removes log Z(c), which no image of one prompt can see."""

from __future__ import annotations

import torch
from torch import Tensor


def center(values: Tensor, group_id: Tensor, weights: Tensor | None = None) -> Tensor:
    """Remove from each value the weighted mean of its group.

        centered_i = values_i - sum_k w_k values_k / sum_k w_k,    k over the rows with the group_id of row i

    Sums run in float64, so that the result depends on the rows of a group and not on their order.

    Args:
        values: (B,) floating point; differentiable.
        group_id: (B,) int64, arbitrary integers; rows of one group need not be neighbours.
        weights: (B,) non-negative, normalised here per group; None weighs all rows equally.

    Returns:
        (B,) in the dtype of `values`.

    Raises:
        ValueError: a shape or dtype is wrong, or the weights of a group are negative or sum to zero.

    Source: arXiv 2603.14128, the centered objective.
    """
    _check(values, group_id)
    group, n_groups = _dense_groups(group_id)
    if weights is None:
        weights = torch.ones_like(group, dtype=torch.float64)
    elif weights.shape != values.shape:
        raise ValueError(f"weights must be (B,)={tuple(values.shape)}, got {tuple(weights.shape)}")
    weights = weights.double()
    total = _sum_by_group(weights, group, n_groups)
    if bool((weights < 0).any()) or not bool((total > 0).all()):
        raise ValueError("weights must be non-negative with a positive sum in every group")
    mean = _sum_by_group(weights * values.double(), group, n_groups) / total
    return (values.double() - mean[group]).to(values.dtype)


def tempered_weights(rewards: Tensor, group_id: Tensor, tau: float) -> Tensor:
    """Weights that lean towards the best and the worst images of each group alike.

        w = softmax(r / tau) / 2 + softmax(-r / tau) / 2    within each group; tau -> infinity is uniform

    Centering is linear in its weights, so this equals averaging the two softmax centerings.

    Args:
        rewards: (B,) floating point.
        group_id: (B,) int64.
        tau: temperature in units of the reward, above 0.

    Returns:
        (B,) in the dtype of `rewards`; sums to 1 in each group.

    Raises:
        ValueError: a shape or dtype is wrong, or `tau` is not above 0.

    Source: arXiv 2603.14128, tempered centering.
    """
    _check(rewards, group_id)
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}; a large tau gives uniform weights")
    group, n_groups = _dense_groups(group_id)
    logits = rewards.double() / tau
    weights = (_softmax_by_group(logits, group, n_groups) + _softmax_by_group(-logits, group, n_groups)) / 2
    return weights.to(rewards.dtype)


def group_std(values: Tensor, group_id: Tensor) -> Tensor:
    """Population standard deviation of each row's group.

        std_i = sqrt(mean_k (values_k - mean)^2),    k over the group of row i

    Args:
        values: (B,) floating point.
        group_id: (B,) int64.

    Returns:
        (B,) in the dtype of `values`, the same number for all rows of a group.

    Raises:
        ValueError: a shape or dtype is wrong.
    """
    _check(values, group_id)
    group, n_groups = _dense_groups(group_id)
    squares = center(values.double(), group_id).square()
    counts = torch.bincount(group, minlength=n_groups)
    return (_sum_by_group(squares, group, n_groups) / counts).sqrt()[group].to(values.dtype)


def _check(values: Tensor, group_id: Tensor) -> None:
    if values.ndim != 1 or group_id.shape != values.shape:
        raise ValueError(
            f"values and group_id must both be (B,), got {tuple(values.shape)} and {tuple(group_id.shape)}"
        )
    if not values.is_floating_point() or group_id.dtype != torch.int64:
        raise ValueError(f"values must be floating point and group_id int64, got {values.dtype}, {group_id.dtype}")


def _dense_groups(group_id: Tensor) -> tuple[Tensor, int]:
    """Group ids renumbered 0..G-1 (B,), and G."""
    distinct, group = torch.unique(group_id, return_inverse=True)
    return group, len(distinct)


def _sum_by_group(values: Tensor, group: Tensor, n_groups: int) -> Tensor:
    """(B,) summed to (G,)."""
    return torch.zeros(n_groups, dtype=values.dtype, device=values.device).index_add(0, group, values)


def _softmax_by_group(logits: Tensor, group: Tensor, n_groups: int) -> Tensor:
    # The maximum is subtracted per group: exp never overflows, and each group keeps one term equal to 1.
    lowest = torch.full((n_groups,), -torch.inf, dtype=logits.dtype, device=logits.device)
    largest = lowest.scatter_reduce(0, group, logits.detach(), "amax")
    exp = (logits - largest[group]).exp()
    return exp / _sum_by_group(exp, group, n_groups)[group]
