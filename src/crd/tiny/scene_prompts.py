"""Compositional prompts of the bundled world: the GenEval tasks over twelve classes, split into train and test."""

from __future__ import annotations

import random

import numpy as np

from crd.errors import CRDError
from crd.geneval.metadata import COLORS, TASKS, Metadata
from crd.geneval.prompts import is_held_out, nth_prompt, prompt_count, training_prompts
from crd.seeds import derive_seed

SCENE_CLASSES = (
    "apple", "banana", "boat", "book", "bottle", "car", "chair", "clock", "cup", "donut", "kite", "umbrella",
)  # fmt: skip
TEST_MIX = dict.fromkeys(TASKS, 1)
# Twelve single-object prompts are too few to split; they stay unseen. Flow-GRPO's mix leans on tasks that only a
# large model has left to learn: with it, this small one lost on single objects and colors what it won on positions.
TRAIN_MIX = {**TEST_MIX, "single_object": 0}

_SIZES = {tag: prompt_count(tag, SCENE_CLASSES) for tag in TASKS}


def scene_prompts(split: str, count: int, seed: int = 0) -> list[Metadata]:
    """`count` prompts of the split "train" or "test", in random order.

    Test has the six tasks in equal parts, and of five of them only prompts that `is_held_out`. Train has these five in
    equal parts, and none of the held-out prompts. The twelve single-object prompts are for the test alone, but
    pretraining knows them. All prompts of a task occur before one occurs twice: of 36 counting prompts 8 are held out.

    Raises:
        CRDError: another split, or a count below 1.
    """
    if split not in ("train", "test"):
        raise CRDError(f"the split of scene prompts must be train or test, got {split!r}")
    stream = derive_seed("scenes", split, seed)
    mix, keep = (TRAIN_MIX, _is_train) if split == "train" else (TEST_MIX, _is_test)
    return training_prompts(count, stream, SCENE_CLASSES, mix=mix, keep=keep)


def _is_train(metadata: Metadata) -> bool:
    return not is_held_out(metadata)


def _is_test(metadata: Metadata) -> bool:
    return metadata.tag == "single_object" or is_held_out(metadata)


def pretraining_prompt(rng: np.random.Generator | random.Random, tasks: tuple[str, ...] = TASKS) -> Metadata:
    """A random prompt of one of `tasks`, all tasks equally likely, that is not held out."""
    below = rng.randrange if isinstance(rng, random.Random) else rng.integers
    tag = tasks[int(below(len(tasks)))]
    while True:
        metadata = nth_prompt(tag, int(below(_SIZES[tag])), SCENE_CLASSES, COLORS)
        if not is_held_out(metadata):
            return metadata
