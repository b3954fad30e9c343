"""What each command of the command line does."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from PIL import Image
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from crd.checkpoint import PREFIX, CheckpointFolder
from crd.comparison import NO_PAIRS, Line, as_dict, comparison_table, differences, read_evaluations, table, to_dict
from crd.config import RESUMABLE, CRDConfig
from crd.config_io import config_from, field_names, load_config
from crd.console import console
from crd.data import load_prompts, prompt_batch
from crd.engine import Engine
from crd.errors import CRDError
from crd.evaluation import EVAL_SEED, Evaluator, SamplingSettings, draw, encode_unconditional
from crd.export import export_lora, export_pipeline
from crd.geneval.benchmark import GenEvalSuite
from crd.geneval.detectors import judge_settings
from crd.grid import GridRow, draw_grid
from crd.loading import LoadedModel, base_name, checkpoint_number, is_run, judged_prompts, load_model, run_config
from crd.metrics.held_out import HeldOutScores
from crd.report import write_report
from crd.rewards import RewardSet
from crd.run_folder import CONFIG_FILE
from crd.snapshots import ANCHOR
from crd.trainer import CRDTrainer

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


def _train(config: CRDConfig, resume: bool | int) -> None:
    trainer = CRDTrainer(args=config)
    trainer.train(resume)
    trainer.engine.leave()


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
    engine = _engine(args, run_config(args.target))
    model = _load(args, engine)
    batch = prompt_batch(dataset, range(len(dataset)), args.images, _seed(args, model), EVAL_SEED)
    scales = _scales(args, model)
    base_scales = scales if args.base_guidance is None else [*scales, args.base_guidance]
    lines = [("base", ANCHOR, scale) for scale in base_scales]
    if model.role != ANCHOR:
        lines += [("trained", model.role, scale) for scale in scales]
    uncond = encode_unconditional(model.backbone, engine, *_size(args, model))
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
    """`crd eval`: rewards, held-out scores and statistics, or a benchmark, of the base model and of the trained one."""
    if args.benchmark is None:
        lines = _evaluate_rewards(args)
        console.print(table(lines))
        results = [to_dict(line) for line in lines]
    else:
        results = _evaluate_geneval(args)
    if args.out:
        text = json.dumps(results, indent=None if args.benchmark is None else 2) + "\n"
        _write(Path(args.out), lambda path: path.write_text(text, encoding="utf-8"))


def compare(args: argparse.Namespace) -> None:
    """`crd compare`: paired differences to the first of several models, evaluated now or before."""
    lines: list[Line] = []
    # Pairs need one noise, number of steps and precision: unless told otherwise those of the first run, or .json.
    shared = next((config for config in map(run_config, args.targets) if config is not None), None)
    engine = _engine(args, shared)
    if args.checkpoint != "last" and shared is None:
        raise CRDError(f"--checkpoint {args.checkpoint} is for runs, got none; leave it out")
    _refuse_for_files(args)
    for target in args.targets:
        if target.endswith(".json"):
            lines += read_evaluations(Path(target))
            continue
        seed, steps = args.seed, args.steps
        if lines:
            seed, steps = lines[0].record.seed if seed is None else seed, steps or lines[0].record.steps
        elif shared is not None:
            seed, steps = shared.seed if seed is None else seed, steps or shared.eval_steps
        checkpoint = args.checkpoint if is_run(Path(target)) else "last"
        given = {"target": target, "seed": seed, "steps": steps, "checkpoint": checkpoint}
        one = argparse.Namespace(**{**vars(args), **given})
        model, evaluator = _evaluator(one, engine)
        if lines and not evaluator.draws(lines[0].record):
            raise CRDError(NO_PAIRS)  # before the time is spent on images
        lines += [Line(target, evaluator(model.role, scale).record) for scale in _scales(args, model)]
    if len(lines) < 2:
        raise CRDError(f"nothing to compare: got one evaluation, {lines[0].title}; name a second model")
    console.print(comparison_table(lines))
    if args.out:
        first, *others = lines
        found = [{**to_dict(first), "differences": {}}]
        found += [{**to_dict(line), "differences": as_dict(differences(line.record, first.record))} for line in others]
        _write(Path(args.out), lambda path: path.write_text(json.dumps(found) + "\n", encoding="utf-8"))


def _refuse_for_files(args: argparse.Namespace) -> None:
    """Options of an evaluation that do nothing where every target was evaluated before."""
    if not all(target.endswith(".json") for target in args.targets):
        return
    for name in ("prompts", "reward", "held_out", "images", "seed", "steps", "guidance", "height", "width"):
        if args.__dict__[name]:
            option = name.replace("_", "-")
            raise CRDError(f"--{option} is for models to evaluate, got .json files alone; leave it out")


def _evaluate_rewards(args: argparse.Namespace) -> list[Line]:
    if args.judge is not None:
        raise CRDError("--judge belongs to --benchmark geneval; add it, or leave --judge out")
    model, evaluator = _evaluator(args, _engine(args, run_config(args.target)))
    return [Line(_name(args, role), evaluator(role, scale).record) for role, scale in _lines(args, model)]


def _evaluator(args: argparse.Namespace, engine: Engine) -> tuple[LoadedModel, Evaluator]:
    """The model of `args.target`, and what measures it on `args.prompts`."""
    rewards = RewardSet(args.reward or ["ocr"])
    dataset = judged_prompts("--prompts", args.prompts or "world:test:256", rewards)
    held_out = HeldOutScores(args.held_out or (), dataset)
    for scorers in (rewards, held_out):
        scorers.use_device(str(engine.device))
        scorers.self_test()
    model = _load(args, engine)
    return model, Evaluator(
        model.backbone, model.snapshots, engine, rewards, held_out, dataset,
        _settings(args, model, _plain_scale(model)),
        encode_unconditional(model.backbone, engine, *_size(args, model)),
        anchor_guidance=(model.config or CRDConfig()).anchor_guidance, images_per_prompt=args.images or 1,
        seed=_seed(args, model),
    )  # fmt: skip


def _evaluate_geneval(args: argparse.Namespace) -> list[dict[str, Any]]:
    """GenEval by task. The bundled model is judged by the bundled detector on scenes, others by the real one."""
    if args.reward:
        raise CRDError(f"--benchmark geneval has its own scores, got --reward {args.reward[0]} too; leave one out")
    if args.held_out:
        raise CRDError(f"--held-out is not for --benchmark, got {args.held_out[0]}; leave one out")
    judge = args.judge or ("tiny" if base_name(args.target, args.base) == CRDConfig.model else "mask2former")
    bundled = judge_settings(judge).detector.startswith("tiny")
    prompts = args.prompts or ("scenes:test:240" if bundled else "geneval:test")
    dataset, engine = load_prompts(prompts), _engine(args, run_config(args.target))
    suite = GenEvalSuite(dataset, judge, str(engine.device))
    suite.load()
    model = _load(args, engine)
    suite.check_size(*_size(args, model))
    batch = prompt_batch(dataset, range(len(dataset)), args.images or 4, _seed(args, model), EVAL_SEED)
    uncond = encode_unconditional(model.backbone, engine, *_size(args, model))
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
    return [(role, scale) for role in dict.fromkeys((ANCHOR, model.role)) for scale in _scales(args, model)]


def _name(args: argparse.Namespace, role: str) -> str:
    return "base" if role == ANCHOR else str(args.target)


def report(args: argparse.Namespace) -> None:
    """`crd report`: one self-contained page."""
    runs = [Path(run) for run in args.runs]
    out = Path(args.out) if args.out else (runs[0] if len(runs) == 1 else Path()) / "report.html"
    console.print(f"wrote {write_report(runs, out)}")


def export(args: argparse.Namespace) -> None:
    """`crd export`: LoRA folder or merged pipeline."""
    model = _load(args, _engine(args, run_config(args.target)))
    write = export_pipeline if args.merge else export_lora
    if model.role == ANCHOR and not args.merge:
        raise CRDError(f"{args.target} is a base model and has no LoRA; give a run, or --merge")
    folder = write(model.backbone, model.snapshots, args.out, role=model.role, overwrite=args.overwrite)
    how = f"{type(model.backbone.pipeline).__name__}.from_pretrained" if args.merge else "pipe.load_lora_weights"
    console.print(f"wrote {folder}; load it with {how}({str(folder)!r})")


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Create a file for the user, and the folders above it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        raise CRDError(f"cannot write {path}: {error}; choose another --out") from error


def _engine(args: argparse.Namespace, config: CRDConfig | None) -> Engine:
    engine = Engine(CRDConfig.mixed_precision if config is None else config.mixed_precision, args.device)
    if engine.ranks.world_size > 1:
        raise CRDError(
            f"crd {args.command} runs in one process, got {engine.ranks.world_size}; only train takes several"
        )
    return engine


def _load(args: argparse.Namespace, engine: Engine) -> LoadedModel:
    return load_model(args.target, base=args.base, checkpoint=args.checkpoint, device=str(engine.device))


def _settings(args: argparse.Namespace, model: LoadedModel, guidance: float) -> SamplingSettings:
    config = model.config
    steps = args.steps or (config.eval_steps if config is not None else CRDConfig.eval_steps)
    solver = CRDConfig.solver if config is None else config.solver
    return SamplingSettings(steps, guidance, args.batch, *_size(args, model), solver)


def _scales(args: argparse.Namespace, model: LoadedModel) -> list[float]:
    """Guidance scales: as given, else that of the model as it is."""
    return args.guidance or [_plain_scale(model)]


def _plain_scale(model: LoadedModel) -> float:
    """Guidance scale of a model as it is: no CFG, or what it was trained with where the scale is its input."""
    backbone, config = model.backbone, model.config
    return backbone.stock_scale if config is None else backbone.trained_scale(config.rollout_guidance)


def _size(args: argparse.Namespace, model: LoadedModel) -> tuple[int, int]:
    """Height and width of the images, px: as given, else the run's, else the model's own."""
    config, (height, width) = model.config or CRDConfig(), model.backbone.default_size
    return args.height or config.height or height, args.width or config.width or width


def _seed(args: argparse.Namespace, model: LoadedModel) -> int:
    """Of the noise: a run is judged on the images that its own evaluation drew, unless told otherwise."""
    if args.seed is not None:
        return int(args.seed)
    return CRDConfig.seed if model.config is None else model.config.seed
