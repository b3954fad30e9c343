"""CLIP's embeddings of images and texts, by transformers' model in any of its versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from crd.geneval.detectors.loading import check_model_type, load_image_processor, load_tokenizer, load_weights


@dataclass(frozen=True)
class CLIP:
    """A CLIP with what prepares its inputs."""

    model: Any  # CLIPModel
    tokenizer: Any
    processor: Any

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, D) float32 unit vectors of N RGB images."""
        return image_embeddings(self.model, clip_pixels(self.processor, images))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32 unit vectors of N texts, each cut to the tokens the model reads."""
        return text_embeddings(self.model, self.tokenizer, texts)

    def cosines(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """(N,) cosine of each image and its own text."""
        return (self.images(images) * self.texts(texts)).sum(dim=-1)


def load_clip(source: str, device: str, what: str, preparation: str | None = None) -> CLIP:
    """A CLIP in float32, its images prepared without torchvision.

    Args:
        source: hub id or folder of the model in transformers format.
        device: where it goes.
        what: needs it, for the message.
        preparation: hub id or folder of tokenizer and image processor; None = `source`.

    Raises:
        CRDError: a part cannot be loaded, or the model is another one.
    """
    from transformers import CLIPModel

    check_model_type(source, ("clip",), what)
    parts = source if preparation is None else preparation
    processor, tokenizer = load_image_processor(parts), load_tokenizer(parts)
    return CLIP(load_weights(CLIPModel, source, device, torch.float32), tokenizer, processor)


def clip_pixels(processor: Any, images: Sequence[Image.Image]) -> Tensor:
    """(N, 3, S, S) pixels of N RGB images, as the checkpoint's image processor prepares them."""
    # Told, because an image three pixels high would be taken for channels first.
    prepared = processor(images=list(images), input_data_format="channels_last", return_tensors="pt")
    pixels: Tensor = prepared["pixel_values"]
    return pixels


# Towers and projections are called by themselves: `get_image_features` returned a tensor in transformers 4 and returns
# an output object in 5, these are the same in both.


def image_embeddings(model: Any, pixels: Tensor) -> Tensor:
    """(N, D) float32 unit vectors of N images.

    Args:
        model: a CLIPModel.
        pixels: (N, 3, S, S), normalised.
    """
    pooled = model.vision_model(pixel_values=pixels.to(model.device, model.dtype)).pooler_output
    return F.normalize(model.visual_projection(pooled).float(), dim=-1)


def text_embeddings(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """(N, D) float32 unit vectors of N texts, each cut to the tokens the model reads, the end token kept.

    The pooled token is the first end token. What pads the shorter texts does not matter: attention is causal.
    """
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
    pooled = model.text_model(
        input_ids=tokens["input_ids"].to(model.device), attention_mask=tokens["attention_mask"].to(model.device)
    ).pooler_output
    return F.normalize(model.text_projection(pooled).float(), dim=-1)
