"""What `overlap_rewards` saves with a reward that another machine computes: time of an update, in turn and beside.

    python benchmarks/overlap_rewards.py [--seconds 0 0.5 1] [--updates 2]

The reward sleeps for so many seconds an image, as a process that waits for a server does, and takes no processor. Both
kinds of updates take turns within one process, so that other load of the machine meets both; the median of each is
shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from PIL import Image, ImageStat

from crd.config import CRDConfig
from crd.trainer import CRDTrainer

Reward = Callable[[list[Image.Image], list[str]], list[float]]


def sleeping(seconds: float) -> Reward:
    """Brightness, `seconds` late for each image."""

    def brightness(images: list[Image.Image], prompts: list[str]) -> list[float]:
        time.sleep(seconds * len(images))
        return [ImageStat.Stat(image.convert("L")).mean[0] / 255 for image in images]

    return brightness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.0, 0.5, 1.0], help="of sleep an image")
    parser.add_argument("--updates", type=int, default=2, help="timed, after one that is not")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=6)
    parser.add_argument("--rollout-batch", type=int, default=3)
    args = parser.parse_args()
    print(f"{args.prompts} x {args.group_size} images, rollout_batch {args.rollout_batch}\n")
    print("| sleep of an update, s | in turn, s | beside, s | ratio |")
    print("|---|---|---|---|")
    for seconds in args.seconds:
        trainers = [
            CRDTrainer(
                reward_funcs=sleeping(seconds),
                args=CRDConfig(
                    prompts_per_update=args.prompts, group_size=args.group_size, optimizer_steps=1, draws=2,
                    rollout_batch=args.rollout_batch, eval_prompts=None, overlap_rewards=overlap, threads=1,
                ),
            )
            for overlap in (False, True)
        ]  # fmt: skip
        taken: list[list[float]] = [[], []]
        for number in range(1 + args.updates):
            for trainer, times in zip(trainers, taken, strict=True):
                started = time.perf_counter()
                trainer.update()
                if number:
                    times.append(time.perf_counter() - started)
        turn, beside = (statistics.median(times) for times in taken)
        sleep = seconds * args.prompts * args.group_size
        print(f"| {sleep:.1f} | {turn:.1f} | {beside:.1f} | {turn / beside:.2f} |", flush=True)


if __name__ == "__main__":
    main()
