"""What a model does on a fixed prompt set, with noise fixed per image: any two models are compared in pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from crd.backbones.base import Backbone
from crd.console import progress_steps
from crd.data import PromptDataset, prompt_batch
from crd.engine import Engine
from crd.eval_record import EvalRecord, rounded
from crd.metrics.drift import velocity_drift
from crd.metrics.held_out import HeldOutScores
from crd.metrics.image_statistics import image_statistics, within_prompt_diversity
from crd.records import Conditioning, PromptBatch, Rollout
from crd.rewards import RewardSet
from crd.sampling import sample
from crd.snapshots import Snapshots

EVAL_SEED = "evaluation"


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn from a denoiser."""

    steps: int
    guidance: float
    batch: int
    height: int | None
    width: int | None


@dataclass(frozen=True)
class EvalResult:
    """An evaluation: its numbers, and its images in the same order."""

    record: EvalRecord
    images: list[Image.Image]

    @property
    def mean(self) -> float:
        """Mean total reward."""
        return self.record.metrics()["reward"]

    def metrics(self) -> dict[str, float]:
        """Mean of every score and statistic where it applies, by name."""
        return self.record.metrics()

    @property
    def prompts(self) -> list[str]:
        """The prompt of each image."""
        return [self.record.prompts[index] for index in self.record.prompt_id]


def encode_prompts(backbone: Backbone, engine: Engine, prompts: list[str]) -> dict[str, Tensor]:
    """Conditioning of P prompts, name -> (P, ...), floats in float32; "" is the unconditional prompt.

    The one way from text to conditioning: guidance must not mix a prompt under autocast with a "" that was not.
    """
    with engine.autocast():
        encoded = backbone.encode(prompts)
    return {name: value.float() if value.is_floating_point() else value for name, value in encoded.items()}


def draw(
    backbone: Backbone,
    denoiser: nn.Module,
    engine: Engine,
    batch: PromptBatch,
    settings: SamplingSettings,
    uncond: Mapping[str, Tensor],
    title: str,
) -> Rollout:
    """Finished images of a batch of prompts; each distinct prompt is encoded once."""
    distinct = list(dict.fromkeys(batch.prompts))
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    tensors = encode_prompts(backbone, engine, distinct)
    conditioning = Conditioning(tensors, torch.tensor([row_of[prompt] for prompt in batch.prompts]))
    with progress_steps(title) as progress, engine.autocast():
        x0 = sample(
            backbone,
            denoiser,
            conditioning,
            batch.image_seed,
            num_steps=settings.steps,
            guidance_scale=settings.guidance,
            uncond=uncond,
            height=settings.height,
            width=settings.width,
            micro_batch=settings.batch,
            progress=progress,
        )
        images = backbone.decode(x0, chunk=settings.batch)
    return Rollout(x0, conditioning, images, batch)


@dataclass(frozen=True)
class Evaluator:
    """A fixed prompt set, and all that is measured on the images drawn for it."""

    backbone: Backbone
    snapshots: Snapshots
    engine: Engine
    rewards: RewardSet
    held_out: HeldOutScores
    dataset: PromptDataset
    settings: SamplingSettings  # its guidance is that of the policy
    uncond: Mapping[str, Tensor]
    anchor_guidance: float
    images_per_prompt: int
    seed: int

    def __call__(self, role: str, guidance: float | None = None) -> EvalResult:
        """Draw and judge the images of one role; image i has the same noise for every model and scale.

        Raises:
            CRDError: a reward or held-out scorer failed.
        """
        settings = self.settings if guidance is None else dataclasses.replace(self.settings, guidance=guidance)
        indices = range(len(self.dataset))
        batch = prompt_batch(self.dataset, indices, self.images_per_prompt, self.seed, EVAL_SEED)
        with self.snapshots.use(role) as denoiser:
            rollout = draw(self.backbone, denoiser, self.engine, batch, settings, self.uncond, "evaluate")
        return EvalResult(self._record(role, settings, rollout), rollout.images)

    def draws(self, record: EvalRecord) -> bool:
        """Whether this draws the images of `record`: its prompts, as many for each, from the same noise."""
        prompt_id = np.repeat(np.arange(len(self.dataset)), self.images_per_prompt)
        return (
            (list(self.dataset.prompts), self.seed) == (record.prompts, record.seed)
            and prompt_id.tolist() == record.prompt_id.tolist()
        )  # fmt: skip

    def _record(self, role: str, settings: SamplingSettings, rollout: Rollout) -> EvalRecord:
        batch, images = rollout.batch, rollout.images
        rewards = self.rewards.score(images, batch.prompts, batch.columns)
        scores = {"reward": rewards.total, **{f"reward_{name}": column for name, column in rewards.columns.items()}}
        for name, column in self.held_out.score(images, batch.group_id).items():
            scores[f"held_out_{name}"] = column
        drift = velocity_drift(
            self.backbone, self.snapshots, self.engine, role, rollout, self.uncond,
            guidance=settings.guidance, anchor_guidance=self.anchor_guidance, batch=settings.batch,
            seed_name=(self.seed, EVAL_SEED, "drift"),
        )  # fmt: skip
        return EvalRecord(
            role=role,
            guidance=settings.guidance,
            steps=settings.steps,
            seed=self.seed,
            prompts=list(self.dataset.prompts),
            prompt_id=batch.group_id.numpy(),
            scores={name: rounded(column.numpy()) for name, column in scores.items()},
            statistics={name: rounded(column) for name, column in image_statistics(images).items()},
            diversity=rounded(within_prompt_diversity(images, batch.group_id.numpy())),
            drift=drift,
        )
