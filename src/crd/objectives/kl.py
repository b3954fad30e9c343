"""The KL term that all objectives share, and the settings that come with it.

    loss = policy term + mean_i λ_i KL_i,    λ_i = kl_min + (kl_max - kl_min) g_i

KL_i estimates the divergence of the policy from the anchor at one row, g_i is the gate of its image.

Source: arXiv 2603.14128, reward-adaptive KL to the guided pretrained model.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from crd.errors import CRDError
from crd.flow import velocity_error
from crd.objectives.base import DenoiserOutputs, Objective, Rows
from crd.records import LossOutput
from crd.setting_checks import check_bounded


@dataclass(frozen=True)
class ObjectiveConfig(ABC):
    """Settings of an objective: fields of `CRDConfig`, by name. Each objective adds its own to these."""

    kl_min: float = 1e-4
    kl_max: float = 0.1  # 0 switches the KL term off; kl_min is then not read
    flow_only: ClassVar[bool] = False  # not for DDPM models

    def __post_init__(self) -> None:
        check_bounded("kl_max", self.kl_max)
        if self.kl_max != 0 and not 0 <= self.kl_min <= self.kl_max:
            raise CRDError(
                f"KL strengths need 0 <= kl_min <= kl_max, got kl_min={self.kl_min}, kl_max={self.kl_max}; "
                "use kl_max=0 to switch the KL term off"
            )

    @abstractmethod
    def build(self) -> Objective:
        """The objective with these settings."""

    def with_kl_times(self, scale: float) -> ObjectiveConfig:
        """The same settings with both KL strengths multiplied."""
        return dataclasses.replace(self, kl_min=scale * self.kl_min, kl_max=scale * self.kl_max)


def kl_needs(config: ObjectiveConfig) -> frozenset[str]:
    """What the KL term reads beside the policy's velocity."""
    return frozenset({"anchor"} if config.kl_max > 0 else ())


def kl_terms(outputs: DenoiserOutputs, config: ObjectiveConfig, weight: Tensor | float = 1.0) -> dict[str, Tensor]:
    """The term "kl" of each row, {} without an anchor.

        KL_i = weight_i mean_dims (v_θ - v_anchor)²

    Args:
        outputs: velocities of N rows.
        config: settings of the objective.
        weight: one number, or (N,).

    Returns:
        {"kl": (N,) float64} or {}.

    Raises:
        CRDError: no anchor while kl_max > 0.
    """
    if outputs.anchor is None:
        if config.kl_max > 0:
            raise CRDError(f"kl_max={config.kl_max} needs an anchor velocity, got None; pass it or set kl_max=0")
        return {}
    return {"kl": weight * velocity_error(outputs.policy, outputs.anchor).square().mean(1)}


def with_kl(
    loss: Tensor, metrics: dict[str, float], terms: dict[str, Tensor], rows: Rows, config: ObjectiveConfig
) -> LossOutput:
    """The policy loss plus the KL term over all rows, those of groups without signal too.

    Args:
        loss: policy term, scaled, ().
        metrics: of the policy term; those of the KL term and the whole loss join them.
        terms: with "kl" (N,) when kl_max > 0.
        rows: the same N rows.
        config: settings of the objective.

    Raises:
        CRDError: "kl" is missing while kl_max > 0.
    """
    metrics = dict(metrics)
    if config.kl_max > 0:
        if "kl" not in terms:
            raise CRDError(f"kl_max={config.kl_max} needs the term `kl`, got none; pass an anchor or set kl_max=0")
        strength = config.kl_min + (config.kl_max - config.kl_min) * rows.kl_gate.double()
        kl_loss = (strength * terms["kl"].double()).mean()
        loss = loss + kl_loss
        metrics |= {"loss_kl": kl_loss.item(), "kl_strength_mean": strength.mean().item()}
    if "kl" in terms:
        metrics["kl"] = terms["kl"].mean().item()
    metrics["loss"] = loss.item()
    return LossOutput(loss, metrics)
