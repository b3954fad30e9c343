"""Runs that were finished elsewhere, from the results.jsonl and cells.jsonl that were kept of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crd.bench.analysis import Curve
from crd.bench.cells import FINISHED, check_settings, parse_attempt
from crd.bench.collect import CELLS_FILE, RESULTS_FILE, Outcome
from crd.bench.suite import Cell, Suite
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
    for folder in folders:
        points: dict[Cell, list[JsonObject]] = {}
        for line in _lines(folder / RESULTS_FILE):
            points.setdefault(_cell(line), []).append(line)
        for line in _lines(folder / CELLS_FILE):
            cell = _cell(line)
            if line.text("state") != FINISHED:
                continue
            if cell in found:
                raise CRDError(f"{line.where}: {cell} is recorded twice; leave one of the two out")
            if cell not in points:
                raise CRDError(f"{folder / RESULTS_FILE} has no line of {cell}, {CELLS_FILE} has; restore the file")
            _check(suite, cell, line)
            found[cell] = _outcome(cell, line, points[cell])
    return found


def _lines(path: Path) -> list[JsonObject]:
    lines, cut = read_object_lines(path)
    if cut:
        raise CRDError(f"{path} ends in the middle of a line; restore the file")
    return lines


def _cell(line: JsonObject) -> Cell:
    return Cell(line.text("task"), line.text("arm"), line.integer("seed"))


def _check(suite: Suite, cell: Cell, line: JsonObject) -> None:
    if cell.task not in suite.tasks or cell.arm not in suite.arms or cell.seed not in suite.seeds:
        raise CRDError(f"{line.where}: suite {suite.name} has no run {cell}; leave these records out")
    with told_of(line.where):
        made = config_from(line.inner("settings").content)
    asked = suite.config(cell, Path("unused"), {})
    check_settings(made, asked, f"{line.where}: {cell}", "leave these records out")


def _outcome(cell: Cell, line: JsonObject, points: Sequence[JsonObject]) -> Outcome:
    axes = {name: np.array([point.real(name) for point in points]) for name in _AXES}
    rows = [point.all_numbers((*_NAMES, *_AXES)) for point in points]
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}
    attempts = line.items("attempts")
    return Outcome(
        cell, FINISHED, Curve(**axes, values=values), line.inner("guided_base").all_numbers(),
        line.real("anchor_guidance"), line.inner("settings").content, line.inner("environment").content,
        tuple(parse_attempt(JsonObject(one, f"{line.where}, attempts")) for one in attempts),
    )  # fmt: skip
