"""How fast and in how much memory the networks run: options that change no result, apart from rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import nn

from crd.backbones.base import Backbone
from crd.config import CRDConfig
from crd.console import progress_steps
from crd.data import PromptDataset, epoch_order
from crd.engine import Engine
from crd.errors import CRDError
from crd.evaluation import encode_prompts
from crd.prompt_cache import PromptCache
from crd.role_stores import ANCHOR, POLICY
from crd.snapshots import Snapshots

_GRAPHS = 64


def prepare_backbone(backbone: Backbone, config: CRDConfig) -> None:
    """Apply `vae_slicing`, `gradient_checkpointing` and `attention_backend`, before any role is made.

    Raises:
        CRDError: an attention backend that is unknown, not installed, or not for this model.
    """
    denoiser: Any = backbone.denoiser  # a diffusers model; nn.Module knows none of its methods
    if config.vae_slicing:
        backbone.pipeline.vae.enable_slicing()
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if config.attention_backend is None:
        return
    if not any(_has_backends(module) for module in denoiser.modules()):
        raise CRDError(
            f"{type(denoiser).__name__} has no attention backends in diffusers, got "
            f"attention_backend={config.attention_backend}; leave it out"
        )
    try:
        denoiser.set_attention_backend(config.attention_backend)
    except (ImportError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CRDError(f"attention_backend={config.attention_backend}: {reason}; choose another") from error


def compile_blocks(backbone: Backbone, snapshots: Snapshots, compiler: str = "inductor") -> int:
    """Compile the repeated blocks of every role's network with `torch.compile`; in LoRA mode it is one network.

    Args:
        backbone: names the blocks.
        snapshots: the roles.
        compiler: a backend of `torch.compile`.

    Returns:
        Number of modules that will be compiled, at their first call.
    """
    # Roles, gradients and ragged last batches are each another graph of one block; torch gives up after 8.
    torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
    blocks: dict[int, nn.Module] = {}
    for role in (POLICY, *snapshots.roles, ANCHOR):
        with snapshots.use(role) as denoiser:
            found = [module for module in denoiser.modules() if type(module).__name__ in backbone.repeated_blocks]
            blocks.update({id(module): module for module in found})
    for module in blocks.values():
        module.compile(backend=compiler)
    return len(blocks)


def memory_advice(config: CRDConfig, sharded: bool) -> str:
    """Settings that save memory and that a run does not use yet, as the end of a message."""
    steps = (
        (config.finetune == "full", "finetune=lora"),
        (config.base_dtype == "float32" and config.finetune == "lora", "base_dtype=bfloat16"),
        (config.mixed_precision == "no", "mixed_precision=bf16"),
        (not config.gradient_checkpointing, "gradient_checkpointing=true"),
        (not config.cache_prompts, "cache_prompts=true"),
        (not config.vae_slicing, "vae_slicing=true"),
        (config.cache_references, "cache_references=false"),
        (not sharded and config.finetune == "lora", "more GPUs with fsdp2"),
        (True, "a smaller height and width"),
    )
    return "try " + ", ".join(advice for helps, advice in steps if helps)


def cache_prompts(
    backbone: Backbone,
    engine: Engine,
    config: CRDConfig,
    model: str,
    folder: Path,
    train: PromptDataset,
    evaluation: PromptDataset | None,
) -> None:
    """Encode all prompts that a run will draw and that have no file in it yet; then the encoders leave the device.

    Several processes encode a part each, into one folder.

    Args:
        backbone: reads the files from here on.
        engine: for its autocast.
        config: of the run; the order of its prompts is known in advance.
        model: names the model.
        folder: of the run.
        train: training prompts.
        evaluation: evaluation prompts.

    Raises:
        CRDError: a file cannot be written.
    """
    size = (config.height, config.width)
    order = epoch_order(len(train), 0, config.updates * config.prompts_per_update, config.seed)
    prompts = [train.prompts[index] for index in order] + list(evaluation.prompts if evaluation is not None else ())
    text = backbone.settings()
    loaded = f"{model} {config.base_dtype} {engine.mixed_precision} {json.dumps(text, sort_keys=True)}"
    cache = PromptCache(folder / "prompts", loaded, str(engine.device))
    distinct = list(dict.fromkeys(prompts))
    share = engine.ranks.share(len(distinct))
    own = [distinct[int(index)] for index in share.index[share.places]]
    with engine.ranks.together(), progress_steps("encode prompts") as report:
        cache.fill(own, size, lambda texts: encode_prompts(backbone, engine, texts, *size), report)
    backbone.cache = cache
    backbone.park_encoders()


def _has_backends(module: nn.Module) -> bool:
    return hasattr(module, "processor") and hasattr(module.processor, "_attention_backend")
