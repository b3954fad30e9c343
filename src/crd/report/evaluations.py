"""Evaluations and events of a run as the report shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from crd.alarm import ACTIONS, NOTE, NOTHING, RAISE_KL, STOP, WARN
from crd.errors import CRDError
from crd.eval_record import EvalRecord, parse_record
from crd.evaluation_files import Sheet, parse_sheet
from crd.json_files import read_object, read_object_lines
from crd.metrics.bootstrap import bootstrap_mean

RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval over prompts; `low` and `high` are NaN where there is none."""

    mean: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Evaluation:
    """What was measured at one moment of a run or of the base model with guidance, and where its pictures are."""

    update: int | None  # None = the base model with guidance; 0 = the base model without
    record: EvalRecord
    sheet: Sheet | None

    @property
    def label(self) -> str:
        """What a person calls it."""
        if self.update is None:
            return f"base, CFG {self.record.guidance:g}" if self.record.guidance != 1 else "base"
        return moment(self.update)

    @cached_property
    def columns(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Values (N,) and prompt ids (N,) of a metric by its name in metrics.jsonl."""
        return self.record.columns()

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """All that was measured, by its name in metrics.jsonl: means with intervals, then plain numbers."""
        found = {}
        for name, (values, prompts) in self.columns.items():
            if not np.isnan(values).all():
                interval = bootstrap_mean(values, prompts, resamples=RESAMPLES)
                found[name] = Estimate(interval.mean, interval.low, interval.high)
        return found | {name: Estimate(value) for name, value in self.record.drift.items() if not math.isnan(value)}


def moment(update: int) -> str:
    """What a person calls the state of a run after an update."""
    return "base" if update == 0 else f"update {update}"


@dataclass(frozen=True)
class Event:
    """What an alarm rule said, what was done about it, and the pictures it kept."""

    update: int
    level: str  # NOTE or WARN
    action: str  # what followed: NOTHING, or of `ACTIONS`
    rule: str  # and the score or statistic that it is about, if any
    message: str
    numbers: Mapping[str, float]
    pictures: tuple[Path, ...]

    @property
    def kind(self) -> str:
        """How it is marked: by what was done, if that is more than telling."""
        return self.action if self.action in (RAISE_KL, STOP) else self.level


def read_evaluations(folder: Path) -> tuple[list[Evaluation], list[str]]:
    """All evaluations in `folder`, the base with guidance after update 0, and what is missing, in words.

    Raises:
        CRDError: a malformed file, or sheets of one run that show different images.
    """
    found: list[Evaluation] = []
    missing: list[str] = []
    for path in sorted(folder.glob("[!.]*.json")):  # without what is being written
        content = read_object(path)
        record = parse_record(content)
        sheet = (parse_sheet(content.inner("pictures"), folder, len(record.prompt_id))
                 if content.has("pictures") else None)  # fmt: skip
        kept = sheet is not None and sheet.path.is_file()
        found.append(Evaluation(content.integer("update") if content.has("update") else None, record,
                                sheet if kept else None))  # fmt: skip
        if sheet is not None and not kept:
            missing.append(f"the pictures of {found[-1].label} ({sheet.path.name})")
    found.sort(key=lambda one: (one.update or 0, one.update is None, one.record.guidance))
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
        pictures = [run / name for name in line.texts("pictures")]
        missing += [f"the picture {picture.name} of an event" for picture in pictures if not picture.is_file()]
        events.append(
            Event(
                line.integer("update"),
                line.one_of("level", (NOTE, WARN)),
                line.one_of("action", (NOTHING, *ACTIONS)),
                f"{line.text('rule')} {line.text('column')}" if line.has("column") else line.text("rule"),
                line.text("message"),
                line.inner("numbers").all_numbers(),
                tuple(picture for picture in pictures if picture.is_file()),
            )
        )
    return sorted(events, key=lambda event: event.update), missing


def _check_same_pictures(evaluations: list[Evaluation]) -> None:
    sheets = [evaluation.sheet for evaluation in evaluations if evaluation.sheet is not None]
    for sheet in sheets:
        if sheet.indices != sheets[0].indices:
            raise CRDError(f"{sheet.path} and {sheets[0].path} must show the same images of their evaluations, got "
                           "other indices; remove one of the two evaluations")  # fmt: skip
