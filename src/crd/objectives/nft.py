"""DiffusionNFT: good images pull the policy towards them, bad ones push it away, by one supervised loss.

Two implicit policies lie on both sides of `old` on the line through the policy,

    v⁺ = (1 - β) v_old + β v_θ,    v⁻ = (1 + β) v_old - β v_θ

An image of optimality probability A trains the first with weight A and the second with 1 - A. At θ = old the gradient
is that of advantage-weighted matching, as for CRD; unlike there it does not fade as the ratio grows.

Source: Zheng et al., "DiffusionNFT", arXiv 2509.16117v2: Theorem 3.2 with Eq. (5), and section 3.3, "Adaptive Loss
Weighting".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from crd.flow import error_scale, velocity_error
from crd.objectives.base import DenoiserOutputs, Rows
from crd.objectives.kl import ObjectiveConfig, kl_needs, kl_terms, with_kl
from crd.records import LossOutput
from crd.setting_checks import check_bounded, check_option, check_positive

WEIGHTINGS = ("adaptive", "unit")


@dataclass(frozen=True)
class NFTObjectiveConfig(ObjectiveConfig):
    """Settings of the NFT loss."""

    beta: float = 1.0  # how far the implicit policies are from `old`, in steps of θ - old
    weighting: str = "adaptive"
    loss_scale: float = 5.0  # the policy term is multiplied by loss_scale / beta
    flow_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("weighting", self.weighting, WEIGHTINGS)
        for name, number in (("beta", self.beta), ("loss_scale", self.loss_scale)):
            check_positive(name, number)
            check_bounded(name, number)

    def build(self) -> NFT:
        """The NFT objective."""
        return NFT(self)


@dataclass(frozen=True)
class NFT:
    """The NFT objective; no row depends on another."""

    config: NFTObjectiveConfig = field(default_factory=NFTObjectiveConfig)

    @property
    def needs(self) -> frozenset[str]:
        """Roles whose velocities `terms` reads."""
        return frozenset({"old"}) | kl_needs(self.config)

    def terms(self, outputs: DenoiserOutputs) -> dict[str, Tensor]:
        """Matching losses of both implicit policies, and the KL, each (N,) float64.

            adaptive:  mean_dims (x̂0 - x0)² / s,    s = stop_grad(max(mean_dims |x̂0 - x0|, 1e-5))
            unit:      mean_dims (x̂0 - x0)²

        with x̂0 = x_t - t v̂, so that x̂0 - x0 = t (v - v̂).

        Raises:
            CRDError: `old` is missing, or `anchor` is while kl_max > 0.
        """
        old = velocity_error(outputs.of_old(), outputs.target)
        step = self.config.beta * velocity_error(outputs.policy, outputs.of_old())
        t = outputs.t.double()[:, None]
        return {
            "positive": self._matching(t * (old + step)),
            "negative": self._matching(t * (old - step)),
            **kl_terms(outputs, self.config),
        }

    def _matching(self, error: Tensor) -> Tensor:
        loss = error.square().mean(1)
        return loss / error_scale(error) if self.config.weighting == "adaptive" else loss

    def loss(self, terms: dict[str, Tensor], rows: Rows) -> LossOutput:
        """Policy term plus KL.

            loss = loss_scale / β  mean_i [A_i positive_i + (1 - A_i) negative_i]  +  KL term

        Groups without signal have A = 1/2 throughout, which pulls the policy to `old` and teaches nothing: they add 0
        and still count in the mean (our reading; the public implementation trains on them).

        Args:
            terms: as from `terms`, rows in any order.
            rows: the same N rows.

        Returns:
            `LossOutput`; metrics are means over rows.

        Raises:
            CRDError: "kl" is missing while kl_max > 0.
            ValueError: terms and rows differ in length.
        """
        cfg, rows = self.config, rows.beside(terms["positive"])
        a = rows.advantage.double()
        policy = ((a * terms["positive"] + (1 - a) * terms["negative"]) * rows.has_signal).mean()
        return with_kl(cfg.loss_scale / cfg.beta * policy, self._metrics(policy, terms, rows), terms, rows, cfg)

    @torch.no_grad()
    def _metrics(self, policy: Tensor, terms: dict[str, Tensor], rows: Rows) -> dict[str, float]:
        return {
            "loss_policy": policy.item(),
            "loss_positive": terms["positive"].mean().item(),
            "loss_negative": terms["negative"].mean().item(),
            "signal_fraction": rows.has_signal.double().mean().item(),
        }
