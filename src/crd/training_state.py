"""What a checkpoint keeps of a run: the weights of its roles, its optimizer, how far it is, and on which prompts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crd.checkpoint import Checkpoint
from crd.errors import CRDError
from crd.optimizer_state import load_optimizer_tensors, optimizer_tensors
from crd.snapshots import POLICY, Snapshots

PROMPTS = "prompts_sha256"


@dataclass
class Progress:
    """How far a run is, over all its resumes."""

    updates_done: int = 0
    optimizer_steps: int = 0
    images_drawn: int = 0
    seconds: float = 0.0  # wall clock, evaluations included
    kl_scale: float = 1.0  # times kl_min and kl_max; the alarm may raise it


def pack(
    snapshots: Snapshots, optimizer: torch.optim.Optimizer, progress: Progress, prompts: Sequence[str]
) -> Checkpoint:
    """The checkpoint of a run after a whole update."""
    tensors: dict[str, dict[str, Tensor]] = {role: snapshots.state(role) for role in (POLICY, *snapshots.roles)}
    tensors["optimizer"] = optimizer_tensors(optimizer, _names(snapshots))
    return Checkpoint(tensors, {**dataclasses.asdict(progress), PROMPTS: _digest(prompts)})


def restore(
    checkpoint: Checkpoint, snapshots: Snapshots, optimizer: torch.optim.Optimizer, prompts: Sequence[str]
) -> Progress:
    """Put back what `pack` took.

    Raises:
        CRDError: the run's training prompts were others, or the tensors are of another model.
    """
    digest = _digest(prompts)
    # A checkpoint that does not say on which prompts it was trained cannot be held to them.
    if checkpoint.counters.get(PROMPTS, digest) != digest:
        raise CRDError(
            f"the training prompts are not those of the run: sha256 {checkpoint.counters[PROMPTS][:12]}, got "
            f"{digest[:12]} ({len(prompts)} prompts); restore the prompts, or start a new run"
        )
    for role in (POLICY, *snapshots.roles):
        snapshots.load_state(role, checkpoint.tensors[role])
    load_optimizer_tensors(optimizer, _names(snapshots), dict(checkpoint.tensors["optimizer"]))
    # A checkpoint that does not know the scale is of a run that could not change it.
    counters = {"kl_scale": 1.0, **checkpoint.counters}
    return Progress(**{field.name: counters[field.name] for field in dataclasses.fields(Progress)})


def _names(snapshots: Snapshots) -> list[str]:
    return [name for name, _ in snapshots.named_parameters()]


def _digest(prompts: Sequence[str]) -> str:
    """Of the prompts in their order, which the order of training follows."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
