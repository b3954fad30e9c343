"""Held-out score of the bundled world: how near a picture is to its caption for a model that no run is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from crd.errors import CRDError
from crd.tiny.image_text import FOLDER, load_image_text, picture_pixels, tokens
from crd.tiny.render import LEVELS
from crd.tiny.scene_prompts import scene_prompts
from crd.tiny.subjects import caption_of, draw_subject, near_misses, read_caption

BATCH_SIZE = 64
SAMPLES = 24
MARGIN = 0.1  # of the bundled weights: 0.24


class TinyImageText:
    """Score in [-1, 1]: the cosine of a picture's and its caption's embedding.

        score = cos(f(image), g(prompt)),    trained so that softmax over captions of scale * score picks the right one

    The cosine itself, neither scaled nor clipped: compare means over the same prompts, as with CLIPScore. No picture or
    prompt influences the score of another. Measured in src/crd/tiny/judges/README.md: it knows words and objects well,
    counts and places less so, and colors badly; the held-out detector is the better judge of those.

    Args:
        source: folder of a model that `python -m crd.tiny.train_image_text` wrote; None = the bundled one.

    Raises:
        CRDError: the model cannot be loaded.

    Source: CLIP, arXiv 2103.00020, for the training; CLIPScore, arXiv 2104.08718, for the use.
    """

    score_range = (-1.0, 1.0)
    judge_name = "tiny-image-text"

    def __init__(self, source: str | None = None) -> None:
        self._model = load_image_text(FOLDER if source is None else Path(source))
        self._device = torch.device("cpu")

    def use_device(self, device: str) -> None:
        """Where the model computes: "cpu" (the default), "cuda", "cuda:1"."""
        self._device = torch.device(device)
        self._model.to(self._device)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise `CRDError` for the first prompt that is no caption of the bundled world."""
        for prompt in prompts:
            read_caption(prompt)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Scores of B pictures of 64 x 64 px, each for its own one of B prompts.

        Raises:
            CRDError: a picture of another size, or a prompt that is no caption of the bundled world.
            ValueError: images and prompts differ in number.
        """
        if len(prompts) != len(images):
            raise ValueError(f"prompts must hold one entry per image ({len(images)}), got {len(prompts)}")
        scores: list[float] = []
        if not images:
            return scores
        pixels, table = picture_pixels(images), tokens(prompts)
        with torch.inference_mode():
            for some_pixels, some_tokens in zip(pixels.split(BATCH_SIZE), table.split(BATCH_SIZE), strict=True):
                seen = self._model.embed_images(some_pixels.to(self._device))
                told = self._model.embed_texts(some_tokens.to(self._device))
                scores += (seen * told).sum(dim=-1).tolist()
        return scores

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings (B, 96) float32 of B pictures of 64 x 64 px, unit vectors on the CPU.

        Raises:
            CRDError: a picture of another size.
        """
        with torch.inference_mode():
            parts = [self._model.embed_images(part.to(self._device)).cpu()
                     for part in picture_pixels(images).split(BATCH_SIZE)]  # fmt: skip
        return torch.cat(parts)

    def self_test(self) -> list[float]:
        """Mean scores of drawn scenes for their own captions and for near misses, which must be lower.

        Scenes alone: words are drawn with fonts that only training needs.

        Raises:
            CRDError: shows the scores.
        """
        rng = np.random.default_rng(0)
        subjects = [read_caption(metadata.prompt) for metadata in scene_prompts("test", SAMPLES)]
        pictures = [Image.fromarray(draw_subject(subject, rng, LEVELS[3])) for subject in subjects]
        wrong = [near_misses(subject, rng, 1)[0] for subject in subjects]
        own, other = (mean(self(pictures, [caption_of(s) for s in told])) for told in (subjects, wrong))
        if not own > other + MARGIN:
            raise CRDError(f"{self.judge_name} must score pictures higher for their own captions than for near misses "
                           f"by {MARGIN}, got {own:.3f} and {other:.3f}; reinstall crd, or train it again")  # fmt: skip
        return [own, other]
