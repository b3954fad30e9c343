"""Contact sheets: rows of images under their prompts and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_PAD, _LABEL, _MARGIN = 4, 14, 130


@dataclass(frozen=True)
class GridRow:
    """One row: a title at its left, images, and a caption under each (or none)."""

    title: str
    images: Sequence[Image.Image]
    captions: Sequence[str] | None = None


def draw_grid(rows: Sequence[GridRow], header: Sequence[str], cell: int = 112) -> Image.Image:
    """All rows with column headers; small images are enlarged without smoothing.

    Raises:
        ValueError: rows of different length.
    """
    columns = len(header)
    if not rows or any(len(row.images) != columns for row in rows):
        raise ValueError(f"every row must hold {columns} images, got {[len(row.images) for row in rows]}")
    height = cell + _LABEL + _PAD
    sheet = Image.new("RGB", (_MARGIN + columns * (cell + _PAD), _LABEL + _PAD + len(rows) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for x, text in enumerate(header):
        pen.text((_MARGIN + x * (cell + _PAD), 2), _fit(pen, text, cell, font), fill="black", font=font)
    for y, row in enumerate(rows):
        top = _LABEL + _PAD + y * height
        for line, part in enumerate(row.title.split("\n")):
            pen.text((4, top + cell / 2 - 12 + 13 * line), part, fill="black", font=font)
        for x, image in enumerate(row.images):
            left = _MARGIN + x * (cell + _PAD)
            filter_ = Image.Resampling.NEAREST if image.width <= cell else Image.Resampling.LANCZOS
            sheet.paste(image.resize((cell, cell), filter_), (left, top))
            if row.captions is not None:
                pen.text((left, top + cell), _fit(pen, row.captions[x], cell, font), fill="black", font=font)
    return sheet


def _fit(pen: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while len(text) > 1 and pen.textlength(text, font=font) > width:
        text = text[:-2] + "…"
    return text
