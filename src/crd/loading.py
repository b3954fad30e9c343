"""From what a user names to what a run works with: a model (or run, or LoRA folder) as `policy`, checked prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from crd.backbones import Backbone, check_source, load_backbone
from crd.checkpoint import PREFIX, CheckpointFolder
from crd.config import CRDConfig
from crd.config_io import load_config
from crd.data import PromptDataset, Prompts, load_prompts
from crd.errors import CRDError, told_of
from crd.export import LORA_FILE, load_lora, read_lora_settings
from crd.rewards import RewardSet
from crd.run_folder import CONFIG_FILE, GIVEN_IN_PYTHON
from crd.snapshots import ANCHOR, POLICY, LoraSettings, Snapshots

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of `CRDConfig.base_dtype`


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to draw: `role` is "policy" for a run or LoRA, "anchor" for a plain base model."""

    backbone: Backbone
    snapshots: Snapshots
    role: str
    config: CRDConfig | None  # of the run


def is_run(folder: Path) -> bool:
    """Whether `folder` is the folder of a run."""
    return (folder / CONFIG_FILE).is_file()


def run_config(target: str | Path) -> CRDConfig | None:
    """The configuration of a run; None if `target` is none."""
    path = Path(target)
    return load_config(path / CONFIG_FILE) if is_run(path) else None


def takes_base(target: str | Path) -> bool:
    """Whether `target` does not say itself what model is under it: a LoRA folder, or a run of a model object."""
    config = run_config(target)
    return (Path(target) / LORA_FILE).is_file() if config is None else config.model == GIVEN_IN_PYTHON


def base_name(target: str | Path, base: str | None = None) -> str:
    """The model under what `load_model` would load, or that model itself; nothing is loaded.

    Raises:
        CRDError: `base` is missing, or `target` has one of its own.
    """
    config, free = run_config(target), takes_base(target)
    if base is not None and not free and config is not None:
        raise CRDError(f"{target} is a run and names its own base model, got --base {base} too; leave it out")
    if base is not None and not free:
        raise CRDError(f"--base is for LoRA folders and {target} is none (it has no {LORA_FILE}); leave it out")
    if base is None and free and config is not None:
        raise CRDError(f"{target} was trained from an object given in Python; name its model with --base MODEL")
    if base is not None:
        return base
    if config is not None:
        return config.model
    return CRDConfig.model if free else str(target)


def check_target(target: str | Path, base: str | None = None, checkpoint: str = "last") -> None:
    """Refuse what `load_model` could not find, before anything is loaded; arguments as there.

    Raises:
        CRDError: nothing usable there.
    """
    path = Path(target)
    if is_run(path):
        checkpoint_number(CheckpointFolder.of_run(path), checkpoint)
    elif checkpoint != "last":
        raise CRDError(f"--checkpoint {checkpoint} is for runs and {target} is none (it has no {CONFIG_FILE})")
    check_source(base_name(target, base))


def judged_prompts(field: str, source: Prompts, rewards: RewardSet) -> PromptDataset:
    """The prompts of `source`, all of which `rewards` can judge.

    Raises:
        CRDError: otherwise; begins with `field`, the setting that named the source.
    """
    with told_of(field):
        dataset = load_prompts(source)
        rewards.check_prompts(dataset.prompts, dataset.columns)
    return dataset


def training_backbone(
    model: str | Path | DiffusionPipeline | Backbone, config: CRDConfig, device: torch.device
) -> Backbone:
    """The backbone that a run trains, loaded with `config.base_dtype`.

    Raises:
        CRDError: the model cannot be loaded, an object has a dtype that cannot be trained, or a `Backbone` object lies
            elsewhere or has another dtype.
    """
    if not isinstance(model, Backbone):
        # A pipeline object keeps the dtype it came with, unless another than the default is asked for.
        as_it_is = isinstance(model, DiffusionPipeline) and config.base_dtype == CRDConfig.base_dtype
        dtype = None if as_it_is else DTYPES[config.base_dtype]
        return _trainable(load_backbone(model, dtype=dtype, device=device), config)
    if config.base_dtype != CRDConfig.base_dtype:
        raise CRDError(
            f"base_dtype={config.base_dtype} is for models that crd loads, got a Backbone object; leave it out and "
            "load the backbone with that dtype"
        )
    if (model.device.type, model.device.index or 0) != (device.type, device.index or 0):
        raise CRDError(
            f"the backbone lies on {model.device} but the run is on {device}; load it there, or set device to its own"
        )
    return _trainable(model, config)


