"""A model's configuration files: from its folder, from what is known of a few published models, or from the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from crd.backbones import read_json, read_settings, resolve_source
from crd.errors import CRDError
from crd.metrics.hub_files import find_file

INDEX = "model_index.json"
_NETWORKS = ("transformer", "unet", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
_SCHEDULER = "scheduler"


@dataclass(frozen=True)
class Component:
    """One part of a pipeline: its library ("diffusers" or "transformers"), class, and configuration."""

    library: str
    kind: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class ModelFiles:
    """What the configuration files of a pipeline say."""

    pipeline_class: str
    components: Mapping[str, Component]
    options: Mapping[str, Any]  # of the pipeline's constructor
    max_sequence_length: int | None  # None = the stock default
    origin: str  # where it was read, for people


def read_model(model: str) -> ModelFiles:
    """The configuration of "tiny-sd3", a folder or a hub id; no weights are read.

    Raises:
        CRDError: no such model, or the hub cannot be reached and the model is none of `known_models`.
    """
    source = resolve_source(model)
    # Before the hub: a plan should need no connection where it can do without, and some of these ask for a login.
    return _known(source) if isinstance(source, str) and source in known_models() else _read(source, model)


def known_models() -> dict[str, Any]:
    """Hub id -> configuration, of the models that a plan can be made for without the hub."""
    content: dict[str, Any] = yaml.safe_load(files("crd.planning").joinpath("known_models.yaml").read_text("utf-8"))
    return {name: value for name, value in content.items() if "/" in name}


def _read(source: str | Path, model: str) -> ModelFiles:
    index = read_json(find_file(str(source), INDEX))
    if not isinstance(index.get("_class_name"), str):
        raise CRDError(f"{INDEX} of {model} names no _class_name; give a model in diffusers format")
    components: dict[str, Component] = {}
    options: dict[str, Any] = {}
    for name, value in index.items():
        if not isinstance(value, list):
            options[name] = value
        elif value[0] is not None and name in (*_NETWORKS, _SCHEDULER):
            file = f"{name}/{'scheduler_config' if name == _SCHEDULER else 'config'}.json"
            components[name] = Component(str(value[0]), str(value[1]), read_json(find_file(str(source), file)))
    length = read_settings(source).get("max_sequence_length") if isinstance(source, Path) else None
    origin = f"the folder {source}" if isinstance(source, Path) else "the hub"
    return ModelFiles(str(index["_class_name"]), components, options, length, origin)


def _known(name: str) -> ModelFiles:
    entry = known_models()[name]
    components = {
        part: Component(value["library"], value["class"], value["config"])
        for part, value in entry["components"].items()
    }
    return ModelFiles(entry["pipeline"], components, {}, None, "crd's own record of it")
