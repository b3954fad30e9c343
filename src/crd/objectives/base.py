"""What every objective reads and offers.

An objective is two pure functions. `terms` maps each row to plain numbers and no row sees another; `loss`
couples the rows and is cheap. So the network may run in micro-batches of any size while the loss still sees
complete groups: numbers of all rows first, then dloss/dterms, then each micro-batch again with its share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from crd.errors import CRDError
from crd.records import LossOutput

TRAJECTORY = "trajectory"  # in `Objective.needs`: rows are steps of a stochastic sampler, not noised images


@dataclass(frozen=True)
class SampledSteps:
    """Steps of a stochastic sampler as velocities: the target is the one that leads there, see `crd.sde`."""

    precision: Tensor  # (N,) one over the variance of that velocity
    log_density: Tensor  # (N,) of the step under the snapshot that drew it


@dataclass(frozen=True)
class DenoiserOutputs:
    """Velocities of one micro-batch of N rows, all predicted at the same x_t."""

    policy: Tensor  # (N, C, H, W) or (N, ...), carries the gradient
    old: Tensor | None  # (N, ...)
    anchor: Tensor | None  # (N, ...), guidance already applied
    target: Tensor  # (N, ...), noise - x0
    t: Tensor  # (N,) in [0, 1]
    steps: SampledSteps | None = None  # of rows that are steps of a trajectory

    def __post_init__(self) -> None:
        shape = self.policy.shape
        for name, tensor in (("old", self.old), ("anchor", self.anchor), ("target", self.target)):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} must be {tuple(shape)} as policy, got {tuple(tensor.shape)}")
        if self.policy.ndim < 2 or self.t.shape != shape[:1]:
            raise ValueError(f"policy must be (N, ...) and t (N,), got {tuple(shape)} and {tuple(self.t.shape)}")

    def of_old(self) -> Tensor:
        """Velocity of `old`, for an objective that needs it.

        Raises:
            CRDError: it was not computed.
        """
        if self.old is None:
            raise CRDError("the objective needs the velocity of `old`, got None; keep an old snapshot")
        return self.old


@dataclass(frozen=True)
class Rows:
    """Plain numbers of all N rows of complete groups; one row is one image at one draw.

    A draw is a pair (t, noise), or a step of the image's trajectory.
    """

    group_id: Tensor  # (N,) int64
    image_id: Tensor  # (N,) int64, one number an image within its group
    draw: Tensor  # (N,) int64, which of the image's draws
    advantage: Tensor  # (N,) in [0, 1]
    reward: Tensor  # (N,) raw
    kl_gate: Tensor  # (N,) in [0, 1]
    has_signal: Tensor  # (N,) bool, False in groups of zero reward variance

    def __post_init__(self) -> None:
        shape = self.group_id.shape
        if len(shape) != 1 or not len(self.group_id):
            raise ValueError(f"group_id must be (N,) with N >= 1, got {tuple(shape)}")
        others = {
            "image_id": self.image_id,
            "draw": self.draw,
            "advantage": self.advantage,
            "reward": self.reward,
            "kl_gate": self.kl_gate,
            "has_signal": self.has_signal,
        }
        for name, tensor in others.items():
            if tensor.shape != shape:
                raise ValueError(f"{name} must be (N,)={tuple(shape)}, got {tuple(tensor.shape)}")

    def __len__(self) -> int:
        return len(self.group_id)

    def beside(self, values: Tensor) -> Rows:
        """The same rows on the device of their `values` (N,).

        Raises:
            ValueError: there are more or fewer values than rows.
        """
        if values.shape != self.group_id.shape:
            raise ValueError(f"terms must be (N,)=({len(self)},) as rows, got {tuple(values.shape)}")
        return self.to(values.device)

    def to(self, device: torch.device) -> Rows:
        """The same rows on `device`."""
        return Rows(
            group_id=self.group_id.to(device),
            image_id=self.image_id.to(device),
            draw=self.draw.to(device),
            advantage=self.advantage.to(device),
            reward=self.reward.to(device),
            kl_gate=self.kl_gate.to(device),
            has_signal=self.has_signal.to(device),
        )


@dataclass(frozen=True)
class RowLayout:
    """Which rows are of one group and draw, and which are draws of one image."""

    group: Tensor  # (N,) int64, index of each row's group_id in ascending order
    draw: Tensor  # (N,) int64
    image: Tensor  # (N,) int64, index of each row's (group_id, image_id)
    draws: Tensor  # (N,) int64, number of draws of each row's image

    @staticmethod
    def of(rows: Rows) -> RowLayout:
        """Layout of complete groups, in any order of rows.

        Raises:
            ValueError: a row is repeated, or an image lacks a draw that its group has.
        """
        set_of_group, image = (
            _pair_index(rows.group_id, rows.draw),
            _pair_index(rows.group_id, rows.image_id),
        )
        if int(_pair_index(image, rows.draw).max()) + 1 != len(rows):
            raise ValueError("rows must hold each (group_id, image_id, draw) once, got a repeated one; drop it")
        # Log Z(c) cancels only in complete sets: every image of the group at every draw.
        group = torch.unique(rows.group_id, return_inverse=True)[1]
        images_of_group = torch.zeros_like(group)
        images_of_group[image] = group  # the group of each image; entries beyond the last image are cut off
        group_size = torch.bincount(images_of_group[: int(image.max()) + 1])[group]
        if not torch.equal(torch.bincount(set_of_group)[set_of_group], group_size):
            raise ValueError("rows must hold every image of a group at every draw; pass complete groups")
        return RowLayout(group, rows.draw, image, torch.bincount(image)[image])

    def centering_set(self, groups: int = 1) -> Tensor:
        """Index (N,) int64 of the rows centered together: one draw of `groups` groups that follow each other by id."""
        return _pair_index(self.group // groups, self.draw)

    def mean_of_other_draws(self, values: Tensor) -> Tensor:
        """Mean of `values` (N,) over the other draws of each row's image, (N,).

        Raises:
            CRDError: an image has a single draw.
        """
        fewest = int(self.draws.min())
        if fewest < 2:
            raise CRDError(
                f"leave_one_out needs 2 or more draws an image, got {fewest}; raise the number of draws "
                "or use residual=per_draw"
            )
        total = torch.zeros(int(self.image.max()) + 1, dtype=values.dtype, device=values.device)
        return (total.index_add(0, self.image, values)[self.image] - values) / (self.draws - 1)


def _pair_index(first: Tensor, second: Tensor) -> Tensor:
    """Index of each distinct pair, (N,)."""
    return torch.unique(torch.stack([first, second]), dim=1, return_inverse=True)[1]


class Objective(Protocol):
    """A training objective: which roles it needs, its terms of single rows, and its loss over all rows."""

    @property
    def needs(self) -> frozenset[str]:
        """What `terms` reads beside the policy's velocity: a subset of {"old", "anchor", TRAJECTORY}."""
        ...

    def terms(self, outputs: DenoiserOutputs) -> dict[str, Tensor]:
        """Differentiable numbers (N,) of each row; row i depends on row i of `outputs` only."""
        ...

    def loss(self, terms: dict[str, Tensor], rows: Rows) -> LossOutput:
        """Loss over all rows of complete groups; differentiable in `terms`."""
        ...
