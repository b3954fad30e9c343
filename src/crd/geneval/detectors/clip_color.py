"""The benchmark's color classifier: zero-shot CLIP on the crop of an object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel

from crd.geneval.detections import Detections
from crd.geneval.detectors.base import BATCH_SIZE, check_batch_size
from crd.geneval.detectors.loading import (
    check_model_type,
    load_image_processor,
    load_tokenizer,
    load_weights,
)
from crd.geneval.metadata import COLORS
from crd.metrics.clip_embeddings import clip_pixels, image_embeddings, text_embeddings

DEFAULT_MODEL = "openai/clip-vit-large-patch14"
TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
BACKGROUND = "#999"  # replaces what lies outside an object's mask


class CLIPColorClassifier:
    """The color whose three descriptions, averaged, are nearest to the crop of an object.

        color = argmax_c cos(image(crop), normalize(mean_template normalize(text(template(c, class)))))

    Args:
        model: hub id or folder of a CLIP.
        device: where the model goes.
        dtype: of the weights; embeddings are compared in float32.
        batch_size: crops at a time.

    Raises:
        CRDError: the model cannot be loaded or is another one.

    Source: GenEval, arXiv 2310.11513.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        check_batch_size("CLIP colors", batch_size)
        check_model_type(model, ("clip",), "the color classifier")
        self.batch_size = batch_size
        self._processor = load_image_processor(model)
        self._tokenizer = load_tokenizer(model)
        self._model = load_weights(CLIPModel, model, device, dtype)
        self._known: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def classify(
        self, images: Sequence[Image.Image], detections: Sequence[Detections], indices: Sequence[Sequence[int]]
    ) -> list[list[str]]:
        """For each of B images the colors of the objects at `indices[image]`, in that order."""
        wanted = [(image, row) for image, rows in enumerate(indices) for row in rows]
        colors: list[list[str]] = [[] for _ in images]
        for start in range(0, len(wanted), self.batch_size):
            part = wanted[start : start + self.batch_size]
            crops = [crop_object(images[image], detections[image], row) for image, row in part]
            texts = torch.stack([self.color_embeddings(detections[image].labels[row]) for image, row in part])
            nearest = torch.einsum("nd,ncd->nc", self.image_embeddings(crops), texts).argmax(dim=1)
            for (image, _), color in zip(part, nearest.tolist(), strict=True):
                colors[image].append(COLORS[color])
        return colors

    @torch.inference_mode()
    def color_embeddings(self, name: str) -> torch.Tensor:
        """(10, D) float32 unit vectors, one for each of `COLORS`; computed once for each class name."""
        if name not in self._known:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            embeddings = text_embeddings(self._model, self._tokenizer, texts)
            mean = embeddings.view(len(COLORS), len(TEMPLATES), -1).mean(dim=1)
            self._known[name] = F.normalize(mean, dim=-1)
        return self._known[name]

    @torch.inference_mode()
    def image_embeddings(self, crops: Sequence[Image.Image]) -> torch.Tensor:
        """(N, D) float32 unit vectors of N images."""
        return image_embeddings(self._model, clip_pixels(self._processor, crops))


def crop_object(image: Image.Image, detections: Detections, row: int) -> Image.Image:
    """The object alone: gray (#999) outside its mask, if there is one, cut out at its box, at least one pixel.

    Raises:
        ValueError: the masks have another size than the image.
    """
    whole = image.convert("RGB")
    if detections.masks is not None:
        mask = detections.masks[row]
        if mask.shape != (whole.height, whole.width):
            raise ValueError(f"masks must be at the image's size {(whole.height, whole.width)}, got {mask.shape}")
        ground = Image.new("RGB", whole.size, BACKGROUND)
        whole = Image.composite(whole, ground, Image.fromarray(np.ascontiguousarray(mask)))
    left, top, right, bottom = (round(float(edge)) for edge in detections.boxes[row])
    left, top = min(max(left, 0), whole.width - 1), min(max(top, 0), whole.height - 1)
    right, bottom = min(max(right, left + 1), whole.width), min(max(bottom, top + 1), whole.height)
    return whole.crop((left, top, right, bottom))
