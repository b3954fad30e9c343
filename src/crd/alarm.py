"""The reward-hacking alarm: rules over the evaluations of a run, each against the base model on the same noise.

A run is compared with two states of the base model: without guidance, where it begins, and with guidance, where the KL
anchor leads it. What lies between the two, and some way beyond, is no reason to worry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from crd.eval_record import HELD_OUT, EvalRecord
from crd.metrics.bootstrap import Interval, paired_difference

NOTE, WARN = "note", "warn"
OFF, TELL, STOP, RAISE_KL = ACTIONS = ("off", "warn", "stop", "raise_kl")  # what a warning does
NOTHING = "none"  # what was done about a note

# Ours; docs/evaluation.md says what is measured of them.
LEVEL = 0.995  # of the intervals: a run asks many such questions; tests/test_alarm.py counts false alarms
DIVERSITY_NOTE, DIVERSITY_WARN = 0.85, 0.7  # share of the less diverse base
RANGE_NOTE, RANGE_WARN = 0.65, 1.0  # deviations of single images beyond the base's means
DRIFT_NOTE, DRIFT_WARN = 3.0, 6.0  # times the distance of the unguided base to the guided one
NORM_NOTE = 0.2  # share beyond the base's velocity norms


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of a run's policy."""

    update: int
    record: EvalRecord


@dataclass(frozen=True)
class Event:
    """A rule that fired."""

    update: int
    level: str  # NOTE or WARN
    rule: str
    message: str
    numbers: dict[str, float]
    column: str | None = None  # the score or statistic that it is about


@dataclass(frozen=True)
class Case:
    """What a rule judges: `history[0]` is the base model without guidance, the last one is judged."""

    history: Sequence[Evaluated]
    guided: EvalRecord  # the base model at the anchor's guidance

    @property
    def base(self) -> EvalRecord:
        return self.history[0].record

    @property
    def now(self) -> EvalRecord:
        return self.history[-1].record

    @property
    def update(self) -> int:
        return self.history[-1].update


def check(history: Sequence[Evaluated], guided: EvalRecord) -> list[Event]:
    """Events of the last evaluation of `history`; none for the base model itself.

    Args:
        history: evaluations of one run by update, the first one of update 0; all on the same prompts and noise.
        guided: the base model at the anchor's guidance, on the same prompts and noise.
    """
    case = Case(history, guided)
    return [event for rule in RULES for event in rule(case)] if len(history) > 1 else []


def held_out_columns(record: EvalRecord) -> list[str]:
    """Names of the held-out scores."""
    return [name for name in record.scores if name.startswith(HELD_OUT)]


def fallen(now: EvalRecord, then: EvalRecord, column: str) -> Interval | None:
    """The paired change of a score since `then`, if it is below 0 beyond its noise."""
    change = _change(now, then, column)
    return change if change is not None and _below(change) else None


def held_out_falls(case: Case) -> Iterator[Event]:
    """Warn: the training reward is above the base model's, and a held-out score below, both beyond their noise."""
    gain = _change(case.now, case.base, "reward")
    if gain is None or not _above(gain):
        return
    for column in held_out_columns(case.now):
        if change := fallen(case.now, case.base, column):
            yield _event(case, WARN, "held_out_falls",
                         f"since the base model the reward rose {gain.mean:.3f} but {column} fell {-change.mean:.3f}",
                         column, change=change.mean, high=change.high, gain=gain.mean)  # fmt: skip


def held_out_turns(case: Case) -> Iterator[Event]:
    """Note: since its best evaluation a held-out score fell while the reward rose; warn: a second time in a row."""
    for column in held_out_columns(case.now):
        slips = [_slip(case.history[:stop], column) for stop in (len(case.history) - 1, len(case.history))]
        if slips[1] is not None:
            change, since = slips[1]
            yield _event(case, WARN if slips[0] is not None else NOTE, "held_out_turns",
                         f"since update {since} {column} fell by {-change.mean:.3f} while the reward rose", column,
                         change=change.mean, high=change.high, since=float(since))  # fmt: skip


