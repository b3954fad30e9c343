"""Fréchet distance of generated pictures to what the bundled world's own renderer draws for the same prompts.

A reward may rise while pictures turn into something that the world never shows. Here the right answer is known: the
renderer draws it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from crd.errors import CRDError
from crd.metrics.frechet import frechet_distance
from crd.metrics.tiny_image_text import TinyImageText
from crd.seeds import derive_seed
from crd.tiny.image_text import EMBEDDING
from crd.tiny.render import LEVELS, SIZE
from crd.tiny.subjects import draw_subject, read_caption

LEVEL = 3  # of the renderer: all fonts and inks, no tints; about what the bundled model was trained on


def renderings(prompts: Sequence[str], seed: int = 0) -> list[Image.Image]:
    """A picture of 64 x 64 px of each of B prompts by the renderer; all that a prompt leaves open is random.

    Seeds come from the prompt's text and from how often it came before, so the order of the prompts does not matter.

    Raises:
        CRDError: a prompt is no caption of the bundled world, or a font that words are drawn with is not installed.
    """
    drawn, before = [], Counter[str]()
    for prompt in prompts:
        rng = np.random.default_rng(derive_seed("renderings", seed, prompt, before[prompt]))
        before[prompt] += 1
        drawn.append(Image.fromarray(draw_subject(read_caption(prompt), rng, LEVELS[LEVEL])))
    return drawn


def frechet_to_renderings(
    images: Sequence[Image.Image], prompts: Sequence[str], judge: TinyImageText, seed: int = 0
) -> float:
    """Squared Fréchet distance between features of pictures and of renderings of the same prompts.

        d^2(F(images), F(renderings(prompts))),    F = judge.image_features, see `frechet_distance`

    Deterministic, and the same for any order of the pictures together with their prompts. Not 0 for perfect pictures:
    two sets of renderings differ too, by `frechet_to_renderings(renderings(prompts, 1), prompts, judge)`, the floor for
    these prompts. Compare distances at one set of prompts only.

    Args:
        images: B pictures of 64 x 64 px, at least 2; well over 96 for a small bias.
        prompts: their B prompts.
        judge: gives the features.
        seed: of the renderings.

    Returns:
        d^2, at least 0; features are unit vectors.

    Raises:
        CRDError: as `renderings` and `frechet_distance`, or a picture of another size.
        ValueError: images and prompts differ in number.
    """
    if len(prompts) != len(images):
        raise ValueError(f"prompts must hold one entry per image ({len(images)}), got {len(prompts)}")
    drawn = judge.image_features(renderings(prompts, seed))
    return frechet_distance(judge.image_features(images).numpy(), drawn.numpy())


class RenderedWorld:
    """How far the pictures of each of several models are from renderings of their prompts, which are drawn once.

    Args:
        prompts: B prompts, one for each picture, more than `EMBEDDING`.
        judge: gives the features.

    Raises:
        CRDError: too few pictures, or as `renderings`.
    """

    def __init__(self, prompts: Sequence[str], judge: TinyImageText) -> None:
        if len(prompts) <= EMBEDDING:
            raise CRDError(f"the Fréchet distance to renderings, by {EMBEDDING} features, needs more images than that, "
                           f"got {len(prompts)}; evaluate more prompts or --images, or leave it out")  # fmt: skip
        self._judge = judge
        self._drawn, again = (judge.image_features(renderings(prompts, seed)).numpy() for seed in (0, 1))
        self.floor = frechet_distance(again, self._drawn)  # between two sets of renderings

    def check_size(self, height: int, width: int) -> None:
        """Refuse pictures of another size than the renderer's.

        Raises:
            CRDError: they are.
        """
        if (height, width) != (SIZE, SIZE):
            raise CRDError(f"the Fréchet distance to renderings is of pictures of {SIZE} x {SIZE} px, got "
                           f"{height} x {width}; leave it out")  # fmt: skip

    def measure(self, images: Sequence[Image.Image]) -> dict[str, float]:
        """Distance of a model's B pictures, in the order of the prompts, and the floor, by the names of evaluations."""
        distance = frechet_distance(self._judge.image_features(images).numpy(), self._drawn)
        return {"frechet_to_renderings": distance, "frechet_floor": self.floor}
