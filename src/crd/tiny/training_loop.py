"""The loop that trains one of the bundled world's judges: steps, averaged weights, log and saved states."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from crd.memory import keep_freed_memory
from crd.tiny.pretrain_state import State, log


def training_options(program: str, about: str, *, out: Path, vae: Path) -> argparse.ArgumentParser:
    """A parser of what every such training takes; `--images`, `--batch` and `--save-every` need a default."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=about)
    parser.add_argument("--work", type=Path, required=True, help="folder of the state and the log")
    parser.add_argument("--out", type=Path, default=out, help="folder of the weights")
    parser.add_argument("--images", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--vae", type=Path, default=vae, help="folder of the VAE that some of the pictures pass")
    parser.add_argument("--save-every", type=int, help="images between two saved states")
    parser.add_argument("--stop-at", type=int, help="interrupt after that many images")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def run_training(
    args: argparse.Namespace,
    state: State,
    step: Callable[[int], Mapping[str, float]],
    *,
    warm: int,
    cool: float,
    after: Callable[[int], None] = lambda _images: None,
) -> bool:
    """Train from the last saved state on; whether `--images` was reached, and the modules hold the averaged weights.

    Args:
        args: of `training_options`.
        state: of the modules.
        step: adds the gradient of the batch after that many images, and gives numbers to log, which are averaged.
        warm: batches over which the learning rate rises.
        cool: last share of the images, over which it falls to 0.
        after: is called after each step with the number of images.
    """
    args.work.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    state.load()
    started, images = time.time() - state.counters["seconds"], int(state.counters["images"])
    means: dict[str, float] = {}
    while images < (args.stop_at or args.images):
        numbers = step(images)
        risen, left = min(1.0, images / (warm * args.batch)), min(1.0, (args.images - images) / (cool * args.images))
        state.step(args.lr * max(risen, 0.01) * left)
        images += args.batch
        state.update_average(min(args.ema, 1 - 10 / (images / args.batch + 10)))
        means = {name: 0.98 * means.get(name, number) + 0.02 * number for name, number in numbers.items()}
        state.counters |= {"images": images, "seconds": time.time() - started}
        if images % (args.batch * 100) < args.batch:
            log(args.work, {**means, **state.counters})
        after(images)
        if images % args.save_every < args.batch or images >= args.images:
            state.save()
    if images < args.images:
        state.save()
        return False
    state.swap_average()
    return True
