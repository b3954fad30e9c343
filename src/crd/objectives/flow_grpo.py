"""Flow-GRPO: a clipped policy gradient over the steps of a stochastic sampler.

A row is one step of an image's trajectory, drawn from the Gaussian that `crd.sde` describes. The ratio is that of the
densities of the step under the policy and under the snapshot that drew it.

Source: Liu et al., "Flow-GRPO", arXiv 2505.05470v5, section 4: Eq. (5) with the clipped sum below it, and the KL of two
Gaussians below Eq. (9).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from crd.objectives.base import TRAJECTORY, DenoiserOutputs, Rows
from crd.objectives.kl import ObjectiveConfig, kl_needs, kl_terms
from crd.objectives.ratio import clipped_loss
from crd.records import LossOutput
from crd.sde import log_density
from crd.setting_checks import check_bounded, check_positive


@dataclass(frozen=True)
class FlowGRPOObjectiveConfig(ObjectiveConfig):
    """Settings of the Flow-GRPO loss, and of the sampler that it needs."""

    clip_range: float = 1e-4
    loss_scale: float = 5.0
    sde_noise: float = 0.7  # a of σ_t = a sqrt(t / (1 - t))
    flow_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = {"clip_range": self.clip_range, "loss_scale": self.loss_scale, "sde_noise": self.sde_noise}
        for name, number in numbers.items():
            check_positive(name, number)
            check_bounded(name, number)

    def build(self) -> FlowGRPO:
        """The Flow-GRPO objective."""
        return FlowGRPO(self)


@dataclass(frozen=True)
class FlowGRPO:
    """The Flow-GRPO objective; no row depends on another."""

    config: FlowGRPOObjectiveConfig = field(default_factory=FlowGRPOObjectiveConfig)

    @property
    def needs(self) -> frozenset[str]:
        """Trajectories; not `old`, for what drew them has left its densities there."""
        return frozenset({TRAJECTORY}) | kl_needs(self.config)

    def terms(self, outputs: DenoiserOutputs) -> dict[str, Tensor]:
        """Log-ratio of each step, and the KL of the two Gaussians, each (N,) float64.

            log_ratio = log p_θ(x_next | x) - log p_sampler(x_next | x),                 mean over dims
            KL        = |μ_θ - μ_anchor|² / (2 std²) = precision / 2 (v_θ - v_anchor)²,  mean over dims

        with precision = q² / std² = -Δt (σ (1 - t) / (2t) + 1 / σ)². The public implementation divides by σ² where the
        Gaussian's variance is -σ² Δt, so that its KL is smaller by a factor -Δt; this one is the paper's.

        Raises:
            CRDError: `anchor` is missing while kl_max > 0.
            ValueError: the rows are no steps of trajectories.
        """
        if outputs.steps is None:
            raise ValueError("flow_grpo is about steps of trajectories, got noised images; draw with Trajectories")
        steps = outputs.steps
        log_ratio = log_density(outputs.policy, outputs.target, steps.precision) - steps.log_density
        return {"log_ratio": log_ratio, **kl_terms(outputs, self.config, steps.precision / 2)}

    def loss(self, terms: dict[str, Tensor], rows: Rows) -> LossOutput:
        """`clipped_loss` of these terms."""
        return clipped_loss(terms, rows, self.config, self.config.loss_scale, self.config.clip_range)
