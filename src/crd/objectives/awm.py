"""Advantage Weighted Matching: a policy gradient whose log-likelihood is minus the denoising loss of pretraining.

Source: Xue et al., "Advantage Weighted Matching", arXiv 2509.25050, section on AWM. The ratio and its clip are those of
its public implementation, which also adds a KL to a moving average of the policy; that one is not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from crd.flow import velocity_error
from crd.objectives.base import DenoiserOutputs, Rows
from crd.objectives.kl import ObjectiveConfig, kl_needs, kl_terms
from crd.objectives.ratio import clipped_loss
from crd.records import LossOutput
from crd.setting_checks import check_bounded, check_option, check_positive

MATCHING_LOSSES = ("squared", "huber")
_POWER, _EPS = 0.25, 1e-10  # of "huber"


@dataclass(frozen=True)
class AWMObjectiveConfig(ObjectiveConfig):
    """Settings of the AWM loss."""

    matching_loss: str = "squared"
    clip_range: float = 1e-4
    loss_scale: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("matching_loss", self.matching_loss, MATCHING_LOSSES)
        for name, number in (("clip_range", self.clip_range), ("loss_scale", self.loss_scale)):
            check_positive(name, number)
            check_bounded(name, number)

    def build(self) -> AWM:
        """The AWM objective."""
        return AWM(self)


@dataclass(frozen=True)
class AWM:
    """The AWM objective; no row depends on another."""

    config: AWMObjectiveConfig = field(default_factory=AWMObjectiveConfig)

    @property
    def needs(self) -> frozenset[str]:
        """Roles whose velocities `terms` reads."""
        return frozenset({"old"}) | kl_needs(self.config)

    def terms(self, outputs: DenoiserOutputs) -> dict[str, Tensor]:
        """Log-ratio ℓ_θ - ℓ_old of each row, and the KL, each (N,) float64.

            squared:  ℓ = -e,                                      e = mean_dims (v̂ - v)²
            huber:    ℓ = -t / p ((e + 1e-10)^p - (1e-10)^p),      p = 1/4

        "huber" is the generalised Huber loss of the public configurations: its slope in e falls as e grows.

        Raises:
            CRDError: `old` is missing, or `anchor` is while kl_max > 0.
        """
        log_ratio = self._log_likelihood(outputs.policy, outputs) - self._log_likelihood(outputs.of_old(), outputs)
        return {"log_ratio": log_ratio, **kl_terms(outputs, self.config)}

    def _log_likelihood(self, v: Tensor, outputs: DenoiserOutputs) -> Tensor:
        error = velocity_error(v, outputs.target).square().mean(1)
        if self.config.matching_loss == "squared":
            return -error
        return -outputs.t.double() / _POWER * ((error + _EPS) ** _POWER - _EPS**_POWER)

    def loss(self, terms: dict[str, Tensor], rows: Rows) -> LossOutput:
        """`clipped_loss` of these terms."""
        return clipped_loss(terms, rows, self.config, self.config.loss_scale, self.config.clip_range)
