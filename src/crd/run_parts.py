"""What a run is made of, loaded and checked before any training: rewards, prompts, model, roles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from crd.advantages import RANGE_SLACK
from crd.backbones import Backbone
from crd.config import CRDConfig
from crd.console import console
from crd.data import PromptDataset, Prompts, count_shared
from crd.errors import CRDError
from crd.execution import compile_blocks, prepare_backbone
from crd.flow import draw_timesteps, kept_grid
from crd.loading import build_snapshots, judged_prompts, training_backbone
from crd.metrics.held_out import HeldOutScores
from crd.objectives.base import TRAJECTORY
from crd.ranks import Ranks
from crd.rewards import RewardFunction, RewardSet
from crd.seeds import generator
from crd.snapshots import OLD, SAMPLER, Snapshots

Model: TypeAlias = str | Path | DiffusionPipeline | Backbone
RewardArgument: TypeAlias = str | RewardFunction
Rewards: TypeAlias = RewardArgument | Sequence[RewardArgument]


@dataclass(frozen=True)
class Judged:
    """Prompts, and what judges their images, each fit for the others."""

    rewards: RewardSet
    train_data: PromptDataset
    eval_data: PromptDataset | None
    held_out: HeldOutScores

    def check_scorers(self, ranks: Ranks) -> None:
        """Refuse broken scorers, and say what a person should know of the others and of the prompts."""
        with ranks.together():
            self.rewards.self_test()
            self.held_out.self_test()
        for line in self.held_out.warn_of(self.rewards):
            console.print(f"warn: {line}", style="yellow")
        if self.eval_data is not None and (shared := count_shared(self.train_data, self.eval_data)):
            console.print(f"{shared} of {len(self.eval_data)} evaluation prompts are also training prompts")


@dataclass(frozen=True)
class RunParts(Judged):
    """The parts of a run, each fit for the others."""

    backbone: Backbone
    snapshots: Snapshots
    sigmas: Tensor  # of the rollout


def load_parts(
    config: CRDConfig,
    device: torch.device,
    model: Model | None,
    reward_funcs: Rewards | None,
    train_dataset: Prompts | None,
    eval_dataset: Prompts | None,
    processes: int = 1,
) -> RunParts:
    """Load and check; an argument that is not None takes the place of its setting.

    Raises:
        CRDError: anything the user can mend.
    """
    judged = load_judged(config, reward_funcs, train_dataset, eval_dataset, processes)
    for scorers in (judged.rewards, judged.held_out):
        scorers.use_device(str(device))
    backbone = training_backbone(config.model if model is None else model, config, device)
    prepare_backbone(backbone, config)
    snapshots = build_snapshots(backbone, config, trained_roles(config))
    if config.compile == "regional":
        compile_blocks(backbone, snapshots)
    sigmas = _sigmas(backbone, config)
    if judged.eval_data is not None:
        # Kept by the backbone: recorded later, it would bring parked text encoders back.
        backbone.grid(config.eval_steps, config.height, config.width, config.solver)
    return RunParts(**judged.__dict__, backbone=backbone, snapshots=snapshots, sigmas=sigmas)


def load_judged(
    config: CRDConfig,
    reward_funcs: Rewards | None = None,
    train_dataset: Prompts | None = None,
    eval_dataset: Prompts | None = None,
    processes: int = 1,
) -> Judged:
    """The part of `load_parts` that needs no model.

    Raises:
        CRDError: anything the user can mend.
    """
    funcs = config.rewards if reward_funcs is None else reward_funcs
    patience = config.peer_timeout if processes > 1 else math.inf
    rewards = RewardSet(funcs, config.reward_weights, patience=patience)
    train_data = judged_prompts("prompts", config.prompts if train_dataset is None else train_dataset, rewards)
    _warn_of_total(config, rewards, train_data)
    judged = config.eval_prompts if eval_dataset is None else eval_dataset
    eval_data = None if judged is None else judged_prompts("eval_prompts", judged, rewards)
    if config.eval_base_guidance and eval_data is None:
        raise CRDError("eval_base_guidance needs evaluation prompts, got none; set eval_prompts, or leave it out")
    if config.alarm in ("stop", "raise_kl") and eval_data is None:
        raise CRDError(f"alarm={config.alarm} needs evaluation prompts, got none; set eval_prompts, or use warn")
    return Judged(rewards, train_data, eval_data, HeldOutScores(config.held_out, eval_data, patience))


def _warn_of_total(config: CRDConfig, rewards: RewardSet, data: PromptDataset) -> None:
    """Say if totals may leave `kl_reward_range`, which would end a run late, and for good."""
    found = (
        rewards.total_range(data.prompts, data.columns) if config.kl_max > 0 and config.kl_gate == "reward" else None
    )
    low, high = config.kl_reward_range
    slack = RANGE_SLACK * (high - low)
    if found is not None and not (low - slack <= found[0] and found[1] <= high + slack):
        told = f"{found[0]:.6g} to {found[1]:.6g}, kl_reward_range is {low:g} to {high:g}"
        console.print(f"warn: the weighted sum of the rewards may lie outside of kl_reward_range ({told}): the first "
                      "image of which it does ends the run, and a resumed run cannot change it", style="yellow",
                      markup=False, highlight=False, soft_wrap=True)  # fmt: skip


def sampling_role(config: CRDConfig) -> str:
    """The role that draws the rollouts."""
    return SAMPLER if config.decouple_sampler else OLD


def trained_roles(config: CRDConfig) -> tuple[str, ...]:
    """The roles of a run beside the policy and the anchor."""
    needed = config.needs | {sampling_role(config)}
    return tuple(role for role in (OLD, SAMPLER) if role in needed)


def check_settings(backbone: Backbone, config: CRDConfig) -> None:
    """Refuse settings that only the model can judge.

    Raises:
        CRDError: a size, a solver, a guidance, an objective or a weighting that the model does not take.
    """
    backbone.latent_shape(config.height, config.width)
    backbone.check_solver(config.solver)
    for scale in (config.rollout_guidance, config.anchor_guidance, *config.eval_base_guidance):
        backbone.check_scale(scale)
    if config.objective_config().flow_only and not backbone.flow:
        raise CRDError(f"objective={config.objective} is for flow matching, got a DDPM model; use crd")
    trained_scale = backbone.trained_scale(config.rollout_guidance)
    if TRAJECTORY in config.needs and config.rollout_guidance != trained_scale:
        raise CRDError(f"objective={config.objective} trains on the policy's own trajectories, got rollout_guidance="
                       f"{config.rollout_guidance:g}; set rollout_guidance={trained_scale:g}")  # fmt: skip
    if config.weighting == "likelihood" and not backbone.flow:
        raise CRDError("weighting=likelihood is for flow matching, got a DDPM model; use adaptive or unit")


def check_times(config: CRDConfig, sigmas: Tensor, exact: bool) -> None:
    """Refuse settings of times that a grid does not have.

    Args:
        config: of the run.
        sigmas: (S + 1,) noise levels of its rollouts.
        exact: they are; if not, only their number and their ends are, and `timestep_fraction` may keep all S.

    Raises:
        CRDError: no step of it is noisy enough, or too few for an objective that trains on each once.
    """
    once, fraction = generator(config.seed), config.timestep_fraction
    draw_timesteps(config.timesteps, sigmas, units=1, draws=1, fraction=fraction, generator=once)
    kept = len(kept_grid(sigmas, fraction)) if exact else len(sigmas) - 1
    if TRAJECTORY in config.needs and config.draws > kept:
        raise CRDError(f"objective={config.objective} trains on a step once, got draws={config.draws} of {kept} steps "
                       f"with timestep_fraction={fraction:g}; set draws={kept} or less")  # fmt: skip


def _sigmas(backbone: Backbone, config: CRDConfig) -> Tensor:
    """The grid of rollouts; what does not fit the model is refused here, before a run folder exists."""
    check_settings(backbone, config)
    sigmas = backbone.grid(config.rollout_steps, config.height, config.width, config.solver).sigmas
    check_times(config, sigmas, exact=True)
    return sigmas
