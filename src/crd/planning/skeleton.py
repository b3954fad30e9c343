"""A model without its weights: its backbone from configuration files, as a rule on the meta device."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from crd.backbones import family
from crd.backbones.pipeline import CLIP_TOKENS, PipelineBackbone
from crd.errors import CRDError
from crd.planning.model_files import Component, ModelFiles

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}


@dataclass(frozen=True)
class Skeleton:
    """A backbone that can run, and on the meta device yields shapes alone."""

    backbone: PipelineBackbone
    encoder_bytes: int  # of the text encoders
    vae_bytes: int
    clip_tokens: int  # of a text, for families that read CLIP


def build_skeleton(model: ModelFiles, dtype: torch.dtype, device: torch.device | str = "meta") -> Skeleton:
    """Build a pipeline without text encoders, whose size is found.

    Args:
        model: what its configuration files say.
        dtype: of the pretrained weights.
        device: of denoiser and VAE; elsewhere than on "meta" their weights are random.

    Raises:
        CRDError: a pipeline or a part that is not supported.
    """
    backbone_class = family(model.pipeline_class, "the model")
    encoders = {name: part for name, part in model.components.items() if name.startswith("text_encoder")}
    parts: dict[str, object] = {
        name: build_network(part, dtype, device)
        for name, part in model.components.items()
        if name in ("transformer", "unet", "vae")
    }
    scheduler = model.components["scheduler"]
    parts["scheduler"] = _class(scheduler).from_config(dict(scheduler.config))
    pipeline_class = getattr(diffusers, model.pipeline_class)
    taken = inspect.signature(pipeline_class.__init__).parameters
    needed = {name for name, one in taken.items() if one.default is inspect.Parameter.empty} - {"self", *parts}
    options = {name: value for name, value in model.options.items() if name in taken}
    if "requires_safety_checker" in taken:
        options["requires_safety_checker"] = False
    pipeline = pipeline_class(**parts, **dict.fromkeys(needed), **options)
    backbone: PipelineBackbone = backbone_class(pipeline, max_sequence_length=model.max_sequence_length)
    vae = pipeline.vae
    return Skeleton(
        backbone,
        encoder_bytes=sum(size_of(build_network(part, dtype)) for part in encoders.values()),
        vae_bytes=size_of(vae),
        clip_tokens=_clip_tokens(encoders),
    )


def size_of(module: nn.Module) -> int:
    """Bytes of the parameters and buffers of a module."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def build_network(part: Component, dtype: torch.dtype, device: torch.device | str = "meta") -> nn.Module:
    """One network of a pipeline as its class initialises it."""
    kind = _class(part)
    with torch.device(device):
        if part.library == "diffusers":
            network: nn.Module = kind.from_config(dict(part.config))
        else:
            network = kind(kind.config_class.from_dict(dict(part.config)))
    return network.to(dtype)


def _class(part: Component) -> Any:
    if part.library not in _LIBRARIES or not hasattr(_LIBRARIES[part.library], part.kind):
        raise CRDError(f"a plan cannot be made with {part.library}.{part.kind}: not in the installed version; upgrade")
    found: Any = getattr(_LIBRARIES[part.library], part.kind)
    return found


def _clip_tokens(encoders: Mapping[str, Component]) -> int:
    """Tokens that the CLIP encoder reads of a prompt; the stock number without one."""
    first = encoders.get("text_encoder")
    if first is None or not first.kind.startswith("CLIP"):
        return CLIP_TOKENS
    return int(first.config["max_position_embeddings"])
