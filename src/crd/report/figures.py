"""The data of the curves and of the reward-versus-drift plane, as plain values for `page/charts.js`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from crd.eval_record import HELD_OUT, STATISTIC
from crd.report.estimates import band, curve, guided_base
from crd.report.evaluations import Estimate
from crd.report.read_run import Run
from crd.report.words import distinct, is_reward, title

# Counters and axes, not curves.
_NOT_DRAWN = frozenset({"images", "seconds", "optimizer_steps"})

_HINTS = {
    "kl_to_anchor": "from the guided base",
    "kl_to_base": "from the base without guidance",
    "stat_dark_pixel_fraction": "share of nearly black pixels",
    "stat_edge_density": "contrast along edges",
    "stat_color_entropy": "bits",
}


def figure_data(runs: Sequence[Run]) -> dict[str, Any]:
    """Curves (one panel a metric, one entry a run) and what the plane may show, NaN as None."""
    metrics = _ordered(_metrics(runs))
    return {
        "runs": [
            {
                "name": run.name,
                "axes": _axes(run),
                "events": [
                    {"update": event.update, "kind": event.kind, "rule": event.rule, "message": event.message}
                    for event in run.events or ()
                ],
            }
            for run in runs
        ],
        "panels": [_panel(runs, metric) for metric in metrics],
        "plane": [metric for metric in _across(metrics) if any(curve(run, metric) for run in runs)],
    }


def _metrics(runs: Sequence[Run]) -> set[str]:
    found: set[str] = set()
    for run in runs:
        for record in run.metrics:
            found |= {name for name, value in record.numbers.items() if not math.isnan(value)}
        for evaluation in run.evaluations:
            found |= set(evaluation.estimates)
    return set(distinct(found - _NOT_DRAWN))


def _group(metric: str) -> int:
    """Place of a metric's kind on the page."""
    if metric == "reward" or is_reward(metric):
        return 0 if metric == "reward" else 1
    if metric.startswith(HELD_OUT):
        return 2
    fixed = {"kl_to_anchor": 3, "kl_to_base": 4, "kl": 5, "diversity": 6}
    return fixed.get(metric, 7 if metric.startswith(STATISTIC) else 8)


def _ordered(metrics: Iterable[str]) -> list[str]:
    return sorted(metrics, key=lambda metric: (_group(metric), metric))


def _across(metrics: Sequence[str]) -> list[str]:
    """What drift may be read from, KL first."""
    found = [metric for metric in metrics if metric.startswith(HELD_OUT)]
    return [name for name in ("kl_to_anchor", *found, "diversity") if name in metrics]


def _panel(runs: Sequence[Run], metric: str) -> dict[str, Any]:
    return {
        "metric": metric,
        "title": title(metric),
        "hint": _HINTS.get(metric, ""),
        "more": _group(metric) == 8,
        "runs": [_lines(run, metric) for run in runs],
    }


def _lines(run: Run, metric: str) -> dict[str, Any]:
    points = curve(run, metric)
    training = [(one.update, one.numbers[metric]) for one in run.records("train") if metric in one.numbers]
    shaded = band(run, metric) if metric.startswith(STATISTIC) else None
    return {
        "train": [[update, rounded(value)] for update, value in training],
        "eval": [[point.update, *_three(point.value)] for point in points],
        "base": next((rounded(point.value.mean) for point in points if point.update == 0), None),
        "guided": [[one.scale, rounded(one.value.mean), one.label] for one in guided_base(run, metric)],
        "band": None if shaded is None else [rounded(value) for value in shaded],
    }


def _axes(run: Run) -> dict[str, list[float | None]]:
    updates, images, seconds = zip(*run.spent(), strict=True)
    return {
        "update": list(updates),
        "images": [rounded(count, 9) for count in images],
        "seconds": [rounded(value) for value in seconds],
    }


def _three(value: Estimate) -> list[float | None]:
    return [rounded(value.mean), rounded(value.low), rounded(value.high)]


def rounded(value: float, digits: int = 5) -> float | None:
    """A number of that many significant digits, which is more than a screen shows; None for NaN."""
    return None if math.isnan(value) else float(f"{value:.{digits}g}")
