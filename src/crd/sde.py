"""The stochastic sampler of flow matching: steps with the marginals of the ODE's, and with a density.

    dx = [v + σ² / (2t) (x + (1 - t) v)] dt + σ dw,    σ_t = a sqrt(t / (1 - t))

integrated from noise to data: -(x + (1 - t) v) / t is the score, so the drift added to v and the noise leave the
marginals as they are. A step of the Euler-Maruyama scheme is a Gaussian,

    x_next ~ N(p x + q v, std² I),    p = 1 + σ² / (2t) Δt,    q = (1 + σ² (1 - t) / (2t)) Δt,    std = σ sqrt(-Δt)

with Δt < 0. σ diverges at t = 1, where every stock grid begins. There 1 - t is taken from the grid's second time, as
the public implementation of Flow-GRPO does.

A step taken is a velocity: x_next = p x + q v* with v* = (x_next - p x) / q, and the density of x_next under the
sampler's Gaussian is, up to a factor without v, that of v* under N(v, std² / q² I). So a step is trained as a velocity
is, with the target v*.

Source: Liu et al., "Flow-GRPO", arXiv 2505.05470v5, section 4: the SDE is Eq. (8), its steps Eq. (9), σ the line below.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crd.flow import velocity_error


@dataclass(frozen=True)
class SDESteps:
    """The Gaussians of a grid of S steps."""

    sigmas: Tensor  # (S + 1,) times, decreasing, the last one 0
    x_weight: Tensor  # (S,) float64, p
    v_weight: Tensor  # (S,) float64, q, below 0
    std: Tensor  # (S,) float64

    @staticmethod
    def of(sigmas: Tensor, noise: float) -> SDESteps:
        """Steps between the times of a grid.

        Args:
            sigmas: (S + 1,) times of an S-step rollout, decreasing in [0, 1], the last one 0.
            noise: a of σ_t; 0 gives the Euler steps of the ODE.
        """
        t, dt = sigmas[:-1].double(), sigmas.double().diff()
        at_noise = t > 1 - 1e-6  # some stock grids begin one rounding below 1
        remaining = 1 - torch.where(at_noise, sigmas[1].double(), t)
        variance = noise**2 * t / remaining
        return SDESteps(
            sigmas=sigmas,
            x_weight=1 + variance / (2 * t) * dt,
            v_weight=(1 + variance * (1 - t) / (2 * t)) * dt,
            std=(variance * -dt).sqrt(),
        )

    def __len__(self) -> int:
        return len(self.std)

    def index(self, t: Tensor) -> Tensor:
        """The step that starts at each of these times of the grid, (N,) int64.

        Raises:
            ValueError: a time is none of the grid's.
        """
        found = t[:, None].double().cpu() == self.sigmas[:-1].double()
        if not bool(found.any(1).all()):
            raise ValueError(f"times must be those of the grid {self.sigmas.tolist()}, got {t.tolist()}")
        return found.int().argmax(1)

    def step(self, index: int, x: Tensor, v: Tensor, noise: Tensor) -> Tensor:
        """x after step `index` from x, at velocity v: (N, ...) each, `noise` standard normal."""
        p, q, std = (float(values[index]) for values in (self.x_weight, self.v_weight, self.std))
        return p * x + q * v + std * noise

    def target(self, index: Tensor, x: Tensor, x_next: Tensor) -> Tensor:
        """The velocity v* that leads from x to x_next without noise.

        Args:
            index: (N,) steps.
            x: (N, ...).
            x_next: (N, ...).

        Returns:
            (N, ...) float64.
        """
        p, q = (_rows(values[index], x) for values in (self.x_weight, self.v_weight))
        return (x_next.double() - p * x.double()) / q

    def precision(self, index: Tensor) -> Tensor:
        """q² / std² of steps (N,): one over the variance of v*, (N,) float64."""
        return (self.v_weight[index] / self.std[index]).square()


def log_density(v: Tensor, target: Tensor, precision: Tensor) -> Tensor:
    """Log-density of a step, mean over dims, without what does not depend on v.

        ℓ = -precision / 2  mean_dims (v - v*)²

    The mean, where a density of the whole latent has the sum, is that of the public implementation of Flow-GRPO: a
    ratio of the whole latent would be 0 or infinite. Its clip range is to be seen with it.

    Args:
        v: (N, ...) velocities.
        target: (N, ...) v* of the steps.
        precision: (N,).

    Returns:
        (N,) float64.
    """
    return -precision.to(v.device) / 2 * velocity_error(v, target).square().mean(1)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """(N,) viewed as (N, 1, ...) on the device of `like`."""
    return values.to(like.device).reshape(-1, *[1] * (like.ndim - 1))
