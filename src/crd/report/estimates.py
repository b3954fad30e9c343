"""What a run's evaluations say of one metric: a curve, the base model beside it, a change in pairs, by prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from crd.metrics.bootstrap import paired_difference
from crd.report.evaluations import RESAMPLES, Estimate, Evaluation
from crd.report.read_run import Run


@dataclass(frozen=True)
class Point:
    """An estimate at an update."""

    update: int
    value: Estimate


@dataclass(frozen=True)
class Guided:
    """A number of the base model with guidance."""

    scale: float  # CFG
    label: str
    value: Estimate
    evaluation: Evaluation | None  # None = its summary gave the mean


@dataclass(frozen=True)
class PromptChange:
    """A prompt's mean score before and after."""

    prompt: str
    before: float
    after: float
    picture: int | None  # its first image on the run's sheets

    @property
    def change(self) -> float:
        return self.after - self.before


def curve(run: Run, metric: str) -> list[Point]:
    """A metric over the evaluations of a run, by update.

    Where scores of single images are kept, they give the mean and its interval; else metrics.jsonl gives the mean.
    """
    points = {
        record.update: Point(record.update, Estimate(record.numbers[metric]))
        for record in run.records("eval")
        if not math.isnan(record.numbers.get(metric, math.nan))
    }
    for evaluation in run.during:
        if metric in evaluation.estimates and evaluation.update is not None:
            points[evaluation.update] = Point(evaluation.update, evaluation.estimates[metric])
    return [points[update] for update in sorted(points)]


def guided_base(run: Run, metric: str) -> list[Guided]:
    """The base model with guidance, by scale: as the anchor has it, and at the best scale that the run tried."""
    best = run.best_guidance
    found: dict[float, tuple[Estimate, Evaluation | None]] = {}
    for one in run.guided:
        if metric in one.estimates:
            found[one.record.guidance] = one.estimates[metric], one
    if run.summary is not None and best is not None and best not in found and run.summary.has(f"{metric}_base_cfg"):
        found[best] = Estimate(run.summary.number(f"{metric}_base_cfg")), None
    return [
        Guided(scale, f"base, best CFG ({scale:g})" if scale == best else f"base, CFG {scale:g}", *found[scale])
        for scale in sorted(found)
    ]


def band(run: Run, metric: str) -> tuple[float, float] | None:
    """Where single images of the base model lie: mean ± 1 standard deviation, without and with guidance together.

    low = min_b (mean_b - std_b),  high = max_b (mean_b + std_b),    b over the evaluations of the base model
    """
    columns = [one.columns[metric][0] for one in run.evaluations if not one.update and metric in one.columns]
    values = [array for column in columns if len(array := column[~np.isnan(column)])]
    if not values:
        return None
    return (
        min(float(array.mean() - array.std()) for array in values),
        max(float(array.mean() + array.std()) for array in values),
    )


def change(earlier: Evaluation, later: Evaluation, metric: str) -> Estimate | None:
    """Mean change from one evaluation to another, in pairs where both scored the same images of the same prompts."""
    first, second = earlier.columns.get(metric), later.columns.get(metric)
    if first is not None and second is not None and earlier.record.same_images(later.record):
        if np.isnan(second[0] - first[0]).all():
            return None
        found = paired_difference(second[0], first[0], first[1], resamples=RESAMPLES)
        return Estimate(found.mean, found.low, found.high)
    if metric not in earlier.estimates or metric not in later.estimates:
        return None
    return Estimate(later.estimates[metric].mean - earlier.estimates[metric].mean)


def prompt_changes(run: Run, metric: str) -> list[PromptChange]:
    """Change of every prompt from update 0 to the last evaluation, the largest rise first; [] if not kept by image."""
    before, after = run.before, run.after
    if before is None or after is None or before.record.prompts != after.record.prompts:
        return []
    if metric not in before.columns or metric not in after.columns:
        return []
    first, second = before.columns[metric], after.columns[metric]
    pictured = after.sheet.indices if after.sheet is not None else ()
    shown: dict[int, int] = {}
    for place, image in enumerate(pictured):
        shown.setdefault(int(after.record.prompt_id[image]), place)
    changes = []
    for index, prompt in enumerate(after.record.prompts):
        old, new = _mean(first[0][first[1] == index]), _mean(second[0][second[1] == index])
        if not math.isnan(old) and not math.isnan(new):
            changes.append(PromptChange(prompt, old, new, shown.get(index)))
    # By prompt where changes are equal, so that the order of prompts does not matter.
    return sorted(changes, key=lambda one: (-one.change, one.prompt))


def _mean(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else math.nan
