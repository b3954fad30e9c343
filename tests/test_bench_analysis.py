"""Measures of a benchmark on curves whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from crd.bench.analysis import (
    Curve,
    DriftCurve,
    drift_difference,
    drift_gain,
    first_crossing,
    gain_target,
    images_to,
    over_seeds,
    ratio_over_seeds,
    value_at,
)

NAN = math.nan


def curve(reward: list[float], images: float = 100.0, seconds: float = 10.0, **values: list[float]) -> Curve:
    """Evaluations after equal steps of so many images and seconds."""
    update = np.arange(len(reward), dtype=np.float64)
    columns: Mapping[str, list[float]] = {"reward": reward, **values}
    return Curve(update, images * update, 7 * update, seconds * update, {n: np.array(v) for n, v in columns.items()})


def test_the_interval_of_five_seeds_by_hand() -> None:
    """t_4(0.975) = 2.776445, s = sqrt(2.5), so the half width is 2.776445 * sqrt(2.5 / 5)."""
    found = over_seeds([1.0, 2.0, 3.0, 4.0, 5.0, NAN])
    assert (found.mean, found.seeds) == (3.0, 5)
    assert found.high - found.mean == pytest.approx(2.776445 * math.sqrt(0.5), rel=1e-5)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert found.excludes(0.9)
    assert not found.excludes(1.1)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [over_seeds(rng.normal(0.3, 2.0, 5).tolist()) for _ in range(1000)]
    assert 0.93 < np.mean([not one.excludes(0.3) for one in found]) < 0.97


def test_one_seed_has_no_interval_and_none_no_mean() -> None:
    assert over_seeds([0.5]).mean == 0.5
    assert not over_seeds([0.5]).excludes(99.0)
    assert math.isnan(over_seeds([NAN]).mean)
    assert over_seeds([]).seeds == 0


def test_ratios_are_averaged_as_factors() -> None:
    found = ratio_over_seeds([0.5, 2.0])
    assert found.mean == pytest.approx(1.0)
    assert found.low * found.high == pytest.approx(1.0)
    inverse = ratio_over_seeds([1 / value for value in (1.5, 2.0, 3.0)])
    assert 1 / inverse.low == pytest.approx(ratio_over_seeds([1.5, 2.0, 3.0]).high)


def test_values_between_evaluations_are_linear_and_nothing_is_known_outside() -> None:
    x, y = np.array([0.0, 10.0, 20.0]), np.array([1.0, 2.0, 0.0])
    assert value_at(x, y, 5.0) == 1.5
    assert value_at(x, y, 20.0) == 0.0
    assert math.isnan(value_at(x, y, 21.0))


def test_the_first_crossing_counts_even_if_the_curve_falls_again() -> None:
    x, y = np.array([0.0, 10.0, 20.0, 30.0]), np.array([0.0, 0.8, 0.4, 1.0])
    assert first_crossing(x, y, 0.6) == pytest.approx(7.5)
    assert first_crossing(x, y, 0.9) == pytest.approx(20 + 10 * 0.5 / 0.6)
    assert first_crossing(x, y, 0.0) == 0.0
    assert first_crossing(x, y, 1.1) == math.inf


def test_images_to_ninety_percent_of_a_gain() -> None:
    """From 0.2 to 0.7 in 100 images, then on to 0.9: 90% of the gain of 0.7 is 0.83, at 100 + 100 * 0.13 / 0.2."""
    run = curve([0.2, 0.7, 0.9])
    assert gain_target(run, 200.0) == pytest.approx(0.83)
    assert images_to(run, gain_target(run, 200.0)) == pytest.approx(165.0)
    # At an equal, smaller number of images the gain is that of these images alone.
    assert gain_target(run, 100.0) == pytest.approx(0.65)
    fallen = curve([0.5, 0.6, 0.4])
    assert math.isnan(gain_target(fallen, 200.0))
    assert math.isnan(images_to(run, gain_target(fallen, 200.0)))


def test_a_drift_curve_is_what_the_score_was_when_the_reward_first_got_there() -> None:
    drift = DriftCurve.of(curve([0.2, 0.4, 0.3, 0.4, 0.6], held=[1.0, 0.8, 5.0, 7.0, 0.4]), "held")
    assert drift.reward.tolist() == [0.2, 0.4, 0.6]
    assert drift.score.tolist() == [1.0, 0.8, 0.4]
    assert drift.area(0.2, 0.6) == pytest.approx(0.2 * 0.9 + 0.2 * 0.6)
    assert drift.area(0.3, 0.5) == pytest.approx(0.1 * 0.85 + 0.1 * 0.7)


def test_the_gain_in_drift_is_the_area_to_the_base_per_reward() -> None:
    assert drift_gain(curve([0.2, 0.6], held=[1.0, 0.5]), "held") == pytest.approx(-0.25)
    assert math.isnan(drift_gain(curve([0.6, 0.2], held=[1.0, 0.5]), "held"))


def test_the_difference_at_equal_reward_does_not_care_how_fast_or_how_far() -> None:
    """A score that is 0.1 higher at every reward, though the run is slower, ends lower and goes up and down."""
    reference = curve([0.2, 0.5, 0.8], held=[1.0, 0.7, 0.4])  # 1.2 - reward
    better = curve([0.2, 0.3, 0.25, 0.6, 0.5], held=[1.1, 1.0, 0.0, 0.7, 0.0])  # 1.3 - reward where it counts
    assert drift_difference(better, reference, "held") == pytest.approx(0.1)
    assert drift_difference(reference, better, "held") == pytest.approx(-0.1)
    assert drift_difference(better, better, "held") == 0.0


def test_the_difference_at_equal_reward_by_hand() -> None:
    """Both from (0, 0); one score rises as r, the other as 2 r until 0.5 and then falls to 0 at 1.

    On [0, 1]: 0.5 - (0.25 + 0.25) = 0; cut at 0.5, where a run ends: (0.125 - 0.25) / 0.5.
    """
    line, tent = curve([0.0, 1.0], held=[0.0, 1.0]), curve([0.0, 0.5, 1.0], held=[0.0, 1.0, 0.0])
    assert drift_difference(line, tent, "held") == pytest.approx(0.0)
    short = curve([0.0, 0.5], held=[0.0, 0.5])
    assert drift_difference(short, tent, "held") == pytest.approx(-0.25)
    assert math.isnan(drift_difference(curve([0.5, 0.4], held=[0.0, 0.0]), tent, "held"))


@pytest.mark.parametrize(("gain", "known"), [(0.1, False), (0.11, True)])
def test_a_common_range_of_a_tenth_of_the_references_gain_tells_no_difference(gain: float, known: bool) -> None:
    reference = curve([0.0, 1.0], held=[0.5, 0.5])
    found = drift_difference(curve([0.0, gain], held=[0.5, 0.9]), reference, "held")
    assert found == (pytest.approx(0.2) if known else pytest.approx(NAN, nan_ok=True))
