"""The typed records that pass between the rooms: prompts -> rollout -> rewards -> optimizer batch.

Shapes: P prompts, B images (P groups of possibly different sizes), C x H x W latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from crd.trajectories import Trajectories

# The dataset column that names the rewards which judge a prompt; no reward takes it as its own.
ASKED = "rewards"


@dataclass(frozen=True)
class Conditioning:
    """Text conditioning of B images, stored once per distinct prompt.

    `tensors` maps the names the backbone gave them to tensors (P, ...); `row` (B,) int64 names the prompt
    of each image. Group size times embedding size would not fit in memory for large text encoders.
    """

    tensors: Mapping[str, Tensor]
    row: Tensor  # (B,) int64

    def select(self, index: Tensor) -> Conditioning:
        """Conditioning of the images `index` (N,) int64; still one copy per prompt."""
        return Conditioning(self.tensors, self.row[index])

    def gather(self) -> dict[str, Tensor]:
        """One row per image: name -> (B, ...)."""
        return {name: tensor[self.row.to(tensor.device)] for name, tensor in self.tensors.items()}

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class PromptBatch:
    """B images to draw: one entry per image; images of one prompt share a `group_id`."""

    prompts: list[str]  # length B
    group_id: Tensor  # (B,) int64
    columns: Mapping[str, list[Any]]  # dataset columns, each of length B
    image_seed: list[int]  # length B; names the initial noise of each image
    image_id: Tensor  # (B,) int64, the number of each image in the whole batch of all processes

    def select(self, index: Tensor) -> PromptBatch:
        """The images `index` (N,) int64 alone."""
        rows = index.tolist()
        return PromptBatch(
            prompts=[self.prompts[row] for row in rows],
            group_id=self.group_id[index],
            columns={name: [values[row] for row in rows] for name, values in self.columns.items()},
            image_seed=[self.image_seed[row] for row in rows],
            image_id=self.image_id[index],
        )

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Rollout:
    """Finished images of one PromptBatch: all that most objectives need of a sampler."""

    x0: Tensor  # (B, C, H, W) float32, clean latents
    conditioning: Conditioning  # of B images
    images: list[Image.Image]  # length B, RGB
    batch: PromptBatch
    trajectories: Trajectories | None = None  # how the stochastic sampler came there


@dataclass(frozen=True)
class RewardOutput:
    """Scores of B images; `columns` holds each reward before weighting, NaN where it does not apply."""

    total: Tensor  # (B,) float64, weighted sum over the applicable rewards
    columns: Mapping[str, Tensor]  # name -> (B,) float64

    def metrics(self) -> dict[str, float]:
        """Mean total and, by name, the mean of each reward where it applies."""
        columns = {
            f"reward_{name}": float(values.nanmean())
            for name, values in self.columns.items()
            if not values.isnan().all()
        }
        return {"reward": float(self.total.mean()), **columns}


@dataclass(frozen=True)
class LossOutput:
    """A differentiable scalar and plain numbers to log."""

    loss: Tensor  # ()
    metrics: dict[str, float]
