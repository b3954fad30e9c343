"""Detectors of the bundled world: twelve classes and ten colors in 64 x 64 pictures, hundreds of images a second.

There are two, trained apart: `conv` to train against, `transformer` as the judge that training never sees. They
differ in network, seed and training pictures, so that what fools the one need not fool the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from crd.errors import CRDError
from crd.geneval.detections import Detections
from crd.geneval.detectors.base import SCORE_FLOOR, check_batch_size
from crd.geneval.detectors.config import JudgeConfig
from crd.geneval.metadata import COLORS, Metadata
from crd.tiny.detector_networks import CELLS, PARTS, STRIDE, build_network
from crd.tiny.render import SIZE
from crd.tiny.scene_prompts import SCENE_CLASSES, scene_prompts
from crd.tiny.scenes import render_scene, scene_for
from crd.tiny.trained_files import load_trained, save_trained

FOLDER = Path(__file__).parent / "detectors"
SAME = 0.5  # of two boxes that overlap more (IoU), the surer stays: one place is one object, whatever its class
MAX_OBJECTS = 32  # a picture
BATCH_SIZE = 64
SAMPLES = 24
SIDE = 16.0  # px of a box whose size is predicted as 0


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of any size as (B, 3, 64, 64) in [-1, 1]."""
    small = [
        image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        for image in (image.convert("RGB") for image in images)
    ]
    return torch.from_numpy(np.stack([np.asarray(image) for image in small])).permute(0, 3, 1, 2) / 127.5 - 1.0


