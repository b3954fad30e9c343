"""A CLIP in open_clip's names, as transformers' `CLIPModel`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from crd.errors import CRDError
from crd.metrics.state_dicts import Weights, check_names, count_layers, load_exactly, shape_of

VISION_HEAD = 80  # channels of an attention head of ViT-H; no shape tells it
TEXT_HEAD = 64
# Theirs -> ours, module by module; each has a weight and a bias.
MODULES = {
    "visual.ln_pre": "vision_model.pre_layrnorm",  # spelled so in transformers
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
PARAMETERS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
# x @ theirs = Linear(ours)(x)
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
TOWERS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
LAYER_MODULES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def clip_from_open_clip(
    weights: Weights, path: Path, *, vision_head: int = VISION_HEAD, text_head: int = TEXT_HEAD
) -> Any:
    """A frozen `CLIPModel` in float32 with the weights of an open_clip ViT, its sizes read from their shapes.

    Activations are exact GELUs, as in ViT-H. A text is pooled at its first end token, the last of the vocabulary;
    open_clip pools at the highest id, which is the same token.

    Args:
        weights: open_clip's state dict.
        path: where it is from, for messages.
        vision_head: channels of an attention head of the image tower.
        text_head: of the text tower.

    Raises:
        CRDError: a weight is missing, unknown or of a shape that does not fit; named.

    Source: github.com/mlfoundations/open_clip, `CLIP` with its `VisionTransformer`.
    """
    from transformers import CLIPModel

    renamed, fused = _names(weights)
    check_names(weights, {*renamed, *fused, *TRANSPOSED}, path)
    model = CLIPModel(_config(weights, path, vision_head, text_head))
    ours = {name: weights[theirs] for theirs, name in renamed.items()}
    ours |= {name: weights[theirs].T for theirs, name in TRANSPOSED.items()}
    for theirs, names in fused.items():
        ours |= dict(zip(names, weights[theirs].chunk(3), strict=True))
    load_exactly(model, ours, path)
    return model


def _names(weights: Weights) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Theirs -> ours for weights that stay as they are, and for those that hold query, key and value at once."""
    renamed, modules = dict(PARAMETERS), dict(MODULES)
    fused: dict[str, list[str]] = {}
    for tower, own in TOWERS.items():
        for n in range(count_layers(weights, tower)):
            modules |= {f"{tower}.{n}.{theirs}": f"{own}.{n}.{name}" for theirs, name in LAYER_MODULES.items()}
            for kind in ("weight", "bias"):
                fused[f"{tower}.{n}.attn.in_proj_{kind}"] = [f"{own}.{n}.self_attn.{x}_proj.{kind}" for x in "qkv"]
    for theirs, name in modules.items():
        renamed |= {f"{theirs}.{kind}": f"{name}.{kind}" for kind in ("weight", "bias")}
    return renamed, fused


def _config(weights: Weights, path: Path, vision_head: int, text_head: int) -> Any:
    from transformers import CLIPConfig

    vision, text = TOWERS
    width, _, patch, _ = shape_of(weights, "visual.conv1.weight", 4, path)
    positions, _ = shape_of(weights, "visual.positional_embedding", 2, path)
    vocabulary, text_width = shape_of(weights, "token_embedding.weight", 2, path)
    length, _ = shape_of(weights, "positional_embedding", 2, path)
    _, shared = shape_of(weights, "visual.proj", 2, path)
    for size, head in ((width, vision_head), (text_width, text_head)):
        if size % head:
            raise CRDError(f"{path} has towers {width} and {text_width} wide, which heads of {vision_head} and "
                           f"{text_head} channels do not divide; give a ViT-H-14")  # fmt: skip
    return CLIPConfig(
        vision_config={
            "hidden_size": width,
            "num_attention_heads": width // vision_head,
            "image_size": math.isqrt(positions - 1) * patch,
            "patch_size": patch,
            **_tower(weights, vision, path),
        },
        text_config={
            "hidden_size": text_width,
            "num_attention_heads": text_width // text_head,
            "vocab_size": vocabulary,
            "max_position_embeddings": length,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": 0,
            **_tower(weights, text, path),
        },
        projection_dim=shared,
    )


def _tower(weights: Weights, tower: str, path: Path) -> dict[str, Any]:
    inner, _ = shape_of(weights, f"{tower}.0.mlp.c_fc.weight", 2, path)
    return {"intermediate_size": inner, "num_hidden_layers": count_layers(weights, tower), "hidden_act": "gelu"}
