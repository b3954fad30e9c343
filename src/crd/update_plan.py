"""What an update draws, in which optimizer step each image is trained on, and which images are whose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crd.config import CRDConfig
from crd.data import PromptDataset, epoch_order, prompt_batch
from crd.flow import draw_timesteps
from crd.ranks import Ranks
from crd.records import PromptBatch
from crd.seeds import generator
from crd.shares import Share


@dataclass(frozen=True)
class Draws:
    """How images are noised: `count` draws of (t, noise) each."""

    count: int
    timesteps: str
    fraction: float
    shared: bool  # one t for a group


@dataclass(frozen=True)
class UpdatePlan:
    """The images of one update; equal on all processes but for the rank in `share`."""

    number: int  # of the update, from 0
    batch: PromptBatch  # B images
    steps: tuple[Tensor, ...]  # images (n,) of each optimizer step: whole groups
    times: tuple[Tensor, ...]  # t (n draws,) of the rows of each step, draw-major
    share: Share  # of the images; the images of every step are dealt out evenly

    @property
    def own(self) -> PromptBatch:
        """The images of this process."""
        return self.batch.select(self.share.index)


def plan_update(dataset: PromptDataset, config: CRDConfig, number: int, ranks: Ranks, sigmas: Tensor) -> UpdatePlan:
    """The plan of update `number`; it follows from the seed, so that no process has to be told.

    Args:
        dataset: training prompts.
        config: of the run.
        number: of the update, from 0.
        ranks: the processes.
        sigmas: (S + 1,) grid of the rollouts.
    """
    count = config.prompts_per_update
    indices = epoch_order(len(dataset), number * count, count, config.seed)
    batch = prompt_batch(dataset, indices, config.group_size, config.seed, "rollout", number)
    order = torch.randperm(count, generator=generator(config.seed, "groups", number))
    steps = tuple(
        torch.isin(batch.group_id, groups).nonzero()[:, 0] for groups in order.tensor_split(config.optimizer_steps)
    )
    draws = Draws(config.draws, config.timesteps, config.timestep_fraction, config.share_timesteps)
    times = tuple(
        draw_times(draws, sigmas, batch.group_id[images], config.seed, "train", number, step)
        for step, images in enumerate(steps)
    )
    return UpdatePlan(number, batch, steps, times, ranks.share(*steps))


def draw_times(draws: Draws, sigmas: Tensor, group_id: Tensor, *name: int | str) -> Tensor:
    """t (n draws,) of all rows of n images, draw-major: one per (group, draw) if shared, else one per row."""
    image = torch.arange(len(group_id))
    unit = torch.unique(group_id, return_inverse=True)[1] if draws.shared else image
    table = draw_timesteps(
        draws.timesteps,
        sigmas,
        units=int(unit.max()) + 1,
        draws=draws.count,
        fraction=draws.fraction,
        generator=generator(*name, "timesteps"),
    )
    return table[:, unit].flatten()
