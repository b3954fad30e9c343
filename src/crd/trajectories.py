"""Trajectories of the stochastic sampler: drawn step by step, and kept where they will be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crd.backbones.solvers import Step
from crd.sampling import initial_noise
from crd.sde import SDESteps, log_density
from crd.seeds import derive_seed
from crd.update_plan import UpdatePlan


@dataclass(frozen=True)
class Transitions:
    """Single steps of trajectories."""

    x: Tensor  # (N, C, H, W) float32
    x_next: Tensor  # (N, C, H, W) float32
    log_density: Tensor  # (N,) float64, of the step under the denoiser that drew it


@dataclass(frozen=True)
class Trajectories:
    """The trained steps of B images; a step is kept as the two states at its ends, which neighbours share.

    They lie on the CPU: each is read twice, and there are up to twice as many as steps that are trained.
    """

    sde: SDESteps
    image_seed: Sequence[int]  # B, as of the initial noise
    slot: Tensor  # (B, S + 1) int64, where a state of an image is among those kept, -1 = it is not
    states: Tensor  # (B, M, C, H, W) float32
    log_density: Tensor  # (B, S) float64

    @staticmethod
    def of(plan: UpdatePlan, sde: SDESteps, shape: tuple[int, int, int]) -> Trajectories:
        """Room for the steps that an update trains, of the images of this process.

        Args:
            plan: of the update.
            sde: the sampler.
            shape: (C, H, W) of one latent.
        """
        step = torch.empty(
            len(plan.batch), len(plan.times[0]) // len(plan.steps[0]), dtype=torch.long
        )  # (images, draws)
        for images, times in zip(plan.steps, plan.times, strict=True):
            step[images] = sde.index(times).view(-1, len(images)).T
        own = step[plan.share.index]
        kept = torch.zeros(len(own), len(sde) + 1, dtype=torch.bool)
        kept.scatter_(1, own, True).scatter_(1, own + 1, True)
        return Trajectories(
            sde=sde,
            image_seed=plan.own.image_seed,
            slot=torch.where(kept, kept.cumsum(1) - 1, -1),
            states=torch.empty(len(own), int(kept.sum(1).max()), *shape),
            log_density=torch.empty(len(own), len(sde), dtype=torch.float64),
        )

    def stepper(self, rows: Tensor) -> Step:
        """What moves the images `rows` (N,) one step on, keeping what is to be kept.

        Images that are drawn again, in other company, take the place of what was kept of them.
        """

        def advance(index: int, x: Tensor, v: Tensor) -> Tensor:
            seeds = [derive_seed(self.image_seed[row], "step", index) for row in rows.tolist()]
            noise = initial_noise(seeds, (x.shape[1], x.shape[2], x.shape[3])).to(x)
            x_next = self.sde.step(index, x, v, noise)
            self._keep(rows, index, x)
            if index == len(self.sde) - 1:
                self._keep(rows, index + 1, x_next)
            steps = torch.full((len(rows),), index)
            density = log_density(v, self.sde.target(steps, x, x_next), self.sde.precision(steps))
            self.log_density[rows, index] = density.cpu()
            return x_next

        return advance

    def at(self, place: Tensor, step: Tensor) -> Transitions:
        """Steps (N,) of the images at `place` (N,); they must be among those kept."""
        return Transitions(
            x=self.states[place, self.slot[place, step]],
            x_next=self.states[place, self.slot[place, step + 1]],
            log_density=self.log_density[place, step],
        )

    def _keep(self, rows: Tensor, state: int, x: Tensor) -> None:
        slot = self.slot[rows, state]
        kept = slot >= 0
        self.states[rows[kept], slot[kept]] = x.cpu()[kept]
