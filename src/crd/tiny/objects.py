"""The bundled world's objects: twelve COCO classes as small vector drawings, in the ten colors of GenEval.

A drawing is a list of parts in a unit square (x to the right, y down, stretched to the class's aspect), each painted
in one tone of the object's color. A new class is one entry of `DRAWINGS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

PALETTE = {
    "red": (212, 36, 38),
    "orange": (246, 138, 24),
    "yellow": (250, 222, 48),
    "green": (44, 152, 66),
    "blue": (38, 84, 208),
    "purple": (128, 52, 178),
    "pink": (248, 150, 194),
    "brown": (118, 70, 36),
    "black": (28, 28, 32),
    "white": (246, 246, 246),
}
SUPERSAMPLE = 6

Tone = Literal["body", "shade", "contrast", "dark", "glass", "hole"]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Part:
    """One painted shape: an ellipse or box given by its bounds, a polygon, or a line `width` units thick."""

    shape: Literal["ellipse", "box", "polygon", "line"]
    tone: Tone
    points: tuple[float, ...]
    width: float = 0.0


@dataclass(frozen=True)
class Drawing:
    """Parts, later ones on top; `aspect` is height over width."""

    aspect: float
    parts: tuple[Part, ...]


def _crescent() -> tuple[float, ...]:
    """Outline of a banana, ends up: a wide lower arc and a flatter one above it."""
    angles = np.linspace(0.02 * np.pi, 0.98 * np.pi, 24)
    lower = np.stack([0.5 + 0.49 * np.cos(angles), 0.12 + 0.86 * np.sin(angles)], 1)
    upper = np.stack([0.5 + 0.40 * np.cos(angles[::-1]), 0.02 + 0.46 * np.sin(angles[::-1])], 1)
    return tuple(float(v) for v in np.concatenate([lower, upper]).ravel())


DRAWINGS = {
    "apple": Drawing(1.05, (
        Part("ellipse", "body", (0.02, 0.2, 0.64, 0.98)),
        Part("ellipse", "body", (0.36, 0.2, 0.98, 0.98)),
        Part("line", "dark", (0.5, 0.32, 0.54, 0.04), 0.09),
        Part("ellipse", "shade", (0.56, 0.02, 0.92, 0.22)),
        Part("ellipse", "contrast", (0.18, 0.36, 0.3, 0.54)),
    )),
    "banana": Drawing(0.62, (
        Part("polygon", "body", _crescent()),
        Part("ellipse", "dark", (0.0, 0.0, 0.12, 0.24)),
        Part("ellipse", "dark", (0.88, 0.0, 1.0, 0.24)),
        Part("line", "shade", (0.2, 0.52, 0.36, 0.74, 0.64, 0.74, 0.8, 0.52), 0.06),
    )),
    "boat": Drawing(0.95, (
        Part("line", "dark", (0.47, 0.02, 0.47, 0.75), 0.07),
        Part("polygon", "body", (0.54, 0.04, 0.54, 0.62, 0.98, 0.62)),
        Part("polygon", "body", (0.4, 0.16, 0.4, 0.62, 0.08, 0.62)),
        Part("polygon", "shade", (0.0, 0.7, 1.0, 0.7, 0.8, 1.0, 0.2, 1.0)),
    )),
    "book": Drawing(1.2, (
        Part("box", "body", (0.0, 0.0, 1.0, 1.0)),
        Part("box", "shade", (0.0, 0.0, 0.2, 1.0)),
        Part("box", "contrast", (0.2, 0.88, 0.94, 0.96)),
        Part("line", "contrast", (0.36, 0.24, 0.84, 0.24), 0.1),
        Part("line", "contrast", (0.36, 0.44, 0.7, 0.44), 0.08),
    )),
    "bottle": Drawing(2.1, (
        Part("box", "body", (0.34, 0.04, 0.66, 0.4)),
        Part("ellipse", "body", (0.06, 0.24, 0.94, 0.6)),
        Part("box", "body", (0.06, 0.42, 0.94, 1.0)),
        Part("box", "dark", (0.3, 0.0, 0.7, 0.1)),
        Part("box", "contrast", (0.06, 0.6, 0.94, 0.8)),
    )),
    "car": Drawing(0.56, (
        Part("polygon", "body", (0.18, 0.44, 0.32, 0.02, 0.7, 0.02, 0.86, 0.44)),
        Part("polygon", "glass", (0.3, 0.38, 0.38, 0.12, 0.48, 0.12, 0.48, 0.38)),
        Part("polygon", "glass", (0.55, 0.38, 0.55, 0.12, 0.66, 0.12, 0.76, 0.38)),
        Part("box", "body", (0.0, 0.4, 1.0, 0.8)),
        Part("ellipse", "dark", (0.1, 0.54, 0.36, 1.0)),
        Part("ellipse", "dark", (0.64, 0.54, 0.9, 1.0)),
    )),
    "chair": Drawing(1.45, (
        Part("box", "body", (0.04, 0.0, 0.26, 1.0)),
        Part("box", "body", (0.04, 0.46, 0.96, 0.64)),
        Part("box", "body", (0.76, 0.6, 0.96, 1.0)),
        Part("box", "shade", (0.04, 0.62, 0.96, 0.68)),
    )),
    "clock": Drawing(1.1, (
        Part("ellipse", "shade", (0.02, 0.0, 0.36, 0.28)),
        Part("ellipse", "shade", (0.64, 0.0, 0.98, 0.28)),
        Part("line", "dark", (0.2, 0.86, 0.1, 0.98), 0.1),
        Part("line", "dark", (0.8, 0.86, 0.9, 0.98), 0.1),
        Part("ellipse", "dark", (0.02, 0.1, 0.98, 0.98)),
        Part("ellipse", "body", (0.1, 0.17, 0.9, 0.91)),
        Part("line", "contrast", (0.5, 0.26, 0.5, 0.54, 0.7, 0.64), 0.1),
    )),
    "cup": Drawing(0.9, (
        Part("ellipse", "body", (0.5, 0.2, 1.0, 0.82)),
        Part("ellipse", "hole", (0.6, 0.36, 0.84, 0.66)),
        Part("polygon", "body", (0.0, 0.1, 0.72, 0.1, 0.62, 1.0, 0.1, 1.0)),
        Part("ellipse", "shade", (0.0, 0.0, 0.72, 0.22)),
    )),
    "donut": Drawing(0.95, (
        Part("ellipse", "body", (0.0, 0.0, 1.0, 1.0)),
        Part("ellipse", "hole", (0.32, 0.32, 0.68, 0.68)),
        Part("line", "contrast", (0.2, 0.24, 0.28, 0.16), 0.08),
        Part("line", "contrast", (0.66, 0.12, 0.76, 0.2), 0.08),
        Part("line", "contrast", (0.84, 0.48, 0.84, 0.6), 0.08),
        Part("line", "contrast", (0.12, 0.56, 0.18, 0.66), 0.08),
        Part("line", "contrast", (0.44, 0.84, 0.56, 0.86), 0.08),
    )),
    "kite": Drawing(1.5, (
        Part("line", "dark", (0.5, 0.6, 0.4, 0.8, 0.6, 0.9, 0.46, 1.0), 0.08),
        Part("polygon", "body", (0.5, 0.0, 1.0, 0.28, 0.5, 0.74, 0.0, 0.28)),
        Part("line", "contrast", (0.06, 0.28, 0.94, 0.28), 0.07),
        Part("line", "contrast", (0.5, 0.04, 0.5, 0.7), 0.07),
    )),
    "umbrella": Drawing(1.0, (
        Part("line", "dark", (0.5, 0.4, 0.5, 0.94, 0.34, 0.98, 0.28, 0.86), 0.09),
        Part("ellipse", "body", (0.0, 0.06, 1.0, 1.06)),
        Part("box", "hole", (0.0, 0.56, 0.44, 1.1)),
        Part("box", "hole", (0.56, 0.56, 1.0, 1.1)),
        Part("box", "hole", (0.4, 0.62, 0.6, 1.1)),
        Part("line", "dark", (0.5, 0.5, 0.5, 0.94, 0.34, 0.98, 0.28, 0.86), 0.09),
        Part("line", "shade", (0.5, 0.08, 0.26, 0.54), 0.05),
        Part("line", "shade", (0.5, 0.08, 0.74, 0.54), 0.05),
    )),
}  # fmt: skip


def _tones(color: tuple[int, int, int]) -> dict[Tone, tuple[int, int, int]]:
    """Paint of each tone; black is shaded lighter, as a darker one could not be seen."""
    bright = sum(color) > 3 * 120
    dark = color == PALETTE["black"]
    return {
        "body": color,
        "shade": (70, 70, 78) if dark else (color[0] * 7 // 10, color[1] * 7 // 10, color[2] * 7 // 10),
        "contrast": (52, 48, 56) if bright else (238, 236, 228),
        "dark": (108, 108, 118) if dark else (46, 42, 50),
        "glass": (190, 214, 226),
        "hole": (0, 0, 0),
    }


@lru_cache(maxsize=8192)
def sprite(class_name: str, color: str, width: int) -> np.ndarray:
    """Picture (h, width, 4) float32 of one object: RGB in [0, 255] and coverage in [0, 1]; a thin outline around it."""
    drawing = DRAWINGS[class_name]
    height = max(1, round(width * drawing.aspect))
    outline = SUPERSAMPLE  # one pixel
    inner = (width * SUPERSAMPLE - 2 * outline, height * SUPERSAMPLE - 2 * outline)
    tones = _tones(PALETTE[color])
    picture = Image.new("RGB", (width * SUPERSAMPLE, height * SUPERSAMPLE), tones["dark"])
    cover = Image.new("L", picture.size, 0)
    for part in drawing.parts:
        _paint(ImageDraw.Draw(picture), part, tones[part.tone], inner, outline)
        _paint(ImageDraw.Draw(cover), part, 0 if part.tone == "hole" else 255, inner, outline)
    inside = np.asarray(cover)[..., None] > 0
    colors = np.where(inside, np.asarray(picture), np.array(tones["dark"], np.uint8))
    around = cover.filter(ImageFilter.MaxFilter(2 * (outline // 2) + 1))
    alpha = np.asarray(around, np.float32).reshape(height, SUPERSAMPLE, width, SUPERSAMPLE) / 255
    weight = alpha[..., None]
    painted = colors.reshape(height, SUPERSAMPLE, width, SUPERSAMPLE, 3).astype(np.float32) * weight
    total = alpha.mean((1, 3))
    rgb = painted.mean((1, 3)) / np.maximum(total, 1e-6)[..., None]
    return np.concatenate([rgb, total[..., None]], -1)


def _paint(
    draw: ImageDraw.ImageDraw, part: Part, fill: int | tuple[int, int, int], size: tuple[int, int], offset: int
) -> None:
    points = [offset + part.points[i] * size[i % 2] for i in range(len(part.points))]
    if part.shape == "ellipse":
        draw.ellipse(points, fill=fill)
    elif part.shape == "box":
        draw.rectangle(points, fill=fill)
    elif part.shape == "polygon":
        draw.polygon(points, fill=fill)
    else:
        draw.line(points, fill=fill, width=max(1, round(part.width * size[0])), joint="curve")
