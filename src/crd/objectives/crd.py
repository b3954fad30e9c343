"""Centered Reward Distillation: match the centered implicit reward to the centered external reward.

KL-regularised reward maximisation against `old` has the optimum p* = p_old exp(r / β) / Z(c), hence
β log p*/p_old = r - β log Z(c). Z(c) is one number for all images of a prompt and vanishes once both sides
are centered within the prompt. Rows are centered over (group_id, draw): one draw of every image of a group.
Centered over several prompts, or not at all (`centering_prompts`), the loss keeps what differs between log Z of
those prompts, or log Z itself. The public implementation centers what shares a gathered micro-batch.

The residual. A single draw R̂ of the log-ratio, squared, has the expectation (β E R̂ - A)² + β² Var R̂, and
Var R̂ grows with the ratio, so `per_draw` (published) is pulled towards `old`. `leave_one_out` (ours)
multiplies the residual of draw m by that of the image's other draws: with draws that are independent given
the images it is an unbiased estimate of (β E R̂ - A)². Two draws without replacement from S grid points, or from
M strata, are not: the expectation is then less than that by Var / (S - 1) (M - 1), with Var the variance over grid
points (strata) of the mean of β R̂_c at each. A network can make it as large as it likes at a fixed mean over t, so
that loss has no minimum; `CRDConfig` refuses it.

The zero of the loss. p* is one, and the only one within a family of densities. A velocity network is freer:
the loss fixes R, a function of x0, and many velocities in (x_t, t) have that R without belonging to a density
(tests/test_closed_form.py measures it on a toy with `old` fixed).

Source: arXiv 2603.14128; choices where the paper is silent are marked "our reading".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from crd.centering import center, tempered_weights
from crd.errors import CRDError
from crd.flow import error_scale, velocity_error
from crd.objectives.base import DenoiserOutputs, RowLayout, Rows
from crd.objectives.kl import ObjectiveConfig, kl_needs, kl_terms, with_kl
from crd.records import LossOutput
from crd.setting_checks import check_bounded, check_count, check_option, check_positive

OPTIONS = {
    "centering": ("uniform", "tempered"),
    "form": ("squared", "cross_entropy"),
    "residual": ("per_draw", "leave_one_out"),
    "weighting": ("adaptive", "unit", "likelihood"),
}


@dataclass(frozen=True)
class CRDObjectiveConfig(ObjectiveConfig):
    """Settings of the CRD loss; the defaults are the published ones."""

    beta: float = 1.0  # strength of the KL regulariser against `old`
    centering: str = "uniform"
    centering_prompts: int = 1  # 1 alone cancels log Z; n: n successive groups as one; 0: R stays as it is
    tau: float = 1.0  # temperature of tempered centering, in units of the raw reward
    form: str = "squared"
    residual: str = "per_draw"
    weighting: str = "adaptive"
    loss_scale: float = 5.0  # the policy term is multiplied by loss_scale / beta

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("centering", self.centering, OPTIONS["centering"])
        check_option("form", self.form, OPTIONS["form"])
        check_option("residual", self.residual, OPTIONS["residual"])
        check_option("weighting", self.weighting, OPTIONS["weighting"])
        check_count("centering_prompts", self.centering_prompts, "crd", 0)
        if self.centering == "tempered" and self.centering_prompts != 1:
            raise CRDError(f"centering=tempered weighs the images of one prompt, got centering_prompts="
                           f"{self.centering_prompts}; set centering_prompts=1, or use uniform")  # fmt: skip
        for name, number in (("beta", self.beta), ("tau", self.tau), ("loss_scale", self.loss_scale)):
            check_positive(name, number)
        # tau may be infinite: that is uniform centering.
        check_bounded("beta", self.beta)
        check_bounded("loss_scale", self.loss_scale)

    def build(self) -> CRD:
        """The CRD objective."""
        return CRD(self)


@dataclass(frozen=True)
class CRDInputs:
    """All rows at once: velocities and plain numbers, row by row."""

    outputs: DenoiserOutputs
    rows: Rows


def implicit_reward(v_policy: Tensor, v_old: Tensor, v_target: Tensor, t: Tensor, weighting: str) -> Tensor:
    """One-draw estimate of log p_θ/p_old from two denoising errors, per row.

        adaptive:    R = -mean_dims[(v_θ - v)² / s_θ - (v_old - v)² / s_old],
                     s_. = stop_grad(max(mean_dims |v_. - v|, 1e-5)), one number for each row and model
        unit:        R = -mean_dims[(v_θ - v)² - (v_old - v)²]
        likelihood:  R = -(1 - t) / t  sum_dims[(v_θ - v)² - (v_old - v)²]

    The likelihood weight. A path with data scale 1 - t and noise scale t has SNR(t) = (1 - t)² / t², and its
    continuous-time ELBO is -1/2 ∫ -SNR'(t) E|x0 - x̂0|² dt plus terms without the network. Here
    -SNR'(t) = 2 (1 - t) / t³ and x0 - x̂0 = t (v̂ - v), so the integrand is (1 - t) / t |v̂ - v|². The integral
    over t in (0, 1) is the mean over t ~ U(0, 1): E_t,noise[R] is the difference of the two ELBOs at x0, and
    the exact log-ratio where both velocities are the exact ones of their densities. Any other law of t gives
    another weight. The sum over dims makes R a log-ratio of the whole latent; adaptive and unit R are not.

    Args:
        v_policy: (N, ...) velocity of the policy.
        v_old: (N, ...) velocity of `old`.
        v_target: (N, ...) noise - x0.
        t: (N,) in [0, 1]; above 0 for "likelihood".
        weighting: "adaptive", "unit" or "likelihood".

    Returns:
        R (N,) float64, differentiable in `v_policy`; exactly 0 where `v_policy` equals `v_old`.

    Raises:
        CRDError: an unknown weighting.
        ValueError: t at or below 0 with likelihood weighting.

    Source: arXiv 2603.14128, the implicit reward; Kingma et al., "Variational Diffusion Models",
    arXiv 2107.00630, section on the continuous-time loss, for the ELBO.
    """
    error_policy, error_old = velocity_error(v_policy, v_target), velocity_error(v_old, v_target)
    if weighting == "adaptive":
        scaled_policy = error_policy.square().mean(1) / error_scale(error_policy)
        return error_old.square().mean(1) / error_scale(error_old) - scaled_policy
    if weighting == "unit":
        return error_old.square().mean(1) - error_policy.square().mean(1)
    if weighting != "likelihood":
        raise CRDError(f"weighting must be one of {', '.join(OPTIONS['weighting'])}, got {weighting!r}; choose one")
    t = t.double()
    if not bool(((t > 0) & (t <= 1)).all()):
        raise ValueError(f"likelihood weighting needs t in (0, 1], got {t.min().item()} to {t.max().item()}")
    return (1 - t) / t * (error_old.square().sum(1) - error_policy.square().sum(1))


@dataclass(frozen=True)
class CRD:
    """The CRD objective: `terms` of single rows, `loss` over complete groups."""

    config: CRDObjectiveConfig = field(default_factory=CRDObjectiveConfig)

    @property
    def needs(self) -> frozenset[str]:
        """Roles whose velocities `terms` reads."""
        return frozenset({"old"}) | kl_needs(self.config)

    def terms(self, outputs: DenoiserOutputs) -> dict[str, Tensor]:
        """Implicit reward R and, with an anchor, KL_i = mean_dims (v_θ - v_anchor)², each (N,) float64.

        Raises:
            CRDError: `old` is missing, or `anchor` is while kl_max > 0.
        """
        reward = implicit_reward(outputs.policy, outputs.of_old(), outputs.target, outputs.t, self.config.weighting)
        return {"implicit_reward": reward, **kl_terms(outputs, self.config)}

    def loss(self, terms: dict[str, Tensor], rows: Rows) -> LossOutput:
        """Policy term plus reward-adaptive KL to the anchor.

            loss = loss_scale / β  mean_i policy_i  +  mean_i λ_i KL_i,   λ_i = kl_min + (kl_max - kl_min) g_i

            squared, per_draw:             policy_i = (β R_c - A_c)²
            squared, leave_one_out:        policy_i = (β R_c - A_c) (β R̄_c - A_c)
            cross_entropy, per_draw:       policy_i = BCE of sigmoid(β R_c) against sigmoid(A_c)
            cross_entropy, leave_one_out:  gradient (sigmoid(β R̄_c) - sigmoid(A_c))_stopgrad β dR_c

        with R̄ the mean over the image's other draws and index c for centering within (group_id, draw), or as
        `centering_prompts` says; groups without signal count in the means of the others. Uncentered, A_c is A - 1/2.
        The squared leave-one-out product sums over ordered pairs of different draws, so that its full
        gradient is that of 2 (β R̄_c - A_c)_stopgrad β R_c, and its value is the unbiased estimate of the
        noise-free loss (it can be negative). Cross-entropy has d/dx BCE = sigmoid(x) - sigmoid(a) at
        x = β R_c, a = A_c: the same zero as the squared form, a bounded gradient, an eighth of its slope
        there; taking sigmoid of both centered sides is our reading. Its leave-one-out gradient drops the
        covariance of residual and dR but keeps the curvature of sigmoid: unbiased to first order only.

        Rows without signal add 0 to the policy sum and still count in its mean; KL acts on every row.
        That loss_scale / β leaves the KL term alone is our reading.

        Args:
            terms: "implicit_reward" (N,), and "kl" (N,) when kl_max > 0; as from `terms`, rows in any order.
            rows: the same N rows.

        Returns:
            `LossOutput`; metrics are means over rows, residual and correlation over rows with signal
            (0 where undefined). The correlation is that of R_c and A_c, a cosine.

        Raises:
            CRDError: leave_one_out with one draw an image, or "kl" missing while kl_max > 0.
            ValueError: terms and rows differ in length, or a group misses draws of some image.
        """
        cfg = self.config
        reward = terms["implicit_reward"]
        rows = rows.beside(reward)
        layout = RowLayout.of(rows)
        centered = self._centering(layout, rows)
        # 1/2 is the advantage of an image that is worth its group's mean: what is left uncentered starts there.
        x, a = cfg.beta * centered(reward.double()), centered(rows.advantage.double() - 0.5)
        x_other = None
        if cfg.residual == "leave_one_out":
            x_other = cfg.beta * centered(layout.mean_of_other_draws(reward.double()))
        policy = (_policy_rows(x, x_other, a, cfg.form) * rows.has_signal).mean()
        metrics = _policy_metrics(policy, reward, x, a, rows.has_signal)
        if x_other is not None:
            unbiased = _policy_rows(x, x_other, a, "squared") * rows.has_signal
            metrics["squared_loss_unbiased"] = unbiased.mean().item()
        return with_kl(cfg.loss_scale / cfg.beta * policy, metrics, terms, rows, cfg)

    def _centering(self, layout: RowLayout, rows: Rows) -> Callable[[Tensor], Tensor]:
        """What takes from values (N,) the mean over the rows that each is centered with."""
        cfg = self.config
        if cfg.centering_prompts == 0:
            return lambda values: values
        together = layout.centering_set(cfg.centering_prompts)
        tempered = cfg.centering == "tempered"
        weights = tempered_weights(rows.reward.double(), together, cfg.tau) if tempered else None
        return lambda values: center(values, together, weights)


def crd_loss(inputs: CRDInputs, config: CRDObjectiveConfig) -> LossOutput:
    """The CRD loss of all rows at once: `CRD(config).loss(CRD(config).terms(outputs), rows)`.

    Args:
        inputs: velocities (N, ...) and plain numbers (N,) of complete groups.
        config: settings of the loss.

    Returns:
        `LossOutput` with a differentiable scalar.

    Raises:
        CRDError, ValueError: as `CRD.terms` and `CRD.loss`.

    Source: arXiv 2603.14128.
    """
    objective = CRD(config)
    return objective.loss(objective.terms(inputs.outputs), inputs.rows)


def _policy_rows(x: Tensor, x_other: Tensor | None, a: Tensor, form: str) -> Tensor:
    """Policy loss of each row (N,) from x = β R_c, x_other = β R̄_c (None: per draw) and a = A_c."""
    if form == "squared":
        return (x - a) * ((x if x_other is None else x_other) - a)
    if x_other is None:
        return F.binary_cross_entropy_with_logits(x, a.sigmoid(), reduction="none")
    held = x_other.detach()
    value = F.binary_cross_entropy_with_logits(held, a.sigmoid(), reduction="none")
    return value + (held.sigmoid() - a.sigmoid()) * (x - x.detach())


@torch.no_grad()
def _policy_metrics(policy: Tensor, reward: Tensor, x: Tensor, a: Tensor, has_signal: Tensor) -> dict[str, float]:
    x, a = x[has_signal], a[has_signal]
    norm = (x.square().sum() * a.square().sum()).sqrt()
    return {
        "loss_policy": policy.item(),
        "implicit_reward_mean": reward.mean().item(),
        "implicit_reward_std": reward.std(correction=0).item(),
        "residual_rms": (x - a).square().mean().sqrt().item() if len(x) else 0.0,
        "implicit_reward_correlation": ((x * a).sum() / norm).item() if norm > 0 else 0.0,
        "signal_fraction": has_signal.double().mean().item(),
    }
