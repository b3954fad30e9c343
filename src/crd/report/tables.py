"""What the page says in words and tables: summary, prompts that changed most, configuration, versions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from crd.alarm import NOTE, RAISE_KL, STOP, WARN
from crd.config import CRDConfig
from crd.eval_record import HELD_OUT
from crd.report.estimates import PromptChange, change, curve, guided_base, prompt_changes
from crd.report.evaluations import Estimate, Event, moment
from crd.report.read_run import Run
from crd.report.words import count, distinct, duration, is_reward, number, signed, title

_EXTREMES = 5
KIND_WORDS = {NOTE: "Note", WARN: "Warning", RAISE_KL: "KL raised", STOP: "Stopped"}


@dataclass(frozen=True)
class ScoreRow:
    """One held-out number of a run, before and after, beside the guided base model."""

    name: str
    before: str
    after: str
    change: str
    interval: str  # of the change, "" = unknown
    sure: bool  # whether that interval leaves out 0
    rising: bool
    guided: tuple[tuple[str, str, str], ...]  # label, value, change of the run against it


@dataclass(frozen=True)
class RunSummary:
    """The head of a report, for one run."""

    facts: tuple[tuple[str, str], ...]
    alarm_level: str  # "none" or a kind of events
    alarm: str
    scores: tuple[ScoreRow, ...]
    guided_labels: tuple[str, ...]


@dataclass(frozen=True)
class Extremes:
    """The prompts that a score changed most for."""

    name: str
    rose: tuple[PromptChange, ...]
    fell: tuple[PromptChange, ...]
    prompts: int


@dataclass(frozen=True)
class Setting:
    """One field of the configuration in every run; None = the run has no such field."""

    name: str
    values: tuple[str | None, ...]
    default: str | None
    differs: tuple[bool, ...]  # of each run, from the default


def run_summary(run: Run) -> RunSummary:
    """Facts, alarm state and held-out numbers of a run."""
    names = dict.fromkeys(name for record in run.records("eval") for name in record.numbers)
    names |= dict.fromkeys(name for one in run.evaluations for name in one.record.scores)
    told = sorted(distinct(names))
    wanted = [
        "reward",
        *filter(is_reward, told),
        *filter(_held_out_score, told),
    ]
    rows = [row for row in (_score_row(run, name) for name in wanted) if row is not None]
    level, alarm = alarm_state(run)
    labels = tuple(dict.fromkeys(label for row in rows for label, _, _ in row.guided))
    return RunSummary(tuple(_facts(run)), level, alarm, tuple(rows), labels)


def alarm_state(run: Run) -> tuple[str, str]:
    """The gravest kind among a run's events, and the state in words."""
    if run.events is None:
        return "none", "No event log in this run."
    alarms = [event for event in run.events if event.level == WARN]
    if not alarms:
        return "none", "No alarm: no rule spoke beyond a note." if run.events else "No alarm: no rule spoke."
    last = next((event for event in alarms if run.ended_by(event)), None)
    if last is not None:
        return STOP, f"At update {last.update} by {last.rule}: {last.message}"
    # One evaluation may warn by several rules, and is answered once.
    raised = {event.update for event in alarms if event.action == RAISE_KL}
    stopped = sorted({event.update for event in alarms if event.action == STOP})
    words = [count(len(alarms), "warning")]
    words += [f"KL raised {count(len(raised), 'time')}"] if raised else []
    words += [f"stopped at update {update}, resumed" for update in stopped]
    last = alarms[-1]
    level = RAISE_KL if raised else WARN
    return level, f"{'; '.join(words)}; the last warning at update {last.update} by {last.rule}: {last.message}"


def event_word(run: Run, event: Event) -> str:
    """What an event was, and what was done about it, in a word or two."""
    return "Stopped, resumed" if event.kind == STOP and not run.ended_by(event) else KIND_WORDS[event.kind]


def extremes(run: Run) -> list[Extremes]:
    """For the reward and every held-out score, the prompts that rose and fell most; [] if no prompt is kept."""
    after = run.after
    names = [] if after is None else ["reward", *sorted(filter(_held_out_score, after.record.scores))]
    found = []
    for name in names:
        changes = prompt_changes(run, name)
        if changes:
            rose = [one for one in changes if one.change > 0][:_EXTREMES]
            fell = [one for one in reversed(changes) if one.change < 0][:_EXTREMES]
            found.append(Extremes(title(name), tuple(rose), tuple(fell), len(changes)))
    return found


