"""results.jsonl and cells.jsonl: what came of runs, written, and read back where their folders are not there."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crd.atomic import replace_file
from crd.bench.analysis import Curve
from crd.bench.cells import FAILED, FINISHED, NEW, STARTED, check_settings, parse_attempt
from crd.bench.collect import Outcome
from crd.bench.suite import Cell, Suite
from crd.config import CRDConfig
from crd.config_io import config_from
from crd.errors import CRDError, told_of
from crd.json_files import JsonObject, read_object_lines

RESULTS_FILE, CELLS_FILE = "results.jsonl", "cells.jsonl"
_NAMES = ("task", "arm", "seed")
_AXES = ("update", "images", "transformer_evaluations", "seconds")


def write_results(out: Path, outcomes: Sequence[Outcome]) -> None:
    """Write results.jsonl (a line for each run and evaluation) and cells.jsonl (a line for each run).

    Raises:
        CRDError: they cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CRDError(f"cannot make {out}: {error}; choose another --output_dir") from error
    points = [line for outcome in outcomes for line in _points(outcome)]
    for name, lines in ((RESULTS_FILE, points), (CELLS_FILE, [_totals(outcome) for outcome in outcomes])):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        try:
            replace_file(out / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))  # type: ignore[misc]
        except OSError as error:
            raise CRDError(f"cannot write {out / name}: {error}; free space") from error


def _points(outcome: Outcome) -> list[dict[str, Any]]:
    curve = outcome.curve
    return [
        {
            **_named(outcome.cell),
            "update": int(curve.update[row]),
            "images": _plain(curve.images[row]),
            "transformer_evaluations": _plain(curve.transformer_evaluations[row]),
            "seconds": _plain(curve.seconds[row]),
            **{name: _plain(values[row]) for name, values in curve.values.items()},
        }
        for row in range(len(curve.update))
    ]


def _totals(outcome: Outcome) -> dict[str, Any]:
    curve, attempts = outcome.curve, outcome.attempts
    return {
        **_named(outcome.cell),
        "state": outcome.state,
        "updates": int(curve.update[-1]),
        "images": _plain(curve.images[-1]),
        "transformer_evaluations": _plain(curve.transformer_evaluations[-1]),
        "training_seconds": _plain(curve.seconds[-1]),
        "wall_seconds": sum(one.seconds for one in attempts),
        "cpu_seconds": sum(one.cpu_seconds for one in attempts),
        "peak_memory_bytes": _plain(outcome.peak_bytes),
        "anchor_guidance": outcome.anchor_guidance,
        "guided_base": {name: _plain(value) for name, value in outcome.guided.items()},
        "settings": {name: value for name, value in outcome.settings.items() if name != "output_dir"},
        "environment": dict(outcome.environment),
        "attempts": [one.__dict__ for one in attempts],
    }


def _named(cell: Cell) -> dict[str, Any]:
    return {"task": cell.task, "arm": cell.arm, "seed": cell.seed}


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


def recorded_cells(out: Path) -> list[Cell]:
    """The finished runs of a cells.jsonl; [] if there is none.

    Raises:
        CRDError: it is damaged.
    """
    lines = _lines(out, CELLS_FILE) if (out / CELLS_FILE).is_file() else []
    return [_cell(line) for line in lines if line.text("state") == FINISHED]


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
    updates = [point.integer("update") for point in points]
    due = [update for update in range(config.updates + 1) if config.evaluation_is_due(update)]
    if updates != due:
        raise CRDError(f"{results} must hold {cell} after updates {due}, got {updates}; restore the file")
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


def _plain(value: float) -> float | None:
    """For JSON: whole numbers without a point, null for NaN."""
    if math.isnan(value):
        return None
    return int(value) if float(value).is_integer() else float(value)
