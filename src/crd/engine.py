"""Accelerate, and how a loss over complete groups is differentiated in micro-batches; the only file that imports it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from crd.batch_sizes import T, in_memory
from crd.errors import CRDError
from crd.memory import keep_freed_memory
from crd.objectives.base import DenoiserOutputs, Objective, Rows
from crd.ranks import Ranks
from crd.sharding import shard, whole
from crd.shares import Share

GPU_PEAK = "gpu_peak_bytes"  # a metric of each update
Forward = Callable[[Tensor], DenoiserOutputs]  # row indices (n,) -> velocities of those rows, with gradient


class Engine:
    """Device, precision, processes and gradient steps of one run.

    Processes hold the whole network each ("replicas"), or, if Accelerate was configured for FSDP2, a part of it
    ("sharded"). Replicas are not wrapped in DistributedDataParallel: gradients of all micro-batches add up in each
    process, and one sum over processes follows, which is exact for any numbers of rows.

    Args:
        mixed_precision: "no", "bf16", or "auto": bf16 where the hardware multiplies it fast, else no.
        device: "auto", "cpu" or "cuda".
        peer_timeout: s that a process waits for the others.

    Raises:
        CRDError: the device or precision is not to be had, the process already has an engine of another device
            or precision, or Accelerate was configured for what the engine does not do.
    """

    def __init__(self, mixed_precision: str = "no", device: str = "auto", peer_timeout: float = 1800.0) -> None:
        if device not in ("auto", "cpu", "cuda"):
            raise CRDError(f"device must be auto, cpu or cuda, got {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise CRDError("device=cuda but torch sees no GPU; use device=cpu or install a CUDA build of torch")
        cpu = device == "cpu" or not torch.cuda.is_available()
        if mixed_precision not in ("no", "bf16", "auto"):
            raise CRDError(f"mixed_precision must be no, bf16 or auto, got {mixed_precision!r}; use bf16")
        if cpu:
            keep_freed_memory()
        else:
            # What is float32, the judges above all, is so in its convolutions too.
            torch.backends.cudnn.allow_tf32 = False
        if mixed_precision == "auto":
            mixed_precision = "bf16" if _fast_bf16(cpu) else "no"
        self._sharding = _sharding(mixed_precision)
        self.accelerator = _accelerator(mixed_precision, cpu, peer_timeout)
        if not cpu and self.accelerator.device.type == "cpu":
            raise CRDError("this process already runs on the CPU, got cuda; restart it or use device=cpu")
        if self.sharded and not dist.is_initialized():
            raise CRDError("Accelerate was configured for FSDP and started one process alone; launch without --cpu, or "
                           "run crd without accelerate launch")  # fmt: skip
        if self.accelerator.gradient_accumulation_steps != 1:
            raise CRDError(f"gradient_accumulation_steps={self.accelerator.gradient_accumulation_steps} of Accelerate "
                           "would scale the loss; set it to 1, micro_batch accumulates exactly")  # fmt: skip
        self.ranks = Ranks(self.accelerator.process_index, self.accelerator.num_processes, peer_timeout)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def mixed_precision(self) -> str:
        """ "no" or "bf16"; never "auto"."""
        return str(self.accelerator.mixed_precision)

    @property
    def sharded(self) -> bool:
        """Whether a process holds only a part of each weight."""
        return self._sharding is not None

    @property
    def layout(self) -> str:
        """How weights lie in the processes, by the file of `crd/launch` that says so: ddp, zero2 or fsdp2."""
        if self._sharding is None:
            return "ddp"
        return "fsdp2" if self._sharding.reshard_after_forward is True else "zero2"

    def restart_peak_memory(self) -> None:
        """From here on `peak_memory` counts."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> dict[str, float]:
        """Most bytes in tensors on this process's GPU since `restart_peak_memory`, as a metric; {} on a CPU."""
        if self.device.type != "cuda":
            return {}
        return {GPU_PEAK: float(torch.cuda.max_memory_allocated(self.device))}

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision of network calls; losses are computed outside of it."""
        return self.accelerator.autocast()

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module to call for the policy; if sharded, its parameters are other objects from here on."""
        self.ranks.check_same(module.parameters(), "the weights of the model")
        # In evaluation mode Accelerate adds mixed precision and no wrapper.
        prepared: nn.Module = self.accelerator.prepare_model(module, evaluation_mode=True)
        if self.sharded:
            shard(prepared, self.device, reshard=self.layout == "fsdp2")
        return prepared

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer to step."""
        prepared: torch.optim.Optimizer = self.accelerator.prepare_optimizer(optimizer)
        return prepared

    def backward(
        self, objective: Objective, forward: Forward, rows: Rows, micro_batch: int, share: Share | None = None
    ) -> dict[str, float]:
        """Gradient of `objective.loss` over all rows of complete groups, added to `.grad`.

        With terms τ_i(θ) of single rows and a loss L(τ_1 .. τ_N), dL/dθ = Σ_i ∂L/∂τ_i dτ_i/dθ: a pass without
        gradient collects all τ, L gives its derivative by τ, and each micro-batch is then run again against its
        slice. One micro-batch that holds all rows needs no first pass. Exact for any split and order of rows.

        Several processes run the rows of their shares. Every one gathers all τ and so has the whole L and its
        slopes; the sum of their gradients is dL/dθ, on all of them.

        Args:
            objective: gives terms and loss.
            forward: velocities of the rows with the given indices.
            rows: N rows, complete groups, the same on all processes.
            micro_batch: rows per call of `forward`.
            share: which rows each process runs; None: as the engine deals them.

        Returns:
            The objective's metrics, of all rows.

        Raises:
            CRDError: the loss is not finite, or another process is gone.
            ShortOfMemoryError: on all processes, if memory ran out in one; `.grad` is then of no use.
        """
        share = self.ranks.share(len(rows)) if share is None else share
        chunks = share.index.split(micro_batch)
        if len(chunks) == 1 and self.ranks.world_size == 1:
            return self.in_memory(lambda: self._backward_at_once(objective, forward, rows, chunks[0]))
        parts = self.in_memory(lambda: _terms(objective, forward, chunks))
        own = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        terms = {
            name: self.ranks.gather(share, values[share.places.to(values.device)]).requires_grad_()
            for name, values in own.items()
        }
        output = objective.loss(terms, rows)
        _check_finite(output.loss)
        slopes = dict(
            zip(terms, torch.autograd.grad(output.loss, list(terms.values()), allow_unused=True), strict=True)
        )
        counted = share.counted[share.rank].split(micro_batch)
        self.in_memory(lambda: self._backward_in_chunks(objective, forward, chunks, counted, slopes))
        return output.metrics

    def _backward_at_once(self, objective: Objective, forward: Forward, rows: Rows, index: Tensor) -> dict[str, float]:
        output = objective.loss(objective.terms(forward(index)), rows)
        _check_finite(output.loss)
        self.accelerator.backward(output.loss)
        return output.metrics

    def _backward_in_chunks(
        self,
        objective: Objective,
        forward: Forward,
        chunks: Sequence[Tensor],
        counted: Sequence[Tensor],
        slopes: Mapping[str, Tensor | None],
    ) -> None:
        # Sharded gradients are averaged over processes where they should be summed.
        factor = self.ranks.world_size if self.sharded else 1
        for chunk, counts in zip(chunks, counted, strict=True):
            again = objective.terms(forward(chunk))
            weighted = [
                (slope[chunk.to(slope.device)] * counts.to(slope.device) * factor * again[name]).sum()
                for name, slope in slopes.items()
                if slope is not None
            ]
            self.accelerator.backward(torch.stack(weighted).sum())

    def in_memory(self, work: Callable[[], T]) -> T:
        """`work()`, or `ShortOfMemoryError` on all processes; see `crd.batch_sizes.in_memory`."""
        return in_memory(work, self.ranks, sharded=self.sharded)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up what each process has in `.grad`, on all of them; sharded weights have done so in `backward`."""
        if self.ranks.world_size == 1 or self.sharded:
            return
        self.ranks.meet()
        with self.ranks.loss_told():
            for parameter in parameters:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)

    def leave(self) -> None:
        """Part from the other processes in good order; nothing can be computed together after it."""
        self.ranks.meet()
        if dist.is_initialized():
            dist.destroy_process_group()

    def check_replicas(self, parameters: Iterable[nn.Parameter]) -> None:
        """Refuse to go on if processes that should hold the same weights do not; sharded weights are one copy."""
        if not self.sharded:
            self.ranks.check_same(parameters, "the trained weights")

    def step(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], max_grad_norm: float) -> float:
        """Sum over processes, clip, step, clear; returns the gradient norm before clipping.

        Raises:
            CRDError: the gradient is not finite; no parameter has changed then.
        """
        parameters = list(parameters)
        self.sum_gradients(parameters)
        norm = float(whole(self.accelerator.clip_grad_norm_(parameters, max_grad_norm)))
        if not math.isfinite(norm):
            raise CRDError(f"the gradient norm is {norm}; lower learning_rate, or use mixed_precision=no")
        optimizer.step()
        optimizer.zero_grad()
        return norm


