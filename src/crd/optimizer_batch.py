"""One optimizer step's rows: which image is noised how, and the velocities of all roles at those points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from crd.advantages import Advantages, group_advantages, group_normalized, kl_gate
from crd.backbones.base import Backbone, guided_velocity
from crd.batch_sizes import BatchSize
from crd.config import CRDConfig
from crd.engine import Engine
from crd.flow import interpolate, velocity_target
from crd.objectives.base import DenoiserOutputs, Rows, SampledSteps
from crd.records import RewardOutput, Rollout
from crd.sampling import initial_noise
from crd.seeds import derive_seed
from crd.shares import Share
from crd.snapshots import ANCHOR, OLD, POLICY, Snapshots


@dataclass(frozen=True)
class Points:
    """Where N rows are, and the velocity that they are to have there."""

    x_t: Tensor  # (N, C, H, W)
    t: Tensor  # (N,)
    target: Tensor  # (N, C, H, W)
    steps: SampledSteps | None


def learning_signal(
    config: CRDConfig, rewards: RewardOutput, weights: Mapping[str, float], group_id: Tensor, number: int
) -> tuple[Advantages, Tensor]:
    """Advantages of the B images of update `number`, and the gate (B,) of their KL strength.

    In the first `config.distill_updates` updates no group has signal, so that the KL term alone is trained.
    """
    signal = rewards.total
    if config.reward_normalization == "group":
        signal = group_normalized(rewards.columns, weights, group_id)
    advantages = group_advantages(signal, group_id, clip=config.advantage_clip)
    if number < config.distill_updates:
        advantages = replace(advantages, has_signal=torch.zeros_like(advantages.has_signal))
    # Without an anchor nothing reads the gate, so rewards need no range.
    kind = config.kl_gate if config.kl_max > 0 else "constant"
    return advantages, kl_gate(kind, rewards.total, advantages.advantage, config.kl_reward_range)


def blank_rows(group_id: Tensor, images: Tensor, draws: int) -> Rows:
    """Rows of `images` (n,) with `draws` rows each, draw-major, of which no reward is known."""
    image = images.repeat(draws)
    unknown = torch.full((len(image),), torch.nan, dtype=torch.float64)
    return Rows(
        group_id=group_id[image],
        image_id=image,
        draw=torch.arange(draws).repeat_interleave(len(images)),
        advantage=unknown,
        reward=unknown,
        kl_gate=unknown,
        has_signal=torch.zeros(len(image), dtype=torch.bool),
    )


def build_rows(
    rewards: RewardOutput, advantages: Advantages, gate: Tensor, group_id: Tensor, images: Tensor, draws: int
) -> Rows:
    """Rows of `images` (n,) with `draws` rows each; row order is draw-major."""
    rows = blank_rows(group_id, images, draws)
    return replace(
        rows,
        advantage=advantages.advantage[rows.image_id],
        reward=rewards.total[rows.image_id],
        kl_gate=gate[rows.image_id],
        has_signal=advantages.has_signal[rows.image_id],
    )


@dataclass
class RowVelocities:
    """Callable of the engine: velocities of policy, `old` and anchor at the rows' own (t, noise).

    All are scaled alike so that their errors are those of what the network itself predicts (epsilon, say).
    The references do not depend on the gradient: with `cache` they are computed once for both passes. `rows` are those
    of all processes, and the engine calls for rows whose images are in this one's `rollout`. Rewards are not read.
    """

    backbone: Backbone
    snapshots: Snapshots
    engine: Engine
    rollout: Rollout
    rows: Rows
    t: Tensor  # (N,)
    needs: frozenset[str]
    uncond: Mapping[str, Tensor]
    trained_guidance: float  # of policy and `old`
    anchor_guidance: float
    cache: bool
    name: tuple[int | str, ...]  # of the noise
    share_noise: bool  # one for all images of a group at each draw
    _cached: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Where in this process's rollout an image is; -1 = another process has it, and runs its rows.
        known = self.rollout.batch.image_id
        self._place = torch.full((int(known.max()) + 1,), -1)
        self._place[known] = torch.arange(len(known))

    def __call__(self, index: Tensor) -> DenoiserOutputs:
        points, conditioning = self._points(index)
        references = self._references(index, points, conditioning)
        with self.snapshots.use(POLICY) as policy, self.engine.autocast():
            velocity = self._velocity(policy, points, conditioning, self.trained_guidance)
        return DenoiserOutputs(
            policy=velocity,
            old=references.get(OLD),
            anchor=references.get(ANCHOR),
            target=self._scaled(points.target, points.t),
            t=points.t,
            steps=points.steps,
        )

    def look_ahead(self, size: BatchSize, share: Share) -> None:
        """Compute and keep the references of this process's share of the rows."""

        def compute(rows: int) -> None:
            for index in share.index.split(rows):
                self._references(index, *self._points(index))

        size.run(lambda rows: self.engine.in_memory(lambda: compute(rows)), len(share.index), self.forget)

    def forget(self) -> None:
        """Let the references go."""
        self._cached.clear()

    def _points(self, index: Tensor) -> tuple[Points, dict[str, Tensor]]:
        """Noised images, or, if the rollout kept its trajectories, the states that its steps started from.

        Their conditioning goes with them.
        """
        place = self._place[self.rows.image_id[index]]
        conditioning = self.rollout.conditioning.select(place).gather()
        x0 = self.rollout.x0[place]
        t = self.t[index].to(x0)
        trajectories = self.rollout.trajectories
        if trajectories is None:
            noise = self._noise(index, (x0.shape[1], x0.shape[2], x0.shape[3])).to(x0)
            return Points(interpolate(x0, noise, t), t, velocity_target(x0, noise), None), conditioning
        sde, step = trajectories.sde, trajectories.sde.index(self.t[index])
        taken = trajectories.at(place, step)
        x_t, log_density = taken.x.to(x0), taken.log_density.to(x0.device)
        sampled = SampledSteps(sde.precision(step).to(x0.device), log_density)
        return Points(x_t, t, sde.target(step, x_t, taken.x_next.to(x0)), sampled), conditioning

    def _noise(self, index: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Noise (n, C, H, W) of rows; each depends on its own name only."""
        owner = self.rows.group_id if self.share_noise else self.rows.image_id
        names = zip(owner[index].tolist(), self.rows.draw[index].tolist(), strict=True)
        return initial_noise([derive_seed(*self.name, "noise", *name) for name in names], shape)

    def _velocity(
        self, denoiser: nn.Module, points: Points, conditioning: dict[str, Tensor], guidance: float
    ) -> Tensor:
        x_t, t = points.x_t, points.t
        velocity = guided_velocity(self.backbone, denoiser, x_t, t, conditioning, self.uncond, guidance)
        return self._scaled(velocity, t)

    def _scaled(self, velocity: Tensor, t: Tensor) -> Tensor:
        return velocity * self.backbone.target_scale(t)[:, None, None, None]

    @torch.no_grad()
    def _references(self, index: Tensor, points: Points, conditioning: dict[str, Tensor]) -> dict[str, Tensor]:
        key = (int(index[0]), len(index))
        if key in self._cached:
            return self._cached[key]
        found: dict[str, Tensor] = {}
        if OLD in self.needs:
            with self.snapshots.use(OLD) as old, self.engine.autocast():
                found[OLD] = self._velocity(old, points, conditioning, self.trained_guidance)
        if ANCHOR in self.needs:
            with self.snapshots.use(ANCHOR) as anchor, self.engine.autocast():
                found[ANCHOR] = self._velocity(anchor, points, conditioning, self.anchor_guidance)
        if self.cache:
            self._cached[key] = found
        return found
