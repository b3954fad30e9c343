"""The benchmark's detector: Mask2Former trained on COCO instances, from transformers instead of mmdet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Mask2FormerForUniversalSegmentation

from crd.errors import CRDError
from crd.geneval.detections import Detections
from crd.geneval.detectors.base import BATCH_SIZE, SCORE_FLOOR, boxes_of_masks, check_batch_size, detect_by_size
from crd.geneval.detectors.config import JudgeConfig
from crd.geneval.detectors.loading import (
    check_model_type,
    dtype_named,
    load_image_processor,
    load_weights,
    require_scipy,
)
from crd.geneval.metadata import COCO_CLASSES

DEFAULT_MODEL = "facebook/mask2former-swin-small-coco-instance"
MAX_INSTANCES = 100  # pairs of a query and a class that are looked at, of one image
STRIDE = 32  # px; sides of the network's input are multiples of it

# What checkpoints call a class that the benchmark calls otherwise, without spaces.
SYNONYMS = {
    "mouse": "computer mouse", "remote": "tv remote", "remotecontrol": "tv remote", "keyboard": "computer keyboard",
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv", "television": "tv",
    "hairdryer": "hair drier", "doughnut": "donut", "mobilephone": "cell phone",
}  # fmt: skip


class Mask2FormerDetector:
    """Instance segmentation with the 80 classes of COCO, masks at the size of the image.

    Images are shrunk or enlarged as the benchmark did it for its detector, to a shorter side of 800 px (longer side
    at most 1333). The processor of the published checkpoint would squeeze every image into a square of 384, in which
    small objects drown. See `instances` for how outputs become objects.

    Args:
        model: hub id or folder of a Mask2Former trained on COCO instances.
        device: where the model goes.
        dtype: of the weights; outputs are read in float32.
        batch_size: images at a time.
        short_side, long_side: px, of the network's input.

    Raises:
        CRDError: the model cannot be loaded, is another one, or its labels are not the 80 classes.
    """

    classes = COCO_CLASSES
    gives_colors = False
    published_thresholds = True
    picture_side: int | None = None

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = BATCH_SIZE,
        short_side: int = 800,
        long_side: int = 1333,
    ) -> None:
        check_batch_size("mask2former", batch_size)
        if not 0 < short_side <= long_side:
            raise CRDError(f"mask2former: short_side must be from 1 to long_side {long_side}, got {short_side}")
        check_model_type(model, ("mask2former",), "the mask2former detector")
        require_scipy("Mask2Former")  # for its loss, which transformers builds with the model
        self.device, self.dtype, self.batch_size = torch.device(device), dtype, batch_size
        self._size = {"shortest_edge": short_side, "longest_edge": long_side}
        self._processor = load_image_processor(model)
        self._model = load_weights(Mask2FormerForUniversalSegmentation, model, device, dtype)
        id2label = self._model.config.id2label
        self._labels = coco_labels([id2label[index] for index in range(len(id2label))], str(model))

    @classmethod
    def classes_for(cls, config: JudgeConfig) -> tuple[str, ...]:
        """The classes it finds; refuses settings that ask for others."""
        if config.classes:
            raise CRDError(f"mask2former knows the 80 classes of COCO only, got classes={config.classes!r:.60}; "
                           "leave it out, or take open-vocabulary")  # fmt: skip
        return cls.classes

    @classmethod
    def from_config(cls, config: JudgeConfig) -> Mask2FormerDetector:
        """The detector that a judge's settings ask for."""
        cls.classes_for(config)
        return cls(
            config.model or DEFAULT_MODEL,
            device=config.device,
            dtype=dtype_named(config.dtype),
            batch_size=config.batch_size or BATCH_SIZE,
        )

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        """The objects of each of B images, best first; boxes end one pixel after the mask's last."""
        return detect_by_size(images, self.batch_size, self._detect_equal)

    @torch.inference_mode()
    def _detect_equal(self, rgb: list[Image.Image]) -> list[Detections]:
        # size_divisor would distort to a multiple of STRIDE; the network was tested on images padded to it.
        pixels = self._processor(images=rgb, size=self._size, size_divisor=0, return_tensors="pt")["pixel_values"]
        height, width = pixels.shape[-2:]
        padded = F.pad(pixels, (0, -width % STRIDE, 0, -height % STRIDE))
        output = self._model(pixel_values=padded.to(self.device, self.dtype))
        size = (rgb[0].height, rgb[0].width)
        return [
            self._detections(*instances(logits, masks, tuple(padded.shape[-2:]), (height, width), size))
            for logits, masks in zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
        ]

    def _detections(self, scores: torch.Tensor, labels: torch.Tensor, masks: torch.Tensor) -> Detections:
        in_numpy = masks.cpu().numpy()
        return Detections(
            labels=tuple(self._labels[label] for label in labels.tolist()),
            boxes=boxes_of_masks(in_numpy),
            scores=scores.cpu().numpy().astype(np.float64),
            masks=in_numpy,
        )


