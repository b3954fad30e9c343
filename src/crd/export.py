"""A trained role on its way out: LoRA files and whole pipelines that stock diffusers loads."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from crd.atomic import share
from crd.backbones import SETTINGS_FILE
from crd.backbones.base import Backbone
from crd.errors import CRDError
from crd.snapshots import ANCHOR, POLICY, LoraSettings, Snapshots

LORA_FILE = "pytorch_lora_weights.safetensors"
_ADAPTER_SETTINGS = "lora_adapter_metadata"  # diffusers' name of a LoraConfig in the header of a LoRA file


def export_lora(
    backbone: Backbone,
    snapshots: Snapshots,
    folder: str | Path,
    *,
    role: str = POLICY,
    overwrite: bool = False,
) -> Path:
    """Write a role's adapter so that `pipe.load_lora_weights(folder)` reproduces it.

    The file holds `B' = (alpha / rank) B` and A: a reader that knows nothing of alpha assumes alpha = rank,
    so the factor must be inside the matrices.

    Args:
        backbone: Whose stock pipeline class writes the file.
        snapshots: In LoRA mode.
        folder: To create, holding `pytorch_lora_weights.safetensors`.
        role: "policy", "old" or "sampler".
        overwrite: Replace an earlier export in `folder`.

    Returns:
        The folder.

    Raises:
        CRDError: full fine-tuning has no adapter, the folder is taken, or it cannot be written.
    """
    if snapshots.lora is None:
        raise CRDError("full fine-tuning has no LoRA to export; export the whole pipeline instead")
    layers = {
        name: tensor * snapshots.lora.scale if ".lora_B." in name else tensor
        for name, tensor in snapshots.state(role).items()
    }
    with _new_folder(Path(folder), overwrite) as temporary:
        keyword = f"{backbone.denoiser_component}_lora_layers"
        type(backbone.pipeline).save_lora_weights(str(temporary), **{keyword: layers})
    return Path(folder)


def load_lora(snapshots: Snapshots, folder: str | Path, *, role: str = POLICY) -> None:
    """Read a folder of `export_lora`, or a LoRA of diffusers, into a role, dividing B by the role's alpha / rank.

    Raises:
        CRDError: not in LoRA mode, no such file, an unreadable file, or other modules or another rank.
    """
    if snapshots.lora is None:
        raise CRDError(f"{folder} holds a LoRA but the model is set up for full fine-tuning; use mode 'lora'")
    scale = snapshots.lora.scale
    state = {
        name: tensor.float() / scale if ".lora_B." in name else tensor.float()
        for name, tensor in _read_lora(Path(folder)).items()
    }
    snapshots.load_state(role, state)


def read_lora_settings(folder: str | Path) -> LoraSettings:
    """Settings under which what `load_lora` reads is kept as it is: the file's rank, alpha = rank, its modules.

    Raises:
        CRDError: no such file, an unreadable file, or several ranks in it.
    """
    state = _read_lora(Path(folder))
    ranks = {tensor.shape[0] for name, tensor in state.items() if name.endswith(".lora_A.weight")}
    if len(ranks) != 1:
        raise CRDError(f"{folder} must hold adapters of one rank, got ranks {sorted(ranks)}; export it with crd export")
    targets = sorted({name.rsplit(".lora_", 1)[0] for name in state})
    rank = ranks.pop()
    return LoraSettings(targets=tuple(targets), rank=rank, alpha=float(rank))


def export_pipeline(
    backbone: Backbone,
    snapshots: Snapshots,
    folder: str | Path,
    *,
    role: str = POLICY,
    overwrite: bool = False,
) -> Path:
    """Write the whole pipeline with a role's weights in it, `W + (alpha / rank) B A`, in diffusers format.

    The live model is not touched; the merged weights are rounded to the base's dtype once, from float32.

    Args:
        backbone: Owner of the other components.
        snapshots: Either mode.
        folder: To create.
        role: Any role; "anchor" writes the pretrained model.
        overwrite: Replace an earlier export in `folder`.

    Returns:
        The folder.

    Raises:
        CRDError: the folder is taken or cannot be written.
    """
    merged = _plain_copy(backbone, snapshots, role)
    own = backbone.pipeline  # its components, and options such as `is_distilled` that are none
    pipeline = type(own)(**{**own.components, **own.parameters, backbone.denoiser_component: merged})
    with _new_folder(Path(folder), overwrite) as temporary:
        pipeline.save_pretrained(str(temporary))
        settings = backbone.settings()
        if settings:
            (temporary / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


@torch.no_grad()
def _plain_copy(backbone: Backbone, snapshots: Snapshots, role: str) -> nn.Module:
    """A denoiser of the stock class on the CPU with the role's weights and no adapters."""
    if role == POLICY:
        source = snapshots.module  # `use` may yield a DDP wrapper
    else:
        with snapshots.use(role) as source:
            pass
    state: dict[str, Tensor] = {}
    for name, tensor in source.state_dict().items():
        if not any(part.startswith("lora_") for part in name.split(".")):
            state[name.replace(".base_layer.", ".")] = tensor.detach().cpu().clone()
    if snapshots.lora is not None and role != ANCHOR:
        adapters: list[tuple[str, Any]] = [
            (name, layer) for name, layer in source.named_modules() if isinstance(layer, LoraLayer)
        ]
        for name, layer in adapters:
            weight = state[f"{name}.weight"]
            merged = weight.float() + layer.get_delta_weight(role).float().cpu()
            state[f"{name}.weight"] = merged.to(weight.dtype)
    denoiser: Any = backbone.denoiser
    with torch.random.fork_rng(devices=[]):  # building draws weights that are replaced at once
        plain: nn.Module = type(denoiser).from_config(denoiser.config)
    plain.load_state_dict(state, strict=True, assign=True)
    return plain.eval()


