"""Numbers that change while a run goes on: how slowly a snapshot follows the policy, how fast the policy learns, how
strongly the anchor holds it."""

from __future__ import annotations

from dataclasses import dataclass

from crd.errors import CRDError
from crd.setting_checks import check_bounded, check_positive


@dataclass(frozen=True)
class RampDecay:
    """Decay of a snapshot's moving average, growing linearly with the number of optimizer steps.

        d(n) = start                                         for n <= start_step
        d(n) = min(start + (n - start_step) slope, end)      after it
        snapshot <- d(n) snapshot + (1 - d(n)) policy

    Args:
        start: decay until `start_step`, in [0, 1); 0 copies the policy.
        slope: growth per optimizer step, at least 0.
        start_step: optimizer step at which growth starts, at least 0.
        end: largest decay, in [start, 1]; 1 would freeze the snapshot.

    Raises:
        CRDError: a value out of range.

    Source: arXiv 2603.14128, OCR run: old = RampDecay(0.25, 0.005, 0, 0.999),
    sampler = RampDecay(0.0, 0.0075, 75, 0.999).
    """

    start: float
    slope: float
    start_step: int
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise CRDError(f"decay needs 0 <= start <= end <= 1, got start={self.start}, end={self.end}; change one")
        if not self.slope >= 0:
            raise CRDError(f"decay slope must be at least 0, got {self.slope}; 0 keeps the decay at its start")
        if self.start_step < 0:
            raise CRDError(f"decay start_step must be at least 0, got {self.start_step}; 0 grows from the first step")

    def decay(self, n: int) -> float:
        """Decay after `n` optimizer steps, n >= 0."""
        if n < 0:
            raise ValueError(f"n counts optimizer steps and must be at least 0, got {n}")
        if n <= self.start_step:
            return self.start
        return min(self.start + (n - self.start_step) * self.slope, self.end)


@dataclass(frozen=True)
class LearningRate:
    """Learning rate that rises linearly over the first steps and falls linearly over the last updates.

        rate(n, u) = peak min(1, (n + 1) / (warmup_steps + 1)) min(1, (updates - u) / cooldown_updates)

    The fall averages out the noise of the last gradients.

    Args:
        peak: the rate in between.
        warmup_steps: optimizer steps of the rise, at least 0.
        cooldown_updates: updates of the fall, in 0..updates; 0 = none.
        updates: of the whole run.

    Raises:
        CRDError: the fall is longer than the run.
    """

    peak: float
    warmup_steps: int
    cooldown_updates: int
    updates: int

    def __post_init__(self) -> None:
        if self.cooldown_updates > self.updates:
            raise CRDError(
                f"cooldown_updates must lie in 0..updates={self.updates}, got {self.cooldown_updates}; lower it"
            )

    def rate(self, steps_done: int, updates_done: int) -> float:
        """Rate of the next optimizer step, after `steps_done` of them and `updates_done` < updates updates."""
        rise = min(1.0, (steps_done + 1) / (self.warmup_steps + 1))
        if self.cooldown_updates == 0:
            return self.peak * rise
        return self.peak * rise * min(1.0, (self.updates - updates_done) / self.cooldown_updates)


@dataclass(frozen=True)
class KLRamp:
    """Factor of both KL strengths, which goes from `start` to 1 by equal ratios over the first updates.

        scale(u) = start^(1 - u / updates)    for u < updates
        scale(u) = 1                          from then on

    Above 1 the anchor teaches first, and holds less firmly afterwards; below 1 it comes in slowly.

    Args:
        start: factor of the first update, above 0.
        updates: length of the ramp, at least 0; 0 = none.

    Raises:
        CRDError: a value out of range.
    """

    start: float
    updates: int

    def __post_init__(self) -> None:
        check_positive("kl_start_scale", self.start)
        check_bounded("kl_start_scale", self.start)
        if self.updates < 0:
            raise CRDError(
                f"kl_ramp_updates must be at least 0, got {self.updates}; 0 leaves the strengths as they are"
            )

    def scale(self, updates_done: int) -> float:
        """Factor of the update after `updates_done` others."""
        if updates_done >= self.updates:
            return 1.0
        return float(self.start ** (1 - updates_done / self.updates))
