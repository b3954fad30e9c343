"""Rows and velocities of small optimizer steps, for the tests of objectives."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from crd.objectives.base import DenoiserOutputs, Rows, SampledSteps

DOUBLE = torch.float64
SHAPE = (2, 3, 3)


def make_rows(group_sizes: tuple[int, ...] = (3, 2, 4), draws: int = 3, seed: int = 0) -> Rows:
    """Rows of groups of different sizes, in random order; the last group has no signal."""
    g = torch.Generator().manual_seed(seed)
    entries = [(5 * p - 3, k, m) for p, size in enumerate(group_sizes) for k in range(size) for m in range(draws)]
    rewards = {(p, k): torch.rand(1, generator=g).item() for p, k, _ in entries}
    order = torch.randperm(len(entries), generator=g).tolist()
    group_id, image_id, draw = (torch.tensor([entries[i][column] for i in order]) for column in range(3))
    reward = torch.tensor([rewards[entries[i][:2]] for i in order], dtype=DOUBLE)
    has_signal = group_id != group_id.max()
    advantage = torch.where(has_signal, 0.2 + 0.6 * reward, torch.full_like(reward, 0.5))
    return Rows(group_id, image_id, draw, advantage, reward, kl_gate=reward, has_signal=has_signal)


def make_outputs(n: int, seed: int = 0) -> DenoiserOutputs:
    """Random velocities; as steps of trajectories, `old` drew them."""
    g = torch.Generator().manual_seed(seed)
    policy, old, anchor, target = (torch.randn(n, *SHAPE, generator=g, dtype=DOUBLE) for _ in range(4))
    t = 0.1 + 0.9 * torch.rand(n, generator=g, dtype=DOUBLE)
    precision = 0.2 + torch.rand(n, generator=g, dtype=DOUBLE)
    steps = SampledSteps(precision, -precision * (old - target).square().flatten(1).mean(1) / 2)
    return DenoiserOutputs(policy, old, anchor, target, t, steps)


def pick_rows(rows: Rows, index: Tensor) -> Rows:
    return Rows(*(getattr(rows, f.name)[index] for f in dataclasses.fields(Rows)))


def pick_outputs(outputs: DenoiserOutputs, index: Tensor) -> DenoiserOutputs:
    tensors = (outputs.policy, outputs.old, outputs.anchor, outputs.target, outputs.t)
    assert outputs.steps is not None
    steps = SampledSteps(outputs.steps.precision[index], outputs.steps.log_density[index])
    return DenoiserOutputs(*(tensor[index] for tensor in tensors if tensor is not None), steps)
