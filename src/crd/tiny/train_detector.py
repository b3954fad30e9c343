"""Train one of the bundled world's detectors from scratch, on pictures drawn as they are needed.

    python -m crd.tiny.train_detector --architecture conv --work detector-conv --seed 0 --disturbance smooth
    python -m crd.tiny.train_detector --architecture transformer --work detector-transformer --seed 1 \\
        --disturbance rough

Resumable: the same command goes on from the last saved state. At the end the averaged weights are written to `--out`;
`python -m crd.tiny.detector_card` measures them.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from crd.tiny.detector import FOLDER, save_detector, to_boxes
from crd.tiny.detector_data import DISTURBANCES, IGNORED, Targets, disturb, draw_pictures, targets
from crd.tiny.detector_networks import ARCHITECTURES, PARTS, build_network
from crd.tiny.pretrain_state import State
from crd.tiny.training_loop import run_training, training_options

VAE = FOLDER.parent / "model" / "vae"
# A picture has two or three centers among 3072 class cells.
CENTER_WEIGHT = 8.0


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = training_options("crd.tiny.train_detector", __doc__.splitlines()[0], out=FOLDER, vae=VAE)
    parser.set_defaults(images=150_000, batch=64, save_every=20_000)
    parser.add_argument("--architecture", choices=tuple(ARCHITECTURES), default="conv")
    parser.add_argument("--disturbance", choices=tuple(DISTURBANCES), default="smooth")
    return parser.parse_args(argv)


def detector_loss(predictions: Tensor, wanted: Targets) -> dict[str, Tensor]:
    """Class cross-entropy an object, box distance in px and color cross-entropy a cell that knows them."""
    class_logits, raw, color_logits = predictions.float().split(PARTS, dim=1)
    known = wanted.classes != IGNORED
    centers = wanted.classes == 1
    entropy = F.binary_cross_entropy_with_logits(class_logits, wanted.classes.clamp(min=0), reduction="none")
    objects = centers.sum().clamp(min=1)
    near = wanted.near.flatten(1)
    boxes = to_boxes(raw)[near] - wanted.boxes.flatten(2).transpose(1, 2)[near]
    colors = color_logits.flatten(2).transpose(1, 2)[near]
    return {
        "class": (entropy * known * (1 + (CENTER_WEIGHT - 1) * centers)).sum() / objects,
        "box": F.smooth_l1_loss(boxes, torch.zeros_like(boxes), reduction="sum") / near.sum().clamp(min=1) / 4,
        "color": F.cross_entropy(colors, wanted.colors.flatten(1)[near], reduction="sum") / near.sum().clamp(min=1),
    }


def train(args: argparse.Namespace) -> None:
    """Train until `--images`, and write the detector; an interrupted training writes none."""
    network = build_network(args.architecture, args.seed)
    vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32).eval().requires_grad_(False)
    state, how = State(args.work, {"detector": network}, args.lr), DISTURBANCES[args.disturbance]
    network.train()

    def step(images: int) -> dict[str, float]:
        rng = np.random.default_rng((args.seed, 7, images))
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + images)
        pictures, objects = draw_pictures(rng, args.batch)
        # Plain attention is 1.5 times as fast here as the fused kernel.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            pictures, objects = disturb(pictures, objects, how, vae, generator)
            predictions = network(pictures)
        losses = detector_loss(predictions, targets(objects, args.batch))
        torch.stack(list(losses.values())).sum().backward()
        return {name: loss.item() for name, loss in losses.items()}

    if run_training(args, state, step, warm=200, cool=0.6):
        save_detector(network, args.architecture, args.out)


def main(argv: list[str] | None = None) -> None:
    train(parse_arguments(argv))


if __name__ == "__main__":
    main()
