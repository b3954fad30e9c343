"""Rewards of one role on a fixed prompt set, with noise fixed per image: any two models are compared in pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from crd.backbones.base import Backbone
from crd.console import progress_steps
from crd.data import PromptDataset, prompt_batch
from crd.engine import Engine
from crd.records import Conditioning, PromptBatch, RewardOutput, Rollout
from crd.rewards import RewardSet
from crd.sampling import sample

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
    """Scores and images of an evaluation, one entry an image."""

    rewards: RewardOutput
    images: list[Image.Image]
    prompts: list[str]

    @property
    def mean(self) -> float:
        """Mean total reward."""
        return float(self.rewards.total.mean())

    def metrics(self) -> dict[str, float]:
        """Mean total and, by name, the mean of each reward where it applies."""
        return self.rewards.metrics()


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


def evaluate(
    backbone: Backbone,
    denoiser: nn.Module,
    engine: Engine,
    rewards: RewardSet,
    dataset: PromptDataset,
    settings: SamplingSettings,
    uncond: Mapping[str, Tensor],
    *,
    images_per_prompt: int,
    seed: int,
) -> EvalResult:
    """Score `images_per_prompt` images of every prompt; image i has the same noise for every model."""
    batch = prompt_batch(dataset, range(len(dataset)), images_per_prompt, seed, EVAL_SEED)
    rollout = draw(backbone, denoiser, engine, batch, settings, uncond, "evaluate")
    return EvalResult(rewards.score(rollout.images, batch.prompts, batch.columns), rollout.images, batch.prompts)
