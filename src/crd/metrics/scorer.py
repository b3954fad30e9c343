"""What the preference scorers share: loading when first needed, batches, a self-test."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from crd.console import progress_steps
from crd.errors import CRDError

# (N RGB images, their N prompts) -> scores (N,)
BatchScorer = Callable[[list[Image.Image], list[str]], Tensor]


class PreferenceScorer(ABC):
    """A network's score of each image for its own prompt, under the contract of `crd.rewards.base`.

    No image or prompt influences the score of another. Weights and arithmetic are float32, in eval mode.

    Args:
        source: hub id or local copy of the weights; None = `published`.
    """

    published: ClassVar[str]  # hub id
    batch_size: int = 32  # images at a time

    def __init__(self, source: str | None = None) -> None:
        self.source = self.published if source is None else source
        self._device = "auto"
        self._score: BatchScorer | None = None

    @abstractmethod
    def load(self, device: str) -> BatchScorer:
        """The networks on a device, as a function of one batch.

        Raises:
            CRDError: they cannot be loaded.
        """

    def use_device(self, device: str) -> None:
        """Where the networks go: "cpu", "cuda", "cuda:1"; never told, a GPU if there is one."""
        if device != self._device:
            self._device, self._score = device, None

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Scores of B images of any size and mode, each for its own one of B prompts.

        Raises:
            CRDError: the networks cannot be loaded.
            ValueError: images and prompts differ in number.
        """
        if len(prompts) != len(images):
            raise ValueError(f"prompts must hold one entry per image ({len(images)}), got {len(prompts)}")
        scores: list[float] = []
        if not images:
            return scores
        score = self._loaded()
        with torch.inference_mode(), progress_steps(type(self).__name__) as progress:
            for start in range(0, len(images), self.batch_size):
                stop = start + self.batch_size
                batch = [image.convert("RGB") for image in images[start:stop]]
                scores += score(batch, list(prompts[start:stop])).tolist()
                progress(len(scores), len(images))
        return scores

    def self_test(self) -> list[float]:
        """Scores of three drawn pictures, which must be finite and differ; loads the networks.

        Raises:
            CRDError: they cannot be loaded, or the scores are not so.
        """
        images, prompts = samples()
        scores = self(images, prompts)
        if not all(math.isfinite(score) for score in scores) or len(set(scores)) < len(scores):
            told = f"{type(self).__name__} must give three different pictures three finite scores that differ, got"
            raise CRDError(f"{told} {scores}; download {self.source} again")
        return scores

    def _loaded(self) -> BatchScorer:
        if self._score is None:
            free = "cuda" if torch.cuda.is_available() else "cpu"
            self._score = self.load(free if self._device == "auto" else self._device)
        return self._score


def samples(side: int = 224) -> tuple[list[Image.Image], list[str]]:
    """Three drawn pictures of `side` px and what they show."""
    frame = (side // 4, side // 4, 3 * side // 4, 3 * side // 4)
    circle, square, triangle = (Image.new("RGB", (side, side), ground) for ground in ("white", "black", "yellow"))
    ImageDraw.Draw(circle).ellipse(frame, fill="red")
    ImageDraw.Draw(square).rectangle(frame, fill="blue")
    ImageDraw.Draw(triangle).polygon([(side // 2, side // 4), frame[2:], (frame[0], frame[3])], fill="green")
    prompts = [
        "a red circle on a white background",
        "a blue square on a black background",
        "a green triangle on a yellow background",
    ]
    return [circle, square, triangle], prompts
