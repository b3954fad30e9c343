from __future__ import annotations

import numpy as np
import pytest

from crd.errors import CRDError
from crd.metrics.frechet import frechet_distance


def exactly(mean: np.ndarray, deviation: np.ndarray, seed: int, count: int = 50) -> np.ndarray:
    """Features (count, D) whose sample mean and covariance are exactly `mean` and diag(deviation^2)."""
    features = np.random.default_rng(seed).normal(size=(count, len(mean)))
    orthonormal, _ = np.linalg.qr(features - features.mean(axis=0))
    return mean + orthonormal * np.sqrt(count - 1) * deviation


def test_hand_worked_in_one_dimension() -> None:
    # Means 1 and 6, variances with N - 1: 2 and 8. (1 - 6)^2 + (sqrt 2 - sqrt 8)^2 = 25 + 2.
    assert frechet_distance([[0.0], [2.0]], [[4.0], [8.0]]) == pytest.approx(27.0, rel=1e-12)


def test_closed_form_of_diagonal_gaussians() -> None:
    mean_a, mean_b = np.array([0.0, 1.0, -2.0]), np.array([0.5, 1.0, 3.0])
    deviation_a, deviation_b = np.array([1.0, 0.2, 3.0]), np.array([2.0, 0.5, 0.0])
    expected = np.square(mean_a - mean_b).sum() + np.square(deviation_a - deviation_b).sum()
    a, b = exactly(mean_a, deviation_a, 0), exactly(mean_b, deviation_b, 1, count=80)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("count_a", "count_b", "width"), [(60, 90, 12), (40, 200, 30)])
def test_the_plain_formula(count_a: int, count_b: int, width: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(width)
    a = rng.normal(size=(count_a, width)) @ rng.normal(size=(width, width))
    b = rng.normal(size=(count_b, width)) @ rng.normal(size=(width, width)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_fewer_rows_than_features() -> None:
    # Both lie in 5 of 40 dimensions, rotated: the distance is that of the 5.
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(8, 5)), 2 * rng.normal(size=(7, 5))
    rotation, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    assert frechet_distance(a @ rotation[:5], b @ rotation[:5]) == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_properties() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(50, 6)), rng.normal(size=(70, 6)) * 2 + 1
    distance = frechet_distance(a, b)
    assert isinstance(distance, float)
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-12)
    assert frechet_distance(a[rng.permutation(50)], b) == pytest.approx(distance, rel=1e-12)
    assert frechet_distance(a + 1e3, b + 1e3) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * distance, rel=1e-12)
    shift = np.arange(6.0)
    assert frechet_distance(a, a + shift) == pytest.approx(float(shift @ shift), rel=1e-10)


def test_equal_sets_are_at_distance_0() -> None:
    rng = np.random.default_rng(4)
    for count, width in ((300, 20), (10, 50)):
        a = 10 * rng.normal(size=(count, width))
        assert 0.0 <= frechet_distance(a, a) < 1e-9
        assert 0.0 <= frechet_distance(a, a[::-1]) < 1e-9


def test_the_bias_falls_with_the_number_of_images() -> None:
    rng = np.random.default_rng(5)

    def of(count: int) -> float:
        return frechet_distance(rng.normal(size=(count, 16)), rng.normal(size=(count, 16)))

    few, many = np.mean([of(100) for _ in range(20)]), np.mean([of(400) for _ in range(20)])
    assert few > 0
    assert few / many == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [
        (np.zeros((1, 3)), np.zeros((4, 3)), "features a must have at least 2 rows for a covariance, got 1"),
        (np.zeros((4, 3)), np.zeros((0, 3)), "features b must have at least 2 rows for a covariance, got 0"),
        (np.zeros((4, 3)), np.zeros((4, 2)), "features must be of one width, got 3 in a and 2 in b"),
        (np.zeros((4, 3, 1)), np.zeros((4, 3)), r"features a must be \(N, D\) .*got shape \(4, 3, 1\)"),
        (np.zeros((4, 3)), np.array([[0.0], [np.nan]]), "features b must be finite, got row 1"),
    ],
)
def test_wrong_features_are_told(a: np.ndarray, b: np.ndarray, told: str) -> None:
    with pytest.raises(CRDError, match=told):
        frechet_distance(a, b)
