"""`crd bench`: run a suite, or go on with it, and write what came of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crd.bench.cells import FAILED, FINISHED, Attempt, CellFolder
from crd.bench.checks import check_measured, check_runs
from crd.bench.collect import Outcome, collect
from crd.bench.figures import draw_figures
from crd.bench.pictures import draw_samples
from crd.bench.records import CELLS_FILE, read_records, recorded_cells, write_results
from crd.bench.runner import Job, Runner, alone
from crd.bench.schedule import Planned, failures, outlook, plan_cells, schedule_table, to_do
from crd.bench.suite import EXECUTION, Cell, Suite
from crd.bench.suite_file import read_suite
from crd.bench.tables import write_report
from crd.console import console
from crd.errors import CRDError
from crd.report.words import duration


def bench(args: argparse.Namespace) -> None:
    """Check all runs of a suite, run those that are not done, and summarise.

    Raises:
        CRDError: a run that would be refused or that does not fit its folder, before any starts; or runs failed.
    """
    suite = read_suite(args.suite)
    out = Path(args.output_dir or f"runs/bench-{suite.name}")
    folders = [Path(folder) for folder in args.records]
    if args.summary:
        _check_nothing_is_chosen(args)
        recorded = read_records(suite, folders)
        _check_kept(suite, out, recorded)
        if not summarise(suite, out, recorded):
            raise CRDError(
                f"no run of suite {suite.name} in {out} has been evaluated yet; leave --summary out to run it"
            )
        return
    cells = suite.cells(args.tasks, args.arms, args.seeds)
    check_runs(suite, cells)
    recorded = read_records(suite, folders)

    def plan() -> list[Planned]:
        return plan_cells(suite, cells, out, _execution(args), recorded)

    # Now, not only at the end: a refusal there would leave untold what has been run by then.
    _begun(suite, out, recorded)
    _check_kept(suite, out, recorded)
    planned = plan()
    if suite.about:
        _say(suite.about)
    console.print(schedule_table(suite, planned))
    _say(outlook(planned, args.jobs))
    for cell, words in failures(planned).items():
        _say(f"failed: {cell}: {words}; --retry tries again", style="yellow")
    if args.dry_run:
        return
    with alone(out) as lock:
        # Planned again: what an earlier harness left behind may have finished meanwhile.
        run_planned(plan(), plan, args, lock, lambda: _keep(suite, out, recorded))
        summarise(suite, out, recorded)
    failed = [str(one.cell) for one in plan() if one.state == FAILED]
    if failed:
        raise CRDError(f"{len(failed)} of {len(cells)} runs failed, {', '.join(failed)}; see log.txt in their folders "
                       f"in {out}, and use --retry")  # fmt: skip


def run_planned(
    planned: Sequence[Planned],
    plan_again: Callable[[], list[Planned]],
    args: argparse.Namespace,
    lock: int,
    keep: Callable[[], None],
) -> None:
    """Run what is to do, and tell of every start and end; `keep` is called whenever a run has finished."""

    def started(job: Job) -> None:
        _say(f"start {job.folder.cell}")

    def ended(job: Job, attempt: Attempt) -> None:
        cell, took = job.folder.cell, duration(attempt.seconds)
        if job.folder.state() != FINISHED:
            _say(f"failed {cell} after {took}: {job.folder.last_words()}", style="yellow")
            return
        if not args.keep_weights:
            try:
                job.folder.drop_checkpoints()
            except CRDError as error:  # the runs that are left need not wait for it
                _say(str(error), style="yellow")
        peak = f"peak memory {attempt.peak_bytes / 1e9:.2f} GB"
        keep()
        left = outlook(plan_again(), args.jobs)
        _say(f"done {cell}: {took}, {peak}; {left}")

    Runner(args.jobs, lock, started, ended).run(to_do(planned, args.retry))


def summarise(suite: Suite, out: Path, recorded: Mapping[Cell, Outcome]) -> bool:
    """results.jsonl, cells.jsonl, figures, sample sheets and report.md of all runs in `out` and of `recorded` ones.

    Of a run that is finished in `out` too, that one is told; of recorded ones there are no pictures.

    Returns:
        Whether there is a run to tell of.

    Raises:
        CRDError: a run folder is damaged, arms do not compare, or the files cannot be written.
    """
    planned, here, outcomes = _gather(suite, out, recorded)
    if not outcomes:
        return False
    write_results(out, outcomes)
    figures, samples = draw_figures(out, suite, outcomes), draw_samples(out, suite, here)
    for task, paths in samples.items():
        figures.setdefault(task, []).extend(paths)
    report = write_report(out, suite, outcomes, failures(planned), figures)
    _say(f"wrote {report}, {sum(map(len, figures.values()))} figures, results.jsonl and cells.jsonl")
    return True


def _gather(
    suite: Suite, out: Path, recorded: Mapping[Cell, Outcome]
) -> tuple[list[Planned], list[Outcome], list[Outcome]]:
    """Runs that were begun in `out`, what came of them, and what came of all, recorded ones included.

    Raises:
        CRDError: a run folder is damaged, or arms do not compare.
    """
    planned = _begun(suite, out, recorded)
    here = collect(planned)
    told = {**{one.cell: one for one in here}, **recorded, **{one.cell: one for one in here if one.finished}}
    return planned, here, [told[cell] for cell in suite.cells() if cell in told]


def _begun(suite: Suite, out: Path, recorded: Mapping[Cell, Outcome]) -> list[Planned]:
    """Runs that were begun in `out`; of arms that never were, not even the settings need to hold.

    Raises:
        CRDError: one has other settings than the suite, or arms do not compare.
    """
    begun = [cell for cell in suite.cells() if CellFolder(out, cell).path.is_dir()]
    planned = plan_cells(suite, begun, out, {}, recorded)
    check_measured(suite, [*begun, *recorded])
    return planned


def _check_kept(suite: Suite, out: Path, recorded: Mapping[Cell, Outcome]) -> None:
    """Refuse to write over the numbers of finished runs that are nowhere else.

    Raises:
        CRDError: names one.
    """
    here = set(suite.cells())
    for cell in recorded_cells(out):
        if cell not in here:
            raise CRDError(f"{out / CELLS_FILE} holds {cell} as finished, which suite {suite.name} does not have; "
                           "choose another --output_dir, or move that file away")  # fmt: skip
        if cell not in recorded and CellFolder(out, cell).state() != FINISHED:
            raise CRDError(f"{out / CELLS_FILE} holds {cell} as finished, and neither a folder nor --records does; add "
                           f"--records {out} to keep its numbers, or take its line out of that file")  # fmt: skip


def _keep(suite: Suite, out: Path, recorded: Mapping[Cell, Outcome]) -> None:
    """results.jsonl and cells.jsonl of what there is, for whoever looks, or has to stop, before the end."""
    try:
        write_results(out, _gather(suite, out, recorded)[2])
    except CRDError as error:  # told again, and as a failure, at the end; the runs that are left need not wait for it
        _say(str(error), style="yellow")


def _execution(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in EXECUTION if (value := args.__dict__[name]) is not None}


def _check_nothing_is_chosen(args: argparse.Namespace) -> None:
    """Refuse options of runs beside --summary: it tells of all that there are."""
    choices = ("tasks", "arms", "seeds", "compile", "retry", "keep_weights", "dry_run")
    given = [f"--{name.replace('_', '-')}" for name in choices if args.__dict__[name]]
    if given:
        raise CRDError(f"--summary runs nothing and tells of all runs that there are, got {', '.join(given)}; leave "
                       f"{'it' if len(given) == 1 else 'them'} out")  # fmt: skip


def _say(text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
