"""report.md: what a benchmark found, in tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from crd.atomic import replace_file
from crd.bench.analysis import LEAST_SEEDS, SHARE, Interval, ratio_over_seeds
from crd.bench.collect import WAITING, Outcome
from crd.bench.compare import (
    DRIFT,
    EQUAL_REWARD,
    OWN_IMAGES,
    PEAK,
    REFERENCE_IMAGES,
    REWARD_BY_SECONDS,
    SECONDS,
    SPEED,
    TRAINING_PEAK,
    Comparison,
    compare_arms,
    held_out_scores,
    told_scores,
)
from crd.bench.suite import Suite
from crd.errors import CRDError
from crd.report.words import duration, number, signed, title

REPORT_FILE = "report.md"
_DASH = "–"
_READING = f"""Means over the seeds with 95% intervals of Student's t; few seeds make them wide, and one gives none.
"(3 of 5)" behind one says that only so many seeds of the arm have such a value. Means of images, seconds and memory are
geometric, as those of ratios. Differences and ratios are to the reference arm, paired by seed; bold where the interval
of {LEAST_SEEDS} seeds or more excludes 0, or 1 for a ratio.
Intervals are not corrected for their number. "Reward" is that on the evaluation prompts, "{SHARE:.0%} of its gain" the
first crossing of start + {SHARE} (end - start) between evaluations, "at equal reward" the mean difference of the drift
curves over the rewards that both runs have passed. docs/benchmarks.md defines all of it."""


def write_report(
    out: Path,
    suite: Suite,
    outcomes: Sequence[Outcome],
    failed: Mapping[str, str],
    figures: Mapping[str, Sequence[Path]],
) -> Path:
    """Write report.md.

    Args:
        out: folder of the benchmark.
        suite: of it.
        outcomes: of its runs.
        failed: runs that failed, and what they printed last.
        figures: pictures in `out`, by task.

    Raises:
        CRDError: it cannot be written.
    """
    parts = [f"# {suite.name}", suite.about, f"Reference arm: {suite.reference}. {_READING}", *_measured_on(outcomes)]
    for task in suite.tasks:
        done = [one for one in outcomes if one.cell.task == task and one.finished]
        parts.append(f"## {task}")
        if not done:
            parts.append("No run is finished.")
            continue
        parts += _bases(done, suite.reference)
        for name, arms in suite.tables().items():
            comparison = compare_arms(done, arms, suite.reference)
            if comparison is not None and (present := comparison.told(arms)):
                parts += [f"### {name}"] if name else []
                parts += [_table(comparison, present, suite.tell), *_left_out(comparison)]
        parts += [f"![{path.stem}]({path.name})" for path in figures.get(task, ())]
    if failed:
        parts += ["## Failed runs", "\n".join(f"- {cell}: {words}" for cell, words in failed.items())]
    path = out / REPORT_FILE
    text = "\n\n".join(part for part in parts if part) + "\n"
    try:
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise CRDError(f"cannot write {path}: {error}; free space") from error
    return path


def _measured_on(outcomes: Sequence[Outcome]) -> list[str]:
    """Processors, commits and versions; several where the runs have several."""
    attempts = [attempt for one in outcomes for attempt in one.attempts]
    if not attempts:
        return []
    facts = {
        "processor": {f"{one.processor}, {one.cores} cores" for one in attempts},
        "runs at a time x threads": {f"{one.jobs} x {one.threads}" for one in attempts},
        "GPU": {str(one.environment.get("gpu") or "none") for one in outcomes},
        "compile": {one.compile for one in attempts},
        "mixed precision": {str(one.settings.get("mixed_precision", "unknown")) for one in outcomes},
        "commit": {one.commit or "not in git" for one in attempts},
        "Python": {str(one.environment.get("python", "unknown")) for one in outcomes},
        "torch": {str(one.environment.get("packages", {}).get("torch", "unknown")) for one in outcomes},
    }
    return ["; ".join(f"{name}: {' and '.join(sorted(values))}" for name, values in facts.items()) + "."]


def _left_out(comparison: Comparison) -> list[str]:
    """What the table does not tell of some arms and runs, and why."""
    reasons = (
        ("a distance to the anchor, because theirs is not that of the reference, or no run of that is finished",
         comparison.other_anchor),
        (f"seconds, because others kept them from the processor for more than {WAITING:.0%} of the time, because they "
         "were executed otherwise than most, or because neither is known", comparison.untimed),
        ("memory, because they ran on another GPU, or compiled or in another precision than most",
         comparison.executed_otherwise),
    )  # fmt: skip
    return [f"Without {why}: {', '.join(left_out)}." for why, left_out in reasons if left_out]


def _bases(done: Sequence[Outcome], reference: str) -> list[str]:
    """The base model without and with guidance, from the finished runs of the reference arm."""
    runs = [one for one in done if one.cell.arm == reference]
    if not runs:
        return []
    states = [("base model, no guidance", [{n: float(v[0]) for n, v in one.curve.values.items()} for one in runs])]
    guided = [one.guided for one in runs if one.guided]
    if guided:
        states.append((f"base model, guidance {runs[0].anchor_guidance:g}", [dict(one) for one in guided]))
    names = ("reward", *held_out_scores(done))
    rows = [
        [label, *(number(sum(one[name] for one in found) / len(found)) if all(name in one for one in found) else _DASH
                  for name in names)]
        for label, found in states
    ]  # fmt: skip
    return [_markdown(["", *map(title, names)], rows)]


def _table(comparison: Comparison, arms: Sequence[str], tell: Sequence[str]) -> str:
    """A column for each arm, a row for each measure."""
    table, share, reference = _Rows(comparison, arms), f"{SHARE:.0%}", comparison.reference
    table.add("seeds", lambda arm: str(comparison.seeds(arm)))
    table.mean(f"reward at {comparison.images:,.0f} images", "reward")
    table.difference("reward")
    if not math.isnan(comparison.seconds):
        table.mean(f"reward at {duration(comparison.seconds)} of training", REWARD_BY_SECONDS)
        table.difference(REWARD_BY_SECONDS)
    table.add(f"images to {share} of its gain", lambda arm: _reached(comparison, arm, OWN_IMAGES))
    table.versus(f"divided by {reference}'s images to there", lambda arm: _speed(comparison, arm))
    table.add(f"images to {share} of {reference}'s gain", lambda arm: _reached(comparison, arm, REFERENCE_IMAGES))
    for name in (*told_scores(comparison), *tell):
        table.mean(title(name), name)
        table.difference(name)
        if name in comparison.scores:
            table.mean("mean change over its rewards", f"{DRIFT}{name}")
            table.at_equal_reward(name)
    costs = (
        ("peak memory, GB", PEAK, _gigabytes),
        ("peak memory of the GPU, GB", TRAINING_PEAK, _gigabytes),
        ("training, s", SECONDS, _whole),
    )
    for label, measure, form in costs:
        if measure != TRAINING_PEAK or comparison.known(measure):
            table.mean(label, measure, form)
            table.ratio(measure)
    return _markdown(["", *arms], table.rows)


class _Rows:
    """Rows of a table whose columns are arms; what compares with the reference arm is empty for that arm."""

    def __init__(self, comparison: Comparison, arms: Sequence[str]) -> None:
        self._of, self._arms = comparison, arms
        self.rows: list[list[str]] = []

    def add(self, label: str, cell: Callable[[str], str]) -> None:
        self.rows.append([label, *map(cell, self._arms)])

    def versus(self, label: str, cell: Callable[[str], str]) -> None:
        self.add(label, lambda arm: "" if arm == self._of.reference else cell(arm))

    def mean(self, label: str, measure: str, form: Callable[[float], str] = number) -> None:
        self.add(label, lambda arm: _plain(self._of.mean(arm, measure), self._of.seeds(arm), form))

    def difference(self, measure: str) -> None:
        self.versus("difference", lambda arm: _signed(self._of.difference(arm, measure), self._of.seeds(arm)))

    def at_equal_reward(self, score: str) -> None:
        measure = f"{EQUAL_REWARD}{score}"
        self.versus("difference at equal reward", lambda arm: _signed(self._of.mean(arm, measure), self._of.seeds(arm)))

    def ratio(self, measure: str) -> None:
        self.versus("ratio", lambda arm: _ratio(self._of.ratio(arm, measure), self._of.seeds(arm)))


def _plain(found: Interval, seeds: int, form: Callable[[float], str] = number) -> str:
    return _DASH if math.isnan(found.mean) else _spread(found, form) + _counted(found, seeds)


def _signed(found: Interval, seeds: int) -> str:
    return _bold(_spread(found, signed), found.excludes(0)) + _counted(found, seeds)


def _ratio(found: Interval, seeds: int) -> str:
    if math.isnan(found.mean):
        return _DASH
    return _bold(_spread(found, "{:.2f}".format), found.excludes(1)) + _counted(found, seeds)


def _spread(found: Interval, form: Callable[[float], str]) -> str:
    if math.isnan(found.low):
        return form(found.mean)
    return f"{form(found.mean)} [{form(found.low)}, {form(found.high)}]"


def _bold(text: str, whether: bool) -> str:
    return f"**{text}**" if whether else text


def _counted(found: Interval, seeds: int) -> str:
    """How many of an arm's seeds a mean is of, where it is not all: those left out are not like the others."""
    return "" if found.seeds in (0, seeds) else f" ({found.seeds} of {seeds})"


def _whole(count: float) -> str:
    return f"{count:,.0f}".replace("-", "−")


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}"


def _reached(comparison: Comparison, arm: str, measure: str) -> str:
    """Images; where some seeds never get there, or gain nothing that they could get to, how many do."""
    found = comparison.applying(arm, measure)
    reached = sum(math.isfinite(value) for value in found)
    if reached < len(found):
        return f"reached by {reached} of {len(found)}"
    return _plain(comparison.mean(arm, measure), comparison.seeds(arm), _whole)


def _speed(comparison: Comparison, arm: str) -> str:
    """How many times the reference's images an arm takes to 90% of its gain; where not all seeds tell, how many do."""
    found = comparison.applying(arm, SPEED)
    there = sum(value > 0 for value in found)
    if there < len(found):
        return f"both get there with {there} of {len(found)} seeds"
    return _ratio(ratio_over_seeds(found), comparison.seeds(arm))


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
