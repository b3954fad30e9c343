"""2-D Gaussians with a linear plus quadratic reward: the one world where the optimum of CRD is known exactly.

`old` = N(m, C). A prompt is a number c, with r(x, c) = c a.x - sum_j b_j x_j^2 / 2 + 4 c, so that
p_old exp(r / β) / Z(c) is the Gaussian of precision P = C^-1 + diag(b) / β and mean P^-1 (C^-1 m + c a / β).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crd.flow import draw_timesteps, interpolate, velocity_target
from crd.objectives.base import DenoiserOutputs, Rows
from crd.objectives.crd import CRDInputs, CRDObjectiveConfig, crd_loss, implicit_reward

GROUP_SIZE = 16
# One rollout step from t=1 and one from 1e-3: "uniform" on this grid is t ~ U(0.001, 1).
GRID = torch.tensor([1.0, 1e-3, 0.0], dtype=torch.float64)


@dataclass(frozen=True)
class Gaussian:
    """N(mean, covariance) in float64, one for all rows or one for each."""

    mean: Tensor  # (2,) or (B, 2)
    covariance: Tensor  # (2, 2) or (B, 2, 2)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return self.mean + noise @ torch.linalg.cholesky(self.covariance).T

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.distributions.MultivariateNormal(self.mean, self.covariance).log_prob(x)

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[noise - x0 | x_t], exact: x_t has mean (1-t) m and covariance (1-t)^2 C + t^2 I."""
        eye = torch.eye(2, dtype=torch.float64)
        t = t.reshape(-1, 1, 1)
        marginal = (1 - t) ** 2 * self.covariance + t**2 * eye
        cross = t * eye - (1 - t) * self.covariance
        offset = (x_t - (1 - t[:, :, 0]) * self.mean).unsqueeze(-1)
        return (cross @ torch.linalg.solve(marginal, offset)).squeeze(-1) - self.mean


@dataclass(frozen=True)
class QuadraticReward:
    """r(x, c) = c linear . x - sum_j quadratic_j x_j^2 / 2 + 4 c; the last term is per prompt."""

    linear: Tensor  # (2,)
    quadratic: Tensor  # (2,)

    def __call__(self, x: Tensor, prompt: Tensor) -> Tensor:
        return prompt * (x @ self.linear) - x.square() @ self.quadratic / 2 + 4 * prompt

    def optimum(self, old: Gaussian, beta: float, prompt: float = 1.0) -> Gaussian:
        precision = torch.linalg.inv(old.covariance)
        covariance = torch.linalg.inv(precision + torch.diag(self.quadratic) / beta)
        return Gaussian(covariance @ (precision @ old.mean + prompt * self.linear / beta), covariance)


