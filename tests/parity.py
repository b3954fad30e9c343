"""Our numbers against the stock pipeline's, family by family: what the parity tests assert and the table shows."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny_families import FAMILIES, tiny_family
from torch import Tensor

from crd.advantages import group_advantages
from crd.backbones import Backbone, guided_velocity, load_backbone
from crd.config import CRDConfig
from crd.export import export_lora
from crd.optimizer_batch import build_rows
from crd.records import Conditioning
from crd.sampling import sample
from crd.snapshots import LoraSettings, Snapshots
from crd.trainer import CRDTrainer
from crd.update_plan import Draws, draw_times

PROMPTS = ["a cat", 'the "dog" runs', "two birds"]
SEEDS = [11, 12, 13]
STEPS = 4


@dataclass
class Stock:
    """One call of the stock pipeline: its pictures, and what passed between denoiser and scheduler."""

    images: list[Image.Image] = field(default_factory=list)
    handed: list[Tensor] = field(default_factory=list)  # to the scheduler, each step
    points: list[Tensor] = field(default_factory=list)  # the sample that it stepped from
    last: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Case:
    """A family, its backbone on one random pipeline, and the same pipeline as stock diffusers runs it."""

    name: str
    backbone: Backbone
    pipeline: Any
    scheduler: Any  # that the pipeline came with

    @staticmethod
    def of(name: str) -> Case:
        family = FAMILIES[name]
        backbone = load_backbone(tiny_family(name), max_sequence_length=family.length)
        pipeline = tiny_family(name)
        return Case(name, backbone, pipeline, pipeline.scheduler)

    @property
    def size(self) -> tuple[int, int]:
        return FAMILIES[self.name].side, FAMILIES[self.name].side

    @property
    def plain(self) -> float:
        """Scale of a call that is not guided, or as it must be."""
        return self.backbone.stock_scale

    def stock(self, scale: float, solver: str = "euler") -> Stock:
        """`pipe(PROMPTS, ...)` from the noise of SEEDS."""
        found = Stock()
        self.pipeline.scheduler = watched(stock_scheduler(self.scheduler, solver), found)
        call = {**FAMILIES[self.name].options, **self.backbone.call_options(scale, len(PROMPTS))}
        if FAMILIES[self.name].length is not None:
            call["max_sequence_length"] = FAMILIES[self.name].length
        found.images = self.pipeline(
            prompt=list(PROMPTS),
            height=self.size[0],
            width=self.size[1],
            num_inference_steps=STEPS,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            **call,
        ).images
        return found

    def ours(self, scale: float, solver: str = "euler", denoiser: Any = None) -> Tensor:
        """Latents (3, C, H, W) from the same noise."""
        backbone = self.backbone
        return sample(
            backbone,
            backbone.denoiser if denoiser is None else denoiser,
            Conditioning(backbone.encode(PROMPTS, *self.size), torch.arange(len(PROMPTS))),
            SEEDS,
            num_steps=STEPS,
            guidance_scale=scale,
            uncond=backbone.unconditional(*self.size),
            height=self.size[0],
            width=self.size[1],
            solver=solver,
        )

    def latents(self, stock: Tensor) -> Tensor:
        """The stock pipeline's latents as (N, C, H, W)."""
        return self.backbone.unpack(stock, torch.empty(len(stock), *self.backbone.latent_shape(*self.size)))


def stock_scheduler(own: Any, solver: str) -> Any:
    """What a user of diffusers would set: `pipe.scheduler = Class.from_config(pipe.scheduler.config)`."""
    flow = isinstance(own, FlowMatchEulerDiscreteScheduler) or own.config.get("use_flow_sigmas", False)
    if solver == "euler":
        if not flow:
            return EulerDiscreteScheduler.from_config(own.config)
        extra = {} if isinstance(own, FlowMatchEulerDiscreteScheduler) else {"shift": own.config.flow_shift}
        return FlowMatchEulerDiscreteScheduler.from_config(own.config, **extra)
    if not flow:
        return DPMSolverMultistepScheduler.from_config(own.config)
    shift = own.config.shift if isinstance(own, FlowMatchEulerDiscreteScheduler) else own.config.flow_shift
    return DPMSolverMultistepScheduler.from_config(
        own.config, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    )


def watched(scheduler: Any, found: Stock) -> Any:
    """The scheduler, telling `found` of each step."""
    step = scheduler.step

    @functools.wraps(step)
    def telling(model_output: Tensor, timestep: Any, latents: Tensor, **options: Any) -> Any:
        found.handed.append(model_output.clone())
        found.points.append(latents.clone())
        result = step(model_output, timestep, latents, **options)
        found.last = result[0]
        return result

    scheduler.step = telling
    return scheduler


