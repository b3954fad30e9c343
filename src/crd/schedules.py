"""How slowly a snapshot follows the policy."""

from __future__ import annotations

from dataclasses import dataclass

from crd.errors import CRDError


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
