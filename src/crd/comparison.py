"""Evaluations as people read them: means with intervals over prompts, and paired differences between models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from crd.errors import CRDError
from crd.eval_record import EvalRecord, Protocol, parse_record
from crd.json_files import read_objects
from crd.metrics.bootstrap import Interval, bootstrap_mean, paired_difference

KL_TO_ANCHOR = "kl_to_anchor"
NO_PAIRS = (
    "the evaluations are not of the same prompts and seed, so no pairs can be formed; "
    "use the same --prompts, --images and --seed"
)


@dataclass(frozen=True)
class Line:
    """One model at one guidance scale."""

    model: str
    record: EvalRecord

    @property
    def title(self) -> str:
        return f"{self.model}, CFG {self.record.guidance:g}"


def intervals(record: EvalRecord) -> dict[str, Interval]:
    """Mean and 95% interval of every column that applies somewhere."""
    return {
        name: bootstrap_mean(values, prompts)
        for name, (values, prompts) in record.columns().items()
        if not np.isnan(values).all()
    }


def check_comparable(first: Line, line: Line) -> None:
    """Refuse two evaluations whose images form no pairs, or are measured by different means.

    Raises:
        CRDError: says what differs.
    """
    if not line.record.same_images(first.record):
        raise CRDError(NO_PAIRS)
    check_protocol(first, line.title, line.record.protocol)


def check_protocol(first: Line, title: str, protocol: Protocol | None) -> None:
    """Refuse to compare with `first` what is measured otherwise.

    Args:
        first: an evaluation.
        title: of the other one.
        protocol: of the other one.

    Raises:
        CRDError: the two differ, or one does not say how it was measured.
    """
    for name, known in ((first.title, first.record.protocol), (title, protocol)):
        if known is None:
            raise CRDError(f"the evaluation of {name} does not say how it was measured (rewards and their weights, "
                           "scorers, image size), so nothing can be compared with it; evaluate it again")  # fmt: skip
    if first.record.protocol is not None and protocol is not None and (told := first.record.protocol.unlike(protocol)):
        raise CRDError(f"{first.title} and {title} were measured differently: {told}; evaluate them with the same "
                       "--reward, --held-out, --height and --width")  # fmt: skip


def same_anchor(one: EvalRecord, other: EvalRecord) -> bool:
    """Whether `kl_to_anchor` is the distance to the base model at the same scale in both."""
    scales = [None if record.protocol is None else record.protocol.anchor_guidance for record in (one, other)]
    return scales[0] is not None and scales[0] == scales[1]


def remarks(lines: Sequence[Line]) -> list[str]:
    """What else differs between the first evaluation and the others: it is part of their differences, or leaves them
    out."""
    first, found = lines[0], []
    for line in lines[1:]:
        if line.record.steps != first.record.steps:
            found.append(f"{line.title} was drawn in {line.record.steps} steps and {first.title} in "
                         f"{first.record.steps}: the differences are also those of the steps")  # fmt: skip
        if line.record.solver != first.record.solver:
            found.append(f"{line.title} was drawn by {line.record.solver} and {first.title} by {first.record.solver}: "
                         "the differences are also those of the solver")  # fmt: skip
        if not same_anchor(line.record, first.record):
            found.append(f"the kl_to_anchor of {line.title} and {first.title} are distances from the base model at "
                         "different guidance: their difference is left out")  # fmt: skip
    return found


def differences(line: EvalRecord, reference: EvalRecord) -> dict[str, Interval]:
    """Paired differences to `reference` in every column that both have, of comparable evaluations."""
    theirs, found = reference.columns(), {}
    for name, (values, prompts) in line.columns().items():
        if name in theirs and not np.isnan(values - theirs[name][0]).all():
            found[name] = paired_difference(values, theirs[name][0], prompts)
    return found


def to_dict(line: Line) -> dict[str, Any]:
    """For JSON: `read_evaluations` reads it back."""
    record = line.record
    return {
        "model": line.model,
        "guidance": record.guidance,
        "steps": record.steps,
        "solver": record.solver,
        "images": len(record.prompt_id),
        "intervals": as_dict(intervals(record)),
        "evaluation": record.to_dict(),
    }


def as_dict(found: Mapping[str, Interval]) -> dict[str, dict[str, float | None]]:
    """Intervals for JSON; None where there is none."""
    return {
        name: {"mean": one.mean, "low": _plain(one.low), "high": _plain(one.high)} for name, one in found.items()
    }  # fmt: skip


def read_evaluations(path: Path) -> list[Line]:
    """The lines of a file that `crd eval --out` wrote.

    Raises:
        CRDError: it is no such file.
    """
    lines = [Line(entry.text("model"), parse_record(entry.inner("evaluation"))) for entry in read_objects(path)]
    if not lines:
        raise CRDError(f"{path} holds an empty list of evaluations; write it again with `crd eval --out`")
    return lines


def table(lines: Sequence[Line]) -> Table:
    """Mean and 95% interval over prompts: a row for each column of the evaluations, a column for each model."""
    cells = [{name: _shown(found) for name, found in intervals(line.record).items()} for line in lines]
    drift = [{name: f"{value:.4f}" for name, value in line.record.drift.items()} for line in lines]
    return _table(lines, cells, drift, "mean [95% interval over prompts]")


def comparison_table(lines: Sequence[Line]) -> Table:
    """The first model's means, and the paired differences of the others to it; bold where the interval excludes 0."""
    first, *others = [line.record for line in lines]
    cells = [{name: _shown(found) for name, found in intervals(first).items()}]
    drift = [{name: f"{value:.4f}" for name, value in first.drift.items()}]
    for other in others:
        cells.append({name: _signed(found) for name, found in differences(other, first).items()})
        drift.append({name: f"{value - first.drift[name]:+.4f}" for name, value in other.drift.items()
                      if name in first.drift and (name != KL_TO_ANCHOR or same_anchor(other, first))})  # fmt: skip
    return _table(lines, cells, drift, "first: mean; others: paired difference to it [95% interval over prompts]")


def _table(
    lines: Sequence[Line], cells: Sequence[Mapping[str, Text]], drift: Sequence[Mapping[str, str]], title: str
) -> Table:
    table = Table(Column(no_wrap=True), *(escape(line.title) for line in lines), title=title)
    images = [str(len(line.record.prompt_id)) for line in lines]
    table.add_row("images", *images)
    table.add_row("drawn in", *(f"{line.record.steps} steps, {line.record.solver}" for line in lines))
    for name in dict.fromkeys(name for column in cells for name in column):
        table.add_row(name, *(column.get(name, Text("-")) for column in cells))
    for name in dict.fromkeys(name for column in drift for name in column):
        table.add_row(name, *(column.get(name, "-") for column in drift))
    return table


def _shown(interval: Interval) -> Text:
    if not interval.known:
        return Text(f"{interval.mean:.3f}")
    return Text(f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]")


def _signed(interval: Interval) -> Text:
    if not interval.known:
        return Text(f"{interval.mean:+.3f}")
    told = interval.low > 0 or interval.high < 0
    text = f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
    return Text(text, style="bold" if told else "")


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value
