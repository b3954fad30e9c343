"""What the judge needs of a detector and of a color classifier, and what detectors share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from crd.errors import CRDError
from crd.geneval.detections import Detections
from crd.geneval.metadata import Metadata

# Detectors report every object that scores at least this. It only spares work: the lines that decide what counts are
# those of `Thresholds` (0.3 and 0.9 as published), and the judge accepts none below the floor.
SCORE_FLOOR = 0.05
BATCH_SIZE = 8  # images, or crops, at a time, unless the settings say


class Detector(Protocol):
    """Finds the objects of its `classes`, `batch_size` images at a time.

    `gives_colors` says whether it names their colors too, `picture_side` the pixels of the square pictures that it was
    made for; None = any size.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def gives_colors(self) -> bool: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def picture_side(self) -> int | None: ...

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        """The objects of each of B images that score at least `SCORE_FLOOR`; no image influences another's."""
        ...


@runtime_checkable
class WithSamples(Protocol):
    """A detector that brings pictures which show what their prompts ask for, to be tested on."""

    def samples(self) -> list[tuple[Image.Image, Metadata]]: ...


class ColorClassifier(Protocol):
    """Names the color of detected objects."""

    def classify(
        self, images: Sequence[Image.Image], detections: Sequence[Detections], indices: Sequence[Sequence[int]]
    ) -> list[list[str]]:
        """For each of B images the colors, of `COLORS`, of the objects at `indices[image]`, in that order."""
        ...


def equal_size_batches(images: Sequence[Image.Image], batch_size: int) -> Iterator[list[int]]:
    """Indices of the images, at most `batch_size` at a time, and only images of one size together.

    Padding an image to the size of another changes what a detector sees in it; without, an image's objects do not
    depend on the company it is judged in.
    """
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        by_size[image.size].append(index)
    for indices in by_size.values():
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]


def detect_by_size(
    images: Sequence[Image.Image], batch_size: int, detect: Callable[[list[Image.Image]], list[Detections]]
) -> list[Detections]:
    """The objects of each of B images, by a `detect` that takes RGB images of one size."""
    found: dict[int, Detections] = {}
    for batch in equal_size_batches(images, batch_size):
        found.update(zip(batch, detect([images[index].convert("RGB") for index in batch]), strict=True))
    return [found[index] for index in range(len(images))]


def boxes_of_masks(masks: np.ndarray) -> np.ndarray:
    """The smallest boxes around masks.

    Args:
        masks: (N, H, W) bool, none of them empty.

    Returns:
        (N, 4) float64, x0 y0 x1 y1 in pixels, x1 and y1 exclusive: a mask of one pixel has a box of size 1.
    """
    n, height, width = masks.shape
    boxes = np.empty((n, 4))
    for axis, size, across in ((0, width, 1), (1, height, 2)):
        occupied: np.ndarray = np.any(masks, axis=across)  # (N, size)
        boxes[:, axis] = occupied.argmax(axis=1)
        boxes[:, axis + 2] = size - occupied[:, ::-1].argmax(axis=1)
    return boxes


def check_batch_size(what: str, batch_size: int) -> None:
    """Raise `CRDError` for a batch size that is no positive integer."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise CRDError(f"{what}: batch_size must be an integer of 1 or more, got {batch_size!r}; {BATCH_SIZE} will do")