def rollout_difference(case: Case, solver: str, scale: float) -> tuple[float, int]:
    """`sample` against `pipe(...)`: final latents, relative to the largest one, and pictures in 1/255."""
    stock, latents = case.stock(scale, solver), case.ours(scale, solver)
    return relative(latents, case.latents(stock.last)), distance(case.backbone.decode(latents, chunk=2), stock.images)


@torch.no_grad()
def velocity_difference(case: Case, scale: float) -> float:
    """Our velocity against what the stock pipeline handed its scheduler, in its own unit, relative, at every step."""
    backbone, stock = case.backbone, case.stock(scale)
    cond, uncond = backbone.encode(PROMPTS, *case.size), backbone.unconditional(*case.size)
    grid = backbone.grid(STEPS, *case.size)
    found: list[float] = []
    for t, handed, point in zip(grid.times, stock.handed, stock.points, strict=True):
        # EulerDiscreteScheduler steps through x_vp / alpha = x_t / (1 - t).
        x_t = case.latents(point) if backbone.flow else point * (1 - t)
        times = t.expand(len(x_t))
        v = guided_velocity(backbone, backbone.denoiser, x_t, times, cond, uncond, scale)
        found.append(relative(in_stock_unit(case, v, x_t, t), case.latents(handed)))
    return torch.tensor(found).max().item()  # not `max`: that would lose a nan


def in_stock_unit(case: Case, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """A velocity as the model's own prediction: epsilon = x_t + (1 - t) v, v_vp = alpha epsilon - sigma x0."""
    if case.backbone.flow:
        return v
    epsilon, x0 = x_t + (1 - t) * v, x_t - t * v
    if case.scheduler.config.prediction_type == "epsilon":
        return epsilon
    norm = (t.square() + (1 - t).square()).sqrt()
    return ((1 - t) * epsilon - t * x0) / norm


def update_losses(name: str, folder: Path) -> tuple[float, float]:
    """Loss of a fixed batch before and after one CRD update on it."""
    side, length = FAMILIES[name].side, FAMILIES[name].length
    backbone = load_backbone(tiny_family(name), max_sequence_length=length)
    scale = backbone.stock_scale
    config = CRDConfig(
        prompts_per_update=2, group_size=3, rollout_steps=2, draws=2, lora_rank=2, learning_rate=1e-3, height=side,
        width=side, rollout_guidance=scale, anchor_guidance=scale if FAMILIES[name].scale is None else 3.0,
        output_dir=str(folder), optimizer_steps=1, eval_prompts=None, tensorboard=False, threads=1,
    )  # fmt: skip
    trainer = CRDTrainer(backbone, ["reward_functions:brightness"], config, train_dataset=PROMPTS)
    rollout = trainer.rollout(trainer.plan(0))
    rewards = trainer.rewards.score(rollout.images, rollout.batch.prompts, rollout.batch.columns)
    advantages = group_advantages(rewards.total, rollout.batch.group_id, clip=5.0)
    images = torch.arange(len(rollout.batch))
    draws = Draws(2, "rollout_grid", 0.99, True)
    rows = build_rows(rewards, advantages, torch.ones(len(images)), rollout.batch.group_id, images, 2)
    times = draw_times(draws, trainer.sigmas, rollout.batch.group_id, 0, "parity")
    velocities = trainer.velocities(rollout, rows, times, 0, "parity")
    before = trainer.engine.backward(trainer.objective, velocities, rows, 64)["loss"]
    trainer.engine.step(trainer.optimizer, trainer.snapshots.parameters(), 1.0)
    with torch.no_grad():
        terms = trainer.objective.terms(velocities(torch.arange(len(rows))))
        after = trainer.objective.loss(terms, rows).loss.item()
    return before, after


def lora_difference(case: Case, folder: Path) -> tuple[float, int]:
    """A random LoRA, exported and loaded by `pipe.load_lora_weights`: as `rollout_difference`. It stays loaded."""
    backbone, scale = case.backbone, case.plain
    without = case.stock(scale).last
    snapshots = Snapshots(backbone.denoiser, "lora", LoraSettings(backbone.lora_targets, rank=2, alpha=4.0), roles=())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in snapshots.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    export_lora(backbone, snapshots, folder)
    case.pipeline.load_lora_weights(str(folder))
    stock = case.stock(scale)
    assert largest(stock.last - without) > 1e-2  # the LoRA does something
    with snapshots.use("policy") as policy:
        latents = case.ours(scale, denoiser=policy)
    return relative(latents, case.latents(stock.last)), distance(backbone.decode(latents), stock.images)


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, over the largest number where that is above 1."""
    return largest(found - expected) / max(1.0, largest(expected))


def distance(first: list[Image.Image], second: list[Image.Image]) -> int:
    """Largest difference of a channel, in 1/255."""
    pairs = zip(first, second, strict=True)
    return max(int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max()) for a, b in pairs)


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()
