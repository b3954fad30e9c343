"""How many rows an update sends through the denoiser, counted from the settings as the trainer would run them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crd.backbones.base import CFG, Backbone
from crd.config import CRDConfig
from crd.role_stores import ANCHOR, OLD


@dataclass(frozen=True)
class Geometry:
    """Images and rows of one update, of the process that has most."""

    images: int  # of the update, on all processes
    own_images: int
    own_rows: tuple[int, ...]  # of each optimizer step: images x draws


@dataclass(frozen=True)
class Forwards:
    """Rows through the denoiser in one update of one process; a backward pass counts as two forward passes."""

    rollout: int
    old: int
    anchor: int
    policy: int
    backward: int
    recompute: int  # of gradient checkpointing

    @property
    def total(self) -> int:
        return self.rollout + self.old + self.anchor + self.policy + 2 * self.backward + self.recompute


def geometry(config: CRDConfig, gpus: int) -> Geometry:
    """The size of an update on `gpus` processes."""
    groups = [len(part) for part in torch.arange(config.prompts_per_update).tensor_split(config.optimizer_steps)]
    places = [-(-count * config.group_size // gpus) for count in groups]  # as `Share.deal` has it
    return Geometry(
        images=config.prompts_per_update * config.group_size,
        own_images=sum(places),
        own_rows=tuple(count * config.draws for count in places),
    )


def references(config: CRDConfig) -> frozenset[str]:
    """The roles whose velocities the objective reads, `old` and anchor among them."""
    return config.needs & {OLD, ANCHOR}


def rows_per_image(backbone: Backbone, scale: float) -> int:
    """Rows of the denoiser for one velocity at a guidance scale."""
    return 2 if backbone.guidance == CFG and scale != 1.0 else 1


def forwards(config: CRDConfig, backbone: Backbone, gpus: int, micro_batch: int) -> Forwards:
    """Rows of one update; see `Engine.backward` for when a step takes one pass or two."""
    size, needs = geometry(config, gpus), references(config)
    rows = sum(size.own_rows)
    passed = sum(count * (1 if gpus == 1 and count <= micro_batch else 2) for count in size.own_rows)
    referred = rows if config.cache_references else passed
    return Forwards(
        rollout=size.own_images * config.rollout_steps * rows_per_image(backbone, config.rollout_guidance),
        old=referred if OLD in needs else 0,
        anchor=referred * rows_per_image(backbone, config.anchor_guidance) if ANCHOR in needs else 0,
        policy=passed,
        backward=rows,
        recompute=rows if config.gradient_checkpointing else 0,
    )