def _trainable(backbone: Backbone, config: CRDConfig) -> Backbone:
    """The backbone, whose weights have a type that `config` could ask for.

    Raises:
        CRDError: they have another.
    """
    allowed = [torch.float32] if config.finetune == "full" else list(DTYPES.values())
    if backbone.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise CRDError(f"finetune={config.finetune} needs pretrained weights in {names}, got a model in "
                       f"{str(backbone.dtype).removeprefix('torch.')}; load it so")  # fmt: skip
    return backbone


def build_snapshots(backbone: Backbone, config: CRDConfig, roles: tuple[str, ...]) -> Snapshots:
    """The roles as a run's configuration asks for them."""
    if config.finetune == "full":
        return Snapshots(backbone.denoiser, "full", roles=roles)
    targets = backbone.lora_targets if config.lora_targets is None else config.lora_targets
    return Snapshots(
        backbone.denoiser,
        "lora",
        LoraSettings(targets, config.lora_rank, config.lora_alpha, seed=config.seed),
        roles,
    )


def build_optimizer(snapshots: Snapshots, config: CRDConfig) -> torch.optim.Optimizer:
    """AdamW on the policy's parameters."""
    return torch.optim.AdamW(
        snapshots.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
    )


def load_model(
    target: str | Path,
    *,
    base: str | None = None,
    checkpoint: str = "last",
    dtype: str | None = None,
    device: str = "cpu",
    prepare: Callable[[Backbone, CRDConfig | None], None] = lambda _backbone, _config: None,
) -> LoadedModel:
    """Load what `target` names.

    Args:
        target: a run folder, a LoRA folder, a diffusers folder, a hub id, or "tiny-sd3".
        base: the model under a LoRA folder (None = "tiny-sd3"), or under a run whose model was an object.
        checkpoint: of a run: "last", "best" or the number of an update.
        dtype: of the pretrained weights, a key of `DTYPES`; None = as the run has them, else float32.
        device: where the model goes.
        prepare: gets the backbone before any role is made of it, and the configuration of its run.

    Raises:
        CRDError: nothing usable there.
    """
    check_target(target, base, checkpoint)
    path, model = Path(target), base_name(target, base)
    if is_run(path):
        return _load_run(path, model, checkpoint, dtype, device, prepare)
    backbone = load_backbone(model, dtype=DTYPES[dtype or CRDConfig.base_dtype], device=device)
    prepare(backbone, None)
    if (path / LORA_FILE).is_file():
        snapshots = Snapshots(backbone.denoiser, "lora", read_lora_settings(path), roles=())
        load_lora(snapshots, path)
        return LoadedModel(backbone, snapshots, POLICY, None)
    # An untouched adapter costs nothing, and gives every model the same roles.
    snapshots = Snapshots(backbone.denoiser, "lora", LoraSettings(backbone.lora_targets, rank=1, alpha=1.0), roles=())
    return LoadedModel(backbone, snapshots, ANCHOR, None)


def checkpoint_number(checkpoints: CheckpointFolder, wanted: str) -> int:
    """The update that "last", "best" or a number names.

    Raises:
        CRDError: there is none.
    """
    updates = checkpoints.updates()
    if not updates:
        raise CRDError(f"no checkpoint in {checkpoints.folder}; train the run first")
    if wanted == "last":
        return updates[-1]
    if wanted == "best":
        best = checkpoints.best()
        if best is None:
            raise CRDError(
                f"{checkpoints.folder} records no best checkpoint (no evaluation yet, or a held-out score "
                "fell in each); use last"
            )
        return best[0]
    number = wanted.removeprefix(PREFIX)
    if not number.isdigit() or int(number) not in updates:
        raise CRDError(f"checkpoint must be last, best or one of {updates}, got {wanted!r}")
    return int(number)


def _load_run(
    path: Path,
    model: str,
    wanted: str,
    dtype: str | None,
    device: str,
    prepare: Callable[[Backbone, CRDConfig | None], None],
) -> LoadedModel:
    config = load_config(path / CONFIG_FILE)
    checkpoints = CheckpointFolder.of_run(path)
    state = checkpoints.load(checkpoint_number(checkpoints, wanted))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    backbone = load_backbone(model, dtype=DTYPES[dtype or config.base_dtype], device=device)
    prepare(backbone, config)
    snapshots = build_snapshots(backbone, config, roles=())
    snapshots.load_state(POLICY, state.tensors[POLICY])
    return LoadedModel(backbone, snapshots, POLICY, config)
