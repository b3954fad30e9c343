"""Detectors that look for classes given as text: Grounding DINO and OWLv2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection

from crd.errors import CRDError
from crd.geneval.detections import Detections
from crd.geneval.detectors.base import BATCH_SIZE, SCORE_FLOOR, check_batch_size, detect_by_size
from crd.geneval.detectors.config import JudgeConfig
from crd.geneval.detectors.loading import (
    TRANSFORMERS_5,
    check_model_type,
    dtype_named,
    load_image_processor,
    load_tokenizer,
    load_weights,
    require_scipy,
)

DEFAULT_MODEL = "IDEA-Research/grounding-dino-tiny"
OWL_TEMPLATE = "a photo of a {name}"  # of the captions it was trained on
_DELIMITERS = ".?"  # what Grounding DINO takes for the end of a phrase


class OpenVocabularyDetector:
    """Boxes, without masks, for classes that need not be COCO's.

    A box carries the one class it scores highest for. Its score is the sigmoid of OWLv2's logit, or the mean of the
    sigmoids of Grounding DINO's logits over the tokens of the class, so that "bear" and "teddy bear" stay apart.
    These scores run lower than Mask2Former's, for which the published thresholds of 0.3 and 0.9 are made; a judge must
    be given its own.

    Args:
        model: hub id or folder of a Grounding DINO or an OWLv2.
        classes: names to look for; the prompts must use the same.
        device: where the model goes.
        dtype: of the weights; outputs are read in float32.
        batch_size: images at a time.
        overlap: of two boxes of a class whose intersection over union exceeds this, only the better one stays; 1 = all.

    Raises:
        CRDError: the model cannot be loaded or is another one, or it cannot read the classes.

    Source: Grounding DINO, arXiv 2303.05499 (scores as in its evaluation on COCO); OWLv2, arXiv 2306.09683.
    """

    gives_colors = False
    published_thresholds = False
    picture_side: int | None = None

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        classes: Sequence[str] = (),
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = BATCH_SIZE,
        overlap: float = 0.7,
    ) -> None:
        check_batch_size("open-vocabulary", batch_size)
        if not 0 < overlap <= 1:
            raise CRDError(f"open-vocabulary: overlap must be above 0 and at most 1, got {overlap}; 0.7 is the default")
        self.classes = _checked(classes)
        found = check_model_type(model, ("grounding-dino", "owlv2"), "the open-vocabulary detector")
        self._grounding = found == "grounding-dino"
        if self._grounding and dtype is not torch.float32 and not TRANSFORMERS_5:
            raise CRDError(f"Grounding DINO in {dtype} needs transformers 5 or newer; use float32 or upgrade")
        if not self._grounding:
            require_scipy("OWLv2")  # for its image processor
        self.device, self.dtype, self.batch_size, self.overlap = torch.device(device), dtype, batch_size, overlap
        self._processor = load_image_processor(model)
        tokenizer = load_tokenizer(model)
        self._model = load_weights(AutoModelForZeroShotObjectDetection, model, device, dtype)
        if self._grounding:
            self._tokens, self._pooling = _caption(tokenizer, self.classes, self._model.config.max_text_len)
        else:
            self._tokens = _queries(tokenizer, self.classes, self._model.config.text_config.max_position_embeddings)

    @classmethod
    def classes_for(cls, config: JudgeConfig) -> tuple[str, ...]:
        """The classes it looks for; refuses a list that no model could read."""
        return _checked(config.classes)

    @classmethod
    def from_config(cls, config: JudgeConfig) -> OpenVocabularyDetector:
        """The detector that a judge's settings ask for."""
        return cls(
            config.model or DEFAULT_MODEL,
            config.classes,
            device=config.device,
            dtype=dtype_named(config.dtype),
            batch_size=config.batch_size or BATCH_SIZE,
        )

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        """The objects of each of B images, best first."""
        return detect_by_size(images, self.batch_size, self._detect_equal)

    def _detect_equal(self, rgb: list[Image.Image]) -> list[Detections]:
        return [self._detections(*one, *rgb[0].size) for one in zip(*self._predict(rgb), strict=True)]

    @torch.inference_mode()
    def _predict(self, images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        """Scores (B, Q, C) and boxes (B, Q, 4), x0 y0 x1 y1 px, of images of one size."""
        pixels = self._processor(images=images, return_tensors="pt")["pixel_values"].to(self.device, self.dtype)
        tokens = {name: ids.repeat(len(images), 1).to(self.device) for name, ids in self._tokens.items()}
        output = self._model(pixel_values=pixels, **tokens)
        scores = output.logits.float().sigmoid()
        width, height = images[0].size
        if self._grounding:
            scores = scores[..., : len(self._pooling)] @ self._pooling.to(self.device)
        else:
            width = height = max(width, height)  # OWLv2 sees the image padded to a square
        center, size = output.pred_boxes.float().split(2, dim=-1)
        boxes = torch.cat([center - size / 2, center + size / 2], dim=-1).cpu().numpy().astype(np.float64)
        return scores.cpu().numpy().astype(np.float64), boxes * (width, height, width, height)

    def _detections(self, scores: np.ndarray, boxes: np.ndarray, width: int, height: int) -> Detections:
        labels, best = scores.argmax(axis=1), scores.max(axis=1)
        boxes = boxes.clip(0, (width, height, width, height))
        good = np.flatnonzero((best >= SCORE_FLOOR) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1))
        order = good[np.argsort(-best[good], kind="stable")]
        if self.overlap < 1:
            order = order[without_duplicates(boxes[order], labels[order], self.overlap)]
        return Detections(tuple(self.classes[label] for label in labels[order]), boxes[order], best[order])


