"""Arms of one task side by side: what each run measures, and paired by seed with the reference arm."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from crd.bench.analysis import (
    Curve,
    Interval,
    drift_difference,
    drift_gain,
    gain_target,
    images_to,
    over_seeds,
    ratio_over_seeds,
    value_at,
)
from crd.bench.collect import TRAINING, Outcome
from crd.engine import GPU_PEAK
from crd.eval_record import DIVERSITY, HELD_OUT

KL_TO_ANCHOR, KL_TO_BASE = "kl_to_anchor", "kl_to_base"
STATE = (DIVERSITY, KL_TO_BASE, KL_TO_ANCHOR)  # of a model, told and drawn beside rewards and scores
REWARD_BY_SECONDS = "reward_by_seconds"
OWN_IMAGES, REFERENCE_IMAGES, SPEED = "images_to_own_gain", "images_to_reference_gain", "reference_speed"
PEAK, SECONDS = "peak_memory_bytes", "seconds"
TRAINING_PEAK = f"{TRAINING}{GPU_PEAK}"  # of an update; no run on a CPU has it
FACTORS = frozenset({OWN_IMAGES, REFERENCE_IMAGES, PEAK, TRAINING_PEAK, SECONDS})
DRIFT, EQUAL_REWARD = "drift_", "at_equal_reward_"  # and the name of a score


@dataclass(frozen=True)
class Comparison:
    """Measures of the finished runs of some arms of one task."""

    images: float  # the least that any of the runs has drawn
    seconds: float  # the least that any of those has trained whose seconds compare; NaN = none does
    reference: str
    scores: tuple[str, ...]  # held-out
    arms: Mapping[str, Mapping[int, Mapping[str, float]]]  # arm -> seed -> measure -> value
    other_anchor: tuple[str, ...]  # arms whose distance to the anchor is that to another model than the reference's
    untimed: tuple[str, ...]  # runs whose seconds compare with nothing
    executed_otherwise: tuple[str, ...]  # runs whose memory compares with nothing

    def values(self, arm: str, measure: str) -> list[float]:
        """A measure of every seed of an arm; NaN where it does not apply."""
        return [found.get(measure, math.nan) for found in self.arms[arm].values()]

    def known(self, measure: str) -> bool:
        """Whether any run has such a value."""
        return not all(math.isnan(value) for arm in self.arms for value in self.values(arm, measure))

    def applying(self, arm: str, measure: str) -> list[float]:
        """Likewise, without the seeds that the reference has not finished; NaN where a run has no such value."""
        return [found[measure] for found in self.arms[arm].values() if measure in found]

    def told(self, arms: Sequence[str]) -> list[str]:
        """Those of `arms` that have a finished run; none where the reference would stand alone beside empty places."""
        found = [arm for arm in arms if arm in self.arms]
        return [] if found == [self.reference] and len(arms) > 1 else found

    def seeds(self, arm: str) -> int:
        """How many seeds of an arm are finished."""
        return len(self.arms[arm])

    def mean(self, arm: str, measure: str) -> Interval:
        """A measure of an arm over its seeds; of what is above 0 and varies by factors, the geometric mean."""
        return (ratio_over_seeds if measure in FACTORS else over_seeds)(self.values(arm, measure))

    def difference(self, arm: str, measure: str) -> Interval:
        """A measure of an arm minus that of the reference, over the seeds that both have finished."""
        return over_seeds([mine - theirs for mine, theirs in self._pairs(arm, measure)])

    def ratio(self, arm: str, measure: str) -> Interval:
        """A measure of an arm divided by that of the reference, likewise."""
        return ratio_over_seeds([mine / theirs for mine, theirs in self._pairs(arm, measure)])

    def _pairs(self, arm: str, measure: str) -> list[tuple[float, float]]:
        mine, theirs = self.arms[arm], self.arms.get(self.reference, {})
        return [
            (mine[seed].get(measure, math.nan), theirs[seed].get(measure, math.nan)) for seed in mine if seed in theirs
        ]


def compare_arms(outcomes: Sequence[Outcome], arms: Sequence[str], reference: str) -> Comparison | None:
    """The comparison of the finished runs of some arms of one task; None if there is none.

    Seconds are compared between runs that others did not disturb, under the conditions that most of them had; memory
    between runs on the GPU, if there is one, compiled and in the precision that most had.
    """
    done = [one for one in outcomes if one.finished and one.cell.arm in arms]
    if not done:
        return None
    images = min(float(one.curve.images[-1]) for one in done)
    timed = _usual([one for one in done if one.undisturbed], lambda one: one.conditions)
    alike = _usual(done, lambda one: one.execution)
    seconds = min((float(one.curve.seconds[-1]) for one in timed), default=math.nan)
    references = {one.cell.seed: one for one in done if one.cell.arm == reference}
    scores = held_out_scores(done)
    anchors = {one.anchor_guidance for one in references.values() or done}
    if not references and len(anchors) > 1:
        anchors = set()  # nothing says which of them is the one to compare with
    others = tuple(dict.fromkeys(one.cell.arm for one in done if one.anchor_guidance not in anchors))
    found: dict[str, dict[int, dict[str, float]]] = {}
    for one in done:
        measured = _measures(one, references.get(one.cell.seed), images, seconds, scores)
        if one.cell.arm in others:
            for name in (KL_TO_ANCHOR, f"{TRAINING}kl"):
                measured.pop(name, None)
        if one not in timed:
            measured |= {REWARD_BY_SECONDS: math.nan, SECONDS: math.nan}
        if one not in alike:
            measured |= {name: math.nan for name in (PEAK, TRAINING_PEAK) if name in measured}
        found.setdefault(one.cell.arm, {})[one.cell.seed] = measured
    untimed, executed_otherwise = (tuple(str(one.cell) for one in done if one not in kept) for kept in (timed, alike))
    return Comparison(images, seconds, reference, scores, found, others, untimed, executed_otherwise)


def _usual(outcomes: Sequence[Outcome], conditions: Callable[[Outcome], object]) -> list[Outcome]:
    """The runs under the conditions that most of them had; among several, those of the first."""
    usual = Counter(map(conditions, outcomes)).most_common(1)
    return [one for one in outcomes if conditions(one) == usual[0][0]]


def held_out_scores(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Names of the held-out scores of any of the runs."""
    return tuple(dict.fromkeys(name for one in outcomes for name in one.curve.values if name.startswith(HELD_OUT)))


