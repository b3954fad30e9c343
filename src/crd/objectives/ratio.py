"""The clipped importance ratio of policy-gradient objectives.

Source: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv 1707.06347, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crd.objectives.base import Rows
from crd.objectives.kl import ObjectiveConfig, with_kl
from crd.records import LossOutput


def clipped_loss(
    terms: dict[str, Tensor], rows: Rows, config: ObjectiveConfig, loss_scale: float, clip_range: float
) -> LossOutput:
    """Clipped policy-gradient loss plus the KL term.

        loss = loss_scale mean_i max(-a_i ρ_i, -a_i clip(ρ_i, 1 - ε, 1 + ε)) + KL term,    ρ = exp(log_ratio)

    with a = 2 A - 1 in [-1, 1], the advantage scaled and clipped but not yet mapped to [0, 1], over its clip: at the
    published advantage_clip = loss_scale = 5, loss_scale a is the scaled advantage itself. Rows without signal add 0
    and still count in the mean.

    Args:
        terms: "log_ratio" (N,), and "kl" (N,) when kl_max > 0; rows in any order.
        rows: the same N rows.
        config: settings of the objective.
        loss_scale: of the policy term.
        clip_range: ε.

    Returns:
        `LossOutput`; metrics of the ratio are over rows with signal (1 and 0 where there are none).

    Raises:
        CRDError: "kl" is missing while kl_max > 0.
        ValueError: terms and rows differ in length.
    """
    rows = rows.beside(terms["log_ratio"])
    ratio, a = terms["log_ratio"].double().exp(), 2 * rows.advantage.double() - 1
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    policy = (torch.maximum(-a * ratio, -a * clipped) * rows.has_signal).mean()
    metrics = {"loss_policy": policy.item(), **_ratio_metrics(ratio.detach(), clipped.detach(), rows)}
    return with_kl(loss_scale * policy, metrics, terms, rows, config)


def _ratio_metrics(ratio: Tensor, clipped: Tensor, rows: Rows) -> dict[str, float]:
    signal = rows.has_signal
    some = bool(signal.any())
    return {
        "ratio_mean": ratio[signal].mean().item() if some else 1.0,
        "ratio_std": ratio[signal].std(correction=0).item() if some else 0.0,
        "outside_clip": (ratio != clipped)[signal].double().mean().item() if some else 0.0,
        "signal_fraction": signal.double().mean().item(),
    }
