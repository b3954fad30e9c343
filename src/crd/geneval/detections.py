"""What a detector found in one image, and which of it a GenEval prompt counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from crd.errors import CRDError
from crd.geneval.metadata import Exclude, Include, Metadata


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Thresholds:
    """Where the benchmark draws its lines; the defaults are the published ones.

    Raises:
        CRDError: a value that no threshold can have.

    Source: GenEval, arXiv 2310.11513.
    """

    confidence: float = 0.3  # objects count above this score
    counting_confidence: float = 0.9  # the same for the task "counting"
    max_objects: int = 16  # at most this many of a class, the most confident
    position: float = 0.1  # part of both objects' sizes by which an offset is reduced

    def __post_init__(self) -> None:
        for name, value, published in (
            ("confidence", self.confidence, 0.3),
            ("counting_confidence", self.counting_confidence, 0.9),
        ):
            if not _is_number(value) or not 0 <= value <= 1:
                raise CRDError(f"{name} must be from 0 to 1, got {value!r}; the published value is {published}")
        if isinstance(self.max_objects, bool) or not isinstance(self.max_objects, int) or self.max_objects < 1:
            raise CRDError(f"max_objects must be an integer, 1 or more, got {self.max_objects!r}; published is 16")
        if not _is_number(self.position) or not 0 <= self.position < math.inf:
            raise CRDError(f"position must be a finite number, 0 or more, got {self.position!r}; published is 0.1")


PUBLISHED = Thresholds()


@dataclass(frozen=True, eq=False)
class Detections:
    """The N objects that a detector found in ONE image, in any order.

    Raises:
        ValueError: shapes or types that do not fit, numbers that are not finite, a box that ends before it begins.
    """

    labels: tuple[str, ...]  # (N,) class names
    boxes: np.ndarray  # (N, 4) float, x0 y0 x1 y1 in pixels, y grows downward
    scores: np.ndarray  # (N,) float, higher is more confident
    masks: np.ndarray | None = None  # (N, H, W) bool
    colors: tuple[str | None, ...] | None = None  # (N,) color names; None = not looked at

    def __post_init__(self) -> None:
        n = len(self.labels)
        if not isinstance(self.labels, tuple) or not all(isinstance(label, str) for label in self.labels):
            raise ValueError(f"labels must be a tuple of strings, got {self.labels!r:.80}; use tuple(...)")
        for name, array, shape in (("boxes", self.boxes, (n, 4)), ("scores", self.scores, (n,))):
            if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype.kind != "f":
                raise ValueError(f"{name} must be {shape} float numpy for {n} labels, got {_described(array)}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array)][0]}; drop such objects")
        backward = np.flatnonzero((self.boxes[:, 2:] < self.boxes[:, :2]).any(axis=1))
        if backward.size:
            box = self.boxes[backward[0]].tolist()
            raise ValueError(f"boxes must be x0 y0 x1 y1, x0 <= x1, y0 <= y1, got {box} for object {backward[0]}")
        masks = self.masks
        if masks is not None and (
            not isinstance(masks, np.ndarray) or masks.ndim != 3 or len(masks) != n or masks.dtype != np.bool_
        ):
            raise ValueError(f"masks must be ({n}, H, W) bool numpy, got {_described(masks)}")
        colors = self.colors
        if colors is not None and not (
            isinstance(colors, tuple) and len(colors) == n and all(c is None or isinstance(c, str) for c in colors)
        ):
            raise ValueError(f"colors must be a tuple of {n} names or None, got {colors!r:.80}")

    def select(self, indices: Sequence[int] | np.ndarray) -> Detections:
        """The objects at `indices` (M,), in that order.

        Raises:
            ValueError: `indices` are not integers from 0 to N - 1.
        """
        rows = _rows(indices, len(self.labels))
        return Detections(
            labels=tuple(self.labels[i] for i in rows),
            boxes=self.boxes[rows],
            scores=self.scores[rows],
            masks=None if self.masks is None else self.masks[rows],
            colors=None if self.colors is None else tuple(self.colors[i] for i in rows),
        )


def kept(detections: Detections, metadata: Metadata, thresholds: Thresholds = PUBLISHED) -> dict[str, np.ndarray]:
    """The objects of each class that the prompt names which are confident enough to count, best first.

    Scores must lie strictly above the threshold, compared in their own precision. Equal scores are ordered by box,
    then by color, never by the order in which the detector reported them.

    Returns:
        class name -> (n,) indices into `detections`, for every class of `include` and `exclude`.

    Raises:
        CRDError: the prompt speaks of more objects of a class than `max_objects` lets count.

    Source: GenEval, arXiv 2310.11513.
    """
    asked = _asked(metadata)
    for named in asked:
        if named.count > thresholds.max_objects:
            raise CRDError(f"prompt {metadata.prompt!r:.80} speaks of {named.count} {named.class_name}, but at most "
                           f"{thresholds.max_objects} of a class count; raise max_objects")  # fmt: skip
    limit = thresholds.counting_confidence if metadata.tag == "counting" else thresholds.confidence
    order = _best_first(detections)
    order = order[detections.scores[order] > limit]
    labels = np.array(detections.labels, dtype=object)[order]
    return {a.class_name: order[labels == a.class_name][: thresholds.max_objects] for a in asked}


def objects_to_color(detections: Detections, metadata: Metadata, thresholds: Thresholds = PUBLISHED) -> np.ndarray:
    """The objects whose color the scores of this prompt read, so that a classifier looks at no others.

    Where a color is asked these are the `count` most confident objects of the class; with fewer, color is not read.

    Returns:
        (M,) indices into `detections`, ascending; pass the answers to `with_colors`.

    Raises:
        CRDError: as `kept`.
    """
    objects = kept(detections, metadata, thresholds)
    colored = [wanted for wanted in metadata.include if wanted.color is not None]
    read = [objects[w.class_name][: w.count] for w in colored if len(objects[w.class_name]) >= w.count]
    return np.unique(np.concatenate([np.empty(0, np.intp), *read]))


def with_colors(detections: Detections, indices: Sequence[int] | np.ndarray, names: Sequence[str]) -> Detections:
    """The same objects, those at `indices` (M,) with the colors `names` (M,); other colors stay as they are.

    Raises:
        ValueError: the lengths differ, or `indices` are not integers from 0 to N - 1.
    """
    rows = _rows(indices, len(detections.labels))
    if len(names) != len(rows):
        raise ValueError(f"names must be one for each of the {len(rows)} indices, got {len(names)}")
    colors = list(detections.colors or (None,) * len(detections.labels))
    for row, name in zip(rows, names, strict=True):
        colors[row] = name
    return replace(detections, colors=tuple(colors))


def _best_first(detections: Detections) -> np.ndarray:
    # Objects not looked at come last, so that coloring some of those kept cannot change which are kept.
    colors = detections.colors or (None,) * len(detections.labels)
    names = np.array([color or "" for color in colors], dtype=np.str_)
    unseen = np.array([color is None for color in colors], dtype=bool)
    return np.lexsort((names, unseen, *detections.boxes.T[::-1], -detections.scores))


def _asked(metadata: Metadata) -> list[Include | Exclude]:
    return [*metadata.include, *metadata.exclude]


def _described(value: object) -> str:
    return f"{value.shape} {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


def _rows(indices: Sequence[int] | np.ndarray, n: int) -> np.ndarray:
    rows = np.asarray(indices)
    if rows.size == 0:
        return np.empty(0, np.intp)
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= n:
        raise ValueError(f"indices must be (M,) integers from 0 to {n - 1}, got {indices!r:.80}")
    return rows
