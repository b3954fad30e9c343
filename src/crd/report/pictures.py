"""The sprite sheets and event pictures of a report, few and small enough for one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageOps, UnidentifiedImageError

from crd.errors import CRDError
from crd.evaluation_files import Sheet
from crd.report.evaluations import Evaluation
from crd.report.figures import rounded
from crd.report.read_run import Run
from crd.report.words import distinct

EVENT_SIDE, EVENT_QUALITY = 256, 80  # px; larger pictures of events are shown as smaller WebP
WEBP = "image/webp"
T = TypeVar("T")


@dataclass(frozen=True)
class Fit:
    """One way to make the pictures of a report smaller."""

    most: int | None  # evaluations of a run that are pictured, and events; None = all
    scale: float = 1.0  # of a tile
    quality: int | None = None  # of WebP; None = the files as they are

    @property
    def words(self) -> list[str]:
        """What it does, for the reader; [] = nothing."""
        kept = [] if self.most is None else [
            f"at most {self.most} evaluations of a run are pictured (the first, the best, the last, others evenly "
            f"between), and at most {self.most} of its events"]  # fmt: skip
        size = "" if self.scale == 1 else "at half size "
        return kept if self.quality is None else [*kept, f"pictures are shown {size}in WebP of quality {self.quality}"]


# In this order: fewer moments of a run, then smaller pictures, then hardly any.
_FITS = (
    *(Fit(most) for most in (None, 96, 48, 24, 12)),
    *(Fit(12, scale, quality) for scale, quality in ((1.0, 80), (1.0, 60), (1.0, 40), (0.5, 60), (0.5, 40))),
    Fit(6, 0.5, 40),
    Fit(3, 0.5, 40),
)


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
    """The pictures of a report that are shown, by file, and what was done to make them fit ("" = nothing)."""

    pictures: Mapping[Path, Picture]
    scale: float  # of a tile
    note: str


def blank_album(runs: Sequence[Run]) -> Album:
    """Every picture of the runs without its content: what a page needs beside its pictures."""
    sheets, events = _chosen(runs, None)
    return Album(dict.fromkeys([*sheets, *events], Picture(WEBP, b"")), 1.0, "")


def load_album(runs: Sequence[Run], budget: int) -> Album:
    """Read the pictures of the runs; if together they exceed the budget, fewer of them, then smaller ones.

    Args:
        runs: whose pictures.
        budget: bytes in base64.

    Raises:
        CRDError: a file that is no picture, a sheet too small for its tiles, or too many pictures for any setting.
    """
    for fit in _FITS:
        pictures = _fitted(runs, fit, budget)
        if pictures is not None:
            note = f"To keep this file small, {'; '.join(fit.words)}. The run folder has the originals."
            thinned = fit.quality is not None or len(pictures) < len(set(_paths(runs, None)))
            return Album(pictures, fit.scale, note if thinned else "")
    raise CRDError(f"{len(_paths(runs, 3))} pictures of {len(runs)} runs do not fit in {max(budget, 0) / 1e6:.1f} MB "
                   "even at the lowest quality; report fewer runs at once")  # fmt: skip


def _fitted(runs: Sequence[Run], fit: Fit, budget: int) -> dict[Path, Picture] | None:
    """The pictures of a fit by file; None as soon as they exceed the budget."""
    sheets, events = _chosen(runs, fit.most)
    # Asked of the file system first: a long run has more pictures than memory.
    if fit.quality is None and sum(path.stat().st_size for path in sheets) > budget:
        return None
    found: dict[Path, Picture] = {}
    for path in [*sheets, *events]:
        found[path] = _sheet(sheets[path], fit) if path in sheets else _event(path, fit)
        budget -= 4 * -(-len(found[path].content) // 3)
        if budget < 0:
            return None
    return found


def _chosen(runs: Sequence[Run], most: int | None) -> tuple[dict[Path, Sheet], list[Path]]:
    """Sheets by file and pictures of events, of at most so many evaluations and events of a run."""
    sheets: dict[Path, Sheet] = {}
    events: list[Path] = []
    for run in runs:
        during = [one for one in run.during if one.sheet is not None]
        best = next((place for place, one in enumerate(during) if run.best and one.update == run.best[0]), None)
        shown = [*(one for one in run.guided if one.sheet is not None), *spread(during, most, best)]
        sheets |= {one.sheet.path: one.sheet for one in shown if one.sheet is not None}
        pictured = [event for event in run.events or () if event.pictures]
        events += [picture for event in spread(pictured, most) for picture in event.pictures]
    return sheets, events


def _paths(runs: Sequence[Run], most: int | None) -> list[Path]:
    sheets, events = _chosen(runs, most)
    return [*sheets, *events]


def spread(items: Sequence[T], most: int | None, kept: int | None = None) -> list[T]:
    """At most so many of the items, evenly, the first and the last among them.

    Args:
        items: in their order.
        most: 3 or more; None = all.
        kept: place of one that must be among them.
    """
    if most is None or len(items) <= most:
        return list(items)
    last = len(items) - 1
    places = {round(step * last / (most - 1)) for step in range(most)}
    if kept is not None and kept not in places:
        nearest = min(places - {0, last}, key=lambda place: (abs(place - kept), place))
        places = places - {nearest} | {kept}
    return [items[place] for place in sorted(places)]


def _shown(run: Run, album: Album) -> list[tuple[Evaluation, Sheet]]:
    """A run's evaluations whose sheets are in the album, the base first."""
    return [(one, one.sheet) for one in run.evaluations if one.sheet is not None and one.sheet.path in album.pictures]


