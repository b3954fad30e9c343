"""Random preference scorers in the files of the published ones, small enough to build in a test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from tiny_detectors import save_clip
from torch import Tensor

SIDE, PATCH = 32, 8
VISION_WIDTH, TEXT_WIDTH, LAYERS = 160, 128, 2  # two heads of 80, two of 64
VOCABULARY, LENGTH = 514, 77
BLIP_VISION, BLIP_TEXT, BLIP_TOKENS = 192, 128, 40
WORDS = ("red", "circle", "blue", "square", "a", "on", "of")
HEAD_WIDTHS = {"0": 1024, "2": 128, "4": 64, "6": 16, "7": 1}


def save_scorers(root: Path) -> dict[str, Path]:
    """One folder for each scorer, with all that it needs."""
    clip = save_clip(root / "clip")
    folders = {name: root / name for name in ("hpsv2", "imagereward", "aesthetic")}
    for folder in folders.values():
        folder.mkdir()
    shutil.copytree(clip, folders["aesthetic"], dirs_exist_ok=True)
    torch.save(head_weights(16, "layers."), folders["aesthetic"] / "aesthetic-model.pth")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(clip / name, folders["hpsv2"])
    half = {name: tensor.half() for name, tensor in open_clip_weights().items()}  # as published
    torch.save({"epoch": 1, "state_dict": half}, folders["hpsv2"] / "HPS_v2.1_compressed.pt")
    _save_bert_tokenizer(folders["imagereward"])
    torch.save(imagereward_weights(), folders["imagereward"] / "ImageReward.pt")
    return {"clipscore": clip, "pickscore": clip, **folders}


def open_clip_weights() -> dict[str, Tensor]:
    """The state dict of an open_clip CLIP of two vision transformers."""
    draw = _Draw(1)
    shared = 24
    weights = {
        "positional_embedding": draw(LENGTH, TEXT_WIDTH),
        "text_projection": draw(TEXT_WIDTH, shared),
        "logit_scale": torch.tensor(4.6),
        "token_embedding.weight": draw(VOCABULARY, TEXT_WIDTH, scale=1.0),
        "visual.class_embedding": draw(VISION_WIDTH),
        "visual.positional_embedding": draw((SIDE // PATCH) ** 2 + 1, VISION_WIDTH),
        "visual.proj": draw(VISION_WIDTH, shared),
        "visual.conv1.weight": draw(VISION_WIDTH, 3, PATCH, PATCH),
        **draw.norm("visual.ln_pre", VISION_WIDTH),
        **draw.norm("visual.ln_post", VISION_WIDTH),
        **draw.norm("ln_final", TEXT_WIDTH),
    }
    for tower, width in (("visual.transformer", VISION_WIDTH), ("transformer", TEXT_WIDTH)):
        for n in range(LAYERS):
            block = f"{tower}.resblocks.{n}"
            weights |= {
                f"{block}.attn.in_proj_weight": draw(3 * width, width),
                f"{block}.attn.in_proj_bias": draw(3 * width),
                **draw.linear(f"{block}.attn.out_proj", width, width),
                **draw.linear(f"{block}.mlp.c_fc", width, 48),
                **draw.linear(f"{block}.mlp.c_proj", 48, width),
                **draw.norm(f"{block}.ln_1", width),
                **draw.norm(f"{block}.ln_2", width),
            }
    return weights


def imagereward_weights() -> dict[str, Tensor]:
    """A state dict of ImageReward: BLIP's two encoders, its unused projections, and the head."""
    draw = _Draw(2)
    vision = {
        "cls_token": draw(1, 1, BLIP_VISION),
        "pos_embed": draw(1, (SIDE // PATCH) ** 2 + 1, BLIP_VISION),
        "patch_embed.proj.weight": draw(BLIP_VISION, 3, PATCH, PATCH),
        "patch_embed.proj.bias": draw(BLIP_VISION),
        **draw.norm("norm", BLIP_VISION),
    }
    text = {
        "embeddings.position_ids": torch.arange(BLIP_TOKENS)[None],
        "embeddings.word_embeddings.weight": draw(_VOCABULARY_SIZE, BLIP_TEXT, scale=1.0),
        "embeddings.position_embeddings.weight": draw(BLIP_TOKENS, BLIP_TEXT),
        **draw.norm("embeddings.LayerNorm", BLIP_TEXT),
    }
    for n in range(LAYERS):
        vision |= {
            **draw.linear(f"blocks.{n}.attn.qkv", BLIP_VISION, 3 * BLIP_VISION),
            **draw.linear(f"blocks.{n}.attn.proj", BLIP_VISION, BLIP_VISION),
            **draw.linear(f"blocks.{n}.mlp.fc1", BLIP_VISION, 40),
            **draw.linear(f"blocks.{n}.mlp.fc2", 40, BLIP_VISION),
            **draw.norm(f"blocks.{n}.norm1", BLIP_VISION),
            **draw.norm(f"blocks.{n}.norm2", BLIP_VISION),
        }
        layer = f"encoder.layer.{n}"
        for attention, width in (("attention", BLIP_TEXT), ("crossattention", BLIP_VISION)):
            text |= {
                **draw.linear(f"{layer}.{attention}.self.query", BLIP_TEXT, BLIP_TEXT),
                **draw.linear(f"{layer}.{attention}.self.key", width, BLIP_TEXT),
                **draw.linear(f"{layer}.{attention}.self.value", width, BLIP_TEXT),
                **draw.linear(f"{layer}.{attention}.output.dense", BLIP_TEXT, BLIP_TEXT),
                **draw.norm(f"{layer}.{attention}.output.LayerNorm", BLIP_TEXT),
            }
        text |= {
            **draw.linear(f"{layer}.intermediate.dense", BLIP_TEXT, 56),
            **draw.linear(f"{layer}.output.dense", 56, BLIP_TEXT),
            **draw.norm(f"{layer}.output.LayerNorm", BLIP_TEXT),
        }
    return {
        **{f"blip.visual_encoder.{name}": tensor for name, tensor in vision.items()},
        **{f"blip.text_encoder.{name}": tensor for name, tensor in text.items()},
        **draw.linear("blip.vision_proj", BLIP_VISION, 8),
        **draw.linear("blip.text_proj", BLIP_TEXT, 8),
        **head_weights(BLIP_TEXT, "mlp.layers."),
    }


def head_weights(width: int, prefix: str) -> dict[str, Tensor]:
    draw = _Draw(3)
    weights: dict[str, Tensor] = {}
    for index, wider in HEAD_WIDTHS.items():
        weights |= draw.linear(prefix + index, width, wider)
        width = wider
    return weights


class _Draw:
    """Random weights that neither explode nor vanish; another number for each, so that none can be exchanged."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 0.1) -> Tensor:
        return scale * torch.randn(*shape, generator=self._generator)

    def linear(self, name: str, inside: int, outside: int) -> dict[str, Tensor]:
        return {f"{name}.weight": self(outside, inside, scale=inside**-0.5), f"{name}.bias": self(outside)}

    def norm(self, name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + self(width), f"{name}.bias": self(width)}


_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
_PIECES = (*_TOKENS, *(x for x in _LETTERS if x not in WORDS), *(f"##{x}" for x in _LETTERS))
_VOCABULARY_SIZE = len(_PIECES) + 2  # BLIP adds two that no prompt has


def _save_bert_tokenizer(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(_PIECES))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
