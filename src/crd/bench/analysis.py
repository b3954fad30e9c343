"""Pure measures of runs: what a curve says at equal images or seconds, how soon it rises, what its reward costs.

"Reward" is the reward on the evaluation prompts. Between two evaluations everything is taken to be linear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from crd.metrics.bootstrap import student_quantile

LEVEL = 0.95
SHARE = 0.9  # of a gain in reward, whose images are counted
LEAST_SEEDS = 3  # of two, differences that happen to be alike give an interval of no width
LEAST_RANGE = 0.1  # of the reference's gain: rewards that two runs must share to be compared at equal reward


@dataclass(frozen=True)
class Curve:
    """One run at its E evaluations, the first before training; NaN = not measured."""

    update: np.ndarray  # (E,) float64, rising, from 0
    images: np.ndarray  # (E,) drawn in training until then
    transformer_evaluations: np.ndarray  # (E,) of training
    seconds: np.ndarray  # (E,) of training, without evaluation and saving
    values: Mapping[str, np.ndarray]  # "reward", held-out scores, statistics -> (E,)

    @property
    def reward(self) -> np.ndarray:
        """(E,) mean reward on the evaluation prompts."""
        return self.values["reward"]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its two-sided 95% interval; the ends are NaN for a single seed."""

    mean: float
    low: float
    high: float
    seeds: int

    def excludes(self, value: float) -> bool:
        """Whether the interval is known and `value` lies outside of it, with seeds enough to say so."""
        return self.seeds >= LEAST_SEEDS and (value < self.low or value > self.high)


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean over seeds and Student's interval; NaN are left out.

        mean ± t_{n-1}(0.975) s / sqrt(n),    s^2 = sum (x - mean)^2 / (n - 1)

    Student's t and no bootstrap: n is about 5, and resamples of five numbers are too alike. It takes the values of
    seeds to be roughly normal, which five of them cannot show.
    """
    there = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    if not len(there):
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(there.mean())
    if len(there) == 1 or not math.isfinite(mean):
        return Interval(mean, math.nan, math.nan, len(there))
    half = student_quantile((1 + LEVEL) / 2, len(there) - 1) * float(there.std(ddof=1)) / math.sqrt(len(there))
    return Interval(mean, mean - half, mean + half, len(there))


def ratio_over_seeds(values: Sequence[float]) -> Interval:
    """Geometric mean of positive ratios over seeds: `over_seeds` of their logarithms, raised again."""
    logs = over_seeds([math.log(value) if value > 0 else math.nan for value in values])
    return Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high), logs.seeds)


def value_at(x: np.ndarray, y: np.ndarray, where: float) -> float:
    """y at `where`, linear between the points x (E,), y (E,); NaN outside of them."""
    if not x[0] <= where <= x[-1]:
        return math.nan
    return float(np.interp(where, x, y))


def first_crossing(x: np.ndarray, y: np.ndarray, target: float) -> float:
    """The least x at which y, linear between the points, is `target` or more; infinite if it never is."""
    above = np.flatnonzero(y >= target)
    if not len(above):
        return math.inf
    last = int(above[0])
    if last == 0:
        return float(x[0])
    share = (target - y[last - 1]) / (y[last] - y[last - 1])
    return float(x[last - 1] + share * (x[last] - x[last - 1]))


def gain_target(curve: Curve, images: float) -> float:
    """The reward at `SHARE` of the gain that a run makes with so many images; NaN if it gains nothing."""
    start, end = float(curve.reward[0]), value_at(curve.images, curve.reward, images)
    return start + SHARE * (end - start) if end > start else math.nan


def images_to(curve: Curve, target: float) -> float:
    """Images until the reward is `target`; NaN for no target, infinite if it is never reached."""
    return math.nan if math.isnan(target) else first_crossing(curve.images, curve.reward, target)


@dataclass(frozen=True)
class DriftCurve:
    """A score as a function of the reward: what it was when the reward first got there.

    Only evaluations whose reward is above all before count (the running maximum), so that the function has one value
    for each reward; it is linear between them.
    """

    reward: np.ndarray  # (N,) rising
    score: np.ndarray  # (N,)

    @staticmethod
    def of(curve: Curve, score: str) -> DriftCurve:
        """The drift curve of a run; `score` names one of its values."""
        reward = curve.reward
        record = np.concatenate([[True], reward[1:] > np.maximum.accumulate(reward)[:-1]])
        return DriftCurve(reward[record], curve.values[score][record])

    def area(self, low: float, high: float) -> float:
        """Integral of the score over rewards from `low` to `high`, both inside of the curve."""
        inner = self.reward[(self.reward > low) & (self.reward < high)]
        knots = np.concatenate([[low], inner, [high]])
        height = np.interp(knots, self.reward, self.score)
        return float(((height[1:] + height[:-1]) / 2 * np.diff(knots)).sum())


def drift_gain(curve: Curve, score: str) -> float:
    """Mean change of a score from its start, over all rewards that the run has passed.

        1 / (r_max - r_0) int_{r_0}^{r_max} (H(r) - H(r_0)) dr

    with H the drift curve: the area between the score and that of the base model, divided by the length of the range,
    so that it is in units of the score. NaN if the reward never rises.
    """
    drift = DriftCurve.of(curve, score)
    low, high = float(drift.reward[0]), float(drift.reward[-1])
    return drift.area(low, high) / (high - low) - float(drift.score[0]) if high > low else math.nan


def drift_difference(curve: Curve, reference: Curve, score: str) -> float:
    """How much higher a score is than that of another run at equal reward, on average.

        1 / (b - a) int_a^b (H(r) - H_reference(r)) dr

    [a, b] is the range of rewards that both runs have passed, from the higher of their starts (runs of one seed have
    the same) to the lower of their maxima. NaN if it is no longer than `LEAST_RANGE` of the reference's gain: divided
    by so little, the noise of two evaluations would be a difference.
    """
    mine, theirs = DriftCurve.of(curve, score), DriftCurve.of(reference, score)
    low = float(max(mine.reward[0], theirs.reward[0]))
    high = float(min(mine.reward[-1], theirs.reward[-1]))
    least = LEAST_RANGE * float(theirs.reward[-1] - theirs.reward[0])
    return (mine.area(low, high) - theirs.area(low, high)) / (high - low) if high - low > least else math.nan
