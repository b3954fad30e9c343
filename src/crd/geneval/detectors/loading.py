"""Loading of transformers models for judging, every failure told in one line."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from crd.errors import CRDError

# Version 5 is told apart by what it has, for it renamed the choice of image processors.
TRANSFORMERS_5 = importlib.util.find_spec("transformers.image_processing_backends") is not None
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype of that name.

    Raises:
        CRDError: there is none of that name here.
    """
    if name not in _DTYPES:
        raise CRDError(f"dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def require_scipy(what: str) -> None:
    """Raise `CRDError` without scipy, which transformers imports for some models."""
    if importlib.util.find_spec("scipy") is None:
        raise CRDError(f'{what} needs scipy; pip install -e ".[geneval]"')


def check_model_type(model: str | Path, expected: tuple[str, ...], what: str) -> str:
    """The `model_type` of a folder or hub id, checked before its weights are read.

    Raises:
        CRDError: nothing usable there, or another type than `expected`.
    """
    found = str(_read(AutoConfig.from_pretrained, model).model_type)
    if found not in expected:
        raise CRDError(f"{what} needs a model of type {' or '.join(expected)}, got {model} of type {found}")
    return found


def load_weights(model_class: Any, model: str | Path, device: torch.device | str, dtype: torch.dtype) -> Any:
    """The model with frozen weights, in eval mode.

    Raises:
        CRDError: nothing usable there, or weights are missing, which would leave random ones in their place.
    """
    loaded, report = _read(model_class.from_pretrained, model, dtype=dtype, output_loading_info=True)
    missing = sorted({name for name, _ in loaded.named_parameters()} & set(report["missing_keys"]))
    if missing:
        raise CRDError(f"{model} lacks {len(missing)} weights, {missing[0]} for one; give a complete checkpoint")
    return loaded.requires_grad_(False).eval().to(device)


def load_image_processor(model: str | Path) -> Any:
    """The checkpoint's image processor on PIL and numpy.

    With torchvision installed transformers would take another implementation, which resizes a little differently;
    scores must not depend on what else is installed.
    """
    without_torchvision: dict[str, Any] = {"backend": "pil"} if TRANSFORMERS_5 else {"use_fast": False}
    return _read(AutoImageProcessor.from_pretrained, model, **without_torchvision)


def load_tokenizer(model: str | Path) -> Any:
    """The checkpoint's tokenizer."""
    return _read(AutoTokenizer.from_pretrained, model)


def _read(load: Callable[..., Any], model: str | Path, **options: Any) -> Any:
    path = Path(model).expanduser()
    hub = isinstance(model, str) and model.count("/") == 1 and all(model.split("/")) and model[0] not in "./~"
    if not path.is_dir() and not hub:
        raise CRDError(f"no model at {model}; give a folder in transformers format or a hub id owner/name")
    try:
        return load(str(path) if path.is_dir() else model, **options)
    except Exception as error:  # transformers, tokenizers, safetensors and the hub raise a dozen types here
        _tell(model, path.is_dir(), error)


def _tell(model: str | Path, local: bool, error: Exception) -> NoReturn:
    hint = "the folder is damaged or incomplete" if local else "check the id and the connection"
    reason = next(iter(str(error).strip().splitlines()), "")
    raise CRDError(f"cannot load {model}: {type(error).__name__}: {reason}; {hint}") from error
