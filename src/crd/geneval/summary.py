"""GenEval scores of many images as the benchmark reports them: by task, and their mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crd.errors import CRDError
from crd.geneval.metadata import TASKS
from crd.geneval.scoring import Scores


@dataclass(frozen=True)
class TaskMean:
    """Mean scores of the images of one task; of `overall`, the means of the tasks' means."""

    task: str
    images: int
    official: float
    strict: float
    soft: float


@dataclass(frozen=True)
class Summary:
    """The tasks that were present, in the benchmark's order, and their overall mean.

    Overall scores compare only between runs over the same tasks; published ones are over all six.
    """

    tasks: tuple[TaskMean, ...]
    overall: TaskMean

    def rows(self) -> list[tuple[str, int, float, float, float]]:
        """(task, images, official, strict, soft) of each task and last of `overall`, for a table."""
        return [(t.task, t.images, t.official, t.strict, t.soft) for t in (*self.tasks, self.overall)]


def summarise(tags: Sequence[str], scores: Scores) -> Summary:
    """Mean scores of each task, and overall = the mean of the task means, NOT of images.

    Args:
        tags: (B,) the task of each image, of `TASKS`.
        scores: of the B images.

    Raises:
        CRDError: an unknown tag.
        ValueError: no images, or B differs.

    Source: GenEval, arXiv 2310.11513.
    """
    for tag in tags:
        if tag not in TASKS:
            raise CRDError(f"GenEval tag must be one of {', '.join(TASKS)}, got {tag!r}; correct the prompt's metadata")
    columns = np.stack([scores.official, scores.strict, scores.soft])  # (3, B)
    if columns.shape[1] != len(tags) or not tags:
        raise ValueError(f"tags and scores must be of the same images, at least 1, got {len(tags)} tags and "
                         f"{columns.shape[1]} scores")  # fmt: skip
    task = np.array([TASKS.index(tag) for tag in tags])
    means = {index: columns[:, task == index].mean(axis=1) for index in np.unique(task)}
    tasks = tuple(_named(TASKS[index], int((task == index).sum()), mean) for index, mean in means.items())
    return Summary(tasks, _named("overall", len(tags), np.stack([*means.values()]).mean(axis=0)))


def _named(task: str, images: int, mean: np.ndarray) -> TaskMean:
    official, strict, soft = mean.tolist()
    return TaskMean(task, images, official, strict, soft)
