"""What a model does on a fixed prompt set, with noise fixed per image: any two models are compared in pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from crd.backbones.base import Backbone
from crd.backbones.solvers import Step
from crd.batch_sizes import BatchSize
from crd.console import progress_steps
from crd.data import PromptDataset, prompt_batch
from crd.engine import Engine
from crd.eval_record import HELD_OUT, REWARD, EvalRecord, Protocol, rounded
from crd.flow import EULER
from crd.metrics.drift import velocity_drift
from crd.metrics.held_out import HeldOutScores
from crd.metrics.image_statistics import STATISTICS, group_diversity, image_statistics, thumbnails
from crd.overlap import ScoringThread
from crd.records import Conditioning, PromptBatch, Rollout
from crd.rewards import RewardSet
from crd.sampling import sample
from crd.shares import Share
from crd.snapshots import Snapshots

EVAL_SEED = "evaluation"
SHOWN = 64  # images of an evaluation that people get to see
_CELLS = "cells"


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn from a denoiser."""

    steps: int
    guidance: float
    batch: BatchSize  # images per call of the denoiser, and of the decoder
    height: int | None
    width: int | None
    solver: str = EULER


@dataclass(frozen=True)
class EvalResult:
    """An evaluation: its numbers, and its images in the same order.

    In a run of several processes `images` are the first `SHOWN`, on the first process, and none on the others.
    """

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
        """The prompt of each image, shown or not."""
        return [self.record.prompts[index] for index in self.record.prompt_id]


def encode_prompts(
    backbone: Backbone, engine: Engine, prompts: list[str], height: int | None = None, width: int | None = None
) -> dict[str, Tensor]:
    """Conditioning of P prompts for pictures of that size, name -> (P, ...), floats in float32.

    The one way from text to conditioning: guidance must not mix a prompt under autocast with a "" that was not.
    """

    def encode(texts: list[str]) -> dict[str, Tensor]:
        with engine.autocast():
            return _in_float32(backbone.encode(texts, height, width))

    return encode(prompts) if backbone.cache is None else backbone.cache.rows(prompts, (height, width), encode)


def encode_unconditional(
    backbone: Backbone, engine: Engine, height: int | None = None, width: int | None = None
) -> dict[str, Tensor]:
    """Conditioning that CFG moves away from, name -> (1, ...), as `encode_prompts` gives it; {} without CFG."""
    with engine.autocast():
        return _in_float32(backbone.unconditional(height, width))


def _in_float32(encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in encoded.items()}


