"""A run folder as one typed record; parts that a run may lack are left out and named."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crd.alarm import STOP
from crd.checkpoint import CheckpointFolder
from crd.errors import CRDError
from crd.evaluation_files import EVENTS, FOLDER
from crd.json_files import JsonObject, read_object, read_object_lines
from crd.report.evaluations import Evaluation, Event, read_evaluations, read_events
from crd.run_folder import CONFIG_FILE, SUMMARY_FILE
from crd.text_files import parse_yaml, read_text
from crd.tracker import METRICS_FILE


@dataclass(frozen=True)
class Metrics:
    """One line of metrics.jsonl."""

    update: int
    kind: str  # "train", "eval"
    numbers: Mapping[str, float]  # NaN = null


@dataclass(frozen=True)
class Run:
    """All that a report knows of a run."""

    name: str  # unique among the runs of a report
    path: Path
    config: Mapping[str, Any]
    metrics: tuple[Metrics, ...]  # in the order of the file
    evaluations: tuple[Evaluation, ...]  # by update; the base with guidance after update 0
    events: tuple[Event, ...] | None  # None = no event log
    environment: Mapping[str, Any] | None
    summary: JsonObject | None
    best: tuple[int, float] | None  # update and reward of the best checkpoint
    missing: tuple[str, ...]  # what is left out, in words

    def records(self, kind: str) -> list[Metrics]:
        """Records of one kind, by update."""
        return sorted((one for one in self.metrics if one.kind == kind), key=lambda one: one.update)

    def spent(self) -> list[tuple[int, float, float]]:
        """Images drawn and seconds spent on training by the end of each update, from update 0 on; NaN = not told.

        `seconds` in metrics.jsonl are of one update, without evaluation and saving.
        """
        found, seconds = [(0, 0.0, 0.0)], 0.0
        for record in self.records("train"):
            seconds += record.numbers.get("seconds", math.nan)
            found.append((record.update, record.numbers.get("images", math.nan), seconds))
        return found

    @property
    def during(self) -> list[Evaluation]:
        """Evaluations of the trained model, by update; update 0 is the base without guidance."""
        return [one for one in self.evaluations if one.update is not None]

    @property
    def guided(self) -> list[Evaluation]:
        """Evaluations of the base model with guidance, by scale."""
        return [one for one in self.evaluations if one.update is None]

    @property
    def before(self) -> Evaluation | None:
        """The evaluation of update 0."""
        return next((one for one in self.during if one.update == 0), None)

    @property
    def after(self) -> Evaluation | None:
        """The last evaluation after update 0."""
        return self.during[-1] if self.during and self.during[-1].update else None

    @property
    def updates(self) -> int:
        """How many the run was trained for, so far."""
        return max((record.update for record in self.metrics if record.kind == "train"), default=0)

    @property
    def best_guidance(self) -> float | None:
        """CFG scale of the base model's highest reward among those that the run tried at its end."""
        key = "base_cfg_scale"
        return self.summary.number(key) if self.summary is not None and self.summary.has(key) else None

    def ended_by(self, event: Event) -> bool:
        """Whether an event stopped the run for good: not, if it was resumed."""
        return event.action == STOP and event.update >= self.updates


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of a report, each with a name of its own.

    Raises:
        CRDError: none at all, one twice, not a run folder, or a malformed file.
    """
    if not paths:
        raise CRDError("a report needs at least one run, got none; name a run folder")
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise CRDError(f"the run {paths[index]} is given twice; name each run once")
    return [read_run(path, name) for path, name in zip(paths, _names(resolved), strict=True)]


def read_run(path: Path, name: str) -> Run:
    """One run folder.

    Args:
        path: with config.yaml and metrics.jsonl; everything else may be missing.
        name: of the run in the report.

    Raises:
        CRDError: not a run folder, or a malformed file.
    """
    if not (path / CONFIG_FILE).is_file():
        raise CRDError(f"{path} is not a run folder (it has no {CONFIG_FILE}); name the output_dir of a `crd train`")
    config = parse_yaml(read_text(path / CONFIG_FILE, "configuration", ""), path / CONFIG_FILE)
    if not isinstance(config, dict):
        raise CRDError(f"{path / CONFIG_FILE} must hold a mapping, got {type(config).__name__}; restore the file")
    metrics, missing = _metrics(path / METRICS_FILE)
    evaluations, without = read_evaluations(path / FOLDER)
    missing += without if evaluations else ["per-prompt numbers, intervals and pictures (no evaluations/ in the run)"]
    if evaluations and all(one.sheet is None for one in evaluations):
        missing.append("pictures (no evaluation kept any)")
    events: list[Event] | None = None
    if (path / EVENTS).is_file():
        events, without = read_events(path, path / EVENTS)
        missing += without
    elif evaluations and config.get("alarm", "off") != "off":
        events = []  # the log is made with its first event
    else:
        missing.append("events (no events.jsonl in the run)")
    environment, summary = _optional(path / "environment.json"), _optional(path / SUMMARY_FILE)
    missing += ["environment and package versions (no environment.json)"] if environment is None else []
    missing += ["the final summary (no summary.json: the run is unfinished)"] if summary is None else []
    return Run(
        name,
        path,
        {str(key): value for key, value in config.items()},
        tuple(metrics),
        tuple(evaluations),
        None if events is None else tuple(events),
        None if environment is None else environment.content,
        summary,
        CheckpointFolder.of_run(path).best(),
        tuple(missing),
    )


def _metrics(path: Path) -> tuple[list[Metrics], list[str]]:
    if not path.is_file():
        raise CRDError(f"{path.parent} has no {path.name}, so there is nothing to report; train for an update first")
    lines, cut = read_object_lines(path)
    records = [
        Metrics(line.integer("update"), line.text("kind"), line.all_numbers(without=("update", "kind")))
        for line in lines
    ]
    return records, [f"the last line of {path.name}, which was cut off"] if cut else []


def _optional(path: Path) -> JsonObject | None:
    return read_object(path) if path.is_file() else None


def _names(paths: Sequence[Path]) -> list[str]:
    """As many trailing parts of each path as it takes to tell them all apart."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [os.path.join(*path.parts[-depth:]) for path in paths]
