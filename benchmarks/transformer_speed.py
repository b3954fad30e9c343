"""Speed and memory of one process's rollouts and updates, with a transformer of random weights in a real trainer.

    python benchmarks/transformer_speed.py --model stabilityai/stable-diffusion-3.5-medium --pixels 512 --rank 32 \
        --batch 16 --micro-batch 4 8 16

The model is built from its configuration; nothing is downloaded. Text conditioning is random, of the greatest length.
There are no text encoders, no decoding and no rewards. docs/performance.md says what the columns are.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from crd.backbones.base import CFG, EMBEDDED
from crd.backbones.pipeline import PipelineBackbone
from crd.backbones.solvers import Grid, plain_grid
from crd.config import COMPILE, CRDConfig
from crd.errors import CRDError
from crd.flow import EULER
from crd.loading import DTYPES, build_snapshots
from crd.planning.model_files import ModelFiles, read_model
from crd.planning.skeleton import Skeleton, build_skeleton
from crd.planning.workload import Forwards, forwards
from crd.run_parts import trained_roles
from crd.snapshots import POLICY
from crd.trainer import CRDTrainer

# bfloat16, dense, by the makers' data sheets; the first part of a device's name that fits.
PEAK_TFLOPS = {"H200": 989.0, "H100 80GB HBM3": 989.0, "H100 PCIe": 756.0, "A100": 312.0}


class RandomEnds(PipelineBackbone):
    """A backbone between random conditioning and no pictures; its velocities are a family's own."""

    clip_tokens: int

    def encode(self, prompts: list[str], height: int | None = None, width: int | None = None) -> dict[str, Tensor]:
        blank = self.blank(len(prompts), self.latent_shape(height, width), self.clip_tokens)
        return {name: _filled(name, tensor) for name, tensor in blank.items()}

    def unconditional(self, height: int | None = None, width: int | None = None) -> dict[str, Tensor]:
        return self.encode([""], height, width) if self.guidance == CFG else {}

    def grid(self, num_steps: int, height: int | None = None, width: int | None = None, solver: str = EULER) -> Grid:
        return plain_grid(self.pipeline.scheduler, num_steps, solver, self.flow)

    def decode(self, latents: Tensor, chunk: int = 16) -> list[Image.Image]:
        return [Image.new("RGB", (8, 8)) for _ in latents]


