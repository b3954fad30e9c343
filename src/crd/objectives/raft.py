"""RAFT, or best-of-K: plain flow matching on the best images of each group.

Source: Dong et al., "RAFT: Reward rAnked FineTuning", arXiv 2304.06767, its step of data ranking, with the images of
one update as its batch and one image kept: the SFT baseline of Flow-GRPO, arXiv 2505.05470v5, section 5.2. Keeping more
than one is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from crd.errors import CRDError
from crd.flow import velocity_error
from crd.objectives.base import DenoiserOutputs, Rows
from crd.objectives.kl import ObjectiveConfig, kl_needs, kl_terms, with_kl
from crd.records import LossOutput


@dataclass(frozen=True)
class RAFTObjectiveConfig(ObjectiveConfig):
    """Settings of best-of-K training."""

    best_of: int = 1  # images of a group that are kept

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best_of < 1:
            raise CRDError(f"best_of must be at least 1, got {self.best_of}; raise it")

    def build(self) -> RAFT:
        """The best-of-K objective."""
        return RAFT(self)


@dataclass(frozen=True)
class RAFT:
    """The best-of-K objective."""

    config: RAFTObjectiveConfig = field(default_factory=RAFTObjectiveConfig)

    @property
    def needs(self) -> frozenset[str]:
        """Roles whose velocities `terms` reads."""
        return kl_needs(self.config)

    def terms(self, outputs: DenoiserOutputs) -> dict[str, Tensor]:
        """Denoising loss mean_dims (v_θ - v)² of each row, and the KL, each (N,) float64.

        Raises:
            CRDError: `anchor` is missing while kl_max > 0.
        """
        error = velocity_error(outputs.policy, outputs.target).square().mean(1)
        return {"error": error, **kl_terms(outputs, self.config)}

    def loss(self, terms: dict[str, Tensor], rows: Rows) -> LossOutput:
        """Policy term plus KL.

            loss = mean error_i over the rows of the best images  +  KL term over all rows

        The best images of a group are those of highest advantage, which rewards on one scale may decide together; of
        equal ones, those of higher reward (the clip makes equal), then of the lower `image_id`. Groups
        whose rewards are all equal have no best image: their rows add 0 and still count in the mean.

        Args:
            terms: as from `terms`, rows in any order.
            rows: the same N rows, complete groups.

        Returns:
            `LossOutput`; `kept_reward` is the mean reward of the images that are trained on, 0 where there are none.

        Raises:
            CRDError: "kl" is missing while kl_max > 0.
            ValueError: terms and rows differ in length.
        """
        rows = rows.beside(terms["error"])
        best = best_rows(rows, self.config.best_of)
        trained = best & rows.has_signal
        policy = (terms["error"] * trained).sum() / best.sum()
        metrics = {
            "loss_policy": policy.item(),
            "kept_reward": rows.reward[trained].double().mean().item() if bool(trained.any()) else 0.0,
            "signal_fraction": rows.has_signal.double().mean().item(),
        }
        return with_kl(policy, metrics, terms, rows, self.config)


def best_rows(rows: Rows, count: int) -> Tensor:
    """Whether each row is of one of the `count` best images of its group, (N,) bool; see `RAFT.loss` for ties."""
    best = torch.zeros_like(rows.has_signal)
    for group in torch.unique(rows.group_id):
        own = (rows.group_id == group).nonzero()[:, 0]
        ranked = own[rows.image_id[own].argsort()]
        for value in (rows.reward, rows.advantage):  # the last one decides
            ranked = ranked[value[ranked].argsort(descending=True, stable=True)]
        # Rows of one image have one reward and advantage, so their images come in blocks.
        images = torch.unique_consecutive(rows.image_id[ranked])[:count]
        best[own] = torch.isin(rows.image_id[own], images)
    return best
