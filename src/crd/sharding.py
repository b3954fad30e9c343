"""FSDP2: the weights of one network spread over the processes of a run; each collective call gathers what it needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, device: torch.device, *, reshard: bool) -> None:
    """Keep 1/W of every parameter of `module` in each of W processes; in place, parameters become other objects.

    The members of its lists of blocks are gathered one at a time, what remains as a whole.

    Args:
        module: the same on all processes.
        device: of this process.
        reshard: give a block's gathered weights up after its forward pass; False needs memory and saves a gather
            in the backward pass.
    """
    mesh = init_device_mesh(device.type, (get_world_size(),))
    units = [block for child in module.children() if isinstance(child, nn.ModuleList) for block in child]
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(module, mesh=mesh)
    if device.type == "cpu":
        # gloo adds, and does not average.
        for unit in module.modules():
            if isinstance(unit, FSDPModule):
                unit.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a part; for one that is spread out, all processes must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, values: Tensor) -> Tensor:
    """Of `values`, equal on all processes, the part that this process holds of `tensor`."""
    values = values.to(tensor.device, tensor.dtype)
    if not isinstance(tensor, DTensor):
        return values
    return distribute_tensor(values, tensor.device_mesh, tensor.placements)
