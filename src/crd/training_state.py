"""What a checkpoint keeps of a run: the weights of its roles, its optimizer, how far it is, and on which prompts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crd.checkpoint import Checkpoint
from crd.data import PromptDataset
from crd.errors import CRDError
from crd.optimizer_state import load_optimizer_tensors, optimizer_tensors
from crd.snapshots import POLICY, Snapshots

PROMPTS, COLUMNS = "prompts_sha256", "columns_sha256"


@dataclass
class Progress:
    """How far a run is, over all its resumes."""

    updates_done: int = 0
    optimizer_steps: int = 0
    images_drawn: int = 0
    seconds: float = 0.0  # wall clock, evaluations included
    kl_scale: float = 1.0  # times kl_min and kl_max; the alarm may raise it


def pack(snapshots: Snapshots, optimizer: torch.optim.Optimizer, progress: Progress, data: PromptDataset) -> Checkpoint:
    """The checkpoint of a run after a whole update."""
    tensors: dict[str, dict[str, Tensor]] = {role: snapshots.state(role) for role in (POLICY, *snapshots.roles)}
    tensors["optimizer"] = optimizer_tensors(optimizer, _names(snapshots))
    return Checkpoint(tensors, {**dataclasses.asdict(progress), **_digests(data)})


def restore(
    checkpoint: Checkpoint, snapshots: Snapshots, optimizer: torch.optim.Optimizer, data: PromptDataset
) -> Progress:
    """Put back what `pack` took.

    Raises:
        CRDError: the run's training prompts or their columns were others, or the tensors are of another model.
    """
    for (name, digest), what in zip(
        _digests(data).items(), ("training prompts", "columns of the training prompts"), strict=True
    ):
        # A checkpoint that does not say on which prompts it was trained cannot be held to them.
        if (was := checkpoint.counters.get(name, digest)) != digest:
            raise CRDError(f"the {what} are not those of the run: sha256 {was[:12]}, got {digest[:12]} ({len(data)} "
                           "prompts); restore them, or start a new run")  # fmt: skip
    for role in (POLICY, *snapshots.roles):
        snapshots.load_state(role, checkpoint.tensors[role])
    load_optimizer_tensors(optimizer, _names(snapshots), dict(checkpoint.tensors["optimizer"]))
    # A checkpoint that does not know the scale is of a run that could not change it.
    counters = {"kl_scale": 1.0, **checkpoint.counters}
    return Progress(**{field.name: counters[field.name] for field in dataclasses.fields(Progress)})


def _names(snapshots: Snapshots) -> list[str]:
    return [name for name, _ in snapshots.named_parameters()]


def _digests(data: PromptDataset) -> dict[str, str]:
    """Of the prompts in their order, which the order of training follows, and of what the rewards are told of them.

    Of an object that JSON does not know, given in Python, only the type counts: it may look different every time.
    """
    return {PROMPTS: _digest(list(data.prompts)), COLUMNS: _digest(dict(data.columns))}


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()
