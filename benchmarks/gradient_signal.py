"""Where on the path the policy gradient's signal is: its share at each t of the rollout grid.

    python benchmarks/gradient_signal.py --batches 3 --prompts 12
    python benchmarks/gradient_signal.py --reward geneval-tiny --source scenes:train

At θ = old (the first update) the gradient of the CRD policy term is computed for several independent batches of
rollouts, one t at a time. `total` is its mean squared norm; `signal` is the mean inner product of the gradients of
different batches, an unbiased estimate of the squared norm of the expected gradient. Their ratio is the share of a
batch's gradient that other batches agree with. The KL term is measured in the same way.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from crd.advantages import group_advantages, kl_gate
from crd.config import CRDConfig
from crd.objectives.base import Objective, Rows
from crd.optimizer_batch import RowVelocities, build_rows
from crd.trainer import CRDTrainer


def gradients(trainer: CRDTrainer, number: int, times: list[float]) -> Iterator[dict[str, Tensor]]:
    """Gradient of both terms at each t, on the images of batch `number`."""
    rollout = trainer.rollout(trainer.plan(number))
    batch = rollout.batch
    rewards = trainer.rewards.score(rollout.images, batch.prompts, batch.columns)
    advantages = group_advantages(rewards.total, batch.group_id)
    gate = kl_gate("reward", rewards.total, advantages.advantage, trainer.args.kl_reward_range)
    rows = build_rows(rewards, advantages, gate, batch.group_id, torch.arange(len(batch)), 1)
    settings = trainer.args.objective_config()
    whole, without_kl = settings.build(), dataclasses.replace(settings, kl_max=0.0).build()
    for t in times:
        velocities = trainer.velocities(rollout, rows, torch.full((len(batch),), t), trainer.args.seed, number, str(t))
        policy = gradient(trainer, without_kl, velocities, rows)
        yield {"policy": policy, "kl": gradient(trainer, whole, velocities, rows) - policy}


def gradient(trainer: CRDTrainer, objective: Objective, velocities: RowVelocities, rows: Rows) -> Tensor:
    """Gradient of the loss by all trained weights, flat."""
    parameters = list(trainer.snapshots.parameters())
    for parameter in parameters:
        parameter.grad = None
    trainer.engine.backward(objective, velocities, rows, trainer.micro_batch.rows)
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def agreement(found: Sequence[Tensor]) -> tuple[float, float]:
    """Mean squared norm of independent vectors of one law, and an unbiased estimate of that of their expectation.

    The second is the mean inner product of two different ones; their difference is the trace of the covariance.
    """
    pairs = [float(a @ b) for a, b in itertools.combinations(found, 2)]
    return sum(float(a @ a) for a in found) / len(found), sum(pairs) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--group-size", type=int, default=12)
    parser.add_argument("--model", default="tiny-sd3")
    parser.add_argument("--reward", default="ocr")
    parser.add_argument("--source", default="world:train", help="of the prompts")
    args = parser.parse_args()
    config = CRDConfig(
        model=args.model,
        rewards=(args.reward,),
        prompts=args.source,
        prompts_per_update=args.prompts,
        group_size=args.group_size,
        draws=1,
        finetune="full",
        micro_batch=72,
        rollout_batch=48,
        mixed_precision="auto",
        eval_prompts=None,
    )
    trainer = CRDTrainer(args=config)
    times = [t for t in trainer.sigmas[:-1].tolist() if t > 0.01]
    batches = [list(gradients(trainer, number, times)) for number in range(args.batches)]
    print(f"{args.batches} batches of {args.prompts} x {args.group_size} images\n")
    print("| t | policy: total | signal | share | KL: total | signal | share |")
    print("|---|---|---|---|---|---|---|")
    for column, t in enumerate(times):
        cells = []
        for kind in ("policy", "kl"):
            total, signal = agreement([batch[column][kind] for batch in batches])
            cells.append(f"{total:.1e} | {signal:.1e} | {signal / total:.2f}")
        print(f"| {t:.2f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