def diversity_collapses(case: Case) -> Iterator[Event]:
    """The images of one prompt are more alike than those of either base model, beyond noise."""
    if np.isnan(case.now.diversity).all():
        return
    lowest = min((case.base, case.guided), key=lambda record: _mean(record.diversity))
    if _mean(lowest.diversity) == 0:
        return  # nothing is left to lose
    share = _mean(case.now.diversity) / _mean(lowest.diversity)
    prompts = np.arange(len(lowest.diversity))
    change = paired_difference(case.now.diversity, lowest.diversity, prompts, level=LEVEL)
    if share < DIVERSITY_NOTE and _below(change):
        yield _event(case, WARN if share < DIVERSITY_WARN else NOTE, "diversity_collapses",
                     f"images of one prompt differ {share:.0%} as much as the base model's", "diversity",
                     share=share, change=change.mean)  # fmt: skip


def statistic_leaves_range(case: Case) -> Iterator[Event]:
    """A statistic of the pixels lies outside the range of both base models, by their images' own spread."""
    for name, values in case.now.statistics.items():
        bases = [record.statistics[name] for record in (case.base, case.guided)]
        spread = max(float(np.std(base)) for base in bases)
        low, high = min(map(_mean, bases)), max(map(_mean, bases))
        beyond = max(low - _mean(values), _mean(values) - high)
        if spread > 0 and beyond > RANGE_NOTE * spread and _told_apart(case, name):
            yield _event(case, WARN if beyond > RANGE_WARN * spread else NOTE, "statistic_leaves_range",
                         f"{name} is {_mean(values):.3f}, the base model's {low:.3f} to {high:.3f}", name,
                         value=_mean(values), low=low, high=high, deviations=beyond / spread)  # fmt: skip


def _told_apart(case: Case, name: str) -> bool:
    """Whether a statistic differs from that of both bases beyond its noise."""
    changes = [
        paired_difference(case.now.statistics[name], record.statistics[name], case.now.prompt_id, level=LEVEL)
        for record in (case.base, case.guided)
    ]
    return all(map(_above, changes)) or all(map(_below, changes))


def velocities_drift(case: Case) -> Iterator[Event]:
    """The policy is much farther from the anchor than the base model that it started from, or its velocities grow."""
    start, now = case.base.drift["kl_to_anchor"], case.now.drift["kl_to_anchor"]
    if start > 0 and now > DRIFT_NOTE * start:
        yield _event(case, WARN if now > DRIFT_WARN * start else NOTE, "velocities_drift",
                     f"the distance to the anchor is {now / start:.1f} times that of the base model", "kl_to_anchor",
                     value=now, start=start)  # fmt: skip
    norms = [record.drift["velocity_norm"] for record in (case.base, case.guided)]
    norm = case.now.drift["velocity_norm"]
    if norm > (1 + NORM_NOTE) * max(norms) or norm < (1 - NORM_NOTE) * min(norms):
        yield _event(case, NOTE, "velocities_drift",
                     f"the velocity norm is {norm:.3f}, the base model's {min(norms):.3f} to {max(norms):.3f}",
                     "velocity_norm", value=norm, low=min(norms), high=max(norms))  # fmt: skip


RULES: tuple[Callable[[Case], Iterator[Event]], ...] = (
    held_out_falls, held_out_turns, diversity_collapses, statistic_leaves_range, velocities_drift,
)  # fmt: skip


def _slip(history: Sequence[Evaluated], column: str) -> tuple[Interval, int] | None:
    """Change of a held-out score since its best earlier evaluation, if it fell while the reward rose."""
    scored = [one for one in history[:-1] if not np.isnan(one.record.scores[column]).all()]
    if not scored:
        return None
    now, best = history[-1], max(scored, key=lambda one: _mean(one.record.scores[column]))
    gain = _change(now.record, best.record, "reward")
    change = fallen(now.record, best.record, column)
    return (change, best.update) if change is not None and gain is not None and _above(gain) else None


def _change(now: EvalRecord, then: EvalRecord, column: str) -> Interval | None:
    """Paired change of a score; None where no image has it in both."""
    if np.isnan(now.scores[column] - then.scores[column]).all():
        return None
    return paired_difference(now.scores[column], then.scores[column], now.prompt_id, level=LEVEL)


def _below(change: Interval) -> bool:
    """Whether a change is below 0 beyond its noise; prompts that all change alike have none."""
    return change.high < 0 if change.known else change.prompts > 1 and change.mean < 0


def _above(change: Interval) -> bool:
    return change.low > 0 if change.known else change.prompts > 1 and change.mean > 0


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values))


def _event(case: Case, level: str, rule: str, message: str, column: str, **numbers: float) -> Event:
    return Event(case.update, level, rule, message, numbers, column)
