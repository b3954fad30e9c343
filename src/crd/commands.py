"""What each command of the command line does."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from PIL import Image
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from crd.checkpoint import PREFIX, CheckpointFolder
from crd.config import RESUMABLE, CRDConfig
from crd.config_io import config_from, field_names, load_config
from crd.console import console
from crd.data import PromptDataset, load_prompts, prompt_batch
from crd.engine import Engine
from crd.errors import CRDError
from crd.evaluation import EVAL_SEED, SamplingSettings, draw, encode_prompts
from crd.evaluation import evaluate as evaluate_model
from crd.export import export_lora, export_pipeline
from crd.geneval.benchmark import GenEvalSuite
from crd.geneval.detectors import judge_settings
from crd.grid import GridRow, draw_grid
from crd.loading import LoadedModel, base_name, checkpoint_number, is_run, judged_prompts, load_model, run_config
from crd.rewards import RewardSet
from crd.run_folder import CONFIG_FILE
from crd.snapshots import ANCHOR
from crd.trainer import CRDTrainer

transformers_logging.disable_progress_bar()
diffusers_logging.disable_progress_bar()


def train(source: str | None, overrides: Mapping[str, str], resume: str | None) -> None:
    """`crd train`: a new run, or one that goes on."""
    if resume is None:
        CRDTrainer(args=load_config(source, overrides)).train()
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
    CRDTrainer(args=config).train(resume=checkpoint)


def _plain(config: CRDConfig) -> dict[str, Any]:
    return dict(config.__dict__)


def _resumed(path: Path) -> tuple[Path, bool | int]:
    """Run folder, and True for its last checkpoint or the update of the one that was named."""
    named = path.parent.name == "checkpoints" and path.name.startswith(PREFIX)
    run = path.parent.parent if named else path
    if not is_run(run):
        raise CRDError(f"--resume needs a run folder (with {CONFIG_FILE}), got {path}")
    return run, checkpoint_number(CheckpointFolder(path.parent, keep=1), path.name) if named else True


def sample(args: argparse.Namespace) -> None:
    """`crd sample`: one sheet, a row for the base model and one for the trained model, same noise."""
    if bool(args.prompt) == bool(args.prompts):
        raise CRDError("give prompts as --prompt TEXT (repeatable) or as --prompts FILE, one of the two")
    out = Path(args.out)
    if out.suffix.lower() not in Image.registered_extensions():
        raise CRDError(f"--out must be a picture such as samples.png, got {args.out!r}")
    dataset = load_prompts(args.prompts) if args.prompts else load_prompts(args.prompt)
    engine = _engine(args)
    model = _load(args, engine)
    batch = prompt_batch(dataset, range(len(dataset)), args.images, _seed(args, model), EVAL_SEED)
    scales = args.guidance or [1.0]
    base_scales = scales if args.base_guidance is None else [*scales, args.base_guidance]
    lines = [("base", ANCHOR, scale) for scale in base_scales]
    if model.role != ANCHOR:
        lines += [("trained", model.role, scale) for scale in scales]
    uncond = encode_prompts(model.backbone, engine, [""])
    rows = []
    for name, role, scale in lines:
        title = name if scale == 1 else f"{name}, CFG {scale:g}"
        with model.snapshots.use(role) as denoiser:
            settings = _settings(args, model, scale)
            rollout = draw(model.backbone, denoiser, engine, batch, settings, uncond, title)
        rows.append(GridRow(title, rollout.images))
    _write(out, draw_grid(rows, batch.prompts).save)
    console.print(f"wrote {out} ({len(rows)} rows x {len(batch)} images)")


def evaluate(args: argparse.Namespace) -> None:
    """`crd eval`: mean rewards, or a benchmark, of the base model and of the trained one at each guidance scale."""
    if args.benchmark is None:
        results = _evaluate_rewards(args)
        _print_table(results)
    else:
        results = _evaluate_geneval(args)
    if args.out:
        text = json.dumps(results, indent=2) + "\n"
        _write(Path(args.out), lambda path: path.write_text(text, encoding="utf-8"))


def _evaluate_rewards(args: argparse.Namespace) -> list[dict[str, Any]]:
    if args.judge is not None:
        raise CRDError("--judge belongs to --benchmark geneval; add it, or leave --judge out")
    rewards = RewardSet(args.reward or ["ocr"])
    dataset = judged_prompts("--prompts", args.prompts or "world:test:256", rewards)
    engine = _engine(args)
    rewards.use_device(str(engine.device))
    rewards.self_test()
    model = _load(args, engine)
    return [_evaluate_role(args, model, engine, rewards, dataset, *line) for line in _lines(args, model)]


def _evaluate_geneval(args: argparse.Namespace) -> list[dict[str, Any]]:
    """GenEval by task. The bundled model is judged by the bundled detector on scenes, others by the real one."""
    if args.reward:
        raise CRDError(f"--benchmark geneval has its own scores, got --reward {args.reward[0]} too; leave one out")
    judge = args.judge or ("tiny" if base_name(args.target, args.base) == CRDConfig.model else "mask2former")
    bundled = judge_settings(judge).detector.startswith("tiny")
    prompts = args.prompts or ("scenes:test:240" if bundled else "geneval:test")
    dataset, engine = load_prompts(prompts), _engine(args)
    suite = GenEvalSuite(dataset, judge, str(engine.device))
    suite.load()
    model = _load(args, engine)
    suite.check_size(*_size(args, model))
    batch = prompt_batch(dataset, range(len(dataset)), args.images or 4, _seed(args, model), EVAL_SEED)
    uncond = encode_prompts(model.backbone, engine, [""])
    results: list[dict[str, Any]] = []
    for role, scale in _lines(args, model):
        with model.snapshots.use(role) as denoiser:
            settings = _settings(args, model, scale)
            rollout = draw(model.backbone, denoiser, engine, batch, settings, uncond, "geneval")
        summary = suite.judge(rollout)
        about = {"judge": judge, "prompts": prompts}
        line = {"model": _name(args, role), "guidance": scale, "steps": settings.steps, **about}
        title = Text(f"GenEval of {prompts}, judge {judge}")
        table = Table(f"{line['model']}, CFG {scale:g}", "images", "official", "strict", "soft", title=title)
        for task, images, *scores in summary.rows():
            table.add_row(task, str(images), *(f"{score:.3f}" for score in scores))
        console.print(table)
        results.append({**line, "tasks": [dataclasses.asdict(task) for task in (*summary.tasks, summary.overall)]})
    return results


def _lines(args: argparse.Namespace, model: LoadedModel) -> list[tuple[str, float]]:
    """What is compared: the base model and the trained one, each at every guidance scale."""
    return [(role, scale) for role in dict.fromkeys((ANCHOR, model.role)) for scale in (args.guidance or [1.0])]


def _name(args: argparse.Namespace, role: str) -> str:
    return "base" if role == ANCHOR else str(args.target)


def _evaluate_role(
    args: argparse.Namespace,
    model: LoadedModel,
    engine: Engine,
    rewards: RewardSet,
    dataset: PromptDataset,
    role: str,
    scale: float,
) -> dict[str, Any]:
    settings = _settings(args, model, scale)
    with model.snapshots.use(role) as denoiser:
        result = evaluate_model(
            model.backbone, denoiser, engine, rewards, dataset, settings, encode_prompts(model.backbone, engine, [""]),
            images_per_prompt=args.images or 1, seed=_seed(args, model),
        )  # fmt: skip
    total = result.rewards.total
    error = float(total.std() / len(total) ** 0.5) if len(total) > 1 else 0.0
    return {
        "model": _name(args, role),
        "guidance": scale,
        "steps": settings.steps,
        "images": len(result.images),
        **result.metrics(),
        "standard_error": error,
    }


def export(args: argparse.Namespace) -> None:
    """`crd export`: LoRA folder or merged pipeline."""
    model = _load(args, _engine(args))
    write = export_pipeline if args.merge else export_lora
    if model.role == ANCHOR and not args.merge:
        raise CRDError(f"{args.target} is a base model and has no LoRA; give a run, or --merge")
    folder = write(model.backbone, model.snapshots, args.out, role=model.role, overwrite=args.overwrite)
    how = "StableDiffusion3Pipeline.from_pretrained" if args.merge else "pipe.load_lora_weights"
    console.print(f"wrote {folder}; load it with {how}({str(folder)!r})")


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Create a file for the user, and the folders above it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        raise CRDError(f"cannot write {path}: {error}; choose another --out") from error


def _engine(args: argparse.Namespace) -> Engine:
    config = run_config(args.target)
    return Engine(CRDConfig.mixed_precision if config is None else config.mixed_precision, args.device)


def _load(args: argparse.Namespace, engine: Engine) -> LoadedModel:
    return load_model(args.target, base=args.base, checkpoint=args.checkpoint, device=str(engine.device))


def _settings(args: argparse.Namespace, model: LoadedModel, guidance: float) -> SamplingSettings:
    config = model.config
    steps = args.steps or (config.eval_steps if config is not None else CRDConfig.eval_steps)
    return SamplingSettings(steps, guidance, args.batch, *_size(args, model))


def _size(args: argparse.Namespace, model: LoadedModel) -> tuple[int, int]:
    """Height and width of the images, px: as given, else the run's, else the model's own."""
    config, (height, width) = model.config or CRDConfig(), model.backbone.default_size
    return args.height or config.height or height, args.width or config.width or width


def _seed(args: argparse.Namespace, model: LoadedModel) -> int:
    """Of the noise: a run is judged on the images that its own evaluation drew, unless told otherwise."""
    if args.seed is not None:
        return int(args.seed)
    return CRDConfig.seed if model.config is None else model.config.seed


def _print_table(results: Sequence[Mapping[str, Any]]) -> None:
    table = Table("model", "CFG", "steps", "images", "reward", "s.e.")
    for result in results:
        table.add_row(
            result["model"], f"{result['guidance']:g}", str(result["steps"]), str(result["images"]),
            f"{result['reward']:.3f}", f"{result['standard_error']:.3f}",
        )  # fmt: skip
    console.print(table)
