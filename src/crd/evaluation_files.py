"""What a run keeps of its evaluations, for the alarm, `crd compare` and the report.

evaluations/update-000012.json   numbers of every image (`EvalRecord`)
evaluations/update-000012.webp   the first images, as tiles of one sheet
evaluations/base-cfg-4.5.json    the same of the base model with guidance
events.jsonl, events/            what the alarm said, each with two pictures
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from crd.alarm import Evaluated, Event
from crd.atomic import replace_file
from crd.errors import CRDError
from crd.eval_record import EvalRecord, read_record
from crd.evaluation import SHOWN, EvalResult
from crd.json_files import JsonObject

FOLDER, EVENTS, PICTURES, SAMPLES = "evaluations", "events.jsonl", "events", "samples"
UPDATE, BASE = "update-", "base-cfg-"
TILES, COLUMNS, TILE = SHOWN, 8, 160  # at most so many pictures, so many in a row, of so many px


@dataclass(frozen=True)
class Sheet:
    """Pictures of an evaluation as tiles of one file: number n lies at row n // columns, column n % columns."""

    path: Path
    indices: tuple[int, ...]  # which images of the evaluation are pictured
    tile: int  # px
    columns: int

    def pictures(self, chosen: Sequence[int]) -> list[Image.Image]:
        """Some of the images in `indices`.

        Raises:
            CRDError: the file is lost or damaged.
        """
        try:
            with Image.open(self.path) as file:
                return [_crop(file, self.indices.index(index), self.tile, self.columns) for index in chosen]
        except OSError as error:
            raise CRDError(f"cannot read the pictures {self.path}: {error}; restore the file") from error

    def to_dict(self) -> dict[str, Any]:
        """As the JSON beside it says it; `parse_sheet` reads it back."""
        return {"file": self.path.name, "indices": self.indices, "tile": self.tile, "columns": self.columns}


def parse_sheet(found: JsonObject, folder: Path, images: int) -> Sheet:
    """The sheet of a JSON object.

    Args:
        found: of `Sheet.to_dict`.
        folder: where it lies.
        images: of the evaluation.

    Raises:
        CRDError: it describes no sheet.
    """
    indices = tuple(found.indices("indices", images).tolist())
    return Sheet(folder / found.text("file"), indices, found.integer("tile", 1), found.integer("columns", 1))


class EvaluationFiles:
    """The evaluations and events of one run.

    Args:
        run: its folder.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.folder = run, run / FOLDER

    def save_policy(self, update: int, result: EvalResult) -> None:
        """Keep the evaluation after `update` updates; raises OSError."""
        self._save(f"{UPDATE}{update:06d}", result, update)

    def save_base(self, result: EvalResult) -> None:
        """Keep an evaluation of the base model with guidance; raises OSError."""
        self._save(f"{BASE}{result.record.guidance:g}", result, None)

    def history(self, until: int) -> list[Evaluated]:
        """Evaluations of the policy by update, none later than `until`.

        Raises:
            CRDError: a file is damaged.
        """
        paths = {_update(path): path for path in self.folder.glob(f"{UPDATE}*.json")}
        return [Evaluated(update, read_record(paths[update])) for update in sorted(paths) if update <= until]

    def base(self, guidance: float) -> EvalRecord | None:
        """The evaluation of the base model with this guidance, if there is one.

        Raises:
            CRDError: its file is damaged.
        """
        path = self.folder / f"{BASE}{guidance:g}.json"
        return read_record(path) if path.is_file() else None

    def forget_after(self, update: int) -> None:
        """Drop evaluations, sheets and events of later updates: a run that goes on from `update` has not made them.

        Raises OSError.
        """
        for folder in (self.folder, self.run / SAMPLES, self.run / PICTURES):
            for path in folder.glob(f"{UPDATE}*"):
                if _update(path) > update:
                    path.unlink()
        events = self.run / EVENTS
        if events.is_file():
            lines = events.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = "".join(line for line in lines if _is_event_until(update, line))
            replace_file(events, lambda path: path.write_text(kept, encoding="utf-8"))

    def save_event(self, event: Event, action: str, before: Image.Image, after: Image.Image) -> None:
        """Keep an event, what was done about it, and two pictures from the same prompt and noise; raises OSError."""
        pictures = []
        (self.run / PICTURES).mkdir(exist_ok=True)
        for name, image in (("before", before), ("after", after)):
            column = f"-{event.column}" if event.column else ""
            pictures.append(f"{PICTURES}/{UPDATE}{event.update:06d}-{event.rule}{column}-{name}.png")
            image.save(self.run / pictures[-1])
        content = {**dataclasses.asdict(event), "action": action, "pictures": pictures}
        with (self.run / EVENTS).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(content) + "\n")

    def tile(self, update: int, index: int) -> Image.Image:
        """Image `index`, below `TILES`, of the evaluation after `update` updates.

        Raises:
            CRDError: the sheet is lost or damaged.
        """
        path = self.folder / f"{UPDATE}{update:06d}.webp"
        try:
            with Image.open(path) as sheet:
                return _crop(sheet, index, sheet.width // COLUMNS, COLUMNS)
        except OSError as error:
            why = f"is damaged ({error})" if path.is_file() else "is missing"
            raise CRDError(f"{path}, whose pictures the alarm shows beside later ones, {why}; restore it, or go on "
                           "with --alarm off") from error  # fmt: skip

    def _save(self, name: str, result: EvalResult, update: int | None) -> None:
        self.folder.mkdir(exist_ok=True)
        shown = result.images[:TILES]
        side = min(TILE, max(shown[0].size))
        sheet = Sheet(self.folder / f"{name}.webp", tuple(range(len(shown))), side, COLUMNS)
        tiles = _tiles(shown, side)
        replace_file(sheet.path, lambda path: tiles.save(path, "WEBP", quality=90))
        text = json.dumps({"update": update, **result.record.to_dict(), "pictures": sheet.to_dict()}) + "\n"
        replace_file(self.folder / f"{name}.json", lambda path: path.write_text(text, encoding="utf-8"))


def _crop(sheet: Image.Image, place: int, side: int, columns: int) -> Image.Image:
    left, top = place % columns * side, place // columns * side
    return sheet.crop((left, top, left + side, top + side)).convert("RGB")


def _update(path: Path) -> int:
    """The update that a file's name begins with.

    Raises:
        CRDError: it names none, so it is not of the run.
    """
    number = path.stem.removeprefix(UPDATE).split("-")[0]
    if not number.isdigit():
        raise CRDError(f"{path} is not named after an update; move it out of the run folder")
    return int(number)


def _is_event_until(update: int, line: str) -> bool:
    """Whether a line of the log is an event up to `update`: an interruption may have cut the last one off."""
    try:
        return int(json.loads(line)["update"]) <= update
    except (ValueError, KeyError, TypeError):
        return False


def _tiles(images: list[Image.Image], side: int) -> Image.Image:
    """Tiles of `side` px, `COLUMNS` in a row; an image that is not square is fitted in."""
    sheet = Image.new("RGB", (COLUMNS * side, -(-len(images) // COLUMNS) * side))
    for place, image in enumerate(images):
        tile = image.convert("RGB")
        if tile.size != (side, side):
            tile = ImageOps.contain(tile, (side, side))
        sheet.paste(tile, (place % COLUMNS * side, place // COLUMNS * side))
    return sheet
