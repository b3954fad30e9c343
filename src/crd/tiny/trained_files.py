"""The bundled world's own networks on disk: weights in float16, and beside them what their numbers mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from crd.errors import CRDError
from crd.text_files import read_text


def save_trained(network: nn.Module, stem: Path, meaning: Mapping[str, Any], indent: int | None = None) -> None:
    """Write `<stem>.safetensors` in float16, and `meaning` as `<stem>.json`."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    half = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in network.state_dict().items()}
    save_file(half, _weights(stem))
    _about(stem).write_text(json.dumps(meaning, indent=indent) + "\n", encoding="utf-8")


def load_trained(
    network: nn.Module, stem: Path, meaning: Mapping[str, Any], *, kind: str, name: str, again: str
) -> None:
    """Put what `save_trained` wrote into `network`, which is float32, frozen and ready to predict then.

    Args:
        network: of the architecture that was saved.
        stem: of the two files.
        meaning: what the JSON must say.
        kind: of network, for messages: "detector".
        name: of the network, for messages: "conv network".
        again: how to get the files again, for messages.

    Raises:
        CRDError: a file is missing or damaged, or does not fit the network or its meaning.
    """
    about = _read_about(_about(stem), kind, again)
    for key, expected in meaning.items():
        if about.get(key) != expected:
            raise CRDError(
                f"{kind} {_about(stem)}: {key} must be {expected!r:.60}, got {about.get(key)!r:.60}; {again}"
            )
    path = _weights(stem)
    if not path.is_file():
        raise CRDError(f"no {kind} weights at {path}; {again}")
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        told = str(error).splitlines()[0]
        raise CRDError(f"{kind} weights {path} do not fit the {name} ({told:.80}); {again}") from error
    network.eval().requires_grad_(False)


def _read_about(path: Path, kind: str, again: str) -> dict[str, Any]:
    text = read_text(path, f"{kind} description", f"no {kind} description at {path}; {again}")
    try:
        about = json.loads(text)
    except ValueError as error:
        raise CRDError(f"{path} is not JSON ({error}); {again}") from error
    if not isinstance(about, dict):
        raise CRDError(f"{path} must hold an object, got {text[:60]!r}; {again}")
    return about


def _weights(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.safetensors")


def _about(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.json")
