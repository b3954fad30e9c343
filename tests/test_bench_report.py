"""The arms of a task side by side, in tables and figures: from runs whose numbers are known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from crd.bench.analysis import Curve
from crd.bench.cells import FAILED, FINISHED, STARTED, Attempt
from crd.bench.collect import Outcome
from crd.bench.compare import Comparison, compare_arms
from crd.bench.figures import COLORS, draw_figures
from crd.bench.suite import Cell, Suite, Sweep, Task
from crd.bench.tables import write_report

HELD = "held_out_other"
ARMS = ("crd", "slow", "hacks")
ATTEMPT = Attempt("2026-01-01T00:00:00+00:00", 60.0, 50.0, 2 * 10**9, 0, False, 1, 2, "a processor", 2, "abc+")
SUITE = Suite(
    "made-up", "crd", (0, 1, 2), {"task": Task("ocr-demo")}, {arm: {} for arm in ARMS}, "Made up.",
    tell=("train_kl",), sweeps={"beta": Sweep("beta", ("crd", "slow"))},
)  # fmt: skip


def outcome(arm: str, seed: int, rewards: list[float], held: list[float], *, seconds: float = 10.0, peak: int = 2,
            anchor: float = 4.5, state: str = FINISHED) -> Outcome:  # fmt: skip
    """A run of 100 images an evaluation; everything is shifted a little by the seed."""
    update, shift = np.arange(len(rewards), dtype=np.float64), 0.01 * seed
    values = {
        "reward": np.array(rewards) + shift, HELD: np.array(held) + shift,
        "kl_to_anchor": 0.5 * update + shift, "diversity": 0.3 - 0.01 * update,
        "kl_to_base": 0.2 * update, "train_kl": np.where(update > 0, 0.1 * update, math.nan),
    }  # fmt: skip
    attempt = Attempt(**{**ATTEMPT.__dict__, "peak_bytes": peak * 10**9})
    return Outcome(
        Cell("task", arm, seed), state, Curve(update, 100 * update, 1000 * update, seconds * update, values),
        {"reward": 0.7, HELD: 0.4}, anchor, {"beta": {"crd": 1.0, "slow": 4.0, "hacks": 1.0}[arm]},
        {"python": "3.11", "packages": {"torch": "2.13"}}, (attempt,),
    )  # fmt: skip


@pytest.fixture
def outcomes() -> list[Outcome]:
    """`slow` gets half as far and costs twice the time and memory; `hacks` gets as far and pays with the score."""
    return [
        one
        for seed in (0, 1, 2)
        for one in (
            outcome("crd", seed, [0.2, 0.6, 0.8], [0.5, 0.5, 0.5]),
            outcome("slow", seed, [0.2, 0.4, 0.5], [0.5, 0.5, 0.5], seconds=20.0, peak=4),
            outcome("hacks", seed, [0.2, 0.6, 0.8], [0.5, 0.3, 0.2], anchor=1.0),
        )
    ]


@pytest.fixture
def comparison(outcomes: list[Outcome]) -> Comparison:
    found = compare_arms(outcomes, ARMS, "crd")
    assert found is not None
    return found


def test_equal_images_and_equal_seconds(comparison: Comparison) -> None:
    """All drew 200 images; the quickest trained 20 s, in which `slow` got to its first evaluation."""
    assert (comparison.images, comparison.seconds) == (200.0, 20.0)
    assert comparison.mean("slow", "reward").mean == pytest.approx(0.51)
    assert comparison.difference("slow", "reward").mean == pytest.approx(-0.3)
    assert comparison.mean("slow", "reward_by_seconds").mean == pytest.approx(0.41)
    assert comparison.mean("crd", "reward_by_seconds").mean == pytest.approx(0.81)
    for measure in ("peak_memory_bytes", "seconds"):
        found = comparison.ratio("slow", measure)
        assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_seconds_on_another_gpu_do_not_compare(outcomes: list[Outcome]) -> None:
    there = [replace(one, environment={"gpu": "a GPU"}) if one.cell.arm == "slow" else one for one in outcomes]
    found = compare_arms(there, ARMS, "crd")
    assert found is not None
    assert found.untimed == tuple(f"task/slow/seed-{seed}" for seed in (0, 1, 2))


def test_memory_of_a_gpu_is_told_where_there_is_one(outcomes: list[Outcome], tmp_path: Path) -> None:
    """Training reports it for each update; the evaluation before the first has none."""
    for one in outcomes:
        size = 3e9 if one.cell.arm == "slow" else 1.5e9
        one.curve.values["train_gpu_peak_bytes"] = np.array([math.nan, size, size])  # type: ignore[index]
    text = write_report(tmp_path, SUITE, outcomes, {}, {}).read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    found = next(at for at, row in enumerate(rows) if row[0] == "peak memory of the GPU, GB")
    assert rows[found][1:3] == ["1.50 [1.50, 1.50]", "3.00 [3.00, 3.00]"]
    assert rows[found + 1][0] == "ratio"
    assert "**2.00 [2.00, 2.00]**" in rows[found + 1]


def test_a_difference_is_paired_by_seed(comparison: Comparison) -> None:
    """Seeds shift both arms alike: the mean is uncertain, the difference is not."""
    mean, difference = comparison.mean("slow", "reward"), comparison.difference("slow", "reward")
    assert mean.high - mean.low > 0.04
    assert difference.high - difference.low < 1e-9
    assert difference.excludes(0)


def test_images_to_ninety_percent(comparison: Comparison) -> None:
    """`crd`: 0.74 is reached at 170 images; `slow` gets to its own 0.47 at 170, `crd` is there after 67.5, and `slow`
    never gets to 0.74."""
    assert comparison.values("crd", "images_to_own_gain") == pytest.approx([170.0] * 3)
    assert comparison.values("slow", "images_to_own_gain") == pytest.approx([170.0] * 3)
    assert comparison.values("slow", "reference_speed") == pytest.approx([170 / 67.5] * 3)
    assert comparison.values("slow", "images_to_reference_gain") == [math.inf] * 3


def test_drift_at_equal_reward(comparison: Comparison) -> None:
    """`hacks`: the score falls by 0.1 on average from 0.2 to 0.6 and by 0.25 from there to 0.8."""
    fall = (0.4 * 0.1 + 0.2 * 0.25) / 0.6
    assert comparison.mean("hacks", f"at_equal_reward_{HELD}").mean == pytest.approx(-fall)
    assert comparison.mean("hacks", f"drift_{HELD}").mean == pytest.approx(-fall)
    assert comparison.mean("slow", f"at_equal_reward_{HELD}").mean == pytest.approx(0.0)


def test_the_distance_to_another_anchor_is_left_out(comparison: Comparison) -> None:
    assert comparison.other_anchor == ("hacks",)
    for name in ("kl_to_anchor", "train_kl"):
        assert math.isnan(comparison.mean("hacks", name).mean)
    assert comparison.mean("slow", "kl_to_anchor").mean == pytest.approx(1.01)


def test_distances_to_different_anchors_do_not_stand_side_by_side_without_the_reference_either(
    outcomes: list[Outcome],
) -> None:
    for arms, left_out in ((ARMS[1:], ARMS[1:]), (ARMS[2:], ())):
        found = compare_arms(outcomes, arms, "crd")
        assert found is not None
        assert set(found.other_anchor) == set(left_out)


def test_memory_of_runs_that_were_executed_otherwise_is_left_out(outcomes: list[Outcome], tmp_path: Path) -> None:
    """Compiled, `crd` of seed 0 takes another amount; that `slow` of seed 0 waited is no matter."""
    outcomes[0] = replace(
        timed(outcomes[0], peak_bytes=10**9), settings={**outcomes[0].settings, "compile": "regional"}
    )
    outcomes[1] = timed(outcomes[1], waited_seconds=30.0)
    found = compare_arms(outcomes, ARMS, "crd")
    assert found is not None
    assert found.executed_otherwise == ("task/crd/seed-0",)
    ratio = found.ratio("slow", "peak_memory_bytes")
    assert (ratio.mean, ratio.seeds) == (pytest.approx(2.0), 2)
    text = write_report(tmp_path, SUITE, outcomes, {}, {}).read_text()
    assert text.split("Without memory, ")[1].splitlines()[0].endswith("than most: task/crd/seed-0.")


def test_memory_of_a_gpu_is_known_where_attempts_were_lost(outcomes: list[Outcome]) -> None:
    for one in outcomes:
        one.curve.values["train_gpu_peak_bytes"] = np.array([math.nan, 1e9, 1e9])  # type: ignore[index]
    lost = [replace(one, attempts=()) if one.cell.arm == "slow" else one for one in outcomes]
    found = compare_arms(lost, ARMS, "crd")
    assert found is not None
    assert found.executed_otherwise == ()
    assert found.ratio("slow", "train_gpu_peak_bytes").seeds == 3
    assert found.ratio("slow", "peak_memory_bytes").seeds == 0


def test_seconds_of_a_run_of_which_an_attempt_was_lost_are_not_its_own(outcomes: list[Outcome]) -> None:
    assert outcomes[0].undisturbed
    assert not timed(outcomes[0], seconds=19.0).undisturbed  # it trained for 20


def test_unfinished_runs_and_missing_seeds_are_left_out(outcomes: list[Outcome]) -> None:
    late = [outcome("crd", 7, [0.0, 0.0], [0.0, 0.0], state=STARTED), outcome("slow", 7, [0.9, 0.9, 0.9], [0.0] * 3)]
    found = compare_arms([*outcomes, *late], ARMS, "crd")
    assert found is not None
    assert found.images == 200.0
    assert (found.mean("slow", "reward").seeds, found.difference("slow", "reward").seeds) == (4, 3)
    assert found.difference("slow", "reward").mean == pytest.approx(-0.3)
    assert compare_arms([outcome("crd", 0, [0.1], [0.1], state=FAILED)], ARMS, "crd") is None


def timed(one: Outcome, **attempt: float | str) -> Outcome:
    return replace(one, attempts=tuple(replace(was, **attempt) for was in one.attempts))  # type: ignore[arg-type]


def test_seconds_of_runs_that_waited_or_were_executed_otherwise_are_left_out(
    outcomes: list[Outcome], tmp_path: Path
) -> None:
    """`crd` of seed 0 waited for 7 of its 60 s; `hacks` of seed 1 ran with another number of jobs and was quick."""
    outcomes[0] = timed(outcomes[0], waited_seconds=7.0)
    outcomes[3] = timed(outcomes[3], waited_seconds=5.0)
    hacks = timed(outcome("hacks", 1, [0.2, 0.6, 0.8], [0.5, 0.3, 0.2], seconds=1.0, anchor=1.0), jobs=1)
    outcomes[5] = hacks
    found = compare_arms(outcomes, ARMS, "crd")
    assert found is not None
    assert (found.seconds, found.untimed) == (20.0, ("task/crd/seed-0", "task/hacks/seed-1"))
    assert found.mean("crd", "seconds").seeds == 2
    assert found.mean("crd", "reward").seeds == 3
    assert found.ratio("slow", "seconds").seeds == 2
    assert found.ratio("hacks", "seconds").seeds == 1
    assert found.difference("hacks", "reward_by_seconds").seeds == 1
    text = write_report(tmp_path, SUITE, outcomes, {}, {}).read_text()
    assert text.split("Without seconds, ")[1].splitlines()[0].endswith(": task/crd/seed-0, task/hacks/seed-1.")
    nothing = write_report(tmp_path, SUITE, [timed(one, waited_seconds=60.0) for one in outcomes], {}, {}).read_text()
    assert "of training |" not in nothing
    assert "| training, s | – | – | – |" in nothing


def test_equal_seconds_are_those_of_the_arms_that_are_compared(outcomes: list[Outcome]) -> None:
    """A quick run cuts the comparison of its own table only."""
    quick = [outcome("hacks", seed, [0.2, 0.6, 0.8], [0.5, 0.3, 0.2], seconds=1.0, anchor=1.0) for seed in (0, 1, 2)]
    runs = [*(one for one in outcomes if one.cell.arm != "hacks"), *quick]
    seconds = [found.seconds for arms in (ARMS, ARMS[:2]) if (found := compare_arms(runs, arms, "crd")) is not None]
    assert seconds == [2.0, 20.0]


def test_two_seeds_that_happen_to_agree_decide_nothing(outcomes: list[Outcome], tmp_path: Path) -> None:
    text = write_report(tmp_path, SUITE, [one for one in outcomes if one.cell.seed < 2], {}, {}).read_text()
    assert "−0.300 [−0.300, −0.300]" in text
    assert "**" not in text


def test_the_report_tells_it(outcomes: list[Outcome], tmp_path: Path) -> None:
    text = write_report(tmp_path, SUITE, outcomes, {"task/slow/seed-9": "out of memory"}, {}).read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[:4] == [
        ["", "Reward", "Held out: other"], ["---"] * 3,
        ["base model, no guidance", "0.210", "0.510"], ["base model, guidance 4.5", "0.700", "0.400"],
    ]  # fmt: skip
    assert rows[4] == ["", *ARMS]
    table = iter(rows[6:])
    assert next(table) == ["seeds", "3", "3", "3"]
    high, low = "0.810 [0.785, 0.835]", "0.510 [0.485, 0.535]"
    assert next(table) == ["reward at 200 images", high, low, high]
    assert next(table)[:3] == ["difference", "", "**−0.300 [−0.300, −0.300]**"]
    assert next(table)[:2] == ["reward at 20 s of training", high]
    assert next(table)[:2] == ["difference", ""]
    assert next(table)[:3] == ["images to 90% of its gain", "170 [170, 170]", "170 [170, 170]"]
    assert next(table)[:3] == ["divided by crd's images to there", "", "**2.52 [2.52, 2.52]**"]
    assert next(table)[:3] == ["images to 90% of crd's gain", "170 [170, 170]", "reached by 0 of 3"]
    told = {row[0]: row[1:] for row in table}
    assert told["difference at equal reward"][2] == "**−0.150 [−0.150, −0.150]**"
    assert told["KL to the anchor"][2] == "–"
    assert told["Train kl"] == ["0.200 [0.200, 0.200]", "0.200 [0.200, 0.200]", "–"]
    assert told["KL to the base model"][2] == "0.400 [0.400, 0.400]"
    assert told["peak memory, GB"] == ["2.00 [2.00, 2.00]", "4.00 [4.00, 4.00]", "2.00 [2.00, 2.00]"]
    assert rows[-2:] == [["training, s", *(f"{s} [{s}, {s}]" for s in (20, 40, 20))],
                         ["ratio", "", "**2.00 [2.00, 2.00]**", "1.00 [1.00, 1.00]"]]  # fmt: skip
    assert "hacks" in text.split("Without a distance to the anchor")[1].splitlines()[0]
    assert (
        "a processor, 2 cores; runs at a time x threads: 2 x 1; GPU: none; compile: no; "
        "mixed precision: unknown; commit: abc+" in text
    )
    assert "- task/slow/seed-9: out of memory" in text


def test_seeds_that_gain_nothing_are_counted(outcomes: list[Outcome], tmp_path: Path) -> None:
    """Of `slow`, two seeds of three fall from the start; of a fourth seed there is no reference."""
    fallen = [outcome("slow", seed, [0.2, 0.1, 0.1], [0.5, 0.4, 0.4]) for seed in (1, 2)]
    kept = [one for one in outcomes if one.cell.arm != "slow" or one.cell.seed == 0]
    lone = [outcome("hacks", 7, [0.2, 0.6, 0.8], [0.5, 0.3, 0.2], anchor=1.0)]
    text = write_report(tmp_path, SUITE, [*kept, *fallen, *lone], {}, {}).read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    told = {row[0]: row[1:] for row in rows[6:]}
    assert told["seeds"] == ["3", "3", "4"]
    assert told["images to 90% of its gain"] == ["170 [170, 170]", "reached by 1 of 3", "170 [170, 170]"]
    assert told["divided by crd's images to there"][1:] == [
        "both get there with 1 of 3 seeds",
        "1.00 [1.00, 1.00] (3 of 4)",
    ]
    assert told["images to 90% of crd's gain"][1:] == ["reached by 0 of 3", "170 [170, 170] (3 of 4)"]
    assert told["mean change over its rewards"][1:] == ["0 (1 of 3)", "−0.150 [−0.150, −0.150]"]
    assert told["difference at equal reward"][1:] == ["0 (1 of 3)", "**−0.150 [−0.150, −0.150]** (3 of 4)"]


def test_where_the_reference_gains_nothing_no_seed_is_dropped(outcomes: list[Outcome], tmp_path: Path) -> None:
    fallen = [outcome("crd", 0, [0.2, 0.1, 0.1], [0.5, 0.4, 0.4])]
    text = write_report(tmp_path, SUITE, [*fallen, *outcomes[1:]], {}, {}).read_text()
    lines = [line for line in text.splitlines() if "crd's" in line]
    assert [line.count(" 2 of 3") for line in lines] == [2, 2]


def test_figures_are_drawn_for_groups_and_sweeps(outcomes: list[Outcome], tmp_path: Path) -> None:
    figures = draw_figures(tmp_path, SUITE, outcomes)
    (written,) = figures.values()
    assert [path.name for path in written] == ["task-arms.svg", "task-sweep-beta.svg"]
    with Image.open(written[0].with_suffix(".png")) as picture:
        assert picture.width > 1000
    text = write_report(tmp_path, SUITE, outcomes, {}, figures).read_text()
    assert "![task-arms](task-arms.svg)" in text
    assert "Failed" not in text


def test_panels_show_what_they_say(outcomes: list[Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thin lines of the seeds and a thick one of their mean for each arm, in the units of the axis."""
    drawn: list[Figure] = []
    monkeypatch.setattr("crd.bench.figures._save", lambda figure, path: drawn.append(figure) or path)
    draw_figures(tmp_path, replace(SUITE, sweeps={}), outcomes)
    panels = drawn[0].axes
    assert [(panel.get_title(), panel.get_xlabel()) for panel in panels] == [
        ("Reward", "images"), ("Reward", "transformer evaluations, thousands"), ("Reward", "minutes of training"),
        ("Held out: other", "reward"), ("Diversity within a prompt", "images"), ("KL to the base model", "images"),
        ("KL to the anchor", "images"),
    ]  # fmt: skip
    slow = [[line for line in panel.get_lines() if line.get_color() == COLORS[1]] for panel in panels]
    assert [len(lines) for lines in slow] == [4] * 7
    assert [list(lines[-1].get_xdata()) for lines in slow[:3]] == [[0, 100, 200], [0, 1, 2], [0, 1 / 3, 2 / 3]]
    assert list(slow[0][-1].get_ydata()) == pytest.approx([0.21, 0.41, 0.51])
    assert list(slow[3][-1].get_xdata()) == pytest.approx([0.21, 0.41, 0.51])
    assert list(slow[3][-1].get_ydata()) == pytest.approx([0.51, 0.51, 0.51])
    hacks = [sum(line.get_color() == COLORS[2] for line in panel.get_lines()) for panel in panels]
    assert hacks == [4] * 6 + [0]  # its distance is to another anchor


