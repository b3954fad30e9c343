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
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from crd.flow import interpolate, velocity_target
from crd.memory import keep_freed_memory
from crd.optimizer_state import load_optimizer_tensors, optimizer_tensors
from crd.tiny.architecture import build_pipeline, encode_captions
from crd.tiny.evaluation import evaluate_scales, scales_grid
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
            wanted = pretraining_prompt(rng)
            pixels.append(render_scene(scene_for(wanted, rng)))
            captions.append(wanted.prompt)
        else:
            word = random_scene(rng, level)
            pixels.append(render(word))
            captions.append(word.caption())
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
    return images, captions


def build_optimizers(
    parameters: dict[str, nn.Parameter], args: argparse.Namespace
) -> dict[str, tuple[torch.optim.Optimizer, list[str]]]:
    """Muon for the matrices inside transformer blocks, AdamW for all else; each with its parameters' names.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the update is scaled to
    AdamW's size, so that both share one learning rate (Liu et al. 2025, arXiv 2502.16982).
    """
    matrices = [n for n, p in parameters.items() if p.ndim == 2 and (".transformer_blocks." in n or ".layers." in n)]
    rest = [n for n in parameters if n not in set(matrices)]
    found: dict[str, tuple[torch.optim.Optimizer, list[str]]] = {
        "adamw": (
            torch.optim.AdamW([parameters[n] for n in rest], lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01),
            rest,
        )
    }
    if matrices:
        muon = torch.optim.Muon(
            [parameters[n] for n in matrices], lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        )
        found["muon"] = (muon, matrices)
    return found


class State:
    """What is kept on disk of one stage: modules, optimizer, moving average, counters; safetensors and JSON only."""

    def __init__(self, folder: Path, modules: dict[str, nn.Module], args: argparse.Namespace) -> None:
        self.folder, self.modules = folder, modules
        self.names = [f"{m}.{n}" for m, module in modules.items() for n, _ in module.named_parameters()]
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizers = build_optimizers(dict(zip(self.names, self.parameters, strict=True)), args)
        self.counters: dict[str, float] = {"images": 0, "seconds": 0.0, "level": 0}

    def step(self, lr: float) -> None:
        """Clip, step every optimizer at `lr`, clear."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, _ in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

    def update_average(self, decay: float) -> None:
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1.0 - decay)

    def swap_average(self) -> None:
        """Exchange weights and their moving average; calling it twice changes nothing."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            kept = parameter.detach().clone()
            parameter.data.copy_(average)
            average.copy_(kept)

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"weight:{n}": p.detach().cpu().contiguous() for n, p in zip(self.names, self.parameters, strict=True)
        }
        tensors |= {f"average:{n}": a.cpu().contiguous() for n, a in zip(self.names, self.average, strict=True)}
        for kind, (optimizer, names) in self.optimizers.items():
            tensors |= {f"{kind}:{k}": v for k, v in optimizer_tensors(optimizer, names).items()}
        temporary = self.folder / "state.tmp"
        save_file(tensors, temporary, metadata={"counters": json.dumps(self.counters)})
        os.replace(temporary, self.folder / "state.safetensors")

    def load(self) -> bool:
        """Whether a saved state was found and taken up."""
        path = self.folder / "state.safetensors"
        if not path.exists():
            return False
        tensors = load_file(path)
        with safe_open(path, "pt") as handle:
            self.counters = json.loads(handle.metadata()["counters"])
        for name, parameter, average in zip(self.names, self.parameters, self.average, strict=True):
            parameter.data.copy_(tensors[f"weight:{name}"])
            average.copy_(tensors[f"average:{name}"])
        for kind, (optimizer, names) in self.optimizers.items():
            flat = {k.removeprefix(f"{kind}:"): v for k, v in tensors.items() if k.startswith(f"{kind}:")}
            load_optimizer_tensors(optimizer, names, flat)
        return True


def autocast(args: argparse.Namespace) -> AbstractContextManager[None]:
    return torch.autocast(args.device, torch.bfloat16, enabled=args.bf16)


def learning_rate(args: argparse.Namespace, images: int, total: int) -> float:
    warm = min(1.0, (images + args.batch) / (200 * args.batch))
    cool = min(1.0, max(0.0, (total - images) / max(1, args.cooldown)))
    return args.lr * warm * cool


def train_vae(args: argparse.Namespace, pipe: Any) -> None:
    """L1 plus edge reconstruction and a light KL; ends by measuring the latent scale and shift."""
    vae = pipe.vae.to(memory_format=torch.channels_last)
    state = State(args.work / "vae", {"vae": vae}, args)
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
            log(args, {"stage": "vae", "images": images, "l1": difference.abs().mean().item(), "kl": kl.item(),
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
    state = State(args.work / "flow", modules, args)
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
                args,
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
            results = evaluate_scales(args.work / "pipeline", "world:test:64", (1.0, 3.0))
            scales_grid(results, (1.0, 3.0)).save(args.work / "grid.png")
            scores = {f"reward_cfg_{scale:g}": result.mean for scale, result in results.items()}
            log(args, {"stage": "eval", **scores, **state.counters})
            if scores["reward_cfg_1"] >= args.climb_at and state.counters["level"] < args.top_level:
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


def log(args: argparse.Namespace, record: dict[str, object]) -> None:
    line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()})
    print(line, flush=True)
    with (args.work / "log.jsonl").open("a") as handle:
        handle.write(line + "\n")


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
