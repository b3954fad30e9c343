"""Pictures of a benchmark: one for each task and group of arms, one for each sweep. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from crd.bench.analysis import Curve
from crd.bench.collect import Outcome
from crd.bench.compare import KL_TO_ANCHOR, STATE, Comparison, compare_arms, told_scores
from crd.bench.suite import MOST_LINES, Suite, Sweep, group_figure, sweep_figure
from crd.errors import CRDError
from crd.report.words import title

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise CRDError('crd bench draws its figures with matplotlib; pip install -e ".[bench]"') from error

# Okabe and Ito's colors, which color-blind people tell apart; the reference is black. Markers tell them in gray, too.
COLORS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c7500")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
_GRAY = "#777777"
_PANEL = (4.6, 3.4)  # inches
_COLUMNS = 3
assert len(COLORS) == len(_MARKERS) == MOST_LINES

Axis = Callable[[Curve], np.ndarray]


def draw_figures(out: Path, suite: Suite, outcomes: Sequence[Outcome]) -> dict[str, list[Path]]:
    """Write every figure as SVG and PNG, named TASK-GROUP; returns the SVG files by task.

    Raises:
        CRDError: they cannot be written.
    """
    written: dict[str, list[Path]] = {}
    for task in suite.tasks:
        done = [one for one in outcomes if one.cell.task == task and one.finished]
        written[task] = []
        for name, arms in suite.tables().items():
            comparison = compare_arms(done, arms, suite.reference)
            if comparison is not None and comparison.told(arms):
                runs = {arm: [one for one in done if one.cell.arm == arm] for arm in arms}
                figure = _arms_figure(task, name, runs, comparison)
                written[task].append(_save(figure, out / group_figure(task, name)))
        for name, sweep in suite.sweeps.items():
            comparison = compare_arms(done, (suite.reference, *sweep.arms), suite.reference)
            # One point is no sweep.
            if comparison is not None and sum(arm in comparison.arms for arm in sweep.arms) > 1:
                figure = _sweep_figure(task, name, sweep, done, comparison)
                written[task].append(_save(figure, out / sweep_figure(task, name)))
    return written


def _arms_figure(task: str, group: str, runs: Mapping[str, Sequence[Outcome]], comparison: Comparison) -> Figure:
    """Reward by images, transformer evaluations and seconds; the drift plane of each score; diversity; distances."""
    by_images = [name for name in told_scores(comparison) if name in STATE]
    figure, panels = _panels(3 + len(comparison.scores) + len(by_images))
    for place, (arm, found) in enumerate(runs.items()):
        line = _Line(arm, COLORS[place], _MARKERS[place], [one.curve for one in found])
        timed = replace(line, curves=[one.curve for one in found if str(one.cell) not in comparison.untimed])
        line.draw(panels[0], "images", lambda curve: curve.images, "reward")
        line.draw(panels[1], "transformer evaluations, thousands", _thousands, "reward")
        timed.draw(panels[2], "minutes of training", lambda curve: curve.seconds / 60, "reward")
        for panel, score in zip(panels[3:], comparison.scores, strict=False):
            line.draw(panel, "reward", lambda curve: curve.reward, score)
        for panel, name in zip(panels[3 + len(comparison.scores) :], by_images, strict=True):
            if not (name == KL_TO_ANCHOR and arm in comparison.other_anchor):
                line.draw(panel, "images", lambda curve: curve.images, name)
    _draw_guided(panels, runs.get(comparison.reference, ()), comparison.scores)
    _finish(figure, panels[0], f"{task}, {group}" if group else task)
    return figure


def _thousands(curve: Curve) -> np.ndarray:
    return curve.transformer_evaluations / 1000


@dataclass(frozen=True)
class _Line:
    """One arm: a thin line for each seed, a thick one for their mean."""

    arm: str
    color: str
    marker: str
    curves: Sequence[Curve]

    def draw(self, panel: Axes, x_name: str, x: Axis, name: str) -> None:
        """A value against x in one panel."""
        pairs = [(x(curve), curve.values[name]) for curve in self.curves if name in curve.values]
        for across, value in pairs:
            panel.plot(across, value, color=self.color, linewidth=0.7, alpha=0.4)
        # Evaluation by evaluation: those of all seeds come after the same updates.
        points = min((len(value) for _, value in pairs), default=0)
        if points:
            across = np.mean([one[:points] for one, _ in pairs], axis=0)
            value = np.mean([one[:points] for _, one in pairs], axis=0)
            panel.plot(across, value, color=self.color, linewidth=2, marker=self.marker, markersize=4, label=self.arm)
        panel.set_xlabel(x_name)
        panel.set_title(title(name), fontsize=10)


def _draw_guided(panels: Sequence[Axes], reference: Sequence[Outcome], scores: Sequence[str]) -> None:
    """The base model with guidance: a line of its reward, a star in the drift planes."""
    guided = [one.guided for one in reference if one.guided]
    if not guided:
        return
    label = f"base model, guidance {reference[0].anchor_guidance:g}"
    reward = sum(one["reward"] for one in guided) / len(guided)
    for panel in panels[:3]:
        panel.axhline(reward, color=_GRAY, linestyle=":", linewidth=1.5, label=label)
    for panel, score in zip(panels[3:], scores, strict=False):
        if all(score in one for one in guided):
            mean = sum(one[score] for one in guided) / len(guided)
            panel.plot([reward], [mean], color=_GRAY, marker="*", markersize=12, linestyle="none")


def _sweep_figure(task: str, name: str, sweep: Sweep, done: Sequence[Outcome], comparison: Comparison) -> Figure:
    """Reward, scores and distances at the end against a setting, with intervals over seeds."""
    measures = ["reward", *told_scores(comparison)]
    figure, panels = _panels(len(measures))
    lines: dict[str, list[tuple[float, str]]] = {}  # by the value of `by`
    for arm in sweep.arms:
        of_arm = [one for one in done if one.cell.arm == arm]
        if of_arm:
            by = "" if sweep.by is None else str(of_arm[0].settings[sweep.by])
            lines.setdefault(by, []).append((float(of_arm[0].settings[sweep.field]), arm))
    values = sorted({value for one in lines.values() for value, _ in one})
    logarithmic = values[0] > 0
    for place, by in enumerate(sorted(lines, key=_numbers_first)):
        label, points = f"{sweep.by}: {by}" if by else None, sorted(lines[by])
        # A little beside each other, so that intervals do not hide each other.
        across = [value * 1.05**place if logarithmic else value for value, _ in points]
        for panel, measure in zip(panels, measures, strict=True):
            found = [comparison.mean(arm, measure) for _, arm in points]
            ends = [[one.mean - one.low for one in found], [one.high - one.mean for one in found]]
            look = place % MOST_LINES
            panel.errorbar(across, [one.mean for one in found], yerr=np.nan_to_num(ends), color=COLORS[look],
                           marker=_MARKERS[look], linewidth=2, capsize=3, label=label)  # fmt: skip
            panel.set_title(title(measure), fontsize=10)
            panel.set_xlabel(sweep.field)
            if logarithmic:
                panel.set_xscale("log")
                panel.set_xticks([], minor=True)
            panel.set_xticks(values, [f"{value:g}" for value in values])
    _finish(figure, panels[0], f"{task}, {name}")
    return figure


def _numbers_first(text: str) -> tuple[float, str]:
    """For sorting: numbers by their value, then words."""
    try:
        return float(text), text
    except ValueError:
        return math.inf, text


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    rows = math.ceil(count / _COLUMNS)
    figure = Figure(figsize=(_COLUMNS * _PANEL[0], rows * _PANEL[1] + 0.6), layout="constrained", facecolor="white")
    panels = [figure.add_subplot(rows, _COLUMNS, place + 1) for place in range(count)]
    for panel in panels:
        panel.grid(color="#e5e5e5", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _finish(figure: Figure, legend_of: Axes, name: str) -> None:
    handles, labels = legend_of.get_legend_handles_labels()
    figure.suptitle(name, x=0.01, ha="left", fontsize=12)
    figure.legend(handles, labels, loc="outside upper right", ncols=5, frameon=False, fontsize=9)


def _save(figure: Figure, path: Path) -> Path:
    try:
        for suffix in (".svg", ".png"):
            figure.savefig(path.with_name(path.name + suffix), dpi=110)
    except OSError as error:
        raise CRDError(f"cannot write {path}.svg: {error}; free space") from error
    return path.with_name(f"{path.name}.svg")