def settings(runs: Sequence[Run]) -> tuple[list[Setting], list[Setting]]:
    """Fields of the configuration that differ from their default in some run, and the others."""
    defaults = {field.name: _plain(field.default) for field in dataclasses.fields(CRDConfig)}
    names = dict.fromkeys([*defaults, *(name for run in runs for name in run.config)])
    differing: list[Setting] = []
    usual: list[Setting] = []
    for name in names:
        differs = tuple(name in run.config and (name not in defaults or run.config[name] != defaults[name])
                        for run in runs)  # fmt: skip
        values = tuple(_written(run.config[name]) if name in run.config else None for run in runs)
        default = _written(defaults[name]) if name in defaults else None
        (differing if any(differs) else usual).append(Setting(name, values, default, differs))
    return differing, usual


def environments(runs: Sequence[Run]) -> list[tuple[str, tuple[str, ...]]]:
    """Versions and hardware: a name, and its value in every run."""
    flat = [_flat(run.environment or {}) for run in runs]
    names = dict.fromkeys(name for one in flat for name in one)
    return [(name, tuple(one.get(name, "–") for one in flat)) for name in names]


def numbers_table(run: Run) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The evaluations of a run as a table: headers, and rows of a label and one number a metric."""
    names = dict.fromkeys(name for record in run.records("eval") for name in record.numbers)
    names |= dict.fromkeys(name for one in run.evaluations for name in one.estimates)
    names = dict.fromkeys(distinct(names))
    curves = {name: {point.update: point.value for point in curve(run, name)} for name in names}
    guided = {name: {one.label: one for one in guided_base(run, name)} for name in names}
    updates = sorted({update for points in curves.values() for update in points})
    rows = [(moment(update), [_cell(curves[name].get(update)) for name in names]) for update in updates]
    scales = {one.scale: one.label for found in guided.values() for one in found.values()}
    for _, label in sorted(scales.items()):
        rows.append((label, [_cell(guided[name][label].value if label in guided[name] else None) for name in names]))
    return [title(name) for name in names], rows


def _score_row(run: Run, metric: str) -> ScoreRow | None:
    points = curve(run, metric)
    if not points or points[0].update != 0:
        return None
    first, last = points[0], points[-1]
    before = run.before
    after = next((one for one in run.during if one.update == last.update), None)
    moved = change(before, after, metric) if before and after and last.update else None
    if moved is None:
        moved = Estimate(last.value.mean - first.value.mean)
    guided = []
    for base in guided_base(run, metric):
        gap = change(base.evaluation, after, metric) if base.evaluation and after else None
        difference = last.value.mean - base.value.mean if gap is None else gap.mean
        guided.append((base.label, number(base.value.mean), signed(difference)))
    known = not math.isnan(moved.low)
    return ScoreRow(
        title(metric),
        number(first.value.mean),
        number(last.value.mean) if last.update else "–",
        signed(moved.mean) if last.update else "–",
        f"{signed(moved.low)} to {signed(moved.high)}" if known else "",
        known and (moved.low > 0 or moved.high < 0),
        moved.mean > 0,
        tuple(guided),
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    train = run.records("train")
    planned = run.config.get("updates")
    seconds = math.fsum(record.numbers.get("seconds", 0.0) for record in train)
    images = train[-1].numbers.get("images", math.nan) if train else math.nan
    facts = [("Model", _written(run.config.get("model", "not recorded")))]
    facts += [("Rewards", _written(run.config.get("rewards", "not recorded")))]
    facts += [("Training prompts", _written(run.config.get("prompts", "not recorded")))]
    facts += [("Held-out prompts", _held_out(run))]
    facts += [("Updates", f"{run.updates:,} of {planned:,}" if isinstance(planned, int) else f"{run.updates:,}")]
    facts += [("Images drawn", number(images))]
    facts += [("Training time", duration(seconds) if math.isfinite(seconds) else "not recorded")]
    facts += [
        ("Best checkpoint", f"update {run.best[0]}, reward {number(run.best[1])}" if run.best else "not recorded")
    ]
    return facts


def _held_out(run: Run) -> str:
    source = _written(run.config.get("eval_prompts", "not recorded"))
    evaluation = run.evaluations[0] if run.evaluations else None
    if evaluation is None:
        return source
    record = evaluation.record
    counted = f"{count(len(record.prompts), 'prompt')}, {count(len(record.prompt_id), 'image')}"
    return f"{source} ({counted}, {count(record.steps, 'step')})"


def _held_out_score(name: str) -> bool:
    return name.startswith(HELD_OUT)


def _cell(value: Estimate | None) -> str:
    return "–" if value is None else number(value.mean)


def _flat(environment: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in environment.items():
        if isinstance(value, dict):
            found |= {str(inner): _written(version) for inner, version in value.items()}
        else:
            found[str(name).replace("_", " ")] = _written(value)
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _written(value: Any) -> str:
    """A value of YAML or JSON as a person writes it."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
