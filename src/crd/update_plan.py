"""What an update draws, in which optimizer step each image is trained on, and which images are whose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crd.config import CRDConfig
from crd.data import PromptDataset, epoch_order, prompt_batch
from crd.ranks import Ranks
from crd.records import PromptBatch
from crd.seeds import generator
from crd.shares import Share


@dataclass(frozen=True)
class UpdatePlan:
    """The images of one update; equal on all processes but for the rank in `share`."""

    number: int  # of the update, from 0
    batch: PromptBatch  # B images
    steps: tuple[Tensor, ...]  # images (n,) of each optimizer step: whole groups
    share: Share  # of the images; the images of every step are dealt out evenly

    @property
    def own(self) -> PromptBatch:
        """The images of this process."""
        return self.batch.select(self.share.index)


def plan_update(dataset: PromptDataset, config: CRDConfig, number: int, ranks: Ranks) -> UpdatePlan:
    """The plan of update `number`; it follows from the seed, so that no process has to be told."""
    count = config.prompts_per_update
    indices = epoch_order(len(dataset), number * count, count, config.seed)
    batch = prompt_batch(dataset, indices, config.group_size, config.seed, "rollout", number)
    order = torch.randperm(count, generator=generator(config.seed, "groups", number))
    steps = tuple(
        torch.isin(batch.group_id, groups).nonzero()[:, 0] for groups in order.tensor_split(config.optimizer_steps)
    )
    return UpdatePlan(number, batch, steps, ranks.share(*steps))
