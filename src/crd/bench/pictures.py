"""Sample sheets of a benchmark: the same prompts and noise, by the base model and by each arm when it has finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crd.bench.cells import CellFolder
from crd.bench.collect import Outcome
from crd.bench.suite import Cell, Suite, group_samples
from crd.errors import CRDError
from crd.grid import GridRow, draw_grid
from crd.report.evaluations import Evaluation
from crd.report.read_run import read_run

_PROMPTS = 8  # pictures in a row, one of each prompt


def draw_samples(out: Path, suite: Suite, outcomes: Sequence[Outcome]) -> dict[str, list[Path]]:
    """Write TASK-GROUP-samples.png of every group, of the first seed that all its arms have finished; paths by task.

    A group without such a seed, or without the reference, has none, and so has one whose pictures are lost.

    Raises:
        CRDError: a run folder is damaged, or a sheet cannot be written.
    """
    written: dict[str, list[Path]] = {}
    for task in suite.tasks:
        for name, arms in suite.tables().items():
            seeds = {arm: _finished(outcomes, task, arm) for arm in arms}
            present = [arm for arm in arms if seeds[arm]]
            common = set.intersection(*(seeds[arm] for arm in present)) if present else set[int]()
            if suite.reference in present and common and (len(present) > 1 or len(arms) == 1):
                rows, header = _rows(out, [Cell(task, arm, min(common)) for arm in present])
                if rows:
                    path = out / f"{group_samples(task, name)}.png"
                    try:
                        draw_grid(rows, header).save(path)
                    except OSError as error:
                        raise CRDError(f"cannot write {path}: {error}; free space") from error
                    written.setdefault(task, []).append(path)
    return written


def _finished(outcomes: Sequence[Outcome], task: str, arm: str) -> set[int]:
    return {one.cell.seed for one in outcomes if one.finished and (one.cell.task, one.cell.arm) == (task, arm)}


def _rows(out: Path, cells: Sequence[Cell]) -> tuple[list[GridRow], list[str]]:
    """A row for the base model, with and without guidance, and for each run, the reference first; and the prompts."""
    rows: list[GridRow] = []
    header: list[str] = []
    for cell in cells:
        run = read_run(CellFolder(out, cell).run, str(cell))
        if not rows and run.before is not None:
            rows += _row("base model", run.before)
            header = [run.before.record.prompts[run.before.record.prompt_id[index]] for index in _columns(run.before)]
            for guided in run.guided:
                rows += _row(f"guidance {guided.record.guidance:g}", guided)
        if rows and run.after is not None:
            rows += _row(cell.arm, run.after)
    return rows, header


def _row(title: str, found: Evaluation) -> list[GridRow]:
    """Pictures under the mean reward of all, each with its own; [] if they are lost."""
    if found.sheet is None:
        return []
    rewards = found.record.scores["reward"]
    chosen = _columns(found)
    captions = [f"{rewards[index]:.2f}" for index in chosen]
    return [GridRow(f"{title}\n{rewards.mean():.3f}", found.sheet.pictures(chosen), captions)]


def _columns(found: Evaluation) -> list[int]:
    """The first image of each of the first prompts, as far as they are pictured."""
    first: dict[int, int] = {}
    for index in () if found.sheet is None else found.sheet.indices:
        first.setdefault(int(found.record.prompt_id[index]), index)
    return list(first.values())[:_PROMPTS]