def without_duplicates(boxes: np.ndarray, labels: np.ndarray, overlap: float) -> np.ndarray:
    """Which boxes remain if each removes the later ones of its class that overlap it too much.

    Args:
        boxes: (N, 4) x0 y0 x1 y1, best first, none empty.
        labels: (N,) integers.
        overlap: intersection over union above which the later box goes.

    Returns:
        (M,) indices, ascending.
    """
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    alive = np.ones(len(boxes), dtype=bool)
    for index in range(len(boxes)):
        if not alive[index]:
            continue
        later = slice(index + 1, None)
        corner = np.minimum(boxes[index, 2:], boxes[later, 2:]) - np.maximum(boxes[index, :2], boxes[later, :2])
        shared = corner.clip(0).prod(axis=1)
        union = area[index] + area[later] - shared
        alive[later] &= (labels[later] != labels[index]) | (shared <= overlap * union)
    return np.flatnonzero(alive)


def _checked(classes: Sequence[str]) -> tuple[str, ...]:
    names = tuple(classes)
    if isinstance(classes, str) or not names:
        raise CRDError(f"open-vocabulary: classes must be a list of names to look for, got {classes!r:.60}; "
                       "list them in the settings of the judge, a .yaml file")  # fmt: skip
    for name in names:
        if not isinstance(name, str) or not name.strip() or any(mark in name for mark in _DELIMITERS):
            raise CRDError(f"open-vocabulary: a class must be a name without . and ?, got {name!r}")
    twice = [name for name in names if [other.lower() for other in names].count(name.lower()) > 1]
    if twice:
        raise CRDError(f"open-vocabulary: class {twice[0]!r} is named twice; name each once")
    return names


def _caption(tokenizer: Any, classes: tuple[str, ...], most: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Grounding DINO reads all classes as one caption, "bear. teddy bear."; a class owns the tokens up to its period.

    Returns:
        the tokens, each (1, L), and the matrix (L, C) that averages over the tokens of each class.
    """
    encoded = tokenizer(". ".join(name.lower() for name in classes) + ".", return_tensors="pt")
    ids = encoded["input_ids"][0].tolist()
    if len(ids) > most:
        raise CRDError(f"open-vocabulary: the {len(classes)} classes take {len(ids)} tokens, the model reads {most}; "
                       "give fewer, or take an OWLv2")  # fmt: skip
    ends = [position for position, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids(".")]
    starts = [1, *(end + 1 for end in ends[:-1])]  # the first token marks the beginning of the text
    if len(ends) != len(classes) or any(start == end for start, end in zip(starts, ends, strict=True)):
        raise CRDError(f"open-vocabulary: the model's tokenizer cannot keep apart the classes {classes!r:.80}")
    pooling = torch.zeros(len(ids), len(classes))
    for column, (start, end) in enumerate(zip(starts, ends, strict=True)):
        pooling[start:end, column] = 1 / (end - start)
    names = ("input_ids", "token_type_ids", "attention_mask")
    return {name: encoded[name] for name in names}, pooling


def _queries(tokenizer: Any, classes: tuple[str, ...], length: int) -> dict[str, torch.Tensor]:
    """OWLv2 reads one text for each class; tokens (C, L)."""
    texts = [OWL_TEMPLATE.format(name=name) for name in classes]
    for name, ids in zip(classes, tokenizer(texts)["input_ids"], strict=True):
        if len(ids) > length:
            raise CRDError(f"open-vocabulary: {name!r} takes {len(ids)} tokens, the model reads {length}; shorten it")
    encoded = tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}
