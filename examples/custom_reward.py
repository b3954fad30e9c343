"""Train with a reward function of your own: paper notes shall turn warm, metal plates cold.

python examples/custom_reward.py --updates 10 --output runs/custom-reward
"""

from __future__ import annotations

import argparse

import numpy as np
from PIL import Image

from crd.config import CRDConfig
from crd.trainer import CRDTrainer

SURFACES = {"a paper note": "warm", "a gray metal plate": "cold"}


def tint_reward(images: list[Image.Image], prompts: list[str], tint: list[str]) -> list[float]:
    """Red minus blue, mapped to [0, 1], of each image; `tint` is a column of the dataset below."""
    rewards = []
    for image, wanted in zip(images, tint, strict=True):
        red, _, blue = np.asarray(image.convert("RGB"), dtype=float).mean(axis=(0, 1)) / 255
        warmth = 0.5 + 0.5 * (red - blue)
        rewards.append(warmth if wanted == "warm" else 1 - warmth)
    return rewards


def dataset(words: list[str]) -> list[dict[str, str]]:
    """One prompt for each surface and word; every key beside "prompt" reaches the reward by its name."""
    return [{"prompt": f'{s} that says "{word}"', "tint": tint} for word in words for s, tint in SURFACES.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--output", default="runs/custom-reward", help="a new or empty folder")
    parser.add_argument("--model", default="tiny-sd3", help="tiny-sd3, a diffusers folder or a hub id")
    arguments = parser.parse_args()

    config = CRDConfig(
        output_dir=arguments.output,
        updates=arguments.updates,
        prompts_per_update=4,
        group_size=8,
        draws=4,  # times each image is noised for training
        eval_steps=10,
        eval_every=0,  # before and after
        learning_rate=1e-3,
    )
    train, held_out = dataset(["SALE", "OPEN", "CAFE", "MENU"]), dataset(["EXIT", "TAXI", "BOOK", "SHOP"])
    trainer = CRDTrainer(arguments.model, tint_reward, config, train_dataset=train, eval_dataset=held_out)
    summary = trainer.train()
    folder = trainer.save_model(f"{arguments.output}/lora")
    print(f"held-out reward: {summary['reward_before']:.3f} before, {summary['reward_after']:.3f} after")
    print(f"load it in diffusers with pipe.load_lora_weights({str(folder)!r})")


if __name__ == "__main__":
    main()
