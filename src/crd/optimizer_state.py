"""An optimizer's state as named tensors, so that it can be kept in safetensors instead of a pickle."""

from __future__ import annotations

import torch
from torch import Tensor

from crd.errors import CRDError
from crd.sharding import part_like, whole


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """State of every parameter as `<parameter name>/<slot>` -> CPU tensor; whole, where it is spread over processes.

    Args:
        optimizer: with one parameter group whose parameters are, in order, `names`.
        names: one a parameter.
    """
    (group,) = optimizer.param_groups
    flat: dict[str, Tensor] = {}
    for name, parameter in zip(names, group["params"], strict=True):
        for slot, value in optimizer.state.get(parameter, {}).items():
            flat[f"{name}/{slot}"] = whole(torch.as_tensor(value).detach()).cpu().clone().contiguous()
    return flat


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str], flat: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`.

    Raises:
        CRDError: a tensor names a parameter that the optimizer does not have.
    """
    (group,) = optimizer.param_groups
    slots: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        name, slot = key.rsplit("/", 1)
        slots.setdefault(name, {})[slot] = value
    unknown = set(slots) - set(names)
    if unknown:
        raise CRDError(
            f"optimizer state is for other parameters, got {min(unknown)!r}; resume with the run's own model and LoRA"
        )
    for name, parameter in zip(names, group["params"], strict=True):
        if name in slots:
            # `step` stays on the CPU, as torch.optim keeps it. Copies: tensors read from a file are views of it.
            optimizer.state[parameter] = {
                slot: value.clone() if slot == "step" else part_like(parameter, value.clone())
                for slot, value in slots[name].items()
            }
