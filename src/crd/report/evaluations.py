"""Evaluations and events of a run as typed records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crd.errors import CRDError
from crd.report.json_files import JsonObject, read_object, read_object_lines

LEVELS = ("note", "warn", "raise_kl", "stop")
_ACTIONS = ("raise_kl", "stop")  # what a warning led to, where that is more than telling


@dataclass(frozen=True)
class Sheet:
    """A sprite sheet: picture n lies at row n // columns, column n % columns."""

    path: Path
    indices: tuple[int, ...]  # which images of the evaluation are pictured
    tile: int  # px
    columns: int


@dataclass(frozen=True)
class Evaluation:
    """Scores of B images of P prompts, drawn at one moment of a run or from the base model with guidance."""

    name: str  # of the file, without its ending
    update: int | None  # None = the base model with guidance; 0 = the base model without
    guidance: float
    steps: int
    prompts: tuple[str, ...]  # P
    prompt_index: np.ndarray  # (B,) int64
    scores: Mapping[str, np.ndarray]  # name -> (B,) float64, NaN = does not apply
    statistics: Mapping[str, np.ndarray]  # name -> (B,) float64
    diversity: np.ndarray | None  # (P,) float64, NaN = one image
    model: Mapping[str, float]
    sheet: Sheet | None

    @property
    def label(self) -> str:
        """What a person calls it."""
        if self.update is None:
            return f"base, CFG {self.guidance:g}" if self.guidance != 1 else "base"
        return "base" if self.update == 0 else f"update {self.update}"

    def column(self, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Values (N,) and prompt ids (N,) of a metric by its name in metrics.jsonl; None if not kept by image."""
        if metric == "diversity":
            return None if self.diversity is None else (self.diversity, np.arange(len(self.prompts)))
        if metric.startswith("stat_"):
            values = self.statistics.get(metric.removeprefix("stat_"))
        else:
            values = self.scores.get(metric)
        return None if values is None else (values, self.prompt_index)

    def metrics(self) -> list[str]:
        """Names of all that was measured: of what `column` knows, and of `model`."""
        names = [*self.scores, "diversity", *(f"stat_{name}" for name in self.statistics)]
        columns = {name: column[0] for name in names if (column := self.column(name)) is not None}
        found = [name for name, values in columns.items() if not np.isnan(values).all()]
        return found + [name for name, value in self.model.items() if not np.isnan(value)]


@dataclass(frozen=True)
class Event:
    """What an alarm rule said, and the pictures it kept."""

    update: int
    level: str  # of `LEVELS`: a note, a warning, or what a warning led to
    rule: str  # and the score or statistic that it is about, if any
    message: str
    numbers: Mapping[str, float]
    pictures: tuple[Path, ...]


def read_evaluations(folder: Path) -> tuple[list[Evaluation], list[str]]:
    """All evaluations in `folder`, the base with guidance after update 0, and what is missing, in words.

    Raises:
        CRDError: a malformed file, or sheets of one run that show different images.
    """
    found: list[Evaluation] = []
    missing: list[str] = []
    for path in sorted(folder.glob("*.json")):
        evaluation, without = _evaluation(path)
        found.append(evaluation)
        missing += [f"the pictures of {evaluation.label} ({without})"] if without else []
    found.sort(key=lambda one: (one.update or 0, one.update is None, one.guidance))
    _check_same_pictures(found)
    return found, missing


def read_events(run: Path, path: Path) -> tuple[list[Event], list[str]]:
    """Events of a run, oldest first, and what is missing, in words.

    Raises:
        CRDError: a malformed line.
    """
    lines, cut = read_object_lines(path)
    missing = [f"the last line of {path.name}, which was cut off"] if cut else []
    events = []
    for line in lines:
        pictures = [run / name for name in line.texts("pictures")] if line.has("pictures") else []
        missing += [f"the picture {picture.name} of an event" for picture in pictures if not picture.is_file()]
        events.append(
            Event(
                line.integer("update"),
                _level(line),
                f"{line.text('rule')} {line.text('column')}" if line.has("column") else line.text("rule"),
                line.text("message"),
                line.inner("numbers").all_numbers() if line.has("numbers") else {},
                tuple(picture for picture in pictures if picture.is_file()),
            )
        )
    return sorted(events, key=lambda event: event.update), missing


def _level(line: JsonObject) -> str:
    level = line.text("level")
    if level not in LEVELS:
        raise CRDError(f"{line.where}: level must be one of {', '.join(LEVELS)}, got {level!r}; restore the file")
    action = line.text("action") if line.has("action") else ""
    return action if level == "warn" and action in _ACTIONS else level


def _evaluation(path: Path) -> tuple[Evaluation, str]:
    """An evaluation, and the name of its sheet if that is missing."""
    record = read_object(path)
    prompts = record.texts("prompts")
    index = record.indices("prompt_index", len(prompts))
    images = len(index)
    sheet = _sheet(record.inner("pictures"), path.parent, images) if record.has("pictures") else None
    without = sheet.path.name if sheet is not None and not sheet.path.is_file() else ""
    evaluation = Evaluation(
        path.stem,
        record.integer("update") if record.has("update") else None,
        record.number("guidance"),
        record.integer("steps"),
        prompts,
        index,
        _columns(record, "scores", images),
        _columns(record, "statistics", images) if record.has("statistics") else {},
        record.numbers("diversity", len(prompts)) if record.has("diversity") else None,
        record.inner("model").all_numbers() if record.has("model") else {},
        None if without else sheet,
    )
    return evaluation, without


def _columns(record: JsonObject, name: str, images: int) -> dict[str, np.ndarray]:
    columns = record.inner(name)
    return {column: columns.numbers(column, images) for column in columns.content}


def _sheet(record: JsonObject, folder: Path, images: int) -> Sheet:
    indices = tuple(int(index) for index in record.indices("indices", images))
    sheet = Sheet(folder / record.text("file"), indices, record.integer("tile"), record.integer("columns"))
    if not sheet.tile or not sheet.columns:
        raise CRDError(f"{record.where}: tile and columns must be above 0, got {sheet.tile} and {sheet.columns}; "
                       "restore the file")  # fmt: skip
    return sheet


def _check_same_pictures(evaluations: list[Evaluation]) -> None:
    sheets = [evaluation.sheet for evaluation in evaluations if evaluation.sheet is not None]
    for sheet in sheets:
        if sheet.indices != sheets[0].indices:
            raise CRDError(f"{sheet.path} and {sheets[0].path} must show the same images of their evaluations, got "
                           "other indices; remove one of the two evaluations")  # fmt: skip