def _measures(
    one: Outcome, reference: Outcome | None, images: float, seconds: float, scores: Sequence[str]
) -> dict[str, float]:
    curve = one.curve
    target = gain_target(curve, images)
    found = {name: value_at(curve.images, values, images) for name, values in curve.values.items()}
    found |= {
        REWARD_BY_SECONDS: value_at(curve.seconds, curve.reward, seconds),
        OWN_IMAGES: images_to(curve, target),
        PEAK: one.peak_bytes,
        SECONDS: value_at(curve.images, curve.seconds, images),
        **{f"{DRIFT}{score}": drift_gain(curve, score) for score in _known(curve, scores)},
    }
    if reference is not None:
        found[REFERENCE_IMAGES] = images_to(curve, gain_target(reference.curve, images))
        found[SPEED] = _quotient(found[OWN_IMAGES], images_to(reference.curve, target))
        for score in _known(reference.curve, _known(curve, scores)):
            found[f"{EQUAL_REWARD}{score}"] = drift_difference(curve, reference.curve, score)
    return found


def _quotient(mine: float, theirs: float) -> float:
    """0 where the reference never gets there; NaN where it begins there, or where there is no target."""
    return mine / theirs if theirs > 0 else math.nan


def _known(curve: Curve, scores: Sequence[str]) -> list[str]:
    return [score for score in scores if score in curve.values and not np.isnan(curve.values[score]).any()]


def told_scores(comparison: Comparison) -> list[str]:
    """What tables and figures tell beside the reward: held-out scores, diversity and distances, if they apply."""
    return [name for name in (*comparison.scores, *STATE) if comparison.known(name)]