def _read_lora(folder: Path) -> dict[str, Tensor]:
    """Adapter tensors of a diffusers LoRA folder, without the component prefix; its scale is inside B."""
    path = folder / LORA_FILE
    if not path.is_file():
        raise CRDError(f"{folder} has no {LORA_FILE}; give a folder written by crd export or crd train")
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        settings: dict[str, Any] = dict(json.loads(header.get(_ADAPTER_SETTINGS, "{}")))
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise CRDError(f"cannot read {path}: {error}; the file is damaged, export it again") from error
    components = {name.split(".", 1)[0] for name in tensors}
    if len(components) != 1 or any(".lora_" not in name for name in tensors):
        raise CRDError(f"{path} must hold the LoRA of one denoiser, got parts {sorted(components)}; export it again")
    prefix = f"{components.pop()}."
    own = {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}
    scale = _file_scale(path, own)
    return {
        name.removeprefix(prefix): scale * tensor.float() if ".lora_B." in name else tensor
        for name, tensor in tensors.items()
    }


def _file_scale(path: Path, settings: Mapping[str, Any]) -> float:
    """What stock diffusers multiplies B A with: 1 of a file that does not say, as `export_lora` writes them."""
    if not settings:
        return 1.0
    special = [name for name in ("use_dora", "alpha_pattern", "rank_pattern") if settings.get(name)]
    try:
        alpha, rank = float(settings["lora_alpha"]), float(settings["r"])
    except (KeyError, TypeError, ValueError):
        special += ["lora_alpha", "r"]
    if special:
        raise CRDError(f"{path} has a LoRA with settings that crd does not read ({', '.join(special)}); merge it into "
                       "its model and give that") from None  # fmt: skip
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


@contextmanager
def _new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block succeeds, and vanishes when it fails."""
    _check_replaceable(folder, overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # In the same parent: only a rename within one filesystem is atomic.
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise CRDError(f"cannot write {folder}: {error}; choose another folder") from error
    try:
        yield temporary
        share(temporary)
        _swap(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise CRDError(f"cannot write {folder}: {error}; free some space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CRDError(f"{folder} is a file; give a folder")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise CRDError(f"{folder} is not empty; pass overwrite or choose another folder")
    # Overwriting removes the whole folder, so it must be one that an export made.
    if not (folder / LORA_FILE).is_file() and not (folder / "model_index.json").is_file():
        raise CRDError(f"{folder} is not an earlier export, so it is not overwritten; choose another folder")


def _swap(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`; what was there is moved aside first and put back on failure."""
    if not folder.exists():
        os.replace(temporary, folder)
        return
    aside = temporary.with_name(temporary.name + ".old")
    os.replace(folder, aside)
    try:
        os.replace(temporary, folder)
    except OSError:
        os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
