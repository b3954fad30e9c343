"""Confidence intervals of mean scores by bootstrap over prompts, and of the difference of two models in pairs.

The prompts are the sample; images of one prompt are alike, so they are resampled together. Every prompt weighs the
same, however many images it has: the statistic is the mean over prompts of the mean over a prompt's images, and a
resample of P prompts is a resample of their P means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from crd.errors import CRDError

_DRAWS_AT_ONCE = 2**20  # 8 MB each of draws and of counts
_ANGLES = 20_001  # of the grid on which Student's t is inverted
# Means closer than this, in units of the largest, differ by rounding only.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Interval:
    """A mean over prompts and its two-sided confidence interval.

    `low` and `high` are NaN where the data cannot tell: one prompt, or prompts that are all alike. `str` says which.
    """

    mean: float
    low: float
    high: float
    level: float  # in (0, 1)
    prompts: int  # that went into the mean

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low)

    def __str__(self) -> str:
        if self.known:
            return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"
        why = "1 prompt" if self.prompts == 1 else f"all {self.prompts} prompts are alike"
        return f"{self.mean:.4g} (no interval: {why})"


def bootstrap_mean(
    values: ArrayLike, prompt_id: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean score and its bootstrap interval over prompts; see `bca_interval` for the method and its coverage.

        mean = mean_p mean_{i of p} values_i

    The order of rows and the numbering of prompts change nothing, not even the draws.

    Args:
        values: (B,) scores; NaN = does not apply, left out.
        prompt_id: (B,) integers or strings; images of one prompt need not be neighbours.
        level: coverage wanted, in (0, 1).
        resamples: number of resamples.
        seed: of the resamples, at least 0.

    Raises:
        CRDError: a wrong shape, an infinite value, no value at all, or a setting out of range.
    """
    scores, prompts = _checked("values", values, prompt_id), np.asarray(prompt_id)
    there = ~np.isnan(scores)
    if not there.any():
        raise CRDError(f"values must hold at least one number, got {len(scores)} without one; score some images")
    means = _prompt_means(scores[there], prompts[there])
    low, high = bca_interval(means[:, None], level=level, resamples=resamples, seed=seed)
    return Interval(float(means.mean()), float(low[0]), float(high[0]), level, len(means))


