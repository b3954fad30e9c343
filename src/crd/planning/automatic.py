"""`micro_batch: auto` and `rollout_batch: auto`: what the plan of a run finds for the memory of its GPUs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from crd.batch_sizes import BatchSize
from crd.config import AUTO, ROWS_WITHOUT_GPU, CRDConfig
from crd.console import console
from crd.engine import Engine
from crd.errors import CRDError
from crd.execution import memory_advice
from crd.planning.plan import plan_run


def gpu_memory(config: CRDConfig) -> int | None:
    """Free bytes of the GPU that a run would use; None: it would use none."""
    if config.device == "cpu" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info()[0])


def batch_sizes(config: CRDConfig, model: object, engine: Engine) -> tuple[BatchSize, BatchSize]:
    """`micro_batch` and `rollout_batch` of a run whose model is not loaded yet.

    Args:
        config: of the run.
        model: what takes the place of `config.model`; None = nothing does.
        engine: of the run. Its processes agree on what fits into the GPU with the least free memory.

    Raises:
        CRDError: nothing fits, or the model is an object, which has no configuration files to plan from.
    """
    micro_batch, rollout_batch = config.batches(ROWS_WITHOUT_GPU, ROWS_WITHOUT_GPU)
    if config.automatic:
        if gpu_memory(config) is not None:
            with engine.ranks.together():
                micro_batch, rollout_batch = _planned(config, model, engine)
        console.print(f"auto: micro_batch is {micro_batch} and rollout_batch is {rollout_batch} in this run")
    advice = memory_advice(config, engine.sharded)
    return BatchSize("micro_batch", micro_batch, advice), BatchSize("rollout_batch", rollout_batch, advice)


def _planned(config: CRDConfig, model: object, engine: Engine) -> tuple[int, int]:
    if model is not None and not isinstance(model, str | Path):
        raise CRDError(
            f"micro_batch={AUTO} and rollout_batch={AUTO} need a model by its name, got an object; use numbers"
        )
    named = config if model is None else dataclasses.replace(config, model=str(model))
    size = engine.ranks.world_size
    free = engine.ranks.gather(engine.ranks.share(size), torch.tensor([gpu_memory(config)]))
    plan = plan_run(named, size, engine.layout, int(free.min()))
    return plan.micro_batch, plan.rollout_batch
