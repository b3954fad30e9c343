from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from crd.errors import CRDError
from crd.metrics.bootstrap import Interval, _resampled_means, bca_interval, bootstrap_mean, paired_difference

DATA_SETS = 1000
NAN = math.nan
Draw = Callable[[np.random.Generator, tuple[int, int, int]], np.ndarray]


def normal(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Scores (D, P, K) of mean 0; prompts vary twice as much as images of one prompt."""
    return rng.normal(size=(*shape[:2], 1)) + 0.5 * rng.normal(size=shape)


def bernoulli(mean: float) -> Draw:
    """Right or wrong; every prompt has its own chance, most of them near 0 or 1."""

    def draw(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
        return (rng.random(shape) < rng.beta(mean, 1 - mean, size=(*shape[:2], 1))).astype(float)

    return draw


def exponential(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Mean 1.3, skewed to the right."""
    return rng.exponential(size=(*shape[:2], 1)) + 0.3 * rng.exponential(size=shape)


def lognormal(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Mean exp(1/2); a few prompts decide it."""
    return rng.lognormal(size=(*shape[:2], 1)) * rng.exponential(size=shape)


def coverage(draw: Draw, mean: float, prompts: int, images: int, level: float = 0.95) -> float:
    """Share of 1000 data sets whose interval holds the true mean; those without an interval do not count."""
    scores = draw(np.random.default_rng([prompts, images]), (DATA_SETS, prompts, images))
    low, high = bca_interval(scores.mean(axis=2).T, level=level)
    known = ~np.isnan(low)
    return float(((low <= mean) & (mean <= high))[known].mean())


CASES = [(normal, 0.0), (bernoulli(0.5), 0.5), (bernoulli(0.8), 0.8), (exponential, 1.3)]
NAMES = ["normal", "bernoulli 0.5", "bernoulli 0.8", "exponential"]


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("prompts", [30, 120])
@pytest.mark.parametrize(("draw", "mean"), CASES, ids=NAMES)
def test_coverage(draw: Draw, mean: float, prompts: int, images: int) -> None:
    # 1000 data sets know a coverage of 95% to 0.7%. At 30 x 1 there are 31 means: 0.8 is covered by 96 to 99% of the
    # intervals, depending on which side of it the seed of the resamples puts one end.
    most = 0.995 if (mean, prompts, images) == (0.8, 30, 1) else 0.98
    assert 0.92 <= coverage(draw, mean, prompts, images) <= most


@pytest.mark.parametrize("prompts", [2, 3, 5, 10])
def test_coverage_with_few_prompts_of_normal_scores(prompts: int) -> None:
    assert 0.91 <= coverage(normal, 0.0, prompts, 4) <= 0.98


@pytest.mark.parametrize(
    ("draw", "mean", "prompts", "least", "most"),
    [
        (lognormal, math.exp(0.5), 30, 0.85, 0.92),
        (lognormal, math.exp(0.5), 120, 0.89, 0.95),
        (exponential, 1.3, 5, 0.87, 0.93),
        (exponential, 1.3, 10, 0.89, 0.95),
    ],
)
def test_where_intervals_are_too_short(draw: Draw, mean: float, prompts: int, least: float, most: float) -> None:
    assert least <= coverage(draw, mean, prompts, 1) <= most


@pytest.mark.parametrize("level", [0.8, 0.99])
def test_coverage_at_other_levels(level: float) -> None:
    assert coverage(exponential, 1.3, 120, 4, level) == pytest.approx(level, abs=0.03)


def test_hand_worked_mean_weighs_prompts_equally() -> None:
    # Prompt means 1, 4 and 10, though prompt 7 has three images.
    found = bootstrap_mean([0.0, 1.0, 2.0, 4.0, 10.0, NAN], [7, 7, 7, -1, 3, 3])
    assert found.mean == pytest.approx(5.0)
    assert (found.prompts, found.level) == (3, 0.95)
    assert found.low < 1
    assert found.high > 10


def test_hand_worked_interval_of_two_prompts() -> None:
    # Resampled means of 0 and 1 are 0, 1/2 and 1, at 1/4, 1/2, 1/4: both ends of the middle 95% lie 1/2 away.
    # t with 1 degree of freedom at 0.975 is tan(0.475 pi).
    widen = math.tan(0.475 * math.pi) / 1.959964 * math.sqrt(2)
    found = bootstrap_mean([0.0, 1.0], [0, 1])
    assert (found.low, found.high) == pytest.approx((0.5 - widen / 2, 0.5 + widen / 2), rel=1e-6)


def test_bca_against_all_resamples() -> None:
    # The published formulas on all 5^5 resamples of five prompts, and its answer from random ones.
    stats = pytest.importorskip("scipy.stats")
    means = np.array([0.1, 0.2, 0.25, 0.5, 1.5])
    every = np.sort(np.array(list(itertools.product(means, repeat=5))).mean(axis=1))
    deviation = means - means.mean()
    acceleration = (deviation**3).sum() / (6 * (deviation**2).sum() ** 1.5)
    below = (every < means.mean() - 1e-12).mean() / 2 + (every <= means.mean() + 1e-12).mean() / 2
    shift = stats.norm.ppf(below)
    z = shift + stats.norm.ppf([0.025, 0.975])
    ends = np.quantile(every, stats.norm.cdf(shift + z / (1 - acceleration * z)))
    widen = stats.t.ppf(0.975, 4) / stats.norm.ppf(0.975) * math.sqrt(5 / 4)
    found = bootstrap_mean(means, np.arange(5), resamples=400_000)
    assert (found.low, found.high) == pytest.approx(means.mean() + widen * (ends - means.mean()), abs=0.02)


def test_students_quantile_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    # Symmetric data, so that the BCa levels hardly move: the width is that of Student's interval.
    for prompts in (20, 200, 2000):
        values = stats.norm.ppf((np.arange(prompts) + 0.5) / prompts)
        found = bootstrap_mean(values, np.arange(prompts), resamples=20_000)
        student = stats.t.ppf(0.975, prompts - 1) * values.std(ddof=1) / math.sqrt(prompts)
        assert (found.high - found.low) / 2 == pytest.approx(student, rel=0.03)


def test_images_of_one_prompt_are_no_new_evidence() -> None:
    values = np.random.default_rng(0).normal(size=40)
    prompts = np.arange(40)
    assert bootstrap_mean(np.tile(values, 4), np.tile(prompts, 4)) == bootstrap_mean(values, prompts)
    taken_apart = bootstrap_mean(np.tile(values, 4), np.arange(160))
    whole = bootstrap_mean(values, prompts)
    assert taken_apart.high - taken_apart.low < 0.6 * (whole.high - whole.low)


@settings(max_examples=30)
@example([(0.0, 0), (3.7e-245, 1)])
@given(st.lists(st.tuples(st.floats(-10, 10), st.integers(-3, 3)), min_size=1, max_size=30))
def test_order_and_names_change_nothing(data: list[tuple[float, int]]) -> None:
    values, prompts = np.array([value for value, _ in data]), np.array([prompt for _, prompt in data])
    order = np.random.default_rng(len(data)).permutation(len(data))
    found = bootstrap_mean(values, prompts, resamples=100)
    shuffled = bootstrap_mean(values[order], prompts[order], resamples=100)
    renamed = bootstrap_mean(values, [f"prompt {-prompt}" for prompt in prompts], resamples=100)
    # To the last digit; `repr`, because NaN is not equal to itself.
    assert repr(found) == repr(shuffled) == repr(renamed)


def test_shifting_and_scaling() -> None:
    values = np.random.default_rng(1).exponential(size=50)
    prompts = np.arange(50) // 2
    found, moved = bootstrap_mean(values, prompts), bootstrap_mean(3 * values + 7, prompts)
    assert (moved.low, moved.high) == pytest.approx((3 * found.low + 7, 3 * found.high + 7), rel=1e-9)
    mirrored = bootstrap_mean(-values, prompts, resamples=100_000)
    found = bootstrap_mean(values, prompts, resamples=100_000)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=0.01)


def test_the_seed_decides() -> None:
    values = np.random.default_rng(2).normal(size=50)
    prompts = np.arange(50)
    first = bootstrap_mean(values, prompts, seed=3)
    assert bootstrap_mean(values, prompts, seed=3) == first
    other = bootstrap_mean(values, prompts, seed=4)
    assert other != first
    assert (other.low, other.high) == pytest.approx((first.low, first.high), abs=0.05)


def test_a_higher_level_is_wider() -> None:
    values = np.random.default_rng(3).normal(size=50)
    found = [bootstrap_mean(values, np.arange(50), level=level) for level in (0.5, 0.8, 0.95, 0.99)]
    for narrow, wide in itertools.pairwise(found):
        assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_tensors_and_strings() -> None:
    values, prompts = [0.0, 0.5, 1.0, 0.25], ["a", "b", "a", "c"]
    expected = bootstrap_mean(values, prompts)
    assert bootstrap_mean(torch.tensor(values), torch.tensor([5, 2, 5, 9])) == expected
    assert expected.prompts == 3


@pytest.mark.parametrize(
    ("values", "prompts", "said"),
    [
        ([0.25, 0.75], [4, 4], "0.5 (no interval: 1 prompt)"),
        ([1.0, NAN, NAN], [4, 5, 6], "1 (no interval: 1 prompt)"),
        ([1.0, 1.0, 1.0], [4, 5, 6], "1 (no interval: all 3 prompts are alike)"),
        # Sums of 0.1 over one and over three images round differently.
        ([0.1, 0.1, 0.1, 0.1], [1, 1, 1, 2], "0.1 (no interval: all 2 prompts are alike)"),
        ([0.0, 0.0], [1, 2], "0 (no interval: all 2 prompts are alike)"),
    ],
)
def test_no_interval_is_told(values: list[float], prompts: list[int], said: str) -> None:
    found = bootstrap_mean(values, prompts)
    assert str(found) == said
    assert not found.known
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_an_interval_is_written_out() -> None:
    found = Interval(0.51234, 0.4, 0.61239, 0.95, 30)
    assert str(found) == "0.5123 [0.4, 0.6124]"
    assert found.known


def test_columns_alike_and_not() -> None:
    low, high = bca_interval(np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]))
    assert np.isnan([low[0], high[0]]).all()
    assert low[1] < 1 < high[1]
    alone = bca_interval(np.array([[0.0], [1.0], [2.0]]))
    assert (alone[0][0], alone[1][0]) == pytest.approx((low[1], high[1]), rel=1e-12)


def test_paired_is_the_mean_of_differences() -> None:
    a, b, prompts = [1.0, 3.0, 5.0, NAN, 2.0], [0.0, 1.0, 1.0, 4.0, NAN], ["x", "x", "y", "y", "z"]
    # x: (1 + 2) / 2, y: 4; the last two pairs are incomplete.
    found = paired_difference(a, b, prompts)
    assert found.mean == pytest.approx((1.5 + 4) / 2)
    assert found.prompts == 2
    assert found == bootstrap_mean([1.0, 2.0, 4.0], ["x", "x", "y"])


def test_pairs_are_narrower_on_correlated_scores() -> None:
    prompts = np.repeat(np.arange(60), 4)
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        hardness = rng.normal(size=60)[prompts]
        a = hardness + 0.3 * rng.normal(size=240) + 0.2
        b = hardness + 0.3 * rng.normal(size=240)
        paired = paired_difference(a, b, prompts, resamples=1000)
        own = [bootstrap_mean(scores, prompts, resamples=1000) for scores in (a, b)]
        unpaired = math.hypot(*(interval.high - interval.low for interval in own))
        assert paired.high - paired.low < 0.4 * unpaired
        held += paired.low < 0.2 < paired.high
    # 200 data sets know a coverage of 95% to 1.5%.
    assert 0.91 <= held / 200 <= 0.99


def test_equal_models_have_no_interval() -> None:
    assert str(paired_difference([0.1, 0.7], [0.1, 0.7], [1, 2])) == "0 (no interval: all 2 prompts are alike)"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (([1.0, 2.0], [1]), r"values and prompt_id must be \(B,\) each, got \(2,\) and \(1,\)"),
        (([[1.0], [2.0]], [[1], [2]]), r"must be \(B,\) each, got \(2, 1\)"),
        (([1.0, 2.0], [0.5, 1.5]), "prompt_id must be integers or strings, got float64"),
        (([1.0, -math.inf], [1, 2]), "values must be finite, .* got -inf in row 1"),
        (([NAN, NAN], [1, 2]), "values must hold at least one number, got 2 without one"),
        (([], []), "values must hold at least one number, got 0"),
    ],
)
def test_wrong_values_are_told(arguments: tuple[list[float], list[int]], told: str) -> None:
    with pytest.raises(CRDError, match=told):
        bootstrap_mean(*arguments)


def test_no_pairs_left() -> None:
    with pytest.raises(CRDError, match="a and b must share at least one scored image, got none of 2"):
        paired_difference([1.0, NAN], [NAN, 2.0], [1, 2])
    with pytest.raises(CRDError, match=r"b and prompt_id must be \(B,\) each, got \(1,\) and \(2,\)"):
        paired_difference([1.0, 2.0], [1.0], [1, 2])


@pytest.mark.parametrize(
    ("level", "resamples", "seed", "told"),
    [
        (1.0, 2000, 0, "level must lie between 0 and 1, got 1.0"),
        (95.0, 2000, 0, "level must lie between 0 and 1, got 95.0"),
        (0.95, 39, 0, "resamples must be at least 40 for level 0.95, got 39"),
        (0.95, 2000, -1, "seed must be at least 0, got -1"),
    ],
)
def test_wrong_settings_are_told(level: float, resamples: int, seed: int, told: str) -> None:
    with pytest.raises(CRDError, match=told):
        bootstrap_mean([1.0, 2.0], [1, 2], level=level, resamples=resamples, seed=seed)


def test_wrong_means_are_told() -> None:
    for means in (np.zeros(3), np.zeros((0, 2)), np.array([[1.0], [NAN]])):
        with pytest.raises(CRDError, match=r"means must be \(P, C\) finite numbers"):
            bca_interval(means)


@pytest.mark.parametrize(("prompts", "resamples"), [(40, 500), (1200, 1000)])
def test_resampled_means_are_those_of_one_draw_at_a_time(prompts: int, resamples: int) -> None:
    """In one part and in several, the first time and again."""
    deviation = np.random.default_rng(5).normal(size=(prompts, 2))
    rng = np.random.default_rng(3)
    wanted = np.stack([deviation[rng.integers(prompts, size=prompts)].mean(axis=0) for _ in range(resamples)])
    for _ in range(2):
        np.testing.assert_allclose(_resampled_means(deviation, resamples, 3), wanted, atol=1e-12)
    assert not np.allclose(_resampled_means(deviation, resamples, 4), wanted)
