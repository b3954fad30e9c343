"""From raw rewards to what the losses read: advantages in [0, 1], and the strength of the KL anchor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crd.centering import center, group_std
from crd.errors import CRDError

KL_GATES = ("reward", "advantage", "constant")
NORMALIZATIONS = ("none", "group")

# A sum of weighted rewards may end a few roundings beside its range; more than this is a wrong range.
RANGE_SLACK = 1e-6


@dataclass(frozen=True)
class Advantages:
    """Advantages of B images; groups whose rewards are all equal have no signal."""

    advantage: Tensor  # (B,) float64 in [0, 1], 0.5 at the group mean
    has_signal: Tensor  # (B,) bool, False in groups of zero reward variance
    zero_variance_groups: int
    groups: int


def group_advantages(rewards: Tensor, group_id: Tensor, *, clip: float = 5.0, eps: float = 1e-4) -> Advantages:
    """Center rewards within each group, scale them by the global deviation, and map them to [0, 1].

        adv_i = clamp((r_i - mean_group r) / (std_all r + eps), -clip, clip),    A_i = adv_i / (2 clip) + 1/2

    The deviation is that of all raw rewards, differences between prompts included, as published; scaling
    each group by its own deviation would weigh a group of nearly equal images like any other. At the
    published clip = 5 the map is A = adv / 10 + 0.5.

    Args:
        rewards: (B,) raw rewards, higher is better.
        group_id: (B,) int64.
        clip: bound on the scaled advantage, above 0.
        eps: added to the deviation.

    Returns:
        `Advantages`; the reward variance of a group counts as zero when all its rewards are the same number.

    Raises:
        CRDError: a reward is not finite, or `clip` is not above 0 and finite.
        ValueError: a shape or dtype is wrong.

    Source: arXiv 2603.14128, experimental settings.
    """
    if not 0 < clip < math.inf:
        raise CRDError(f"advantage clip must be above 0 and finite, got {clip}; the published value is 5")
    rewards = rewards.double()
    centered = center(rewards, group_id)
    bad = ~torch.isfinite(rewards)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise CRDError(f"rewards must be finite, got {rewards[row].item()} for image {row}; fix the reward function")
    has_signal, group = _groups_that_vary(rewards, group_id)
    scaled = (centered / (rewards.std(correction=0) + eps)).clamp(-clip, clip)
    # Without this the 1e-17 of a rounded mean would reach the loss as a direction.
    scaled = torch.where(has_signal[group], scaled, torch.zeros_like(scaled))
    return Advantages(
        advantage=scaled / (2 * clip) + 0.5,
        has_signal=has_signal[group],
        zero_variance_groups=int((~has_signal).sum()),
        groups=len(has_signal),
    )


def _groups_that_vary(values: Tensor, group_id: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the values of each of G groups differ, (G,) bool, and the index of each row's group, (B,) int64."""
    distinct, group = torch.unique(group_id, return_inverse=True)
    # Exact comparison: a deviation computed from a rounded mean would be 1e-17 instead of 0.
    start = torch.zeros(len(distinct), dtype=values.dtype, device=values.device)
    highest = start.scatter_reduce(0, group, values, "amax", include_self=False)
    lowest = start.scatter_reduce(0, group, values, "amin", include_self=False)
    return highest > lowest, group


def group_normalized(
    columns: Mapping[str, Tensor], weights: Mapping[str, float], group_id: Tensor, *, eps: float = 1e-4
) -> Tensor:
    """Several rewards on one scale: each normalised within its group, then summed with its weight.

        z_i = Σ_j weight_j (r_ij - mean_group r_j) / (std_group r_j + eps),    j over the rewards that apply to image i

    A plain weighted sum is led by the reward that varies most; here every reward has an equal say per unit of weight,
    in every group. The price: a group of nearly equal rewards counts like any other, down to `eps`.

    Args:
        columns: name -> (B,) scores, NaN where a reward does not apply.
        weights: name -> weight.
        group_id: (B,) int64.
        eps: added to each deviation.

    Returns:
        (B,) float64; exactly 0 where all scores of a group are the same number.
    """
    total = torch.zeros(len(group_id), dtype=torch.float64)
    for name, scores in columns.items():
        rows = (~scores.isnan()).nonzero()[:, 0]
        if weights[name] == 0 or not len(rows):
            continue
        values, groups = scores[rows].double(), group_id[rows]
        scaled = center(values, groups) / (group_std(values, groups) + eps)
        varies, group = _groups_that_vary(values, groups)
        total[rows] += weights[name] * torch.where(varies[group], scaled, torch.zeros_like(scaled))
    return total


def kl_gate(kind: str, rewards: Tensor, advantage: Tensor, reward_range: tuple[float, float]) -> Tensor:
    """Where between its minimum and its maximum the KL strength of each image lies.

        reward:    g_i = (r_i - lo) / (hi - lo)    weak while rewards are low, strong once they are high
        advantage: g_i = A_i                       mean about 0.5 at every stage (public implementation)
        constant:  g_i = 1                         the maximum strength for every image

    Args:
        kind: "reward", "advantage" or "constant".
        rewards: (B,) raw rewards.
        advantage: (B,) in [0, 1].
        reward_range: (lo, hi), the smallest and largest reward there can be; read for "reward" only.

    Returns:
        (B,) float64 in [0, 1].

    Raises:
        CRDError: an unknown kind, an empty range, or a reward outside the range.

    Source: arXiv 2603.14128, reward-adaptive KL. That g is linear in the reward is our reading.
    """
    if kind == "advantage":
        return advantage.double()
    if kind == "constant":
        return torch.ones_like(rewards, dtype=torch.float64)
    if kind != "reward":
        raise CRDError(f"kl_gate must be one of {', '.join(KL_GATES)}, got {kind!r}; choose one of them")
    low, high = reward_range
    if not low < high:
        raise CRDError(f"kl_reward_range must be (lo, hi) with lo < hi, got ({low}, {high}); correct it")
    gate = (rewards.double() - low) / (high - low)
    outside = ~((gate >= -RANGE_SLACK) & (gate <= 1 + RANGE_SLACK))
    if bool(outside.any()):
        value = rewards[outside][0].item()
        raise CRDError(
            f"reward {value:g} lies outside kl_reward_range ({low:g}, {high:g}); "
            "start a run whose kl_reward_range is the range of the weighted reward, or with another kl_gate"
        )
    return gate.clamp(0.0, 1.0)