def draw(
    backbone: Backbone,
    denoiser: nn.Module,
    engine: Engine,
    batch: PromptBatch,
    settings: SamplingSettings,
    uncond: Mapping[str, Tensor],
    title: str,
    stepper: Callable[[Tensor], Step] | None = None,
    scoring: ScoringThread | None = None,
) -> Rollout:
    """Finished images of a batch of prompts; each distinct prompt is encoded once.

    `stepper`: see `sample`; `scoring` gets the images as they are finished. Both begin again when memory runs out.
    """
    distinct = list(dict.fromkeys(batch.prompts))
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    with engine.ranks.together():
        tensors = encode_prompts(backbone, engine, distinct, settings.height, settings.width)
    conditioning = Conditioning(tensors, torch.tensor([row_of[prompt] for prompt in batch.prompts]))

    def attempt(size: int) -> tuple[Tensor, list[Image.Image]]:
        images: list[Image.Image] = []

        def finished(rows: Tensor, x0: Tensor) -> None:
            images.extend(backbone.decode(x0, chunk=size))
            if scoring is not None:
                scoring.take(rows, images[-len(rows) :])

        if scoring is not None:
            scoring.begin()
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
                micro_batch=size,
                progress=progress,
                solver=settings.solver,
                stepper=stepper,
                finished=finished,
            )
        return x0, images

    x0, images = settings.batch.run(lambda size: engine.in_memory(lambda: attempt(size)), len(batch))
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

        Of several processes each draws and judges its share, and all get the whole record.

        Raises:
            CRDError: a reward or held-out scorer failed.
        """
        settings = self.settings if guidance is None else dataclasses.replace(self.settings, guidance=guidance)
        indices = range(len(self.dataset))
        batch = prompt_batch(self.dataset, indices, self.images_per_prompt, self.seed, EVAL_SEED)
        share = self.engine.ranks.share(len(batch))
        own = batch.select(share.index)
        with self.snapshots.use(role) as denoiser:
            rollout = draw(self.backbone, denoiser, self.engine, own, settings, self.uncond, "evaluate")
        record = self._record(role, settings, rollout, batch.group_id, share)
        return EvalResult(record, self._shown(rollout.images, share))

    @property
    def protocol(self) -> Protocol:
        """How this measures images."""
        rewards = {f"{REWARD}{name}": source for name, source in self.rewards.sources.items()}
        held_out = {f"{HELD_OUT}{name}": source for name, source in self.held_out.sources.items()}
        height, width = self.backbone.default_size
        return Protocol(
            weights=self.rewards.weights,
            sources={**rewards, **held_out},
            height=self.settings.height or height,
            width=self.settings.width or width,
            anchor_guidance=self.anchor_guidance,
        )

    def draws(self, record: EvalRecord) -> bool:
        """Whether this draws the images of `record`: its prompts, as many for each, from the same noise."""
        prompt_id = np.repeat(np.arange(len(self.dataset)), self.images_per_prompt)
        return (
            (list(self.dataset.prompts), self.seed) == (record.prompts, record.seed)
            and prompt_id.tolist() == record.prompt_id.tolist()
        )  # fmt: skip

    def _record(
        self, role: str, settings: SamplingSettings, rollout: Rollout, prompt_id: Tensor, share: Share
    ) -> EvalRecord:
        """The numbers of all images; `prompt_id` (B,) of all, `rollout` those of this process."""
        columns = self._measured(rollout, share)
        found = {name: self.engine.ranks.gather(share, values) for name, values in columns.items()}
        cells = found.pop(_CELLS).numpy()
        statistics = {name: found.pop(name) for name in STATISTICS}
        held_out = {name: found[f"{HELD_OUT}{name}"] for name in self.held_out.names}
        self.held_out.check_answers(held_out, prompt_id)
        drift = velocity_drift(
            self.backbone, self.snapshots, self.engine, role, rollout, share, self.uncond,
            guidance=settings.guidance, anchor_guidance=self.anchor_guidance, base_guidance=self.settings.guidance,
            batch=settings.batch, seed_name=(self.seed, EVAL_SEED, "drift"),
        )  # fmt: skip
        return EvalRecord(
            role=role,
            guidance=settings.guidance,
            steps=settings.steps,
            solver=settings.solver,
            seed=self.seed,
            prompts=list(self.dataset.prompts),
            prompt_id=prompt_id.numpy(),
            protocol=self.protocol,
            scores={name: rounded(column.numpy()) for name, column in found.items()},
            statistics={name: rounded(column.numpy()) for name, column in statistics.items()},
            diversity=rounded(group_diversity(cells, prompt_id.numpy())),
            drift=drift,
        )

    def _measured(self, rollout: Rollout, share: Share) -> dict[str, Tensor]:
        """All that is measured on single images, of those of this process that count: name -> (k, ...) float64."""
        images = [rollout.images[place] for place in share.places.tolist()]
        batch = rollout.batch.select(share.places)
        with self.engine.ranks.together():
            rewards = self.rewards.score(images, batch.prompts, batch.columns)
            held_out = self.held_out.score(images, batch.group_id)
        statistics = image_statistics(images)
        return {
            "reward": rewards.total,
            **{f"{REWARD}{name}": column for name, column in rewards.columns.items()},
            **{f"{HELD_OUT}{name}": column for name, column in held_out.items()},
            **{name: torch.from_numpy(column) for name, column in statistics.items()},
            _CELLS: torch.from_numpy(thumbnails(images)),
        }

    def _shown(self, images: list[Image.Image], share: Share) -> list[Image.Image]:
        """The images that people see."""
        ranks = self.engine.ranks
        if ranks.world_size == 1:
            return images
        share = share.first(SHOWN)
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images[: len(share.index)]]))
        found = ranks.gather_to_main(share, pixels[share.places])
        return [] if found is None else [Image.fromarray(one) for one in found.numpy()]
