"""The images of an update, drawn from `sampler` and judged: one after the other, or beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from crd.backbones.base import Backbone
from crd.engine import Engine
from crd.evaluation import SamplingSettings, draw
from crd.overlap import ScoringThread
from crd.records import RewardOutput, Rollout
from crd.rewards import RewardSet
from crd.sde import SDESteps
from crd.snapshots import Snapshots
from crd.trajectories import Trajectories
from crd.update_plan import UpdatePlan

T = TypeVar("T")


@dataclass(frozen=True)
class Rollouts:
    """Draws and judges the images of updates; each process its own."""

    backbone: Backbone
    snapshots: Snapshots
    engine: Engine
    rewards: RewardSet
    settings: SamplingSettings
    uncond: Mapping[str, Tensor]
    role: str  # that draws
    sde: SDESteps | None  # the sampler of an objective that trains on trajectories; None = the solver's own steps

    def draw(self, plan: UpdatePlan, scoring: ScoringThread | None = None) -> Rollout:
        """This process's images of an update; `scoring` gets them as they are finished."""
        trajectories = None
        if self.sde is not None:
            shape = self.backbone.latent_shape(self.settings.height, self.settings.width)
            trajectories = Trajectories.of(plan, self.sde, shape)
        with self.snapshots.use(self.role) as sampler:
            rollout = draw(
                self.backbone, sampler, self.engine, plan.own, self.settings, self.uncond, "rollout",
                None if trajectories is None else trajectories.stepper, scoring,
            )  # fmt: skip
        return replace(rollout, trajectories=trajectories)

    def score(self, plan: UpdatePlan, rollout: Rollout) -> RewardOutput:
        """Rewards of all images of an update; each process judges its own."""
        places = plan.share.places
        own = rollout.batch.select(places)
        with self.engine.ranks.together():
            found = self.rewards.score([rollout.images[place] for place in places], own.prompts, own.columns)
        return self._of_all(plan, found)

    def draw_and_score(self, plan: UpdatePlan, meanwhile: Callable[[Rollout], T]) -> tuple[Rollout, RewardOutput, T]:
        """`draw` and `score` beside each other, and what `meanwhile` makes of the images while the last are judged."""
        with ScoringThread(self.rewards, plan.own, plan.share.places) as scoring:
            rollout = self.draw(plan, scoring)
            made = meanwhile(rollout)
            with self.engine.ranks.together():
                found = scoring.result()
        return rollout, self._of_all(plan, found), made

    def _of_all(self, plan: UpdatePlan, found: RewardOutput) -> RewardOutput:
        ranks = self.engine.ranks
        total = ranks.gather(plan.share, found.total)
        return RewardOutput(total, {name: ranks.gather(plan.share, scores) for name, scores in found.columns.items()})
