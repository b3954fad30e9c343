"""From run folders to one record a run, its curve and what it took, and to JSON lines of both."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crd.atomic import replace_file
from crd.bench.analysis import Curve
from crd.bench.cells import FINISHED, Attempt
from crd.bench.checks import rows_per_update
from crd.bench.schedule import Planned
from crd.bench.suite import Cell
from crd.errors import CRDError
from crd.report.read_run import Run, read_run
from crd.tracker import METRICS_FILE

RESULTS_FILE, CELLS_FILE = "results.jsonl", "cells.jsonl"
WAITING = 0.1  # of the time of a run whose seconds are its own
TRAINING = "train_"  # and a metric of training, its mean over the updates since the evaluation before
_COUNTERS = frozenset({"images", "seconds", "optimizer_steps"})


@dataclass(frozen=True)
class Outcome:
    """What came of one run, so far."""

    cell: Cell
    state: str
    curve: Curve
    guided: Mapping[str, float]  # of the base model at the anchor's guidance; {} = not evaluated
    anchor_guidance: float  # of the model that `kl_to_anchor` is the distance to
    settings: Mapping[str, Any]  # the whole configuration
    environment: Mapping[str, Any]
    attempts: tuple[Attempt, ...]

    @property
    def finished(self) -> bool:
        return self.state == FINISHED

    @property
    def conditions(self) -> tuple[str | None, frozenset[tuple[str, int, int, int, str]]]:
        """The GPU, if there is one, and those of all attempts."""
        return self.environment.get("gpu"), frozenset(one.conditions for one in self.attempts)

    @property
    def undisturbed(self) -> bool:
        """Whether others kept it from a processor for no more than `WAITING` of its time, as far as is known.

        Of a run whose attempts were lost nothing is.
        """
        if not self.attempts:
            return False
        waited = sum(one.waited_seconds or 0.0 for one in self.attempts)
        return waited <= WAITING * sum(one.seconds for one in self.attempts)

    @property
    def peak_bytes(self) -> float:
        """Most memory of any attempt; NaN if none was recorded."""
        return max((float(one.peak_bytes) for one in self.attempts), default=math.nan)


def collect(planned: Iterable[Planned]) -> list[Outcome]:
    """The outcome of every run that has been evaluated at least once.

    Raises:
        CRDError: a run folder is damaged.
    """
    found = []
    for one in planned:
        folder = one.job.folder
        if not (folder.run / METRICS_FILE).is_file():
            continue
        run = read_run(folder.run, str(one.cell))
        if run.records("eval"):
            config = one.job.config
            at_anchor = [base for base in run.guided if base.record.guidance == config.anchor_guidance]
            found.append(Outcome(
                one.cell, one.state, run_curve(run, rows_per_update(config)),
                at_anchor[0].record.metrics() if at_anchor else {}, config.anchor_guidance, run.config,
                run.environment or {}, tuple(folder.attempts()),
            ))  # fmt: skip
    return found


def run_curve(run: Run, rows: int) -> Curve:
    """The evaluations of a run, by update.

    Args:
        run: evaluated at least once.
        rows: transformer evaluations of an update.
    """
    spent = {update: (images, seconds) for update, images, seconds in run.spent()}
    evaluated = [record for record in run.records("eval") if record.update in spent]
    columns: list[dict[str, float]] = []
    before = -1
    for record in evaluated:
        training = [one.numbers for one in run.records("train") if before < one.update <= record.update]
        names = dict.fromkeys(name for numbers in training for name in numbers if name not in _COUNTERS)
        means = {f"{TRAINING}{name}": _mean([one[name] for one in training if name in one]) for name in names}
        columns.append({**record.numbers, **means})
        before = record.update
    names = dict.fromkeys(name for column in columns for name in column)
    update = np.array([record.update for record in evaluated], dtype=np.float64)
    return Curve(
        update=update,
        images=np.array([spent[record.update][0] for record in evaluated], dtype=np.float64),
        transformer_evaluations=rows * update,
        seconds=np.array([spent[record.update][1] for record in evaluated], dtype=np.float64),
        values={name: np.array([column.get(name, math.nan) for column in columns]) for name in names},
    )


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


def _mean(values: Sequence[float]) -> float:
    there = [value for value in values if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


def _plain(value: float) -> float | None:
    """For JSON: whole numbers without a point, null for NaN."""
    if math.isnan(value):
        return None
    return int(value) if float(value).is_integer() else float(value)
