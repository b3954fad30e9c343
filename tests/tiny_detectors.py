"""Random detectors and a random CLIP in transformers format, small enough to build in a test; pictures for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Owlv2Config,
    Owlv2ForObjectDetection,
    SwinConfig,
)

from crd.geneval.detections import Detections
from crd.geneval.metadata import COCO_CLASSES

# COCO's names in one common spelling, among them all that differ from the benchmark's.
SPELLED = {
    "motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "tv": "tvmonitor", "donut": "doughnut",
    "potted plant": "pottedplant", "dining table": "diningtable", "computer mouse": "mouse", "tv remote": "remote",
    "computer keyboard": "keyboard", "hair drier": "hair dryer", "cell phone": "Cell-Phone", "wine glass": "wine_glass",
}  # fmt: skip
LABELS = tuple(SPELLED.get(name, name) for name in COCO_CLASSES)
CLASSES = ("bear", "teddy bear", "dog")  # for those that look for any
SIZES = ((48, 40), (40, 56), (48, 40), (33, 70), (48, 40))  # width, height
CLIP_TOKENS = ("<|startoftext|>", "<|endoftext|>")
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pictures() -> list[Image.Image]:
    """Noise of several sizes."""
    return [noise(*size, seed=seed) for seed, size in enumerate(SIZES)]


def found(labels: Sequence[str] = ("dog",), masks: np.ndarray | None = None, score: float = 0.95) -> Detections:
    boxes = np.array([[4.0 + i, 4.0, 20.0 + i, 24.0] for i in range(len(labels))]).reshape(-1, 4)
    return Detections(tuple(labels), boxes, np.full(len(labels), score), masks)


def save_detectors(root: Path) -> dict[str, Path]:
    """One of each kind, and a CLIP."""
    return {
        "mask2former": save_mask2former(root / "mask2former", LABELS),
        "grounding-dino": save_grounding_dino(root / "grounding-dino", ("teddy", "bear", "dog")),
        "owlv2": save_owlv2(root / "owlv2"),
        "clip": save_clip(root / "clip"),
    }


def save_mask2former(folder: Path, labels: Sequence[str]) -> Path:
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=_swin(["stage1", "stage2", "stage3", "stage4"]),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, dim_feedforward=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=12,
        id2label=dict(enumerate(labels)), label2id={label: index for index, label in enumerate(labels)},
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.mul_(60)  # as drawn, no class would reach the floor,
        for module in model.model.transformer_module.decoder.mask_predictor.mask_embedder.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(10)  # and masks would hang on the last digit
    return _save(model, folder, "Mask2Former", {"size": {"height": 384, "width": 384}, "size_divisor": 32, **IMAGENET})


def save_grounding_dino(folder: Path, words: Sequence[str]) -> Path:
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        backbone_config=_swin(["stage2", "stage3", "stage4"]),
        text_config=BertConfig(
            vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        ),
        d_model=32, encoder_layers=1, encoder_ffn_dim=16, encoder_attention_heads=2, decoder_layers=2,
        decoder_ffn_dim=16, decoder_attention_heads=2, num_queries=20, max_text_len=40,
    )  # fmt: skip
    size = {"shortest_edge": 64, "longest_edge": 96}
    _save(GroundingDinoForObjectDetection(config), folder, "GroundingDino", {"size": size, **IMAGENET})
    # Of the model's tokens only these have a fixed place.
    vocabulary = [f"[unused{index}]" for index in range(1100)]
    for index, token in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: "."}.items():
        vocabulary[index] = token
    letters = "abcdefghijklmnopqrstuvwxyz"
    for index, token in enumerate([*words, *letters, *(f"##{letter}" for letter in letters)], start=200):
        vocabulary[index] = token
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def save_owlv2(folder: Path) -> Path:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Owlv2Config(
        text_config={**size, "vocab_size": 514, "max_position_embeddings": 32, **_clip_special()},
        vision_config={**size, "image_size": 64, "patch_size": 16},
        projection_dim=16,
    )
    _save_clip_tokenizer(folder, length=32)
    return _save(Owlv2ForObjectDetection(config), folder, "Owlv2", {"size": {"height": 64, "width": 64}})


def save_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**size, "vocab_size": 514, "max_position_embeddings": 77, **_clip_special()},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = CLIPModel(config)
    _save_clip_tokenizer(folder, length=77)
    with torch.no_grad():
        model.text_projection.weight.normal_()  # as drawn, all texts are nearly the same
    cut = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return _save(model, folder, "CLIP", cut)


def _swin(out_features: list[str]) -> SwinConfig:
    return SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=out_features, drop_path_rate=0.0,
    )  # fmt: skip


def _clip_special() -> dict[str, int]:
    return {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}


def _save(model: torch.nn.Module, folder: Path, family: str, settings: dict[str, object]) -> Path:
    model.save_pretrained(folder)
    # What published checkpoints say; without torchvision only transformers' own choice of class could be saved.
    described = {"image_processor_type": f"{family}ImageProcessor", **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    return folder


def _save_clip_tokenizer(folder: Path, length: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *CLIP_TOKENS]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": length, "bos_token": CLIP_TOKENS[0],
        "eos_token": CLIP_TOKENS[1], "unk_token": CLIP_TOKENS[1], "pad_token": CLIP_TOKENS[1],
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
