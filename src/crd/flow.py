"""The linear path between data and noise: data at t=0, noise at t=1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crd.errors import CRDError

INDEPENDENT = ("rollout_grid_independent", "uniform")  # draws of an image say nothing of each other
TIMESTEP_MODES = ("rollout_grid", *INDEPENDENT, "stratified")
EULER, DPM = "euler", "dpmsolver++"
SOLVERS = (EULER, DPM)  # of the ODE dx/dt = v(x, t)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Point of the path between `x0` and `noise`.

        x_t = (1 - t) x0 + t noise

    Args:
        x0: (B, ...) clean latents.
        noise: same shape as `x0`.
        t: (B,) in [0, 1].

    Returns:
        x_t (B, ...).

    Raises:
        ValueError: shapes do not agree.
    """
    _check_pair("noise", noise, x0)
    t = _per_row(t, x0)
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """Velocity of the path, d x_t / d t.

        v = noise - x0

    Args:
        x0: (B, ...) clean latents.
        noise: same shape as `x0`.

    Returns:
        v (B, ...).

    Raises:
        ValueError: shapes do not agree.
    """
    _check_pair("noise", noise, x0)
    return noise - x0


def x0_from_velocity(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Clean latent that a velocity at `x_t` points back to.

        x0 = x_t - t v

    Args:
        x_t: (B, ...) noisy latents.
        v: same shape as `x_t`.
        t: (B,) in [0, 1].

    Returns:
        x0 (B, ...).

    Raises:
        ValueError: shapes do not agree.
    """
    _check_pair("v", v, x_t)
    return x_t - _per_row(t, x_t) * v


def velocity_error(v: Tensor, target: Tensor) -> Tensor:
    """Difference of velocities, all dims in one axis.

    In float64: squares of nearly equal half-precision numbers must not cancel.

    Args:
        v: (N, ...) velocities.
        target: same shape as `v`.

    Returns:
        v - target, (N, D) float64.

    Raises:
        ValueError: shapes do not agree.
    """
    _check_pair("target", target, v)
    return (v.double() - target.double()).flatten(1)


def error_scale(error: Tensor) -> Tensor:
    """Size of an error, by which "adaptive" weighting divides its square.

        s = stop_grad(max(mean_dims |error|, 1e-5))

    Args:
        error: (N, D).

    Returns:
        (N,) without gradient.

    Source: arXiv 2509.16117, adaptive loss weighting; the bound is that of its public implementation.
    """
    return error.detach().abs().mean(1).clamp_min(1e-5)


def draw_timesteps(
    mode: str, sigmas: Tensor, *, units: int, draws: int, fraction: float, generator: torch.Generator
) -> Tensor:
    """Draw M times for each unit (a group that shares its t, or an image with its own).

    "The noisiest `fraction`" is read as t >= 1 - fraction (our reading). At 0.99 this drops the step that stock
    grids of 10 steps end with, at t = 0.001, or 0.009 with the shift 3 of SD3.5, where x_t is the picture itself and
    the noise cannot be told from it, and keeps every step that draws something.

        rollout_grid:             kept grid points, without replacement; with more draws than points, every
                                  point comes up before any comes up again
        rollout_grid_independent: kept grid points, each draw by itself
        uniform:                  t ~ U(1 - fraction, first grid point), independent draws
        stratified:               one draw in each of M equal strata of that range, strata in random order

    The leave-one-out residual needs independent draws; `crd.objectives.crd` says why.

    Args:
        mode: one of the four above.
        sigmas: (S+1,) noise levels of an S-step rollout, decreasing in [0, 1], the last one 0.
        units: number of units U.
        draws: number of draws M.
        fraction: share of the grid to keep, in (0, 1].
        generator: source of randomness; its device holds the result.

    Returns:
        t (M, U) float32.

    Raises:
        CRDError: an unknown mode, or a fraction that is out of range or keeps no step.
        ValueError: `sigmas` is no such grid, or `units` or `draws` is below 1.

    Source: arXiv 2603.14128, experimental settings (rollout grid, noisiest 99%); the rest is ours.
    """
    grid = kept_grid(sigmas, fraction).to(generator.device)
    if units < 1 or draws < 1:
        raise ValueError(f"units and draws must be at least 1, got {units} and {draws}")
    if mode == "rollout_grid":
        rounds = math.ceil(draws / len(grid))
        orders = [_permutations(units, len(grid), generator) for _ in range(rounds)]
        return grid[torch.cat(orders, dim=1)[:, :draws]].T.contiguous().float()
    if mode not in TIMESTEP_MODES:
        raise CRDError(f"timestep mode must be one of {', '.join(TIMESTEP_MODES)}, got {mode!r}; choose one of them")
    if mode == "rollout_grid_independent":
        return grid[torch.randint(len(grid), (draws, units), generator=generator, device=generator.device)].float()
    # float64, so that a draw next to the end of its stratum does not round into the following one.
    position = torch.rand(draws, units, generator=generator, device=generator.device, dtype=torch.float64)
    if mode == "stratified":
        position = (_permutations(units, draws, generator).T + position) / draws
    low, high = 1.0 - fraction, grid[0]
    return (low + (high - low) * position).float()


def kept_grid(sigmas: Tensor, fraction: float) -> Tensor:
    """Times of the rollout's denoiser calls from 1 - fraction on, float64, decreasing.

    Args:
        sigmas: (S + 1,) noise levels of an S-step rollout, decreasing in [0, 1], the last one 0.
        fraction: share of the grid to keep, in (0, 1].

    Raises:
        CRDError: a fraction that is out of range or keeps no step.
        ValueError: `sigmas` is no such grid.
    """
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas must be (S+1,) with S >= 1, got {tuple(sigmas.shape)}")
    levels = sigmas.detach().double().cpu()
    if levels[-1] != 0 or levels[0] > 1 or not bool((levels.diff() < 0).all()):
        raise ValueError(f"sigmas must decrease from at most 1 to 0, got {levels.tolist()}; pass the rollout's sigmas")
    if not 0 < fraction <= 1:
        raise CRDError(f"timestep fraction must lie in (0, 1], got {fraction}; the published value is 0.99")
    kept = levels[:-1][levels[:-1] >= 1.0 - fraction - 1e-9]
    if not len(kept):
        least = 1.0 - levels[0].item()
        raise CRDError(f"timestep fraction {fraction} keeps no rollout step; use {least:.3g} or more")
    return kept


def _permutations(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Independent random orders of 0..length-1, (rows, length)."""
    return torch.rand(rows, length, generator=generator, device=generator.device).argsort(dim=1)


def _per_row(t: Tensor, like: Tensor) -> Tensor:
    """t (B,) viewed as (B, 1, ..., 1)."""
    if t.shape != like.shape[:1]:
        raise ValueError(f"t must be (B,)={tuple(like.shape[:1])}, got {tuple(t.shape)}")
    return t.reshape(-1, *[1] * (like.ndim - 1))


def _check_pair(name: str, tensor: Tensor, like: Tensor) -> None:
    # Broadcasting would silently pair every image with the same noise.
    if tensor.shape != like.shape:
        raise ValueError(f"{name} must be {tuple(like.shape)}, got {tuple(tensor.shape)}")
