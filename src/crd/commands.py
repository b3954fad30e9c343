"""What the commands that do not measure do: train, plan, sample, report, export."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from crd.checkpoint import CHECKPOINTS, PREFIX, CheckpointFolder
from crd.command_options import (
    build_engine,
    guidance_scales,
    image_size,
    load_to_draw,
    noise_seed,
    sampling_settings,
    write_out,
)
from crd.config import AUTO, RESUMABLE, CRDConfig
from crd.config_io import config_from, field_names, load_config
from crd.console import console
from crd.data import load_prompts, prompt_batch
from crd.errors import CRDError
from crd.evaluation import EVAL_SEED, draw, encode_unconditional
from crd.export import export_lora, export_pipeline
from crd.grid import GridRow, draw_grid, sheet_width
from crd.loading import checkpoint_number, is_run, load_model, run_config
from crd.planning.automatic import gpu_memory
from crd.planning.plan import plan_run
from crd.planning.show import plan_json, plan_table
from crd.report import write_report
from crd.run_folder import CONFIG_FILE, RunFolder
from crd.run_parts import load_judged
from crd.snapshots import ANCHOR
from crd.trainer import CRDTrainer
from crd.unread_settings import tell_unread_settings

_WIDEST = {"WEBP": 16383, "JPEG": 65500, "GIF": 65535}  # px that a format holds

transformers_logging.disable_progress_bar()
diffusers_logging.disable_progress_bar()


def train(source: str | None, overrides: Mapping[str, str], resume: str | None) -> None:
    """`crd train`: a new run, or one that goes on."""
    if resume is None:
        _train(load_config(source, overrides), False)
        return
    if source is not None:
        raise CRDError(f"--resume takes the run's own configuration, got {source!r} too; leave it out")
    run, checkpoint = _resumed(Path(resume))
    config = load_config(run / CONFIG_FILE)
    changed = field_names(overrides)
    fixed = sorted(set(changed) - RESUMABLE)
    if fixed:
        config_from(changed)  # an unknown key gets its own message
        raise CRDError(f"{fixed[0]} cannot change in a resumed run; allowed: {', '.join(sorted(RESUMABLE))}")
    config = dataclasses.replace(config_from({**_plain(config), **changed}), output_dir=str(run))
    _train(config, checkpoint)


def dry_run(source: str | None, overrides: Mapping[str, str]) -> None:
    """`crd train --dry-run`: settings, prompts, rewards and the plan; no weights, no run folder."""
    config = load_config(source, overrides)
    RunFolder(Path(config.output_dir)).check_free()
    tell_unread_settings(config)
    judged = load_judged(config)
    console.print(plan_table(plan_run(config, available=gpu_memory(config) if config.automatic else None)))
    evaluated = 0 if judged.eval_data is None else len(judged.eval_data)
    console.print(
        f"{len(judged.train_data)} training and {evaluated} evaluation prompts fit the rewards "
        f"({', '.join(judged.rewards.weights)}); weights were not looked for"
    )


def plan(source: str | None, overrides: Mapping[str, str], args: argparse.Namespace) -> None:
    """`crd plan`: memory by part and forwards, as a table or JSON."""
    config, memory = load_config(source, overrides), args.memory
    if memory is not None:
        config = dataclasses.replace(config, micro_batch=AUTO, rollout_batch=AUTO)
    elif config.automatic:
        memory = gpu_memory(config)
    found = plan_run(config, args.gpus, args.sharding, memory)
    if args.json:
        print(plan_json(found))
    else:
        console.print(plan_table(found))


def _train(config: CRDConfig, resume: bool | int) -> None:
    trainer = CRDTrainer(args=config)
    trainer.train(resume)
    trainer.engine.leave()


def _plain(config: CRDConfig) -> dict[str, Any]:
    return dict(config.__dict__)


def _resumed(path: Path) -> tuple[Path, bool | int]:
    """Run folder, and True for its last checkpoint or the update of the one that was named."""
    named = path.parent.name == CHECKPOINTS and path.name.startswith(PREFIX)
    run = path.parent.parent if named else path
    if not is_run(run):
        raise CRDError(f"--resume needs a run folder (with {CONFIG_FILE}), got {path}")
    return run, checkpoint_number(CheckpointFolder.of_run(run), path.name) if named else True


def sample(args: argparse.Namespace) -> None:
    """`crd sample`: one sheet, a row for the base model and one for the trained model, same noise."""
    if bool(args.prompt) == bool(args.prompts):
        raise CRDError("give prompts as --prompt TEXT (repeatable) or as --prompts FILE, one of the two")
    out = Path(args.out)
    dataset = load_prompts(args.prompts) if args.prompts else load_prompts(args.prompt)
    _check_sheet(out, len(dataset) * args.images)
    engine = build_engine(args, run_config(args.target))
    model = load_to_draw(args, engine, args.target, args.base, args.checkpoint)
    batch = prompt_batch(dataset, range(len(dataset)), args.images, noise_seed(args, model), EVAL_SEED)
    scales = guidance_scales(args, model)
    base_scales = scales if args.base_guidance is None else [*scales, args.base_guidance]
    lines = [("base", ANCHOR, scale) for scale in base_scales]
    if model.role != ANCHOR:
        lines += [("trained", model.role, scale) for scale in scales]
    uncond = encode_unconditional(model.backbone, engine, *image_size(args, model))
    rows = []
    for name, role, scale in lines:
        title = name if scale == 1 else f"{name}, CFG {scale:g}"
        with model.snapshots.use(role) as denoiser:
            settings = sampling_settings(args, model, scale)
            rollout = draw(model.backbone, denoiser, engine, batch, settings, uncond, title)
        rows.append(GridRow(title, rollout.images))
    write_out(out, draw_grid(rows, batch.prompts).save)
    console.print(f"wrote {out} ({len(rows)} rows x {len(batch)} images)")


def _check_sheet(out: Path, columns: int) -> None:
    """Refuse a file that could not hold a sheet of so many images in a row, before they are drawn."""
    kind = Image.registered_extensions().get(out.suffix.lower())
    if kind not in Image.SAVE:
        raise CRDError(f"--out must be a picture such as samples.png, got {str(out)!r}")
    width, widest = sheet_width(columns), _WIDEST.get(kind, math.inf)
    if width > widest:
        raise CRDError(f"a sheet of {columns} images in a row is {width} px wide and {kind} holds {widest}; give an "
                       "--out that ends in .png, or fewer prompts and images")  # fmt: skip


def report(args: argparse.Namespace) -> None:
    """`crd report`: one self-contained page."""
    runs = [Path(run) for run in args.runs]
    out = Path(args.out) if args.out else (runs[0] if len(runs) == 1 else Path()) / "report.html"
    console.print(f"wrote {write_report(runs, out)}")


def export(args: argparse.Namespace) -> None:
    """`crd export`: LoRA folder or merged pipeline."""
    engine = build_engine(args, run_config(args.target))
    model = load_model(
        args.target, base=args.base, checkpoint=args.checkpoint, dtype=args.base_dtype, device=str(engine.device)
    )
    write = export_pipeline if args.merge else export_lora
    if model.role == ANCHOR and not args.merge:
        raise CRDError(f"{args.target} is a base model and has no LoRA; give a run, or --merge")
    folder = write(model.backbone, model.snapshots, args.out, role=model.role, overwrite=args.overwrite)
    how = f"{type(model.backbone.pipeline).__name__}.from_pretrained" if args.merge else "pipe.load_lora_weights"
    console.print(f"wrote {folder}; load it with {how}({str(folder)!r})")
