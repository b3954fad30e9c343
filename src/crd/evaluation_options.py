"""What `crd eval` and `crd compare` measure with, made of their arguments and of a run's own settings."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from crd.backbones.base import CFG, Backbone
from crd.command_options import image_size, noise_seed, plain_scale, sampling_settings
from crd.config import CRDConfig
from crd.data import PromptDataset
from crd.engine import Engine
from crd.errors import CRDError, told_of
from crd.eval_record import EvalRecord
from crd.evaluation import Evaluator, encode_unconditional
from crd.loading import LoadedModel, judged_prompts
from crd.metrics.held_out import HeldOutScores
from crd.metrics.tiny_frechet import RenderedWorld
from crd.metrics.tiny_image_text import TinyImageText
from crd.rewards import RewardSet
from crd.run_folder import GIVEN_IN_PYTHON

REWARD, PROMPTS = "ocr", "world:test:256"  # of models that no run says more about


@dataclass(frozen=True)
class Judges:
    """The prompts of an evaluation, images of each, and who judges them."""

    rewards: RewardSet
    held_out: HeldOutScores
    dataset: PromptDataset
    images_per_prompt: int
    rendered: RenderedWorld | None  # to be measured against it

    def record(self, evaluator: Evaluator, role: str, guidance: float) -> EvalRecord:
        """Draw and judge the images of one role at one guidance scale."""
        result = evaluator(role, guidance)
        if self.rendered is None:
            return result.record
        return replace(result.record, drift={**result.record.drift, **self.rendered.measure(result.images)})


def judges_of(args: argparse.Namespace, run: CRDConfig | None, engine: Engine) -> Judges:
    """Tested judges, and the prompts, which they can judge: as given, else as the run evaluates.

    `--reward` takes the place of the run's rewards with their weights, and of its held-out scorers.

    Raises:
        CRDError: a broken judge, prompts that the rewards cannot judge, or a run that does not say.
    """
    held_out = args.held_out or ()
    if args.reward or run is None:
        rewards = RewardSet(args.reward or [REWARD])
    else:
        rewards = RewardSet([_named("--reward", reward) for reward in run.rewards], run.reward_weights)
        held_out = args.held_out or run.held_out
    prompts = args.prompts or (PROMPTS if run is None else _named("--prompts", run.eval_prompts))
    dataset = judged_prompts("eval_prompts" if run is not None and not args.prompts else "--prompts", prompts, rewards)
    scorers = HeldOutScores(held_out, dataset)
    for judges in (rewards, scorers):
        judges.use_device(str(engine.device))
        judges.self_test()
    images = args.images or (1 if run is None else run.eval_images)
    return Judges(rewards, scorers, dataset, images, _rendered(dataset, images, engine) if args.frechet else None)


def evaluator_of(
    args: argparse.Namespace, model: LoadedModel, judges: Judges, engine: Engine, anchor_guidance: float | None
) -> Evaluator:
    """What measures a model; an anchor's scale of None is that of its run."""
    if anchor_guidance is None:
        anchor_guidance = _base_anchor(model.backbone) if model.config is None else model.config.anchor_guidance
    model.backbone.check_scale(anchor_guidance)
    if judges.rendered is not None:
        judges.rendered.check_size(*image_size(args, model))
    return Evaluator(
        model.backbone, model.snapshots, engine, judges.rewards, judges.held_out, judges.dataset,
        sampling_settings(args, model, plain_scale(model)),
        encode_unconditional(model.backbone, engine, *image_size(args, model)),
        anchor_guidance=anchor_guidance, images_per_prompt=judges.images_per_prompt, seed=noise_seed(args, model),
    )  # fmt: skip


def _rendered(dataset: PromptDataset, images: int, engine: Engine) -> RenderedWorld:
    judge = TinyImageText()
    judge.use_device(str(engine.device))
    with told_of("--frechet"):
        return RenderedWorld([prompt for prompt in dataset.prompts for _ in range(images)], judge)


def _base_anchor(backbone: Backbone) -> float:
    """Guidance of the base model that a model without a run is measured against: as pipelines draw it by default."""
    return CRDConfig.anchor_guidance if backbone.guidance == CFG else backbone.stock_scale


def _named(option: str, value: str | None) -> str:
    if value is None:
        raise CRDError(f"the run was not evaluated, so it does not say on what; give {option}")
    if value == GIVEN_IN_PYTHON:
        raise CRDError(f"the run does not say what to evaluate with, it got an object in Python; give {option}")
    return value
