"""Which runs of a benchmark are done, which are to do, and how long these will take."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from crd.bench.cells import FAILED, FINISHED, NEW, RECORDED, STARTED, CellFolder
from crd.bench.checks import rows_per_update
from crd.bench.runner import Job
from crd.bench.suite import Cell, Suite
from crd.errors import told_of
from crd.report.words import duration

_DONE = frozenset({FINISHED, RECORDED})


@dataclass(frozen=True)
class Planned:
    """A run, how far it is, and what it asks for."""

    job: Job
    state: str
    images: int  # of the whole run
    rows: int  # transformer evaluations of the whole run
    seconds: float  # that all attempts at it have taken

    @property
    def cell(self) -> Cell:
        return self.job.folder.cell


def plan_cells(
    suite: Suite, cells: Sequence[Cell], out: Path, execution: Mapping[str, Any], recorded: Collection[Cell] = ()
) -> list[Planned]:
    """The state of each run, executed with `execution` (of `Suite.config`); nothing is written.

    One of `recorded` is not to do, whatever its folder holds.

    Raises:
        CRDError: a run in `out` was made with other settings.
    """
    found, rows = [], dict[tuple[str, str], int]()
    for cell in cells:
        folder = CellFolder(out, cell)
        config = suite.config(cell, folder.run, execution)
        with told_of(f"suite {suite.name}"):
            folder.check_same(config)
        kind = cell.task, cell.arm
        if kind not in rows:
            rows[kind] = config.updates * rows_per_update(config)
        images = config.updates * config.prompts_per_update * config.group_size
        seconds = sum(attempt.seconds for attempt in folder.attempts())
        state = folder.state()
        if cell in recorded and state != FINISHED:
            state = RECORDED
        found.append(Planned(Job(folder, config), state, images, rows[kind], seconds))
    return found


def remaining_seconds(planned: Sequence[Planned], jobs: int) -> float | None:
    """Wall clock that the unfinished runs take at most, in their order, `jobs` at a time; None while nothing is known.

    A run takes as long as the finished ones of its task and arm did on average; else as long for each transformer
    evaluation as the finished ones of its task did, or of all tasks.
    """
    finished = [one for one in planned if one.state == FINISHED and one.seconds > 0]
    if not finished:
        return None
    free = [0.0] * jobs  # when each of the places for runs becomes free
    for one in planned:
        if one.state not in _DONE:
            like = [
                [other for other in finished if (other.cell.task, other.cell.arm) == (one.cell.task, one.cell.arm)],
                [other for other in finished if other.cell.task == one.cell.task],
                finished,
            ]
            known = next(group for group in like if group)
            took = one.rows * sum(other.seconds for other in known) / sum(other.rows for other in known)
            heapq.heapreplace(free, free[0] + took)
    return max(free)


def schedule_table(suite: Suite, planned: Sequence[Planned]) -> Table:
    """A line for each arm on each task."""
    table = Table("task", "arm", "runs", "images", "evaluations", "took", title=f"suite {suite.name}")
    lines: dict[tuple[str, str], list[Planned]] = {}
    for one in sorted(planned, key=lambda one: list(suite.tasks).index(one.cell.task)):
        lines.setdefault((one.cell.task, one.cell.arm), []).append(one)
    for (task, arm), runs in lines.items():
        counts = {state: sum(run.state == state for run in runs) for state in (FINISHED, RECORDED, STARTED, FAILED)}
        told = ", ".join([str(len(runs)), *(f"{count} {state}" for state, count in counts.items() if count)])
        times = [run.seconds for run in runs if run.state == FINISHED]
        took = duration(sum(times) / len(times)) if times else "-"
        table.add_row(task, arm, told, f"{runs[0].images:,}", f"{runs[0].rows:,}", took)
    table.caption = "Images, transformer evaluations of training and wall clock are of one run."
    return table


def outlook(planned: Sequence[Planned], jobs: int) -> str:
    """How many runs there are to do, and how long they take, in words."""
    left = [one for one in planned if one.state not in _DONE]
    text = f"{len(planned) - len(left)} of {len(planned)} runs are finished"
    if not left:
        return text
    seconds = remaining_seconds(planned, jobs)
    if seconds is None:
        return f"{text}; how long the others take is known once one has finished here"
    return f"{text}; the others take about {duration(seconds)}, {jobs} at a time"


def to_do(planned: Sequence[Planned], retry: bool) -> list[Job]:
    """The runs to begin or to go on with; failed ones only on demand."""
    wanted = {NEW, STARTED, FAILED} if retry else {NEW, STARTED}
    return [one.job for one in planned if one.state in wanted]


def failures(planned: Sequence[Planned]) -> Mapping[str, str]:
    """Failed runs, and the last lines that they printed."""
    return {str(one.cell): one.job.folder.last_words() for one in planned if one.state == FAILED}
