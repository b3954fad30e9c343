"""From what a user names (a run, a LoRA folder, a model) to a backbone whose `policy` role is that model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from crd.backbones import Backbone, load_backbone
from crd.checkpoint import PREFIX, CheckpointFolder
from crd.config import CRDConfig, load_config
from crd.errors import CRDError
from crd.export import LORA_FILE, load_lora, read_lora_settings
from crd.run_folder import CONFIG_FILE
from crd.snapshots import ANCHOR, POLICY, LoraSettings, Snapshots


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


def load_model(
    target: str | Path, *, base: str | None = None, checkpoint: str = "last", device: str = "cpu"
) -> LoadedModel:
    """Load what `target` names.

    Args:
        target: a run folder, a LoRA folder, a diffusers folder, a hub id, or "tiny-sd3".
        base: the model under a LoRA folder; None = "tiny-sd3".
        checkpoint: of a run: "last", "best" or the number of an update.
        device: where the model goes.

    Raises:
        CRDError: nothing usable there.
    """
    path = Path(target)
    if is_run(path):
        if base is not None:
            raise CRDError(f"{target} is a run and names its own base model, got --base {base} too; leave it out")
        return _load_run(path, checkpoint, device)
    if checkpoint != "last":
        raise CRDError(f"--checkpoint {checkpoint} is for runs and {target} is none (it has no {CONFIG_FILE})")
    if (path / LORA_FILE).is_file():
        backbone = load_backbone(base or "tiny-sd3", device=device)
        snapshots = Snapshots(backbone.denoiser, "lora", read_lora_settings(path), roles=())
        load_lora(snapshots, path)
        return LoadedModel(backbone, snapshots, POLICY, None)
    if base is not None:
        raise CRDError(f"--base is for LoRA folders and {target} is none (it has no {LORA_FILE}); leave it out")
    backbone = load_backbone(target, device=device)
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
            raise CRDError(f"{checkpoints.folder} records no best checkpoint (no evaluation yet); use last")
        return best[0]
    number = wanted.removeprefix(PREFIX)
    if not number.isdigit() or int(number) not in updates:
        raise CRDError(f"checkpoint must be last, best or one of {updates}, got {wanted!r}")
    return int(number)


def _load_run(path: Path, wanted: str, device: str) -> LoadedModel:
    config = load_config(path / CONFIG_FILE)
    checkpoints = CheckpointFolder(path / "checkpoints", config.keep_checkpoints)
    state = checkpoints.load(checkpoint_number(checkpoints, wanted))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    backbone = load_backbone(config.model, device=device)
    snapshots = build_snapshots(backbone, config, roles=())
    snapshots.load_state(POLICY, state.tensors[POLICY])
    return LoadedModel(backbone, snapshots, POLICY, config)