def paired_difference(
    a: ArrayLike, b: ArrayLike, prompt_id: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of a - b over the same prompts and images, and its bootstrap interval over prompts.

        mean = mean_p mean_{i of p} (a_i - b_i)

    What makes a prompt hard for both models cancels within a pair, so this tells models apart that two separate
    intervals do not.

    Args:
        a: (B,) scores of one model; NaN = does not apply.
        b: (B,) scores of the other on the same prompts, and noise, in the same order. NaN in either drops the pair.
        prompt_id: (B,) integers or strings.
        level: coverage wanted, in (0, 1).
        resamples: number of resamples.
        seed: of the resamples, at least 0.

    Raises:
        CRDError: as `bootstrap_mean`, or no pair is left.
    """
    difference = _checked("a", a, prompt_id) - _checked("b", b, prompt_id)
    if np.isnan(difference).all():
        raise CRDError(f"a and b must share at least one scored image, got none of {len(difference)}; "
                       "compare scores of the same prompts in the same order")  # fmt: skip
    return bootstrap_mean(difference, prompt_id, level=level, resamples=resamples, seed=seed)


def bca_interval(
    means: np.ndarray, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Bias-corrected accelerated (BCa) bootstrap interval of the mean of each column, widened for few prompts.

        [m + c (q(alpha_-) - m), m + c (q(alpha_+) - m)],    c = t_{P-1} / z * sqrt(P / (P - 1))

    with m the mean, q the quantiles of the resampled means at the levels alpha_± that BCa corrects for bias and skew,
    and t, z Student's and the normal quantile at (1 + level) / 2. The mean of a resample varies too little, by
    sqrt((P - 1) / P), and knows nothing of the uncertain variance; c makes good for both, and goes to 1.

    Chosen by measured coverage (`pytest tests/test_bootstrap.py`): at level 0.95 it covers 92 to 98% for normal,
    Bernoulli and exponential scores at 30 and 120 prompts, 1 and 4 images each; up to 99.5% where the mean can take few
    values (0 or 1, one image, 30 prompts). It is too short where few prompts decide the mean: 85 to 92% for lognormal
    scores at 30 prompts, 87 to 93% for exponential ones at 5. Percentile intervals are shorter still, and studentised
    ones have no end for scores of nearly all 0 or 1. The ends may lie beyond the range of the scores, as Student's may.

    Args:
        means: (P, C) one mean per prompt; the C columns share their draws.
        level: coverage wanted, in (0, 1).
        resamples: number of resamples; at least 2 / (1 - level).
        seed: of the resamples, at least 0.

    Returns:
        low, high: (C,) float64 each; NaN for a single prompt, or where all prompts are alike.

    Raises:
        CRDError: `means` is not (P, C) finite numbers with P at least 1, or a setting is out of range.

    Source: Efron 1987, J. Am. Stat. Assoc. 82; Hesterberg 2015, The American Statistician 69 (why to widen). To scale
    the ends rather than to widen the levels is ours: quantiles cannot leave the data, which is too narrow for 2 or 3.
    """
    _check_settings(level, resamples, seed)
    if means.ndim != 2 or not len(means) or not np.isfinite(means).all():
        raise CRDError(f"means must be (P, C) finite numbers, P at least 1, got shape {means.shape}; leave NaN out")
    prompts, columns = means.shape
    low, high = np.full(columns, np.nan), np.full(columns, np.nan)
    # Rounding of equal prompts would make an interval of width 1e-17.
    told = np.ptp(means, axis=0) > _ROUNDING * np.abs(means).max(axis=0)
    if prompts < 2 or not told.any():
        return low, high
    chosen = np.sort(means[:, told], axis=0)  # the draws go by rank: the order of prompts does not matter
    center = chosen.mean(axis=0)
    deviation = chosen - center
    shifts = np.sort(_resampled_means(deviation, resamples, seed), axis=0)
    z = NormalDist().inv_cdf((1 + level) / 2)
    widen = student_quantile((1 + level) / 2, prompts - 1) / z * math.sqrt(prompts / (prompts - 1))
    low[told] = center + widen * _quantile(shifts, _bca_level(deviation, shifts, -z))
    high[told] = center + widen * _quantile(shifts, _bca_level(deviation, shifts, z))
    return low, high


def _checked(name: str, values: ArrayLike, prompt_id: ArrayLike) -> np.ndarray:
    """The values as (B,) float64, finite or NaN, one for each prompt id."""
    array, prompts = np.asarray(values, dtype=np.float64), np.asarray(prompt_id)
    if array.ndim != 1 or prompts.shape != array.shape:
        raise CRDError(f"{name} and prompt_id must be (B,) each, got {array.shape} and {prompts.shape}; "
                       "give one number and one prompt an image")  # fmt: skip
    if len(prompts) and prompts.dtype.kind not in "iuU":
        raise CRDError(f"prompt_id must be integers or strings, got {prompts.dtype}; convert it")
    if np.isinf(array).any():
        row = int(np.argmax(np.isinf(array)))
        raise CRDError(f"{name} must be finite, or NaN where a score does not apply, got {array[row]} in row {row}; "
                       "fix the score")  # fmt: skip
    return array


def _check_settings(level: float, resamples: int, seed: int) -> None:
    if not 0 < level < 1:
        raise CRDError(f"level must lie between 0 and 1, got {level}; the usual one is 0.95")
    least = math.ceil(2 / (1 - level) - 1e-6)
    if resamples < least:
        raise CRDError(f"resamples must be at least {least} for level {level}, got {resamples}; the default is 2000")
    if seed < 0:
        raise CRDError(f"seed must be at least 0, got {seed}; choose another")


def _prompt_means(values: np.ndarray, prompt_id: np.ndarray) -> np.ndarray:
    """Mean of each prompt (P,), sorted: which prompt is which must not change a result, not even by rounding."""
    _, prompt, images = np.unique(prompt_id, return_inverse=True, return_counts=True)
    # Summed by size, for the same reason.
    order = np.lexsort((values, prompt))
    starts = np.cumsum(images) - images
    return np.sort(np.add.reduceat(values[order], starts) / images)


def _resampled_means(deviation: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means (resamples, C) of P rows drawn with replacement out of deviation (P, C)."""
    prompts = len(deviation)
    few = resamples * prompts <= _DRAWS_AT_ONCE
    drawn = [_few_counts(prompts, resamples, seed)] if few else _counts(prompts, resamples, seed)
    return np.concatenate([counts @ deviation / prompts for counts in drawn])


def _counts(prompts: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of P prompts is in each resample, (R, P) float64, in parts of some rows.

    Counts turn the means of all columns into one matrix product.
    """
    rng = np.random.default_rng(seed)
    step = max(1, _DRAWS_AT_ONCE // prompts)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        draws = rng.integers(prompts, size=(rows, prompts)) + prompts * np.arange(rows)[:, None]
        yield np.bincount(draws.ravel(), minlength=rows * prompts).reshape(rows, prompts).astype(np.float64)


@lru_cache(maxsize=4)
def _few_counts(prompts: int, resamples: int, seed: int) -> np.ndarray:
    """`_counts` in one part. Kept, since every score of every evaluation of a run asks for the same."""
    (counts,) = _counts(prompts, resamples, seed)
    counts.setflags(write=False)
    return counts


def _bca_level(deviation: np.ndarray, shifts: np.ndarray, z: float) -> np.ndarray:
    """Level (C,) at which BCa reads the quantile that the normal distribution has at z.

    alpha = Phi(z0 + (z0 + z) / (1 - a (z0 + z))): z0 says how far the resamples' median lies from the mean, and a, of
    the mean, is a sixth of its skewness.
    """
    resamples, normal = len(shifts), NormalDist()
    size = np.abs(deviation).max(axis=0)  # the level has no units; squares of tiny numbers would be 0
    deviation, shifts = deviation / size, shifts / size
    square = np.square(deviation).sum(axis=0)
    acceleration = (deviation**3).sum(axis=0) / (6 * square**1.5)
    # Discrete scores often resample to the very mean: such ties count half on either side.
    tie = 1e-9 * np.sqrt(square)
    below = ((shifts < -tie).mean(axis=0) + (shifts <= tie).mean(axis=0)) / 2
    # A share of exactly 0 or 1 is finer than that many resamples can tell.
    below = np.clip(below, 0.5 / resamples, 1 - 0.5 / resamples)
    shift = np.array([normal.inv_cdf(share) for share in below])
    corrected = shift + (shift + z) / (1 - acceleration * (shift + z))
    return np.array([normal.cdf(value) for value in corrected])


def _quantile(ordered: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Quantile (C,) of each sorted column (R, C) at its own level (C,), between neighbours by interpolation."""
    last = len(ordered) - 1
    position = np.clip(level * (last + 2) - 1, 0, last)
    lower = np.minimum(position.astype(int), last - 1)
    column, share = np.arange(ordered.shape[1]), position - lower
    return ordered[lower, column] * (1 - share) + ordered[lower + 1, column] * share


@lru_cache(maxsize=64)
def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t above its median, without scipy.

    With t = sqrt(freedom) tan(angle), the density of the angle is proportional to cos(angle)^(freedom - 1).
    """
    angle = np.linspace(0, math.pi / 2, _ANGLES)
    density = np.cos(angle) ** (freedom - 1)
    area = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(float(np.interp((2 * probability - 1) * area[-1], area, angle)))
