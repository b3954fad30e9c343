"""What a stock pipeline is about to ask of its denoiser: run it up to the first call, keep the inputs, stop there."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Recording:
    """Inputs of the first denoiser call, by parameter name, and the scheduler as the pipeline had set it."""

    inputs: Mapping[str, Any]
    scheduler: Any


class _Stopped(Exception):  # noqa: N818  it is no error
    """The denoiser was reached."""


def record(pipeline: Any, denoiser: nn.Module, scheduler: Any, call: Mapping[str, Any]) -> Recording:
    """Call `pipeline(**call)` with `scheduler` until it reaches `denoiser`, which does not run.

    Neither the pipeline nor the random state is changed: the call runs on a shallow copy and draws its latents from a
    generator of its own.

    Args:
        pipeline: A diffusers pipeline.
        denoiser: Its denoiser.
        scheduler: To use in place of its own; it is left as the pipeline sets it.
        call: Arguments of the pipeline.
    """
    stock = copy.copy(pipeline)
    stock.scheduler = scheduler
    stock.set_progress_bar_config(disable=True)
    seen: dict[str, Any] = {}

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments)
        raise _Stopped

    # Before any other hook: that of sharded weights would gather them from all processes.
    handle = denoiser.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        stock(**call, output_type="latent", generator=torch.Generator().manual_seed(0))
    except _Stopped:
        return Recording(seen, scheduler)
    finally:
        handle.remove()
    raise RuntimeError(f"{type(pipeline).__name__} finished without a call of its {type(denoiser).__name__}")


def join_rows(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of several encodings under each other; texts of unequal length are padded with zeros on dimension 1."""
    joined: dict[str, Tensor] = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if tensors[0].ndim > 1:
            length = max(tensor.shape[1] for tensor in tensors)
            tensors = [_padded(tensor, length) for tensor in tensors]
        joined[name] = torch.cat(tensors)
    return joined


def _padded(tensor: Tensor, length: int) -> Tensor:
    missing = length - tensor.shape[1]
    if missing == 0:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], dim=1)