class Policy(nn.Module):
    """A velocity (B, 2) of x_t (B, 2), t (B,) and prompt (B,)."""

    def forward(self, x_t: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        raise NotImplementedError


def _gaussian(parameters: Tensor) -> Gaussian:
    """Gaussian of mean, log diagonal and lower entry of the Cholesky factor, (..., 5)."""
    mean, log_diagonal, below = parameters.split([2, 2, 1], dim=-1)
    factor = torch.diag_embed(log_diagonal.exp()) + nn.functional.pad(below.unsqueeze(-1), (0, 1, 1, 0))
    return Gaussian(mean, factor @ factor.mT)


def _parameters(gaussian: Gaussian) -> Tensor:
    factor = torch.linalg.cholesky(gaussian.covariance)
    return torch.cat([gaussian.mean, factor.diagonal().log(), factor[1:, 0]])


class GaussianPolicy(Policy):
    """The exact velocity of a Gaussian whose mean and Cholesky factor are trained."""

    def __init__(self, start: Gaussian) -> None:
        super().__init__()
        self.parameters_of_gaussian = nn.Parameter(_parameters(start))

    def gaussian(self) -> Gaussian:
        return _gaussian(self.parameters_of_gaussian)

    def forward(self, x_t: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        return self.gaussian().velocity(x_t, t)


class PromptedPolicy(Policy):
    """The exact velocity of a Gaussian whose parameters a small network reads off the prompt."""

    def __init__(self, start: Gaussian, width: int = 16) -> None:
        super().__init__()
        self.start = _parameters(start)
        self.net = _network(1, width, 5)

    def gaussian(self, prompt: Tensor) -> Gaussian:
        return _gaussian(self.start + self.net(prompt.unsqueeze(-1)))

    def forward(self, x_t: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        return self.gaussian(prompt).velocity(x_t, t)


class FreePolicy(Policy):
    """The exact velocity of `old` minus t times a small network: in general the velocity of no density.

    Velocities of two densities differ by -t / (1-t) times the difference of their scores. The factor t keeps
    the likelihood weight (1-t) / t from blowing up the gradient noise at small t.
    """

    def __init__(self, start: Gaussian, width: int = 64) -> None:
        super().__init__()
        self.start = start
        self.net = _network(4, width, 2)

    def forward(self, x_t: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        time = t.unsqueeze(1)
        correction = self.net(torch.cat([x_t, time, time.square()], dim=1))
        return self.start.velocity(x_t, t) - time * correction


def _network(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two hidden layers; the output starts at zero, so that the policy starts at `old`."""
    last = nn.Linear(width, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    layers = [nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last]
    return nn.Sequential(*layers).double()


@dataclass(frozen=True)
class World:
    """A fixed `old`, a reward, and prompts that take turns."""

    old: Gaussian
    reward: QuadraticReward
    prompts: tuple[float, ...] = (1.0,)

    def draw_inputs(self, policy: Policy, *, groups: int, draws: int, generator: torch.Generator) -> CRDInputs:
        """Fresh images of `old`, raw rewards as advantages, `draws` noisings of each; a group shares t."""
        images = groups * GROUP_SIZE
        x0 = self.old.sample(images, generator)
        group_id = torch.arange(groups).repeat_interleave(GROUP_SIZE)
        prompt = torch.tensor(self.prompts, dtype=torch.float64)[group_id % len(self.prompts)]
        rewards = self.reward(x0, prompt).repeat(draws)
        t = draw_timesteps("uniform", GRID, units=groups, draws=draws, fraction=1.0, generator=generator)
        rows = Rows(
            group_id=group_id.repeat(draws),
            image_id=torch.arange(images).repeat(draws),
            draw=torch.arange(draws).repeat_interleave(images),
            advantage=rewards,
            reward=rewards,
            kl_gate=torch.ones_like(rewards),
            has_signal=torch.ones_like(rewards, dtype=torch.bool),
        )
        t_rows = t[:, group_id].flatten().double()
        return CRDInputs(self.outputs(policy, x0.repeat(draws, 1), t_rows, prompt.repeat(draws), generator), rows)

    def outputs(
        self, policy: Policy, x0: Tensor, t: Tensor, prompt: Tensor, generator: torch.Generator
    ) -> DenoiserOutputs:
        """Velocities at a fresh noising of `x0` (N, 2)."""
        noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        x_t = interpolate(x0, noise, t)
        return DenoiserOutputs(
            policy=policy(x_t, t, prompt),
            old=self.old.velocity(x_t, t),
            anchor=None,
            target=velocity_target(x0, noise),
            t=t,
        )

    def train(
        self,
        policy: Policy,
        config: CRDObjectiveConfig,
        *,
        steps: int,
        groups: int,
        draws: int,
        lr: float,
        seed: int = 0,
    ) -> None:
        """Train `policy` in place; the learning rate falls to zero over the second half."""
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(policy.parameters(), lr=lr, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, 2 * (1 - n / steps)))
        for _ in range(steps):
            inputs = self.draw_inputs(policy, groups=groups, draws=draws, generator=generator)
            optimizer.zero_grad()
            crd_loss(inputs, config).loss.backward()
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def mean_implicit_reward(self, policy: Policy, x0: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor]:
        """Mean over `draws` draws of R with likelihood weight, and its standard error, each (B,)."""
        generator = torch.Generator().manual_seed(seed)
        rows = x0.repeat_interleave(draws, 0)
        t = 1 - torch.rand(len(rows), generator=generator, dtype=torch.float64)
        out = self.outputs(policy, rows, t, torch.ones_like(t), generator)
        assert out.old is not None
        r = implicit_reward(out.policy, out.old, out.target, out.t, "likelihood").reshape(-1, draws)
        return r.mean(1), r.std(1) / draws**0.5


@torch.no_grad()
def ode_moments(policy: Policy, n: int, steps: int, seed: int) -> Gaussian:
    """Mean and covariance of `n` samples drawn from t=1 to t=0 with Heun steps, prompt 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    one = torch.ones(n, dtype=torch.float64)
    for now, following in itertools.pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        slope = policy(x, now * one, one)
        ahead = policy(x + (following - now) * slope, following * one, one)
        x = x + (following - now) * (slope + ahead) / 2
    return Gaussian(x.mean(0), x.T.cov())


def relative_errors(got: Gaussian, exact: Gaussian) -> tuple[float, float]:
    """|mean - mean*| / |mean*| and |C - C*|_F / |C*|_F."""
    mean = (got.mean - exact.mean).norm() / exact.mean.norm()
    covariance = (got.covariance - exact.covariance).norm() / exact.covariance.norm()
    return mean.item(), covariance.item()
