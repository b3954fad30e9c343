"""One optimizer step's rows: which image is noised how, and the velocities of all roles at those points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from crd.advantages import Advantages
from crd.backbones.base import Backbone, guided_velocity
from crd.engine import Engine
from crd.flow import draw_timesteps, interpolate, velocity_target
from crd.objectives.base import DenoiserOutputs, Rows
from crd.records import RewardOutput, Rollout
from crd.sampling import initial_noise
from crd.seeds import derive_seed, generator
from crd.snapshots import ANCHOR, OLD, POLICY, Snapshots


@dataclass(frozen=True)
class Draws:
    """How rows are noised: `count` draws of (t, noise) an image."""

    count: int
    timesteps: str
    fraction: float
    shared: bool


def build_rows(
    rewards: RewardOutput, advantages: Advantages, gate: Tensor, group_id: Tensor, images: Tensor, draws: int
) -> Rows:
    """Rows of `images` (n,) with `draws` rows each; row order is draw-major."""
    image = images.repeat(draws)
    return Rows(
        group_id=group_id[image],
        image_id=image,
        draw=torch.arange(draws).repeat_interleave(len(images)),
        advantage=advantages.advantage[image],
        reward=rewards.total[image],
        kl_gate=gate[image],
        has_signal=advantages.has_signal[image],
    )


def draw_times(draws: Draws, sigmas: Tensor, rows: Rows, *name: int | str) -> Tensor:
    """t (N,) of the rows: one per (group, draw) if shared, else one per row."""
    unit = torch.unique(rows.group_id if draws.shared else rows.image_id, return_inverse=True)[1]
    table = draw_timesteps(
        draws.timesteps,
        sigmas,
        units=int(unit.max()) + 1,
        draws=draws.count,
        fraction=draws.fraction,
        generator=generator(*name, "timesteps"),
    )
    return table[rows.draw, unit]


@dataclass
class RowVelocities:
    """Callable of the engine: velocities of policy, `old` and anchor at the rows' own (t, noise).

    All are scaled alike so that their errors are those of what the network itself predicts (epsilon, say).
    The references do not depend on the gradient: with `cache` they are computed once for both passes. `rows` are those
    of all processes, and the engine calls for rows whose images are in this one's `rollout`.
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
    _cached: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Where in this process's rollout an image is; -1 = another process has it, and runs its rows.
        known = self.rollout.batch.image_id
        self._place = torch.full((int(known.max()) + 1,), -1)
        self._place[known] = torch.arange(len(known))

    def __call__(self, index: Tensor) -> DenoiserOutputs:
        image = self.rows.image_id[index]
        place = self._place[image]
        x0 = self.rollout.x0[place]
        seeds = [
            derive_seed(*self.name, "noise", int(i), int(d)) for i, d in zip(image, self.rows.draw[index], strict=True)
        ]
        noise = initial_noise(seeds, (x0.shape[1], x0.shape[2], x0.shape[3])).to(x0)
        t = self.t[index].to(x0)
        x_t = interpolate(x0, noise, t)
        conditioning = self.rollout.conditioning.select(place).gather()
        references = self._references(index, x_t, t, conditioning)
        with self.snapshots.use(POLICY) as policy, self.engine.autocast():
            velocity = self._velocity(policy, x_t, t, conditioning, self.trained_guidance)
        return DenoiserOutputs(
            policy=velocity,
            old=references.get(OLD),
            anchor=references.get(ANCHOR),
            target=self._scaled(velocity_target(x0, noise), t),
            t=t,
        )

    def _velocity(
        self, denoiser: nn.Module, x_t: Tensor, t: Tensor, conditioning: dict[str, Tensor], guidance: float
    ) -> Tensor:
        velocity = guided_velocity(self.backbone, denoiser, x_t, t, conditioning, self.uncond, guidance)
        return self._scaled(velocity, t)

    def _scaled(self, velocity: Tensor, t: Tensor) -> Tensor:
        return velocity * self.backbone.target_scale(t)[:, None, None, None]

    @torch.no_grad()
    def _references(self, index: Tensor, x_t: Tensor, t: Tensor, conditioning: dict[str, Tensor]) -> dict[str, Tensor]:
        key = (int(index[0]), len(index))
        if key in self._cached:
            return self._cached[key]
        found: dict[str, Tensor] = {}
        if OLD in self.needs:
            with self.snapshots.use(OLD) as old, self.engine.autocast():
                found[OLD] = self._velocity(old, x_t, t, conditioning, self.trained_guidance)
        if ANCHOR in self.needs:
            with self.snapshots.use(ANCHOR) as anchor, self.engine.autocast():
                found[ANCHOR] = self._velocity(anchor, x_t, t, conditioning, self.anchor_guidance)
        if self.cache:
            self._cached[key] = found
        return found
