"""Accelerate, and how a loss over complete groups is differentiated in micro-batches; the only file that imports it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from crd.errors import CRDError
from crd.memory import keep_freed_memory
from crd.objectives.base import DenoiserOutputs, Objective, Rows

Forward = Callable[[Tensor], DenoiserOutputs]  # row indices (n,) -> velocities of those rows, with gradient


class Engine:
    """Device, precision and gradient steps of one run.

    Args:
        mixed_precision: "no", "bf16", or "auto": bf16 where the hardware multiplies it fast, else no.
        device: "auto", "cpu" or "cuda".

    Raises:
        CRDError: the device or precision is not to be had, the process already has an engine of another device
            or precision, or several processes were launched.
    """

    def __init__(self, mixed_precision: str = "no", device: str = "auto") -> None:
        if device not in ("auto", "cpu", "cuda"):
            raise CRDError(f"device must be auto, cpu or cuda, got {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise CRDError("device=cuda but torch sees no GPU; use device=cpu or install a CUDA build of torch")
        cpu = device == "cpu" or not torch.cuda.is_available()
        if mixed_precision not in ("no", "bf16", "auto"):
            raise CRDError(f"mixed_precision must be no, bf16 or auto, got {mixed_precision!r}; use bf16")
        if cpu:
            keep_freed_memory()
        if mixed_precision == "auto":
            mixed_precision = "bf16" if _fast_bf16(cpu) else "no"
        self.accelerator = _accelerator(mixed_precision, cpu)
        if self.accelerator.num_processes > 1:
            raise CRDError(f"training runs in one process so far, got {self.accelerator.num_processes}; launch one")

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision of network calls; losses are computed outside of it."""
        return self.accelerator.autocast()

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The module to call for the policy, and the optimizer to step."""
        wrapped, prepared = self.accelerator.prepare(module, optimizer)
        return wrapped, prepared

    def backward(self, objective: Objective, forward: Forward, rows: Rows, micro_batch: int) -> dict[str, float]:
        """Gradient of `objective.loss` over all rows of complete groups, added to `.grad`.

        With terms τ_i(θ) of single rows and a loss L(τ_1 .. τ_N), dL/dθ = Σ_i ∂L/∂τ_i dτ_i/dθ: a pass without
        gradient collects all τ, L gives its derivative by τ, and each micro-batch is then run again against its
        slice. One micro-batch that holds all rows needs no first pass. Exact for any split and order of rows.

        Args:
            objective: gives terms and loss.
            forward: velocities of the rows with the given indices.
            rows: N rows, complete groups.
            micro_batch: rows per call of `forward`.

        Returns:
            The objective's metrics.

        Raises:
            CRDError: the loss is not finite.
        """
        chunks = torch.arange(len(rows)).split(micro_batch)
        if len(chunks) == 1:
            output = objective.loss(objective.terms(forward(chunks[0])), rows)
            _check_finite(output.loss)
            self.accelerator.backward(output.loss)
            return output.metrics
        with torch.no_grad():
            parts = [objective.terms(forward(chunk)) for chunk in chunks]
        terms = {name: torch.cat([part[name] for part in parts]).requires_grad_() for name in parts[0]}
        output = objective.loss(terms, rows)
        _check_finite(output.loss)
        slopes = dict(
            zip(terms, torch.autograd.grad(output.loss, list(terms.values()), allow_unused=True), strict=True)
        )
        for chunk in chunks:
            again = objective.terms(forward(chunk))
            weighted = [
                (slope[chunk.to(slope.device)] * again[name]).sum()
                for name, slope in slopes.items()
                if slope is not None
            ]
            self.accelerator.backward(torch.stack(weighted).sum())
        return output.metrics

    def step(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], max_grad_norm: float) -> float:
        """Clip, step, clear; returns the gradient norm before clipping.

        Raises:
            CRDError: the gradient is not finite; no parameter has changed then.
        """
        norm = float(self.accelerator.clip_grad_norm_(list(parameters), max_grad_norm))
        if not math.isfinite(norm):
            raise CRDError(f"the gradient norm is {norm}; lower learning_rate, or use mixed_precision=no")
        optimizer.step()
        optimizer.zero_grad()
        return norm


def _accelerator(mixed_precision: str, cpu: bool) -> Accelerator:
    """Accelerate keeps one device and precision a process, and refuses others."""
    try:
        return Accelerator(mixed_precision=mixed_precision, cpu=cpu)
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise CRDError(f"cannot use mixed_precision={mixed_precision}: {error}; use mixed_precision=no") from error
        running = AcceleratorState()
        raise CRDError(
            f"this process already runs at mixed_precision={running.mixed_precision} on {running.device.type}, got "
            f"{mixed_precision} on {'cpu' if cpu else 'cuda'}; restart it or use the same"
        ) from error


def _fast_bf16(cpu: bool) -> bool:
    """Whether bfloat16 products have their own instructions here (AMX tiles on a CPU)."""
    if not cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_amx_tile_supported())


def _check_finite(loss: Tensor) -> None:
    if not bool(torch.isfinite(loss)):
        raise CRDError(f"the loss is {loss.item()}; lower learning_rate, or use mixed_precision=no")
