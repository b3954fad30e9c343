"""Fréchet distance between Gaussian fits of two sets of features: FID, if the features are Inception's."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from crd.errors import CRDError


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Squared Fréchet (2-Wasserstein) distance between the Gaussians fitted to two feature sets.

        d^2 = |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^{1/2}),    cov with N - 1

    With A, B the centered features over sqrt(N - 1), the eigenvalues of cov_a cov_b = A'A B'B are the squared singular
    values of A B', so tr (cov_a cov_b)^{1/2} is their plain sum. No matrix root is taken, and rank-deficient
    covariances (N <= D) need no regularisation. In float64.

    A biased estimate: two samples of one distribution have d^2 > 0. The bias depends on the features, falls about like
    1/N, and needs N well above D to be small: compare distances only at equal N_a and N_b, and only on the same
    features.

    Args:
        a: (N_a, D) features.
        b: (N_b, D) features of the same network.

    Returns:
        d^2, at least 0, in squared units of the features.

    Raises:
        CRDError: not two (N, D) arrays of one D, fewer than 2 rows, or a feature that is not finite.

    Source: Dowson and Landau 1982, J. Multivariate Analysis 12; Heusel et al. 2017, arXiv 1706.08500, where FID is
    defined; the bias: Bińkowski et al. 2018, arXiv 1801.01401.
    """
    features_a, features_b = _checked("a", a), _checked("b", b)
    width_a, width_b = features_a.shape[1], features_b.shape[1]
    if width_a != width_b:
        raise CRDError(f"features must be of one width, got {width_a} in a and {width_b} in b; use the same network")
    mean_a, factor_a = _gaussian(features_a)
    mean_b, factor_b = _gaussian(features_b)
    root_trace = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    distance = np.square(mean_a - mean_b).sum() + np.square(factor_a).sum() + np.square(factor_b).sum() - 2 * root_trace
    # A square, which rounding can leave just below 0 for equal sets.
    return max(float(distance), 0.0)


def _checked(name: str, features: ArrayLike) -> np.ndarray:
    """The features as (N, D) float64."""
    array = np.asarray(features, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] == 0:
        raise CRDError(
            f"features {name} must be (N, D) with D at least 1, got shape {array.shape}; flatten each to a row"
        )
    if len(array) < 2:
        raise CRDError(f"features {name} must have at least 2 rows for a covariance, got {len(array)}; add images")
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise CRDError(f"features {name} must be finite, got row {int(np.argmin(finite))} that is not; fix the network")
    return array


def _gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and a factor F (min(N, D), D) of the covariance F'F."""
    mean = features.mean(axis=0)
    centered = (features - mean) / np.sqrt(len(features) - 1)
    # The triangle of a QR has the same product with itself and at most D rows.
    factor: np.ndarray = np.asarray(np.linalg.qr(centered, mode="r"))
    return mean, factor
