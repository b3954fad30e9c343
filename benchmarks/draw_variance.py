"""What the draws of (t, noise) cost: spread of the implicit reward and of the policy gradient over redraws.

    python benchmarks/draw_variance.py --updates 4 --redraws 8
    python benchmarks/draw_variance.py --run runs/demo --draws 4

A policy that differs from `old`, by some updates of a configuration or by the last checkpoint of a run, has images
drawn for one more update. They stay, and their (t, noise) are drawn anew, in each of three ways: t of each image by
itself, one t for a group, one t and one noise for a group. All ways have equally many draws, as training takes them.

Implicit reward, centered within its group and averaged over the draws of the image: `signal` is the deviation over
images of its expectation, `noise` the deviation over redraws, root mean squares over images. Gradient of the policy
term of all images in one step: `total` is the mean squared norm, `signal` the squared norm of the expectation,
`share` their ratio, `variance` their difference. Signals are estimated without bias, by pairs of different redraws.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from gradient_signal import agreement, gradient
from torch import Tensor

from crd.centering import center
from crd.checkpoint import CheckpointFolder
from crd.config import CRDConfig
from crd.config_io import load_config
from crd.errors import CRDError
from crd.loading import checkpoint_number, run_config
from crd.objectives.base import DenoiserOutputs, Rows
from crd.objectives.crd import CRD, CRDObjectiveConfig
from crd.optimizer_batch import build_rows, learning_signal
from crd.records import LossOutput, Rollout
from crd.trainer import CRDTrainer
from crd.training_state import restore
from crd.update_plan import Draws, draw_times

WAYS = {"t per image": (False, False), "t shared": (True, False), "t and noise shared": (True, True)}


@dataclass
class Watched:
    """The objective, which keeps the implicit rewards (N,) that its loss was given."""

    objective: CRD
    seen: list[Tensor] = field(default_factory=list)

    @property
    def needs(self) -> frozenset[str]:
        return self.objective.needs

    def terms(self, outputs: DenoiserOutputs) -> dict[str, Tensor]:
        return self.objective.terms(outputs)

    def loss(self, terms: dict[str, Tensor], rows: Rows) -> LossOutput:
        self.seen.append(terms["implicit_reward"].detach().cpu())
        return self.objective.loss(terms, rows)


@dataclass(frozen=True)
class Redraw:
    """What one redraw gives."""

    implicit_reward: Tensor  # (B,) centered, mean over the draws of an image
    gradient: Tensor  # flat


@dataclass(frozen=True)
class FixedImages:
    """Images of one update, judged, that are noised again and again."""

    trainer: CRDTrainer
    rollout: Rollout
    rows: Rows
    objective: CRD

    @staticmethod
    def of(trainer: CRDTrainer) -> FixedImages:
        """Those of the trainer's next update."""
        config, plan = trainer.args, trainer.plan(trainer.progress.updates_done)
        settings = config.objective_config()
        if not isinstance(settings, CRDObjectiveConfig):
            raise CRDError(f"the implicit reward is that of objective crd, got {config.objective}; choose another run")
        rollout = trainer.rollout(plan)
        rewards, group_id = trainer.score(plan, rollout), plan.batch.group_id
        advantages, gate = learning_signal(config, rewards, trainer.rewards.weights, group_id, plan.number)
        rows = build_rows(rewards, advantages, gate, group_id, torch.arange(len(group_id)), config.draws)
        return FixedImages(trainer, rollout, rows, replace(settings, kl_max=0.0).build())

    def redraw(self, number: int, share_timesteps: bool, share_noise: bool) -> Redraw:
        """Noise all images anew; redraws of one number share their seeds, as far as they draw alike."""
        config, batch, name = self.trainer.args, self.rollout.batch, ("redraw", number)
        draws = Draws(config.draws, config.timesteps, config.timestep_fraction, share_timesteps)
        times = draw_times(draws, self.trainer.sigmas, batch.group_id, config.seed, *name)
        velocities = self.trainer.velocities(self.rollout, self.rows, times, config.seed, *name)
        watched = Watched(self.objective)
        velocities = replace(velocities, needs=watched.needs, share_noise=share_noise)  # no anchor
        found = gradient(self.trainer, watched, velocities, self.rows)
        (implicit,) = watched.seen
        # Rows are draw-major, and centering is linear: that of the mean is the mean of the centered draws.
        return Redraw(center(implicit.view(config.draws, -1).mean(0), batch.group_id), found)


def table_row(way: str, redraws: Sequence[Redraw]) -> str:
    """A line of the table."""
    images = len(redraws[0].implicit_reward)
    total, signal = agreement([redraw.implicit_reward for redraw in redraws])
    # An estimate of a square may be below 0, where there is next to no signal.
    deviation = f"{math.sqrt(signal / images):.2e}" if signal >= 0 else "-"
    noise = math.sqrt((total - signal) / images)
    whole, agreed = agreement([redraw.gradient for redraw in redraws])
    gradients = f"{whole:.2e} | {agreed:.2e} | {agreed / whole:.3f} | {whole - agreed:.2e}"
    return f"| {way} | {deviation} | {noise:.2e} | {gradients} |"


def settings(args: argparse.Namespace) -> CRDConfig:
    """Of the run or the configuration, without evaluations, and with what is given in place of its own."""
    config = load_config(args.config) if args.run is None else run_config(args.run)
    if config is None:
        raise CRDError(f"no run in {args.run}; give the folder of one")
    given = {"draws": args.draws, "prompts_per_update": args.prompts, "group_size": args.group_size}
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(config, eval_prompts=None, eval_base_guidance=(), held_out=(), alarm="off", **changes)


def moved_trainer(args: argparse.Namespace) -> CRDTrainer:
    """A trainer whose policy has left `old`."""
    config = settings(args)
    trainer = CRDTrainer(args=config)
    if args.run is None:
        for _ in range(4 if args.updates is None else args.updates):
            trainer.update()
    else:
        checkpoints = CheckpointFolder.of_run(Path(args.run))
        checkpoint = checkpoints.load(checkpoint_number(checkpoints, "last"))
        trainer.progress = restore(checkpoint, trainer.snapshots, trainer.optimizer, trainer.train_data)
    return trainer


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--config", default="ocr-demo", help="a recipe or file, trained for --updates")
    start.add_argument("--run", help="its last checkpoint, instead")
    parser.add_argument("--updates", type=int, help="of --config, before the measurement; default: 4")
    parser.add_argument("--redraws", type=int, default=8)
    parser.add_argument("--draws", type=int, default=2, help="of an image in each redraw")
    parser.add_argument("--prompts", type=int, help="of an update; default: as configured")
    parser.add_argument("--group-size", type=int, help="default: as configured")
    args = parser.parse_args(given)
    if args.redraws < 2:
        parser.error(f"--redraws must be 2 or more, got {args.redraws}")
    if args.run is not None and args.updates is not None:
        parser.error("--updates trains --config, a run has its own; leave it out")
    images = FixedImages.of(moved_trainer(args))
    config, done = images.trainer.args, images.trainer.progress.updates_done
    print(f"{config.prompts_per_update} x {config.group_size} images after {done} updates, {args.redraws} redraws of "
          f"{config.draws} draws, {config.timesteps} of the noisiest {config.timestep_fraction:g}\n")  # fmt: skip
    print("| draws | R: signal | noise | gradient: total | signal | share | variance |")
    print("|---|---|---|---|---|---|---|")
    for way, shared in WAYS.items():
        print(table_row(way, [images.redraw(number, *shared) for number in range(args.redraws)]), flush=True)


if __name__ == "__main__":
    main()
