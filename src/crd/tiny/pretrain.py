"""Train the bundled `tiny-sd3` from scratch: first the VAE, then the transformer and its text encoders.

    python -m crd.tiny.pretrain --work pretrain --vae-images 120000 --images 600000

Resumable: the same command goes on from the last saved state in `--work`, and a larger `--images` trains further.
Method: rectified flow with logit-normal timesteps (Esser et al. 2024, "Scaling Rectified Flow Transformers", section
3.1), an exponential moving average of the weights, captions dropped for classifier-free guidance, and a curriculum
that climbs one `render.LEVELS` step whenever the held-out OCR reward without guidance passes `--climb-at`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from crd.flow import interpolate, velocity_target
from crd.memory import keep_freed_memory
from crd.tiny.architecture import build_pipeline, encode_captions
from crd.tiny.evaluation import evaluate_scales, scales_grid
from crd.tiny.pretrain_state import State, log
from crd.tiny.render import LEVELS, Level, random_scene, render
from crd.tiny.scene_prompts import pretraining_prompt
from crd.tiny.scenes import render_scene, scene_for

CAPTION_DROPOUT = 0.12
# Share of the cooldown's captions that belong to another picture of the batch, as in data from the web. Without
# guidance the model then writes a wrong word now and then; guidance, and reinforcement learning, can take that away.
CAPTION_NOISE = 0.1
VAE_CROP = 32
# Of the batches of the cooldown: T5 tokens are most of the compute of a step that has them.
T5_PRESENT = 0.25
T5_LENGTHS = (32, 256)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m crd.tiny.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("pretrain"), help="folder of states, log and the pipeline")
    parser.add_argument("--images", type=int, default=600_000, help="training images of the transformer, in all")
    parser.add_argument("--vae-images", type=int, default=120_000, help="training images of the VAE, in all")
    parser.add_argument("--cooldown", type=int, default=100_000, help="last images, over which the lr falls to 0")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--climb-at", type=float, default=0.3, help="held-out reward at which the curriculum climbs")
    parser.add_argument("--top-level", type=int, default=len(LEVELS) - 1)
    parser.add_argument("--start-level", type=int, default=0, help="enter the curriculum at this level or above")
    parser.add_argument(
        "--scenes", type=float, default=0.5, help="share of pictures of objects; the others show a word"
    )
    parser.add_argument("--eval-every", type=int, default=40_000, help="images between two evaluations")
    parser.add_argument("--save-every", type=int, default=20_000, help="images between two saved states")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast (fast with AMX or a GPU)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def draw_batch(rng: np.random.Generator, size: int, level: Level, scenes: float) -> tuple[Tensor, list[str]]:
    """Images (B, 3, 64, 64) in [-1, 1] and their captions; a share `scenes` shows objects, the others a word."""
    pixels, captions = [], []
    for _ in range(size):
        if rng.random() < scenes:
            wanted = pretraining_prompt(rng, level.tasks)
            pixels.append(render_scene(scene_for(wanted, rng, level.roam)))
            captions.append(wanted.prompt)
        else:
            word = random_scene(rng, level)
            pixels.append(render(word))
            captions.append(word.caption())
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
    return images, captions


def autocast(args: argparse.Namespace) -> AbstractContextManager[None]:
    return torch.autocast(args.device, torch.bfloat16, enabled=args.bf16)


def learning_rate(args: argparse.Namespace, images: int, total: int) -> float:
    warm = min(1.0, (images + args.batch) / (200 * args.batch))
    cool = min(1.0, max(0.0, (total - images) / max(1, args.cooldown)))
    return args.lr * warm * cool


def train_vae(args: argparse.Namespace, pipe: Any) -> None:
    """L1 plus edge reconstruction and a light KL; ends by measuring the latent scale and shift."""
    vae = pipe.vae.to(memory_format=torch.channels_last)
    state = State(args.work / "vae", {"vae": vae}, args.lr)
    state.load()
    started, images = time.time() - state.counters["seconds"], int(state.counters["images"])
    while images < args.vae_images:
        rng = np.random.default_rng((args.seed, 1, images))
        pixels, _ = draw_batch(rng, args.batch, LEVELS[-1], args.scenes)
        if images < 0.85 * args.vae_images:  # crops cost a quarter; the last part sees whole pictures
            top, left = rng.integers(0, pixels.shape[-1] - VAE_CROP, 2)
            pixels = pixels[:, :, top : top + VAE_CROP, left : left + VAE_CROP]
        pixels = pixels.to(args.device, memory_format=torch.channels_last)
        torch.manual_seed(args.seed * 1_000_003 + images)
        with autocast(args):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        difference = decoded.float() - pixels
        edges = sum(difference.diff(dim=axis).abs().mean() for axis in (2, 3))
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = difference.abs().mean() + 0.5 * edges + 2e-3 * kl
        loss.backward()
        state.step(args.lr * min(1.0, (args.vae_images - images) / (0.3 * args.vae_images) + 1e-3))
        images += args.batch
        if images % (args.batch * 100) < args.batch:
            seconds = time.time() - started
            log(args.work, {"stage": "vae", "images": images, "l1": difference.abs().mean().item(), "kl": kl.item(),
                       "seconds": seconds})  # fmt: skip
        if images % args.save_every < args.batch or images >= args.vae_images:
            state.counters |= {"images": images, "seconds": time.time() - started}
            state.save()
    with torch.no_grad():
        pixels, _ = draw_batch(np.random.default_rng((args.seed, 2)), 512, LEVELS[-1], args.scenes)
        latents = torch.cat([vae.encode(p.to(args.device)).latent_dist.mean.float() for p in pixels.split(64)])
    vae.register_to_config(
        scaling_factor=round(1.0 / latents.std().item(), 5), shift_factor=round(latents.mean().item(), 5)
    )
    vae.eval().requires_grad_(False)


def train_flow(args: argparse.Namespace, pipe: Any) -> None:
    """Flow matching of transformer and text encoders on the frozen VAE's latents."""
    modules: dict[str, nn.Module] = {
        "transformer": pipe.transformer,
        "text_encoder": pipe.text_encoder,
        "text_encoder_2": pipe.text_encoder_2,
        "text_encoder_3": pipe.text_encoder_3,
    }
    state = State(args.work / "flow", modules, args.lr)
    state.load()
    state.counters["level"] = max(int(state.counters["level"]), args.start_level)
    fast = torch.compile(pipe.transformer) if args.compile else pipe.transformer
    started, images = time.time() - state.counters["seconds"], int(state.counters["images"])
    running = 0.0
    for module in modules.values():
        module.train()
    while images < args.images:
        rng = np.random.default_rng((args.seed, 3, images))
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + images)
        pixels, captions = draw_batch(rng, args.batch, LEVELS[int(state.counters["level"])], args.scenes)
        cooling = images >= args.images - args.cooldown
        if cooling:
            wrong = rng.random(args.batch) < CAPTION_NOISE
            captions = [captions[i - 1] if wrong[i] else captions[i] for i in range(args.batch)]
        captions = ["" if rng.random() < CAPTION_DROPOUT else c for c in captions]
        with_t5 = cooling and rng.random() < T5_PRESENT
        t5_length = int(rng.choice(T5_LENGTHS)) if with_t5 else 0
        with torch.no_grad(), autocast(args):
            latents = pipe.vae.encode(pixels.to(args.device, memory_format=torch.channels_last)).latent_dist.mean
        x0 = (latents.float() - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        t = torch.sigmoid(torch.randn(len(x0), generator=generator)).to(x0)
        with (
            autocast(args),
            sdpa_kernel(SDPBackend.MATH if args.device == "cpu" else SDPBackend.FLASH_ATTENTION),
        ):
            joint, pooled = encode_captions(pipe, captions, t5_length)
            velocity = (pipe.transformer if t5_length else fast)(
                hidden_states=interpolate(x0, noise, t),
                encoder_hidden_states=joint,
                pooled_projections=pooled,
                timestep=t * 1000,
                return_dict=False,
            )[0]
        loss = F.mse_loss(velocity.float(), velocity_target(x0, noise))
        loss.backward()
        state.step(learning_rate(args, images, args.images))
        images += args.batch
        state.update_average(min(args.ema, 1 - 10 / (images / args.batch + 10)))
        running = loss.item() if math.isclose(running, 0.0) else 0.98 * running + 0.02 * loss.item()
        state.counters |= {"images": images, "seconds": time.time() - started}
        if images % (args.batch * 50) < args.batch:
            log(
                args.work,
                {
                    "stage": "flow",
                    "loss": running,
                    "lr": learning_rate(args, images, args.images),
                    **state.counters,
                },
            )
        if images % args.eval_every < args.batch or images >= args.images:
            state.swap_average()
            save_pipeline(pipe, args.work / "pipeline")
            state.swap_average()
            parts = {
                reward: evaluate_scales(args.work / "pipeline", prompts, reward, (1.0, 3.0))
                for reward, prompts in (("ocr", "world:test:64"), ("geneval-tiny", "scenes:test:96"))
            }
            scales_grid(list(parts.values()), (1.0, 3.0)).save(args.work / "grid.png")
            scores = {f"{reward}_cfg_{scale:g}": found.mean for reward, results in parts.items()
                      for scale, found in results.items()}  # fmt: skip
            log(args.work, {"stage": "eval", **scores, **state.counters})
            if scores["ocr_cfg_1"] >= args.climb_at and state.counters["level"] < args.top_level:
                state.counters["level"] += 1
        if images % args.save_every < args.batch or images >= args.images:
            state.save()


def save_pipeline(pipe: Any, folder: Path) -> None:
    """The diffusers folder; transformer and VAE in float16, half the size (stock from_pretrained makes them float32).

    The text encoders stay float32: transformers would load half precision as it is, and the dtypes would not match.
    """
    half = {name: copy.deepcopy(getattr(pipe, name)).to(torch.float16) for name in ("transformer", "vae")}
    shipped: Any = StableDiffusion3Pipeline(**{**pipe.components, **half})
    shipped.save_pretrained(folder)
    (folder / "crd.json").write_text(json.dumps({"max_sequence_length": 0}) + "\n")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.device == "cpu":
        keep_freed_memory()
    pipe: Any = build_pipeline(args.seed)
    pipe.to(args.device)
    pipe.set_progress_bar_config(disable=True)
    train_vae(args, pipe)
    train_flow(args, pipe)


if __name__ == "__main__":
    main()