@torch.no_grad()
def _terms(objective: Objective, forward: Forward, chunks: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    return [objective.terms(forward(chunk)) for chunk in chunks]


def _accelerator(mixed_precision: str, cpu: bool, peer_timeout: float) -> Accelerator:
    """Accelerate keeps one device and precision a process, and refuses others."""
    try:
        patience = InitProcessGroupKwargs(timeout=timedelta(seconds=peer_timeout))
        return Accelerator(mixed_precision=mixed_precision, cpu=cpu, kwargs_handlers=[patience])
    except dist.DistError as error:
        raise CRDError(f"cannot reach the other processes: {error}; check the launcher's addresses") from error
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise CRDError(f"cannot use mixed_precision={mixed_precision}: {error}; use mixed_precision=no") from error
        running = AcceleratorState()
        raise CRDError(
            f"this process already runs at mixed_precision={running.mixed_precision} on {running.device.type}, got "
            f"{mixed_precision} on {'cpu' if cpu else 'cuda'}; restart it or use the same"
        ) from error


def _sharding(mixed_precision: str) -> FullyShardedDataParallelPlugin | None:
    """What the launcher's configuration says of FSDP2; None: replicas.

    Raises:
        CRDError: it asks for what would not be done.
    """
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        raise CRDError("DeepSpeed is not supported; zero2.yaml shards gradients and optimizer as its ZeRO-2 does")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", mixed_precision):
        raise CRDError(f"the launcher was configured for mixed_precision={launched} and the run for {mixed_precision}; "
                       f"give the run --mixed_precision {launched}, or the launcher no")  # fmt: skip
    if not _asked("ACCELERATE_USE_FSDP"):
        return None
    plugin = FullyShardedDataParallelPlugin()
    refused = (
        (plugin.fsdp_version != 2, "fsdp_version", "set it to 2"),
        (_asked("FSDP_OFFLOAD_PARAMS"), "fsdp_offload_params", "set it to false"),
        # transformers would leave the text encoders of all processes but the first empty.
        (plugin.cpu_ram_efficient_loading, "fsdp_cpu_ram_efficient_loading", "set it to false"),
        (plugin.activation_checkpointing, "fsdp_activation_checkpointing", "use gradient_checkpointing of the run"),
    )
    for wrong, name, instead in refused:
        if wrong:
            raise CRDError(f"{name} of the launcher's configuration is not supported as it is; {instead}")
    return plugin


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _fast_bf16(cpu: bool) -> bool:
    """Whether bfloat16 products have their own instructions here (AMX tiles on a CPU)."""
    if not cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_amx_tile_supported())


def _check_finite(loss: Tensor) -> None:
    if not bool(torch.isfinite(loss)):
        raise CRDError(f"the loss is {loss.item()}; lower learning_rate, or use mixed_precision=no")
