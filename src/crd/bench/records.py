"""Runs that were finished elsewhere, from the results.jsonl and cells.jsonl that were kept of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crd.bench.analysis import Curve
from crd.bench.cells import FAILED, FINISHED, NEW, STARTED, check_settings, parse_attempt
from crd.bench.collect import CELLS_FILE, RESULTS_FILE, Outcome
from crd.bench.suite import Cell, Suite
from crd.config import CRDConfig
from crd.config_io import config_from
from crd.errors import CRDError, told_of
from crd.json_files import JsonObject, read_object_lines

_NAMES = ("task", "arm", "seed")
_AXES = ("update", "images", "transformer_evaluations", "seconds")


def read_records(suite: Suite, folders: Sequence[Path]) -> dict[Cell, Outcome]:
    """Finished runs of a suite, by cell; unfinished ones cannot be gone on with and are left out.

    Args:
        suite: that they are runs of.
        folders: each with the results.jsonl and cells.jsonl of `write_results`.

    Raises:
        CRDError: a file is missing or damaged, a run is none of the suite's, was made with other settings, or is
            recorded twice.
    """
    found: dict[Cell, Outcome] = {}
    places: dict[Cell, str] = {}
    for folder in folders:
        points: dict[Cell, list[JsonObject]] = {}
        for line in _lines(folder, RESULTS_FILE):
            points.setdefault(_cell(line), []).append(line)
        for line in _lines(folder, CELLS_FILE):
            cell = _cell(line)
            if line.one_of("state", (NEW, STARTED, FAILED, FINISHED)) != FINISHED:
                continue
            if cell in found:
                raise CRDError(f"{line.where}: {cell} is recorded in {places[cell]} too; leave one of the two out")
            config = _config(suite, cell, line)
            found[cell] = _outcome(cell, config, line, points.get(cell, []), folder / RESULTS_FILE)
            places[cell] = line.where
    return found


def _lines(folder: Path, name: str) -> list[JsonObject]:
    path = folder / name
    if not path.is_file():
        raise CRDError(f"--records {folder} has no {name}; name a folder that holds what crd bench wrote")
    lines, cut = read_object_lines(path)
    if cut:
        raise CRDError(f"{path} ends in the middle of a line; restore the file")
    return lines


def _cell(line: JsonObject) -> Cell:
    return Cell(line.text("task"), line.text("arm"), line.integer("seed"))


def _config(suite: Suite, cell: Cell, line: JsonObject) -> CRDConfig:
    """What a run was made with, if that is what the suite asks for."""
    if cell.task not in suite.tasks or cell.arm not in suite.arms or cell.seed not in suite.seeds:
        raise CRDError(f"{line.where}: suite {suite.name} has no run {cell}; leave these records out")
    settings = line.inner("settings")
    with told_of(f"{settings.where}, as another version of crd may have it"):
        made = config_from(settings.content)
    with told_of(f"suite {suite.name}, task {cell.task}, arm {cell.arm}"):
        asked = suite.config(cell, Path("unused"), {})
    check_settings(made, asked, f"{line.where}: {cell}", "leave these records out")
    return made


def _outcome(cell: Cell, config: CRDConfig, line: JsonObject, points: Sequence[JsonObject], results: Path) -> Outcome:
    axes = {name: np.array([point.number(name) for point in points]) for name in _AXES}
    # Of files that were put together by hand, a curve may be lost in part, or told twice.
    updates, last = [point.integer("update") for point in points], line.integer("updates")
    if not updates or updates[0] != 0 or updates != sorted(set(updates)) or updates[-1] != last:
        raise CRDError(f"{results} must hold {cell} from update 0 to {last} in order, got {updates}; restore the file")
    rows = [{"reward": point.real("reward"), **point.all_numbers((*_NAMES, *_AXES))} for point in points]
    names = dict.fromkeys(name for row in rows for name in row)
    return Outcome(
        cell,
        FINISHED,
        Curve(**axes, values={name: np.array([row.get(name, math.nan) for row in rows]) for name in names}),
        line.inner("guided_base").all_numbers(),
        line.real("anchor_guidance"),
        dataclasses.asdict(config),
        line.inner("environment").content,
        tuple(parse_attempt(attempt) for attempt in line.objects("attempts")),
    )
