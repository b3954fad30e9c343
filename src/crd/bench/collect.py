"""From run folders to one record a run: its curve and what it took."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crd.bench.analysis import Curve
from crd.bench.cells import FINISHED, Attempt
from crd.bench.checks import rows_per_update
from crd.bench.schedule import Planned
from crd.bench.suite import Cell
from crd.report.read_run import Run, read_run
from crd.tracker import METRICS_FILE

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
    def execution(self) -> tuple[str | None, str | None, str | None]:
        """What memory depends on beside the run; known also where attempts were lost."""
        return self.environment.get("gpu"), self.settings.get("compile"), self.settings.get("mixed_precision")

    @property
    def undisturbed(self) -> bool:
        """Whether others kept it from a processor for no more than `WAITING` of its time, as far as is known.

        Of a run of which an attempt was lost nothing is, where it shows: its attempts took less time than its training.
        """
        seconds = sum(one.seconds for one in self.attempts)
        waited = sum(one.waited_seconds or 0.0 for one in self.attempts)
        return self.curve.seconds[-1] <= seconds and waited <= WAITING * seconds

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


def _mean(values: Sequence[float]) -> float:
    there = [value for value in values if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan
