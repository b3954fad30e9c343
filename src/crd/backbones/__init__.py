"""Model families, and how a model named by a user becomes one of them."""

from __future__ import annotations

import importlib
import importlib.resources
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from crd.backbones.base import Backbone, guided_velocity
from crd.batch_sizes import is_out_of_memory
from crd.errors import CRDError, one_line

__all__ = [
    "FAMILIES",
    "TINY_SD3",
    "Backbone",
    "check_source",
    "family",
    "guided_velocity",
    "load_backbone",
    "read_json",
    "read_settings",
    "resolve_source",
]

# Pipeline class -> where its backbone lives. A new family is one file and one line here.
FAMILIES: dict[str, str] = {
    "StableDiffusion3Pipeline": "crd.backbones.sd3:SD3Backbone",
    "StableDiffusionPipeline": "crd.backbones.unet:StableDiffusionBackbone",
    "StableDiffusionXLPipeline": "crd.backbones.unet:StableDiffusionXLBackbone",
    "FluxPipeline": "crd.backbones.flux:FluxBackbone",
    "SanaPipeline": "crd.backbones.sana:SanaBackbone",
    "QwenImagePipeline": "crd.backbones.qwen_image:QwenImageBackbone",
    "ZImagePipeline": "crd.backbones.z_image:ZImageBackbone",
    "Flux2KleinPipeline": "crd.backbones.flux2:Flux2KleinBackbone",
    "Lumina2Pipeline": "crd.backbones.lumina2:Lumina2Backbone",
}

TINY_SD3 = "tiny-sd3"  # the model that ships inside the package
SETTINGS_FILE = "crd.json"  # beside model_index.json: what a pipeline folder cannot say about itself


def load_backbone(
    model: str | Path | DiffusionPipeline,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    max_sequence_length: int | None = None,
) -> Backbone:
    """Load a model and wrap it in the backbone of its family.

    Args:
        model: "tiny-sd3" (bundled), a folder in diffusers format, a hub id `owner/name`, or a pipeline.
        dtype: Of the weights; None = float32 for what is loaded here, unchanged for a pipeline object.
        device: Where the model goes.
        max_sequence_length: Text tokens per prompt; None = that of the folder's `crd.json`, else the stock default.

    Returns:
        The backbone; all its weights are frozen and in eval mode.

    Raises:
        CRDError: no such folder, not a pipeline, an unknown family, a load that fails, or too little memory.
    """
    if isinstance(model, DiffusionPipeline):
        family(type(model).__name__, "the pipeline object")
        pipeline: Any = model
        if dtype is not None:
            pipeline.to(dtype)
    else:
        source = resolve_source(model)
        pipeline = _load_pipeline(source, torch.float32 if dtype is None else dtype)
        if max_sequence_length is None and isinstance(source, Path):
            max_sequence_length = read_settings(source).get("max_sequence_length")
    backbone_class = family(type(pipeline).__name__, str(model))
    options = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    try:
        return backbone_class(pipeline, device=device, **options)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise CRDError(f"{model} does not fit into the memory of {device}: {one_line(error)}; load it in bfloat16 "
                       "(base_dtype), or on another device") from error  # fmt: skip


def check_source(model: str | Path) -> None:
    """Refuse what `load_backbone` could not find or does not know, without loading it; a hub id is not looked up.

    Raises:
        CRDError: no such folder, not a pipeline, or an unknown family.
    """
    source = resolve_source(model)
    if isinstance(source, Path):
        family(str(_read_index(source)["_class_name"]), str(source))


def family(pipeline_class: str, source: str) -> type:
    """The backbone class for a pipeline class name."""
    if pipeline_class not in FAMILIES:
        raise CRDError(f"{source} is a {pipeline_class}; supported pipelines: {', '.join(sorted(FAMILIES))}")
    module, name = FAMILIES[pipeline_class].split(":")
    found: type = getattr(importlib.import_module(module), name)
    return found


def resolve_source(model: str | Path) -> str | Path:
    """A folder (Path) or a hub id (str)."""
    if str(model) == TINY_SD3 and not Path(TINY_SD3).exists():
        folder = Path(str(importlib.resources.files("crd"))) / "tiny" / "model"
        if not (folder / "model_index.json").is_file():
            raise CRDError(f"no bundled model in {folder}; reinstall crd, or run python -m crd.tiny.pretrain")
        return folder
    path = Path(model).expanduser()
    if path.exists():
        return path
    if isinstance(model, str) and model.count("/") == 1 and all(model.split("/")) and model[0] not in "./~":
        return model
    raise CRDError(f"no model at {model}; give a diffusers folder, a hub id owner/name, or {TINY_SD3}")


def _load_pipeline(source: str | Path, dtype: torch.dtype) -> Any:
    """Load by `DiffusionPipeline`, telling any failure in one line."""
    absent: dict[str, None] = {}
    if isinstance(source, Path):
        index = _read_index(source)
        family(str(index["_class_name"]), str(source))
        # save_pretrained writes a missing component (SD3 without T5) as [null, null], but from_pretrained
        # wants to be told so again.
        absent = {name: None for name, value in index.items() if value == [None, None]}
    try:
        with warnings.catch_warnings():
            # diffusers 0.36, our oldest, knows only this name; newer ones prefer `dtype`.
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            return DiffusionPipeline.from_pretrained(str(source), torch_dtype=dtype, **absent)
    except Exception as error:  # diffusers, transformers, safetensors and the hub raise a dozen types here
        hint = "check the id and the connection" if isinstance(source, str) else "the folder is damaged or incomplete"
        reason = next(iter(str(error).strip().splitlines()), "")
        raise CRDError(f"cannot load {source}: {type(error).__name__}: {reason}; {hint}") from error


def _read_index(folder: Path) -> dict[str, object]:
    """`model_index.json` of a local pipeline, checked before gigabytes are read."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise CRDError(f"{folder} is not a diffusers pipeline: it has no model_index.json; give the pipeline's folder")
    content = read_json(index)
    if not isinstance(content.get("_class_name"), str):
        raise CRDError(f"{index} names no _class_name; give a folder written by save_pretrained")
    return content


def read_settings(folder: Path) -> dict[str, int]:
    """`crd.json` of a pipeline folder, {} without one; only `max_sequence_length` is known."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return {}
    settings = read_json(path)
    unknown = sorted(set(settings) - {"max_sequence_length"})
    if unknown:
        raise CRDError(f"{path} has the unknown key {unknown[0]!r}; known: 'max_sequence_length'")
    length = settings.get("max_sequence_length")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool)):
        raise CRDError(f"{path}: max_sequence_length must be an integer, got {length!r}")
    return {} if length is None else {"max_sequence_length": length}


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file of a model."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CRDError(f"cannot read {path}: {error}; restore the file") from error
    if not isinstance(content, dict):
        raise CRDError(f"{path} must hold a JSON object, got {type(content).__name__}; restore the file")
    return content
