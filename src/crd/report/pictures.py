"""The sprite sheets and event pictures of a report, made small enough for one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from crd.errors import CRDError
from crd.report.evaluations import Sheet
from crd.report.figures import rounded
from crd.report.read_run import Run
from crd.report.words import distinct

# Bytes of all pictures; base64 makes 8.4 MB of them, so that the file stays below 10 MB.
BUDGET = 6_300_000
# Tried in this order where the files as they are do not fit: tile size, WebP quality.
_LADDER = ((1.0, 80), (1.0, 60), (1.0, 40), (0.5, 60), (0.5, 40))


@dataclass(frozen=True)
class Picture:
    """One encoded picture."""

    mime: str
    content: bytes

    @property
    def base64(self) -> str:
        return base64.b64encode(self.content).decode("ascii")

    @property
    def uri(self) -> str:
        return f"data:{self.mime};base64,{self.base64}"


@dataclass(frozen=True)
class Album:
    """All pictures of a report by file, and what was done to make them fit ("" = nothing)."""

    pictures: Mapping[Path, Picture]
    scale: float  # of a tile
    note: str


def load_album(runs: Sequence[Run], budget: int = BUDGET) -> Album:
    """Read every picture of the runs; encode them anew, ever smaller, if together they exceed the budget.

    Args:
        runs: whose pictures.
        budget: bytes.

    Raises:
        CRDError: a file that is no picture, a sheet too small for its tiles, or too many pictures for any setting.
    """
    sheets = {one.sheet.path: one.sheet for run in runs for one in run.evaluations if one.sheet is not None}
    others = [picture for run in runs for event in run.events or () for picture in event.pictures]
    images = {path: _open(path) for path in [*sheets, *others]}
    for path, sheet in sheets.items():
        _check_size(images[path], sheet)
    pictures = {path: Picture(_mime(image), path.read_bytes()) for path, image in images.items()}
    if _size(pictures) <= budget:
        return Album(pictures, 1.0, "")
    for scale, quality in _LADDER:
        pictures = {path: _encoded(image, sheets.get(path), scale, quality) for path, image in images.items()}
        if _size(pictures) <= budget:
            size = "" if scale == 1 else ", at half size,"
            return Album(pictures, scale, f"To keep this file small, its pictures are shown{size} in WebP of quality "
                                          f"{quality}; the run folder has the originals.")  # fmt: skip
    raise CRDError(f"the pictures of these runs need {_size(pictures) / 1e6:.0f} MB even at the lowest quality, the "
                   f"limit is {budget / 1e6:.1f} MB; report fewer runs at once")  # fmt: skip


def grid_data(run: Run, number: int, album: Album) -> dict[str, Any] | None:
    """What `page/pictures.js` needs to show a run's images; None if it kept none.

    Args:
        run: the run.
        number: of the run in the report; its sheets are named `sheet-NUMBER-0`, `sheet-NUMBER-1`, ...
        album: with its sheets.
    """
    shown = [(one, one.sheet) for one in run.evaluations if one.sheet is not None]
    if not shown or not shown[0][1].indices:
        return None
    first, sheet = shown[0]
    return {
        "prompts": [first.prompts[first.prompt_index[index]] for index in sheet.indices],
        "steps": [
            {
                "label": evaluation.label,
                "update": evaluation.update,
                "sheet": f"sheet-{number}-{place}",
                "mime": album.pictures[sheet.path].mime,
                "tile": _scaled(sheet.tile, album.scale),
                "columns": sheet.columns,
                "scores": {
                    name: [rounded(float(evaluation.scores[name][index]), 4) for index in sheet.indices]
                    for name in distinct(evaluation.scores)
                },
            }
            for place, (evaluation, sheet) in enumerate(shown)
        ],
    }


def sheet_texts(run: Run, number: int, album: Album) -> list[tuple[str, str]]:
    """Name and base64 content of a run's sheets, in the order of `grid_data`."""
    sheets = [one.sheet for one in run.evaluations if one.sheet is not None]
    return [(f"sheet-{number}-{place}", album.pictures[sheet.path].base64) for place, sheet in enumerate(sheets)]


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError) as error:
        raise CRDError(f"cannot read the picture {path}: {error}; restore it, or delete it to leave it out") from error


def _mime(image: Image.Image) -> str:
    mime = Image.MIME.get(image.format or "")
    if mime not in ("image/png", "image/webp", "image/jpeg"):
        raise CRDError(f"pictures of a run must be PNG, WebP or JPEG, got {image.format}; save them as WebP")
    return mime


def _check_size(image: Image.Image, sheet: Sheet) -> None:
    rows = -(-len(sheet.indices) // sheet.columns)
    width = sheet.tile * min(sheet.columns, len(sheet.indices))
    if image.width < width or image.height < rows * sheet.tile:
        raise CRDError(f"{sheet.path} must be at least {width} x {rows * sheet.tile} px for {len(sheet.indices)} tiles "
                       f"of {sheet.tile} px, got {image.width} x {image.height}; draw it again")  # fmt: skip


def _encoded(image: Image.Image, sheet: Sheet | None, scale: float, quality: int) -> Picture:
    plain = image.convert("RGB")
    if scale != 1:
        plain = plain.resize(_small_size(plain, sheet, scale), Image.Resampling.LANCZOS, _tiles_box(plain, sheet))
    buffer = io.BytesIO()
    plain.save(buffer, "WEBP", quality=quality, method=4)
    return Picture("image/webp", buffer.getvalue())


def _tiles_box(image: Image.Image, sheet: Sheet | None) -> tuple[int, int, int, int]:
    """The whole tiles of a sheet: what is left over at its edges would shift them when it is scaled."""
    if sheet is None:
        return (0, 0, image.width, image.height)
    return (0, 0, image.width // sheet.tile * sheet.tile, image.height // sheet.tile * sheet.tile)


def _small_size(image: Image.Image, sheet: Sheet | None, scale: float) -> tuple[int, int]:
    if sheet is None:
        return max(1, int(image.width * scale)), max(1, int(image.height * scale))
    tile = _scaled(sheet.tile, scale)
    return image.width // sheet.tile * tile, image.height // sheet.tile * tile


def _scaled(tile: int, scale: float) -> int:
    return max(1, int(tile * scale))


def _size(pictures: Mapping[Path, Picture]) -> int:
    return sum(len(picture.content) for picture in pictures.values())
