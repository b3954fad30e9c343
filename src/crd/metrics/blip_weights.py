"""The two encoders of BLIP in its authors' names, as transformers' `BlipVisionModel` and `BlipTextModel`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from crd.errors import CRDError
from crd.metrics.state_dicts import Weights, check_names, count_layers, load_exactly, shape_of

HEAD = 64  # channels of an attention head, in both encoders; no shape tells it
VISION_EPS = 1e-6  # of the layer norms; transformers' own default for BLIP is 1e-5
TEXT_EPS = 1e-12
POSITIONS = "embeddings.position_ids"  # 0, 1, 2, ...: saved by old versions of transformers, no weight
VISION_PARAMETERS = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
VISION_LAYER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def vision_encoder(weights: Weights, path: Path, prefix: str) -> Any:
    """A frozen `BlipVisionModel` in float32; its sizes are read from the shapes.

    Args:
        weights: of BLIP's `visual_encoder`, without their prefix.
        path: where they are from, for messages.
        prefix: of their names there, for messages.

    Raises:
        CRDError: a weight is missing, unknown or of a shape that does not fit; named.

    Source: BLIP, arXiv 2201.12086.
    """
    from transformers import BlipVisionConfig, BlipVisionModel

    layers = count_layers(weights, "blocks")
    names = dict(VISION_PARAMETERS)
    for n in range(max(layers, 1)):
        for theirs, ours in VISION_LAYER.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{n}.{theirs}.{kind}"] = f"encoder.layers.{n}.{ours}.{kind}"
    check_names(weights, names, path, prefix)
    width, _, patch, _ = shape_of(weights, "patch_embed.proj.weight", 4, path, prefix)
    _, positions, _ = shape_of(weights, "pos_embed", 3, path, prefix)
    inner, _ = shape_of(weights, "blocks.0.mlp.fc1.weight", 2, path, prefix)
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=_heads(width, path),
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=VISION_EPS,
    )
    model = BlipVisionModel(config)
    load_exactly(model, {ours: weights[theirs] for theirs, ours in names.items()}, path)
    return model


def text_encoder(weights: Weights, path: Path, prefix: str) -> Any:
    """A frozen `BlipTextModel` in float32 that attends to image tokens; its sizes are read from the shapes.

    Args, Raises, Source: as of `vision_encoder`, with BLIP's `text_encoder`. Names are the same in both libraries.
    """
    from transformers import BlipTextConfig, BlipTextModel

    weights = _without_positions(weights, path, prefix)
    vocabulary, width = shape_of(weights, "embeddings.word_embeddings.weight", 2, path, prefix)
    length, _ = shape_of(weights, "embeddings.position_embeddings.weight", 2, path, prefix)
    inner, _ = shape_of(weights, "encoder.layer.0.intermediate.dense.weight", 2, path, prefix)
    _, image_width = shape_of(weights, "encoder.layer.0.crossattention.self.key.weight", 2, path, prefix)
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=image_width,
        intermediate_size=inner,
        num_hidden_layers=count_layers(weights, "encoder.layer"),
        num_attention_heads=_heads(width, path),
        max_position_embeddings=length,
        hidden_act="gelu",
        layer_norm_eps=TEXT_EPS,
        is_decoder=True,  # which builds the attention to the image; a causal mask is asked for at each call
    )
    model = BlipTextModel(config, add_pooling_layer=False)
    check_names(weights, model.state_dict(), path, prefix)
    load_exactly(model, weights, path)
    return model


def _without_positions(weights: Weights, path: Path, prefix: str) -> Weights:
    kept = dict(weights)
    positions = kept.pop(POSITIONS, None)
    if positions is not None and not torch.equal(positions.flatten(), torch.arange(positions.numel())):
        raise CRDError(f"{prefix}{POSITIONS} of {path} must count from 0, got others; give the file as published")
    return kept


def _heads(width: int, path: Path) -> int:
    if width % HEAD:
        raise CRDError(f"{path} has an encoder {width} wide, which heads of {HEAD} channels do not divide; give BLIP's")
    return width // HEAD
