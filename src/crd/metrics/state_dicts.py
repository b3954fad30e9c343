"""Weights published as one torch file: read without executing anything, and loaded name by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from crd.errors import CRDError

Weights = dict[str, Tensor]


def read_weights(path: Path, entry: str | None = None) -> Weights:
    """Tensors by name of a `torch.save` file, on the CPU, in the types they were saved in.

    Args:
        path: the file.
        entry: where in the saved dictionary they are; None = it is they.

    Raises:
        CRDError: no such file, or other contents.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, the tensors and the disk fail in a dozen types
        reason = next(iter(str(error).strip().splitlines()), "")
        told = f"cannot read weights from {path}: {type(error).__name__}: {reason:.200}"
        raise CRDError(f"{told}; download it again") from error
    if entry is not None:
        if not isinstance(saved, Mapping) or entry not in saved:
            raise CRDError(f"{path} has no entry {entry!r}; give the file as it was published")
        saved = saved[entry]
    if not isinstance(saved, Mapping) or not all(isinstance(tensor, Tensor) for tensor in saved.values()):
        raise CRDError(f"{path} must hold tensors by name, got {type(saved).__name__}; give the file as published")
    return {str(name): tensor for name, tensor in saved.items()}


def split(weights: Weights, prefixes: Collection[str], unused: Collection[str], path: Path) -> list[Weights]:
    """The weights below each prefix, without it.

    Args:
        weights: by full name.
        prefixes: of which none begins another.
        unused: full names that may be there and are left out.
        path: where they are from, for the message.

    Raises:
        CRDError: a weight that belongs nowhere, named.
    """
    parts = [{name[len(p) :]: tensor for name, tensor in weights.items() if name.startswith(p)} for p in prefixes]
    surplus = [name for name in weights if name not in unused and not name.startswith(tuple(prefixes))]
    _refuse(path, [], surplus)
    return parts


def count_layers(weights: Weights, prefix: str) -> int:
    """How many layers of names `prefix.N.` there are: the highest N, plus one."""
    numbers = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in weights)
    return max((int(found[1]) + 1 for found in numbers if found), default=0)


def check_names(weights: Weights, expected: Collection[str], path: Path, prefix: str = "") -> None:
    """Raise `CRDError`, naming one, if weights of `expected` are missing or others are there.

    `prefix` goes before the names in the message.
    """
    missing = [prefix + name for name in expected if name not in weights]
    _refuse(path, missing, [prefix + name for name in weights if name not in expected])


def shape_of(weights: Weights, name: str, ndim: int, path: Path, prefix: str = "") -> tuple[int, ...]:
    """The shape of a weight.

    Raises:
        CRDError: it is missing or has not `ndim` dimensions; named, with `prefix` before.
    """
    if name not in weights:
        _refuse(path, [prefix + name], [])
    shape = tuple(weights[name].shape)
    if len(shape) != ndim:
        raise CRDError(f"{prefix}{name} of {path} must have {ndim} dimensions, got shape {shape}; "
                       "give the file as published")  # fmt: skip
    return shape


def load_exactly(model: nn.Module, weights: Weights, path: Path) -> None:
    """Put weights into a model that has the same names and shapes, and freeze it in eval mode.

    Raises:
        CRDError: a name or a shape differs.
    """
    own = model.state_dict()
    check_names(weights, own, path)
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            wanted, got = tuple(own[name].shape), tuple(tensor.shape)
            raise CRDError(f"{name} of {path} must have shape {wanted}, got {got}; give the file as published")
    model.load_state_dict(weights)
    model.requires_grad_(False).eval()


def _refuse(path: Path, missing: list[str], surplus: list[str]) -> None:
    for names, what in ((missing, "lacks"), (surplus, "has unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CRDError(f"{path} {what} weights {names[0]}{more}; give the file as published")