def to_boxes(raw: Tensor) -> Tensor:
    """Boxes x0 y0 x1 y1 in px of every cell.

        center = stride (cell + 0.5 + raw_xy),    size = 16 exp(raw_wh), raw_wh in [-2, 2]

    Args:
        raw: (B, 4, 16, 16) predictions x, y, w, h.

    Returns:
        (B, 256, 4), the cells row by row.
    """
    cell = torch.arange(CELLS, device=raw.device) + 0.5
    places = torch.stack(torch.meshgrid(cell, cell, indexing="xy"))
    center = STRIDE * (places + raw[:, :2])
    half = SIDE / 2 * raw[:, 2:].clamp(-2.0, 2.0).exp()
    return torch.cat([center - half, center + half], dim=1).flatten(2).transpose(1, 2)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (..., N, 4) and (..., M, 4) as (..., N, M)."""
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)]
    return shared / (areas[0][..., :, None] + areas[1][..., None, :] - shared).clamp(min=1e-9)


def decode(predictions: Tensor) -> list[Detections]:
    """The objects in each picture's predictions, the surest first.

    A cell speaks if its best class scores above `SCORE_FLOOR` and no neighbouring cell is surer; then, surest first,
    boxes that overlap a kept one by more than `SAME` fall away.

    Args:
        predictions: (B, CHANNELS, 16, 16) of a network.
    """
    class_logits, raw, color_logits = predictions.float().split(PARTS, dim=1)
    best, label = class_logits.sigmoid().max(dim=1)
    peak = best >= nn.functional.max_pool2d(best[:, None], 3, stride=1, padding=1)[:, 0]
    scores, cells = torch.where(peak & (best > SCORE_FLOOR), best, 0.0).flatten(1).topk(MAX_OBJECTS)
    boxes = to_boxes(raw).take_along_dim(cells[..., None], dim=1)
    clash = iou(boxes, boxes) > SAME
    kept = scores > 0
    for i in range(MAX_OBJECTS - 1):
        kept[:, i + 1 :] &= ~(clash[:, i, i + 1 :] & kept[:, i, None])
    labels = label.flatten(1).gather(1, cells).cpu().numpy()
    colors = color_logits.argmax(dim=1).flatten(1).gather(1, cells).cpu().numpy()
    shown = boxes.clamp(0, SIZE).double().cpu().numpy()
    surest, chosen = scores.double().cpu().numpy(), kept.cpu().numpy()
    return [
        Detections(
            labels=tuple(SCENE_CLASSES[c] for c in labels[i][chosen[i]]),
            boxes=shown[i][chosen[i]],
            scores=surest[i][chosen[i]],
            colors=tuple(COLORS[c] for c in colors[i][chosen[i]]),
        )
        for i in range(len(labels))
    ]


def save_detector(network: nn.Module, architecture: str, folder: Path) -> None:
    """Write `<architecture>.safetensors` in float16 and `<architecture>.json`, which says what its numbers mean."""
    save_trained(network, folder / architecture, _meaning(architecture), indent=1)


def load_detector(which: str, folder: Path = FOLDER) -> nn.Module:
    """The network that `save_detector` wrote, float32, ready to predict.

    Raises:
        CRDError: no such detector, a damaged file, or one that was trained for other classes or colors.
    """
    network = build_network(which)
    again = f"reinstall crd, or train it: python -m crd.tiny.train_detector --architecture {which}"
    load_trained(network, folder / which, _meaning(which), kind="detector", name=f"{which} network", again=again)
    return network


def _meaning(architecture: str) -> dict[str, Any]:
    return {"architecture": architecture, "classes": list(SCENE_CLASSES), "colors": list(COLORS)}


class SceneDetector:
    """Finds the bundled world's objects, with their colors and without masks."""

    classes = SCENE_CLASSES
    gives_colors = True
    published_thresholds = True
    picture_side: int | None = SIZE
    bundled: ClassVar[str] = "conv"

    @classmethod
    def classes_for(cls, config: JudgeConfig) -> tuple[str, ...]:
        """The classes it finds; refuses settings that ask for others, or for a dtype."""
        if config.classes or config.dtype != "float32":
            raise CRDError(f"the tiny detectors have fixed classes and float32, got classes={config.classes!r:.60} and "
                           f"dtype={config.dtype}; leave them out")  # fmt: skip
        return cls.classes

    @classmethod
    def from_config(cls, config: JudgeConfig) -> SceneDetector:
        """The detector that a judge's settings ask for; `model` may name another folder of trained ones."""
        cls.classes_for(config)
        return cls(cls.bundled, config.batch_size or BATCH_SIZE, config.device, config.model or FOLDER)

    def __init__(
        self,
        which: str = "conv",
        batch_size: int = BATCH_SIZE,
        device: str | torch.device = "cpu",
        folder: str | Path = FOLDER,
    ) -> None:
        """Load a detector.

        Args:
            which: "conv", or "transformer", the judge that is kept out of training.
            batch_size: pictures at a time; it changes nothing but speed and memory.
            device: where it computes.
            folder: where its files lie; the default are the bundled ones.

        Raises:
            CRDError: as `load_detector`, or a batch size that is no positive integer.
        """
        check_batch_size(f"{which} detector", batch_size)
        self.which, self.batch_size, self.device = which, batch_size, torch.device(device)
        self.network = load_detector(which, Path(folder)).to(self.device)

    def samples(self) -> list[tuple[Image.Image, Metadata]]:
        """Scenes drawn for held-out prompts, with these prompts."""
        rng = np.random.default_rng(0)
        return [(Image.fromarray(render_scene(scene_for(wanted, rng))), wanted)
                for wanted in scene_prompts("test", SAMPLES)]  # fmt: skip

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        """The objects of each picture, scores above `SCORE_FLOOR`, boxes in the picture's own pixels.

        Pictures of another size than 64 x 64 are resized for the network.
        """
        found: list[Detections] = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            with torch.inference_mode():
                here = decode(self.network(pixels(batch).to(self.device)))
            found += [_scaled(objects, image.size) for objects, image in zip(here, batch, strict=True)]
        return found


def _scaled(objects: Detections, size: tuple[int, int]) -> Detections:
    if size == (SIZE, SIZE):
        return objects
    scale = np.array([*size, *size]) / SIZE
    return Detections(objects.labels, objects.boxes * scale, objects.scores, None, objects.colors)


class TransformerSceneDetector(SceneDetector):
    """The judge that training never sees."""

    bundled = "transformer"