def test_lines_of_a_sweep_are_in_the_order_of_their_numbers(
    outcomes: list[Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("crd.bench.figures._save", lambda figure, path: drawn.append(figure) or path)
    rank = {"crd": 2, "slow": 10, "hacks": 2}
    runs = [replace(one, settings={**one.settings, "lora_rank": rank[one.cell.arm]}) for one in outcomes]
    draw_figures(tmp_path, replace(SUITE, sweeps={"beta": Sweep("beta", ARMS, "lora_rank")}), runs)
    reward = drawn[1].axes[0]
    assert reward.get_legend_handles_labels()[1] == ["lora_rank: 2", "lora_rank: 10"]
    assert [tick.get_text() for tick in reward.get_xticklabels()] == ["1", "4"]
    assert reward.get_xscale() == "log"
    assert [list(bar.lines[0].get_ydata()) for bar in reward.containers] == [
        pytest.approx([0.81, 0.81]), pytest.approx([0.51])
    ]  # fmt: skip


def test_a_group_of_which_only_the_reference_has_run_is_not_told(outcomes: list[Outcome], tmp_path: Path) -> None:
    runs = [one for one in outcomes if one.cell.arm != "hacks"]
    suite = replace(SUITE, groups={"pace": ("crd", "slow"), "hacking": ("crd", "hacks")}, sweeps={})
    figures = draw_figures(tmp_path, suite, runs)
    assert [path.name for path in figures["task"]] == ["task-pace.svg"]
    text = write_report(tmp_path, suite, runs, {}, figures).read_text()
    assert "### pace" in text
    assert "### hacking" not in text
    comparison = compare_arms(runs, ARMS, "crd")
    assert comparison is not None
    assert comparison.told(("crd",)) == ["crd"]


def test_a_sweep_of_which_one_arm_has_run_is_not_drawn(outcomes: list[Outcome], tmp_path: Path) -> None:
    figures = draw_figures(tmp_path, SUITE, [one for one in outcomes if one.cell.arm != "slow"])
    assert [path.name for path in figures["task"]] == ["task-arms.svg"]
