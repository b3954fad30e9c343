"""What several commands make of their arguments: engine, model, how images are drawn, the file to write.

What is not given is that of the run, so that a run is judged on the images that its own evaluation drew.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from crd.atomic import replace_file
from crd.batch_sizes import BatchSize
from crd.config import CRDConfig
from crd.engine import Engine
from crd.errors import CRDError
from crd.evaluation import SamplingSettings
from crd.execution import compile_blocks, prepare_backbone
from crd.loading import LoadedModel, load_model, run_config


def write_out(path: Path, write: Callable[[Path], object]) -> None:
    """Create a file for the user, whole or not at all, and the folders above it; `write` gets a name of its suffix."""
    try:
        path = path.resolve()  # of a link, what it points to
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            write(path)  # a pipe, say
        else:
            replace_file(path, write)
    except (OSError, ValueError, KeyError) as error:  # the latter two: PIL, of what a format cannot hold
        raise CRDError(f"cannot write {path}: {error}; choose another --out") from error


def build_engine(args: argparse.Namespace, config: CRDConfig | None) -> Engine:
    """The engine of `--device`, at the precision of a run.

    Raises:
        CRDError: several processes were launched.
    """
    engine = Engine(CRDConfig.mixed_precision if config is None else config.mixed_precision, args.device)
    if engine.ranks.world_size > 1:
        raise CRDError(
            f"crd {args.command} runs in one process, got {engine.ranks.world_size}; only train takes several"
        )
    return engine


def load_to_draw(
    args: argparse.Namespace,
    engine: Engine,
    target: str,
    base: str | None,
    checkpoint: str,
    like: CRDConfig | None = None,
) -> LoadedModel:
    """A model that runs as its run has it run; other arguments as of `load_model`.

    Args:
        args: of the command.
        engine: where it runs.
        target: what is loaded.
        base: the model under it.
        checkpoint: of a run.
        like: a run whose type of weights a target has that is no run.

    Raises:
        CRDError: nothing usable there, or an attention backend that is not for this model or machine.
    """
    dtype = args.base_dtype
    if dtype is None and like is not None and run_config(target) is None:
        dtype = like.base_dtype
    model = load_model(
        target, base=base, checkpoint=checkpoint, dtype=dtype, device=str(engine.device),
        prepare=lambda backbone, config: prepare_backbone(backbone, _execution(args, config)),
    )  # fmt: skip
    if _execution(args, model.config).compile == "regional":
        compile_blocks(model.backbone, model.snapshots)
    return model


def _execution(args: argparse.Namespace, config: CRDConfig | None) -> CRDConfig:
    """How networks are run: as given, else as in the run; there are no gradients to save memory of."""
    named = {"rollout_batch": args.batch, "vae_slicing": args.vae_slicing, "compile": args.compile,
             "attention_backend": args.attention_backend}  # fmt: skip
    given = {name: value for name, value in named.items() if value is not None}
    return dataclasses.replace(config or CRDConfig(), gradient_checkpointing=False, **given)


def sampling_settings(args: argparse.Namespace, model: LoadedModel, guidance: float) -> SamplingSettings:
    """As given, else as the run evaluates."""
    config = _execution(args, model.config)
    rows = config.rollout_batch
    if isinstance(rows, str):
        raise CRDError(f"rollout_batch={rows} is for the start of a run, its config.yaml holds a number; give --batch")
    return SamplingSettings(
        args.steps or config.eval_steps, guidance, BatchSize("--batch", rows), *image_size(args, model),
        args.solver or config.solver,
    )  # fmt: skip


def guidance_scales(args: argparse.Namespace, model: LoadedModel) -> list[float]:
    """Guidance scales: as given, else that of the model as it is."""
    return args.guidance or [plain_scale(model)]


def plain_scale(model: LoadedModel) -> float:
    """Guidance scale of a model as it is: no CFG, or what it was trained with where the scale is its input."""
    backbone, config = model.backbone, model.config
    return backbone.stock_scale if config is None else backbone.trained_scale(config.rollout_guidance)


def image_size(args: argparse.Namespace, model: LoadedModel) -> tuple[int, int]:
    """Height and width of the images, px: as given, else the run's, else the model's own."""
    config, (height, width) = model.config or CRDConfig(), model.backbone.default_size
    return args.height or config.height or height, args.width or config.width or width


def noise_seed(args: argparse.Namespace, model: LoadedModel) -> int:
    """Of the noise: as given, else that of the run."""
    if args.seed is not None:
        return int(args.seed)
    return CRDConfig.seed if model.config is None else model.config.seed