def instances(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    padded: tuple[int, ...],
    resized: tuple[int, int],
    size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The objects in the outputs for ONE image, as mmdet reads them.

        score(query, class) = softmax(class_logits)[query, class] * mean of sigmoid(mask_logits) where they are > 0

    of the 100 most probable pairs of a query and a class; mask logits are enlarged to the network's input, freed of
    padding, brought to the image's size (both bilinear) and only then cut at 0. Masks may overlap.

    The processor's `post_process_instance_segmentation` is not used. It resizes masks to 384 x 384 px whatever the
    image's shape, cuts them there and enlarges the result by nearest neighbor; it takes padding for a part of the
    image; and unless asked for binary maps it lets a later object overwrite an earlier one.

    Args:
        class_logits: (Q, C + 1), the last is "no object".
        mask_logits: (Q, h, w), covering the padded input.
        padded: height and width of the network's input.
        resized: height and width of the image inside it, at its upper left.
        size: height and width of the image itself.

    Returns:
        scores (N,) float32, labels (N,) int64, masks (N, *size) bool; best first, at least `SCORE_FLOOR`, none empty.

    Source: Mask2Former, arXiv 2112.01527; the benchmark's use of it, GenEval, arXiv 2310.11513.
    """
    probabilities = class_logits.float().softmax(dim=-1)[:, :-1]
    scores, pairs = probabilities.flatten().topk(min(MAX_INSTANCES, probabilities.numel()))
    # The second factor is at most 1: what is below the floor already needs no mask.
    scores, pairs = scores[scores >= SCORE_FLOOR], pairs[scores >= SCORE_FLOOR]
    if not len(pairs):
        return scores, pairs, mask_logits.new_zeros((0, *size), dtype=torch.bool)
    queries, labels = pairs // probabilities.shape[1], pairs % probabilities.shape[1]
    logits = F.interpolate(mask_logits[queries][None].float(), size=padded, mode="bilinear", align_corners=False)
    logits = logits[..., : resized[0], : resized[1]]
    logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0]
    masks = logits > 0
    area = masks.sum(dim=(1, 2))
    scores = scores * (logits.sigmoid() * masks).sum(dim=(1, 2)) / area.clamp(min=1)
    keep = torch.nonzero((area > 0) & (scores >= SCORE_FLOOR))[:, 0]
    order = keep[scores[keep].argsort(descending=True, stable=True)]
    return scores[order], labels[order], masks[order]


def coco_labels(names: Sequence[str], model: str) -> tuple[str, ...]:
    """The benchmark's name of each of a checkpoint's classes.

    Raises:
        CRDError: a name that is none of the 80 classes, two for one class, or a class without a name.
    """
    known = {_joined(name): name for name in COCO_CLASSES}
    known.update({name: SYNONYMS[name] for name in SYNONYMS})
    advice = "give a checkpoint trained on COCO instances"
    unknown = [name for name in names if _joined(name) not in known]
    if unknown:
        raise CRDError(f"{model} has {_some(unknown)}, no class of GenEval; {advice}")
    labels = tuple(known[_joined(name)] for name in names)
    twice = [name for name in COCO_CLASSES if labels.count(name) > 1]
    if twice:
        raise CRDError(f"{model} has two labels for {_some(twice)}; {advice}")
    absent = [name for name in COCO_CLASSES if name not in labels]
    if absent:
        raise CRDError(f"{model} has no label for {_some(absent)}; {advice}")
    return labels


def _joined(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more
