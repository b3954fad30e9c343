"""What a run's evaluations say of one metric: a mean with its interval, a change in pairs, a change by prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from crd.metrics.bootstrap import Interval, bootstrap_mean, paired_difference
from crd.report.evaluations import Evaluation
from crd.report.read_run import Run

_RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval over prompts; `low` and `high` are NaN where there is none."""

    mean: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Point:
    """An estimate at an update."""

    update: int
    value: Estimate


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


def estimate(evaluation: Evaluation, metric: str) -> Estimate | None:
    """The mean of a metric over the prompts of an evaluation, with its interval; None if it was not measured."""
    column = evaluation.column(metric)
    if column is not None and not np.isnan(column[0]).all():
        return _estimate(bootstrap_mean(*column, resamples=_RESAMPLES))
    value = evaluation.model.get(metric, math.nan)
    return None if math.isnan(value) else Estimate(value)


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
        value = estimate(evaluation, metric)
        if value is not None and evaluation.update is not None:
            points[evaluation.update] = Point(evaluation.update, value)
    return [points[update] for update in sorted(points)]


def guided_base(run: Run, metric: str) -> list[tuple[float, Estimate]]:
    """CFG scale and value of the base model, by scale; an older run has it of rewards, in its summary."""
    found = [(one.guidance, value) for one in run.guided if (value := estimate(one, metric)) is not None]
    if found or run.summary is None or not run.summary.has(f"{metric}_base_cfg"):
        return found
    return [(run.summary.number("base_cfg_scale"), Estimate(run.summary.number(f"{metric}_base_cfg")))]


def band(run: Run, metric: str) -> tuple[float, float] | None:
    """Where single images of the base model lie: mean ± 1 standard deviation, without and with guidance together.

    low = min_b (mean_b - std_b),  high = max_b (mean_b + std_b),    b over the evaluations of the base model
    """
    columns = [one.column(metric) for one in run.evaluations if not one.update]
    values = [column[0][~np.isnan(column[0])] for column in columns if column is not None]
    values = [array for array in values if len(array)]
    if not values:
        return None
    return (
        min(float(array.mean() - array.std()) for array in values),
        max(float(array.mean() + array.std()) for array in values),
    )


def change(earlier: Evaluation, later: Evaluation, metric: str) -> Estimate | None:
    """Mean change from one evaluation to another, in pairs where both scored the same images of the same prompts."""
    first, second = earlier.column(metric), later.column(metric)
    if first is not None and second is not None and _same_images(earlier, later):
        if np.isnan(second[0] - first[0]).all():
            return None
        return _estimate(paired_difference(second[0], first[0], first[1], resamples=_RESAMPLES))
    means = estimate(earlier, metric), estimate(later, metric)
    if means[0] is None or means[1] is None:
        return None
    return Estimate(means[1].mean - means[0].mean)


def prompt_changes(run: Run, metric: str) -> list[PromptChange]:
    """Change of every prompt from update 0 to the last evaluation, the largest rise first; [] if not kept by image."""
    before, after = run.before, run.after
    if before is None or after is None or before.prompts != after.prompts:
        return []
    first, second = before.column(metric), after.column(metric)
    if first is None or second is None:
        return []
    pictured = after.sheet.indices if after.sheet is not None else ()
    shown: dict[int, int] = {}
    for place, image in enumerate(pictured):
        shown.setdefault(int(after.prompt_index[image]), place)
    changes = []
    for index, prompt in enumerate(after.prompts):
        old, new = _mean(first[0][first[1] == index]), _mean(second[0][second[1] == index])
        if not math.isnan(old) and not math.isnan(new):
            changes.append(PromptChange(prompt, old, new, shown.get(index)))
    # By prompt where changes are equal, so that the order of prompts does not matter.
    return sorted(changes, key=lambda one: (-one.change, one.prompt))


def _same_images(earlier: Evaluation, later: Evaluation) -> bool:
    return earlier.prompts == later.prompts and np.array_equal(earlier.prompt_index, later.prompt_index)


def _mean(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else math.nan


def _estimate(interval: Interval) -> Estimate:
    return Estimate(interval.mean, interval.low, interval.high)