def _filled(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return torch.randn_like(tensor)
    if not name.endswith("mask"):
        raise CRDError(f"this benchmark cannot make up the input {name} of the model; choose one of another family")
    return torch.ones_like(tensor)


def random_backbone(model: ModelFiles, dtype: torch.dtype, device: torch.device) -> PipelineBackbone:
    """The model with random weights, and `RandomEnds`."""
    skeleton = build_skeleton(model, dtype, device)
    kind: Any = type("RandomModel", (RandomEnds, type(skeleton.backbone)), {"clip_tokens": skeleton.clip_tokens})
    backbone: PipelineBackbone = kind(skeleton.backbone.pipeline, max_sequence_length=model.max_sequence_length)
    return backbone


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of one row of the denoiser with its adapters, and of an update that repeats none."""

    forward: int
    backward: int
    rows: Forwards

    @property
    def rollout(self) -> int:
        return self.rows.rollout * self.forward

    @property
    def update(self) -> int:
        rows = self.rows
        return (rows.old + rows.anchor + rows.policy) * self.forward + rows.backward * self.backward


def count_flops(skeleton: Skeleton, config: CRDConfig) -> ModelFlops:
    """Counted on the meta device, call by call of matrix products, convolutions and attention."""
    backbone = skeleton.backbone
    with torch.device("meta"):
        snapshots = build_snapshots(backbone, config, trained_roles(config))
    latent = backbone.latent_shape(config.height, config.width)
    conditioning = backbone.blank(1, latent, skeleton.clip_tokens)
    if backbone.guidance == EMBEDDED:
        conditioning["guidance"] = torch.empty(1, device="meta")
    x_t, t = torch.empty(1, *latent, device="meta"), torch.empty(1, device="meta")
    with snapshots.use(POLICY) as policy:
        with FlopCounterMode(display=False) as forward:
            velocity = backbone.velocity(policy, x_t, t, conditioning)
        with FlopCounterMode(display=False) as backward:
            velocity.sum().backward()  # type: ignore[no-untyped-call]
    once = replace(config, gradient_checkpointing=False, cache_references=True)
    rows = forwards(once, backbone, gpus=1, micro_batch=config.prompts_per_update * config.group_size * config.draws)
    return ModelFlops(forward.get_total_flops(), backward.get_total_flops(), rows)


@dataclass
class Phases:
    """Seconds and peak bytes of rollouts and of updates, apart: the reward is called where one ends."""

    device: torch.device
    ends: list[tuple[float, int]] = field(default_factory=list)

    def mark(self) -> None:
        """A phase ends here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            # Of the process, and never less than before; in KiB, but on macOS in bytes.
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.ends.append((time.perf_counter(), peak))

    def reward(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        """Random numbers."""
        self.mark()
        return [random.random() for _ in images]


@dataclass(frozen=True)
class Speed:
    """What was measured at one micro-batch; None: memory ran out."""

    micro_batch: int
    rollout_seconds: float | None  # median, of all images of an update
    update_seconds: float | None  # median, of all rows
    rollout_peak: int | None  # bytes
    update_peak: int | None


def measure(trainer: CRDTrainer, phases: Phases, micro_batch: int, warmup: int, repeats: int) -> Speed:
    """Real updates; rollouts and training take `micro_batch` rows at a time."""
    trainer.micro_batch.rows = trainer.rollout_batch.rows = micro_batch
    phases.ends.clear()
    phases.mark()
    for _ in range(warmup + repeats):
        trainer.update()
        phases.mark()
        if (trainer.micro_batch.rows, trainer.rollout_batch.rows) != (micro_batch, micro_batch):
            return Speed(micro_batch, None, None, None, None)
    kept = phases.ends[2 * warmup :]  # begin, then by turns the end of a rollout and of an update
    seconds = [end - start for (start, _), (end, _) in pairwise(kept)]
    peaks = [peak for _, peak in kept[1:]]
    rollout, update = (statistics.median(part) for part in (seconds[::2], seconds[1::2]))
    return Speed(micro_batch, rollout, update, max(peaks[::2]), max(peaks[1::2]))


def results(speed: Speed, config: CRDConfig, flops: ModelFlops, peak_tflops: float | None) -> dict[str, float | None]:
    """A row of the table: rates, memory, and the share of the device's peak."""
    images = config.prompts_per_update * config.group_size
    row: dict[str, float | None] = {"micro_batch": speed.micro_batch}
    phases = (
        ("rollout", speed.rollout_seconds, speed.rollout_peak, flops.rollout),
        ("update", speed.update_seconds, speed.update_peak, flops.update),
    )
    for name, seconds, peak, work in phases:
        rate = None if seconds is None else work / seconds / 1e12
        row[f"{name}_images_per_s"] = None if seconds is None else images / seconds
        if name == "update":
            row["update_rows_per_s"] = None if seconds is None else images * config.draws / seconds
        row[f"{name}_peak_gb"] = None if peak is None else peak / 1e9
        row[f"{name}_tflops"] = rate
        row[f"{name}_utilisation"] = None if rate is None or peak_tflops is None else rate / peak_tflops
    return row


def known_peak(name: str, precision: str) -> float | None:
    """Peak of a device by its name; None: not known, or not for this precision."""
    fits = [peak for part, peak in PEAK_TFLOPS.items() if part in name]
    return fits[0] if fits and precision == "bfloat16" else None


def settings(args: argparse.Namespace) -> CRDConfig:
    """The run that is measured.

    Raises:
        CRDError: a batch that is no number of groups, or smaller than a micro-batch.
    """
    if args.batch % args.group_size:
        raise CRDError(f"--batch must be a multiple of --group-size={args.group_size}, got {args.batch}")
    if not 1 <= min(args.micro_batch) <= max(args.micro_batch) <= args.batch:
        raise CRDError(f"--micro-batch must lie in 1..{args.batch}, the images of --batch, got {args.micro_batch}")
    if args.warmup < 1 or args.repeats < 1:
        raise CRDError(f"--warmup and --repeats must be at least 1, got {args.warmup} and {args.repeats}")
    return CRDConfig(
        model=args.model, height=args.pixels, width=args.pixels, lora_rank=args.rank, draws=args.draws,
        prompts_per_update=args.batch // args.group_size, group_size=args.group_size, optimizer_steps=1,
        rollout_steps=args.steps, rollout_guidance=args.guidance, anchor_guidance=args.anchor_guidance,
        mixed_precision="bf16" if args.precision == "bfloat16" else "no", eval_prompts=None,
        gradient_checkpointing=args.gradient_checkpointing, compile=args.compile, threads=args.threads,
        attention_backend=args.attention_backend,
    )  # fmt: skip


def arguments(argv: list[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny-sd3", help="tiny-sd3, a model that crd plan knows, or a folder")
    parser.add_argument("--pixels", type=int, help="height and width; default: the model's")
    parser.add_argument("--rank", type=int, default=32, help="of LoRA")
    parser.add_argument("--batch", type=int, default=16, help="images of an update")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--draws", type=int, default=2, help="rows of an image")
    parser.add_argument("--steps", type=int, default=10, help="of a rollout")
    parser.add_argument("--guidance", type=float, default=1.0, help="of rollouts")
    parser.add_argument("--anchor-guidance", type=float, default=4.5)
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[8, 16], help="rows at a time, measured in turn")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bfloat16" if gpu else "float32",
                        help="of the base and of products; adapters are float32")  # fmt: skip
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", choices=COMPILE, default="no")
    parser.add_argument("--attention-backend", help="of diffusers")
    parser.add_argument("--warmup", type=int, default=1, help="updates before those that are timed")
    parser.add_argument("--repeats", type=int, default=3, help="updates of which medians are shown")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--peak-tflops", type=float, help="of the device; default: known of some, in bfloat16")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All that is measured, as plain values."""
    config = settings(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    peak = args.peak_tflops or known_peak(name, args.precision)
    model = read_model(args.model)
    flops = count_flops(build_skeleton(model, DTYPES[args.precision]), config)
    phases = Phases(device)
    trainer = CRDTrainer(
        random_backbone(model, DTYPES[args.precision], device),
        phases.reward,
        config,
        [f"picture {number}" for number in range(config.prompts_per_update)],
    )
    speeds = (measure(trainer, phases, rows, args.warmup, args.repeats) for rows in args.micro_batch)
    return {
        "device": name,
        "torch": torch.__version__,
        "peak_tflops": peak,
        "settings": vars(args),
        "forward_tflop_per_row": flops.forward / 1e12,
        "backward_tflop_per_row": flops.backward / 1e12,
        "rows": asdict(flops.rows),
        "results": [results(speed, config, flops, peak) for speed in speeds],
    }


COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("micro-batch", "micro_batch", lambda value: f"{value:.0f}"),
    ("rollout, images/s", "rollout_images_per_s", lambda value: f"{value:.3g}"),
    ("peak, GB", "rollout_peak_gb", lambda value: f"{value:.2f}"),
    ("TFLOP/s", "rollout_tflops", lambda value: f"{value:.3g}"),
    ("utilisation", "rollout_utilisation", lambda value: f"{value:.1%}"),
    ("update, images/s", "update_images_per_s", lambda value: f"{value:.3g}"),
    ("rows/s", "update_rows_per_s", lambda value: f"{value:.3g}"),
    ("peak, GB", "update_peak_gb", lambda value: f"{value:.2f}"),
    ("TFLOP/s", "update_tflops", lambda value: f"{value:.3g}"),
    ("utilisation", "update_utilisation", lambda value: f"{value:.1%}"),
)


def table(found: dict[str, Any]) -> str:
    """The results for people."""
    given = found["settings"]
    lines = [
        f"{given['model']}, {given['precision']}, LoRA r{given['rank']}; {given['batch']} images x {given['draws']} "
        f"rows, {given['steps']} steps; {found['device']}, torch {found['torch']}",
        f"a row: {found['forward_tflop_per_row']:.3g} TFLOP forward, {found['backward_tflop_per_row']:.3g} backward\n",
    ]
    lines.append("| " + " | ".join(title for title, _, _ in COLUMNS) + " |")
    lines.append("|---" * len(COLUMNS) + "|")
    for row in found["results"]:
        cells = ["-" if row[key] is None else shown(row[key]) for _, key, shown in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    try:
        with redirect_stdout(sys.stderr):  # the trainer's own words
            found = run(args)
    except CRDError as error:
        raise SystemExit(f"error: {error}") from error
    print(json.dumps(found, indent=2) if args.json else table(found))


if __name__ == "__main__":
    main()
