"""`crd eval` and `crd compare`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from crd.command_options import (
    build_engine,
    guidance_scales,
    image_size,
    load_to_draw,
    noise_seed,
    sampling_settings,
    write_out,
)
from crd.comparison import (
    NO_PAIRS,
    Line,
    as_dict,
    check_comparable,
    check_protocol,
    comparison_table,
    differences,
    read_evaluations,
    remarks,
    table,
    to_dict,
)
from crd.config import CRDConfig
from crd.console import console
from crd.data import load_prompts, prompt_batch
from crd.errors import CRDError
from crd.evaluation import EVAL_SEED, draw, encode_unconditional
from crd.evaluation_options import evaluator_of, judges_of
from crd.geneval.benchmark import GenEvalSuite
from crd.geneval.detectors import judge_settings
from crd.loading import LoadedModel, base_name, check_target, is_run, run_config, takes_base
from crd.snapshots import ANCHOR

_OF_MODELS = (
    "prompts", "reward", "held_out", "frechet", "images", "seed", "steps", "solver", "guidance", "height", "width",
    "batch", "vae_slicing", "attention_backend", "compile", "base_dtype",
)  # fmt: skip


def evaluate(args: argparse.Namespace) -> None:
    """`crd eval`: rewards, held-out scores and statistics, or a benchmark, of the base model and of the trained one."""
    if args.benchmark is None:
        lines = _evaluate_rewards(args)
        console.print(table(lines))
        results = [to_dict(line) for line in lines]
    else:
        results = _evaluate_geneval(args)
    if args.out:
        _write_json(args.out, results, indent=None if args.benchmark is None else 2)


def compare(args: argparse.Namespace) -> None:
    """`crd compare`: paired differences to the first of several models, evaluated now or before.

    All that is cheap to refuse is refused before a model is loaded, and one model is in memory at a time.
    """
    found = {target: read_evaluations(Path(target)) for target in args.targets if target.endswith(".json")}
    kept = [line for lines in found.values() for line in lines]
    for line in kept:
        check_comparable(kept[0], line)
    models = [target for target in dict.fromkeys(args.targets) if target not in found]
    bases = _check_models(args, models)
    if len(kept) + len(models) * len(args.guidance or [None]) < 2:
        alone = kept[0].title if kept else models[0]
        raise CRDError(f"nothing to compare: got one evaluation, {alone}; name a second model")
    if models:
        found |= _evaluate_models(args, bases, kept)
    _show_comparison([line for target in args.targets for line in found[target]], args.out)


def _evaluate_models(
    args: argparse.Namespace, bases: Mapping[str, str | None], kept: Sequence[Line]
) -> dict[str, list[Line]]:
    """Evaluate models one after the other, all in the way that the first .json among the targets was, or the first run.

    Rewards and prompts are those of the first run: a .json does not hold the columns of its prompts.

    Args:
        args: of the command.
        bases: target -> model under it, None = it says so itself.
        kept: what the .json files hold.
    """
    run = next((config for config in map(run_config, bases) if config is not None), None)
    args, anchor_guidance = _shared(args, kept, run)
    engine = build_engine(args, run)
    judges = judges_of(args, run, engine)
    found: dict[str, list[Line]] = {}
    for target, base in bases.items():
        checkpoint = args.checkpoint if is_run(Path(target)) else "last"
        model = load_to_draw(args, engine, target, base, checkpoint, run)
        evaluator = evaluator_of(args, model, judges, engine, anchor_guidance)
        # Before the time is spent on images that could not be compared.
        for known in [*kept, *(line for lines in found.values() for line in lines)][:1]:
            if not evaluator.draws(known.record):
                raise CRDError(NO_PAIRS)
            check_protocol(known, target, evaluator.protocol)
        found[target] = [
            Line(target, judges.record(evaluator, model.role, scale)) for scale in guidance_scales(args, model)
        ]
        del model, evaluator  # before the next model is loaded
    return found


def _shared(
    args: argparse.Namespace, kept: Sequence[Line], run: CRDConfig | None
) -> tuple[argparse.Namespace, float | None]:
    """The arguments with one noise, steps and solver for all models, and the anchor's scale; None = each its own."""
    if kept:
        record = kept[0].record
        shared = {"seed": record.seed, "steps": record.steps, "solver": record.solver,
                  "images": len(record.prompt_id) // len(record.prompts)}  # fmt: skip
        anchor = None if record.protocol is None else record.protocol.anchor_guidance
    elif run is not None:
        shared, anchor = {"seed": run.seed, "steps": run.eval_steps, "solver": run.solver}, run.anchor_guidance
    else:
        return args, None
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**{**vars(args), **shared, **given}), anchor