def grid_data(run: Run, number: int, album: Album) -> dict[str, Any] | None:
    """What `page/pictures.js` needs to show a run's images; None if it kept none.

    Args:
        run: the run.
        number: of the run in the report; its sheets are named `sheet-NUMBER-0`, `sheet-NUMBER-1`, ...
        album: with its sheets.
    """
    shown = _shown(run, album)
    if not shown or not shown[0][1].indices:
        return None
    first, sheet = shown[0]
    return {
        "prompts": [first.record.prompts[first.record.prompt_id[index]] for index in sheet.indices],
        "steps": [
            {
                "label": evaluation.label,
                "update": evaluation.update,
                "sheet": f"sheet-{number}-{place}",
                "mime": album.pictures[sheet.path].mime,
                "tile": _scaled(sheet.tile, album.scale),
                "columns": sheet.columns,
                "scores": {
                    name: [rounded(float(evaluation.record.scores[name][index]), 4) for index in sheet.indices]
                    for name in distinct(evaluation.record.scores)
                },
            }
            for place, (evaluation, sheet) in enumerate(shown)
        ],
    }


def sheet_texts(run: Run, number: int, album: Album) -> list[tuple[str, str]]:
    """Name and base64 content of a run's sheets, in the order of `grid_data`."""
    shown = _shown(run, album)
    return [(f"sheet-{number}-{place}", album.pictures[sheet.path].base64) for place, (_, sheet) in enumerate(shown)]


def _sheet(sheet: Sheet, fit: Fit) -> Picture:
    image = _open(sheet.path)
    rows = -(-len(sheet.indices) // sheet.columns)
    width = sheet.tile * min(sheet.columns, len(sheet.indices))
    if image.width < width or image.height < rows * sheet.tile:
        raise CRDError(f"{sheet.path} must be at least {width} x {rows * sheet.tile} px for {len(sheet.indices)} tiles "
                       f"of {sheet.tile} px, got {image.width} x {image.height}; draw it again")  # fmt: skip
    if fit.quality is None:
        return Picture(_mime(image), sheet.path.read_bytes())
    if fit.scale == 1:
        return _encoded(image, fit.quality)
    # Whole tiles alone: what is left over at the edges would shift them.
    across, down, tile = image.width // sheet.tile, image.height // sheet.tile, _scaled(sheet.tile, fit.scale)
    box = (0, 0, across * sheet.tile, down * sheet.tile)
    small = image.convert("RGB").resize((across * tile, down * tile), Image.Resampling.LANCZOS, box)
    return _encoded(small, fit.quality)


def _event(path: Path, fit: Fit) -> Picture:
    image = _open(path)
    side = min(int(EVENT_SIDE * fit.scale), max(image.size))
    if fit.quality is None and side == max(image.size):
        return Picture(_mime(image), path.read_bytes())
    return _encoded(ImageOps.contain(image.convert("RGB"), (side, side)), fit.quality or EVENT_QUALITY)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError) as error:
        raise CRDError(f"cannot read the picture {path}: {error}; restore it, or delete it to leave it out") from error


def _mime(image: Image.Image) -> str:
    mime = Image.MIME.get(image.format or "")
    if mime not in ("image/png", WEBP, "image/jpeg"):
        raise CRDError(f"pictures of a run must be PNG, WebP or JPEG, got {image.format}; save them as WebP")
    return mime


def _encoded(image: Image.Image, quality: int) -> Picture:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=quality, method=4)
    return Picture(WEBP, buffer.getvalue())


def _scaled(tile: int, scale: float) -> int:
    return max(1, int(tile * scale))
