"""Contact sheets: rows of images under their prompts and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL = 112  # px of an image
_PAD, _LABEL, _MARGIN = 4, 14, 130
_LINES = 3  # of a column header at most


@dataclass(frozen=True)
class GridRow:
    """One row: a title at its left, images, and a caption under each (or none)."""

    title: str
    images: Sequence[Image.Image]
    captions: Sequence[str] | None = None


def sheet_width(columns: int, cell: int = CELL) -> int:
    """Pixels of a sheet of so many images in a row."""
    return _MARGIN + columns * (cell + _PAD)


def draw_grid(rows: Sequence[GridRow], header: Sequence[str], cell: int = CELL) -> Image.Image:
    """All rows with column headers; small images are enlarged without smoothing, those that are not square fitted in.

    Raises:
        ValueError: rows of different length.
    """
    columns = len(header)
    if not rows or any(len(row.images) != columns for row in rows):
        raise ValueError(f"every row must hold {columns} images, got {[len(row.images) for row in rows]}")
    height, font = cell + _LABEL + _PAD, ImageFont.load_default(11)
    heads = [_wrapped(ImageDraw.Draw(Image.new("RGB", (1, 1))), text, cell, font) for text in header]
    head = _PAD + _LABEL * max(map(len, heads))
    sheet = Image.new("RGB", (sheet_width(columns, cell), head + len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for x, lines in enumerate(heads):
        for line, text in enumerate(lines):
            pen.text((_MARGIN + x * (cell + _PAD), 2 + _LABEL * line), text, fill="black", font=font)
    for y, row in enumerate(rows):
        top = head + y * height
        for line, part in enumerate(row.title.split("\n")):
            pen.text((4, top + cell / 2 - 12 + 13 * line), part, fill="black", font=font)
        for x, image in enumerate(row.images):
            left = _MARGIN + x * (cell + _PAD)
            filter_ = Image.Resampling.NEAREST if max(image.size) <= cell else Image.Resampling.LANCZOS
            tile = ImageOps.contain(image, (cell, cell), filter_)
            sheet.paste(tile, (left + (cell - tile.width) // 2, top + (cell - tile.height) // 2))
            if row.captions is not None:
                pen.text((left, top + cell), _fit(pen, row.captions[x], cell, font), fill="black", font=font)
    return sheet


def _wrapped(
    pen: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[str]:
    """Lines of whole words, the last one cut off."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and pen.textlength(longer, font=font) > width and len(lines) < _LINES:
            lines.append(word)
        else:
            lines[-1] = longer
    return [_fit(pen, line, width, font) for line in lines]


def _fit(pen: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while len(text) > 1 and pen.textlength(text, font=font) > width:
        text = text[:-2] + "…"
    return text
