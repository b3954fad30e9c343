"""The variance-preserving path of DDPM models seen from the straight path: both visit the same points, scaled.

A DDPM model is trained on `x_vp = alpha x0 + sigma noise` with alpha² + sigma² = 1. Divided by alpha + sigma it is a
point of the straight path, `x_t = (1 - t) x0 + t noise` with t = sigma / (alpha + sigma). So with
n(t) = sqrt((1 - t)² + t²)

    alpha = (1 - t) / n,    sigma = t / n,    x_vp = x_t / n

A straight line in one is a straight line in the other: an Euler step along t is a DDIM step.

Source: Song et al., "Denoising Diffusion Implicit Models", arXiv 2010.02502, section 4.3, for the change of variables;
Salimans & Ho, "Progressive Distillation", arXiv 2202.00512, appendix D, for v-prediction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crd.errors import CRDError

PREDICTIONS = ("epsilon", "v_prediction")


def vp_norm(t: Tensor) -> Tensor:
    """n(t) = sqrt((1 - t)² + t²) = 1 / (alpha + sigma), elementwise."""
    return ((1 - t).square() + t.square()).sqrt()


def flow_time(noise_ratio: Tensor) -> Tensor:
    """t of a noise level `sigma / alpha`, the number that DDPM schedulers call sigma.

    t = s / (1 + s)
    """
    return noise_ratio / (1 + noise_ratio)


def vp_timestep(t: Tensor, noise_ratios: Tensor) -> Tensor:
    """Training timestep of a model at t: log(sigma / alpha) interpolated in its table, as its schedulers do.

    Below the first noise level it is 0 and above the last one T - 1. Rounded to 0.01, because a float32 t names its
    timestep only up to 0.001: grids of whole timesteps come back as whole numbers.

    Args:
        t: (N,) in (0, 1).
        noise_ratios: (T,) sigma / alpha of every training timestep, increasing.

    Returns:
        (N,) float32 in [0, T - 1].
    """
    table = noise_ratios.double().log().to(t.device)
    level = t.double().log() - (1 - t.double()).log()
    high = torch.searchsorted(table, level).clamp(1, len(table) - 1)
    low = high - 1
    part = ((level - table[low]) / (table[high] - table[low])).clamp(0, 1)
    return torch.round(low + part, decimals=2).float()


def velocity_from_prediction(prediction: Tensor, x_t: Tensor, t: Tensor, kind: str) -> Tensor:
    """Velocity `noise - x0` of the straight path from what a DDPM model predicts at x_t.

        epsilon:       v = (epsilon - x_t) / (1 - t)
        v_prediction:  v = v_vp / n + (2t - 1) / n² x_t,    v_vp = alpha noise - sigma x0

    Args:
        prediction: (N, ...) output of the model.
        x_t: (N, ...) point of the straight path.
        t: (N,) in [0, 1]; below 1 for epsilon.
        kind: "epsilon" or "v_prediction".

    Returns:
        (N, ...) in the dtype of `x_t`.

    Raises:
        CRDError: another prediction.
    """
    t = t.double()
    if kind == "epsilon":
        return (prediction - x_t) * _rows(1 / (1 - t), x_t)
    _check_kind(kind)
    n = vp_norm(t)
    return prediction * _rows(1 / n, x_t) + x_t * _rows((2 * t - 1) / n.square(), x_t)


def target_scale(t: Tensor, kind: str) -> Tensor:
    """Error of the model's own prediction over the error of the velocity, (N,).

        epsilon: 1 - t,    v_prediction: n(t) = (1 - t) / alpha

    Raises:
        CRDError: another prediction.
    """
    if kind == "epsilon":
        return 1 - t
    _check_kind(kind)
    return vp_norm(t)


def _check_kind(kind: str) -> None:
    if kind not in PREDICTIONS:
        raise CRDError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, got {kind!r}; use another model")


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """(N,) viewed as (N, 1, ...) in the dtype of `like`."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