def _show_comparison(lines: Sequence[Line], out: str | None) -> None:
    console.print(comparison_table(lines))
    for remark in remarks(lines):
        console.print(f"note: {remark}", markup=False)
    if out:
        first, *others = lines
        found = [{**to_dict(first), "differences": {}}]
        found += [{**to_dict(line), "differences": as_dict(differences(line.record, first.record))} for line in others]
        _write_json(out, found)


def _check_models(args: argparse.Namespace, models: Sequence[str]) -> dict[str, str | None]:
    """The base model to name for each target; each is there, and every option is for one of them at least."""
    if not models:
        for name in _OF_MODELS:
            if vars(args)[name] is not None:
                option = name.replace("_", "-")
                raise CRDError(f"--{option} is for models to evaluate, got .json files alone; leave it out")
    if args.base is not None and not any(map(takes_base, models)):
        raise CRDError(f"--base {args.base} is for LoRA folders and runs of a model object, got none; leave it out")
    if args.checkpoint != "last" and not any(is_run(Path(target)) for target in models):
        raise CRDError(f"--checkpoint {args.checkpoint} is for runs, got none; leave it out")
    bases = {target: args.base if takes_base(target) else None for target in models}
    for target in models:
        check_target(target, bases[target], args.checkpoint if is_run(Path(target)) else "last")
    return bases


def _evaluate_rewards(args: argparse.Namespace) -> list[Line]:
    if args.judge is not None:
        raise CRDError("--judge belongs to --benchmark geneval; add it, or leave --judge out")
    check_target(args.target, args.base, args.checkpoint)
    run = run_config(args.target)
    engine = build_engine(args, run)
    judges = judges_of(args, run, engine)
    model = load_to_draw(args, engine, args.target, args.base, args.checkpoint)
    evaluator = evaluator_of(args, model, judges, engine, None)
    return [Line(_name(args, role), judges.record(evaluator, role, scale)) for role, scale in _lines(args, model)]


def _evaluate_geneval(args: argparse.Namespace) -> list[dict[str, Any]]:
    """GenEval by task. The bundled model is judged by the bundled detector on scenes, others by the real one."""
    if args.reward:
        raise CRDError(f"--benchmark geneval has its own scores, got --reward {args.reward[0]} too; leave one out")
    if args.held_out:
        raise CRDError(f"--held-out is not for --benchmark, got {args.held_out[0]}; leave one out")
    if args.frechet:
        raise CRDError("--frechet is not for --benchmark, got both; leave one out")
    judge = args.judge or ("tiny" if base_name(args.target, args.base) == CRDConfig.model else "mask2former")
    bundled = judge_settings(judge).detector.startswith("tiny")
    prompts = args.prompts or ("scenes:test:240" if bundled else "geneval:test")
    dataset, engine = load_prompts(prompts), build_engine(args, run_config(args.target))
    suite = GenEvalSuite(dataset, judge, str(engine.device))
    suite.load()
    model = load_to_draw(args, engine, args.target, args.base, args.checkpoint)
    suite.check_size(*image_size(args, model))
    batch = prompt_batch(dataset, range(len(dataset)), args.images or 4, noise_seed(args, model), EVAL_SEED)
    uncond = encode_unconditional(model.backbone, engine, *image_size(args, model))
    results: list[dict[str, Any]] = []
    for role, scale in _lines(args, model):
        with model.snapshots.use(role) as denoiser:
            settings = sampling_settings(args, model, scale)
            rollout = draw(model.backbone, denoiser, engine, batch, settings, uncond, "geneval")
        summary = suite.judge(rollout)
        about = {"judge": judge, "prompts": prompts}
        line = {"model": _name(args, role), "guidance": scale, "steps": settings.steps,
                "solver": settings.solver, **about}  # fmt: skip
        title = Text(f"GenEval of {prompts}, judge {judge}")
        table = Table(f"{line['model']}, CFG {scale:g}", "images", "official", "strict", "soft", title=title)
        for task, images, *scores in summary.rows():
            table.add_row(task, str(images), *(f"{score:.3f}" for score in scores))
        console.print(table)
        results.append({**line, "tasks": [dataclasses.asdict(task) for task in (*summary.tasks, summary.overall)]})
    return results


def _lines(args: argparse.Namespace, model: LoadedModel) -> list[tuple[str, float]]:
    """What is compared: the base model and the trained one, each at every guidance scale."""
    return [(role, scale) for role in dict.fromkeys((ANCHOR, model.role)) for scale in guidance_scales(args, model)]


def _name(args: argparse.Namespace, role: str) -> str:
    return "base" if role == ANCHOR else str(args.target)


def _write_json(out: str, content: object, indent: int | None = None) -> None:
    text = json.dumps(content, indent=indent) + "\n"
    write_out(Path(out), lambda path: path.write_text(text, encoding="utf-8"))
