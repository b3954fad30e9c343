"""Evaluations as tables and as JSON files: intervals, paired differences, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from eval_records import PROTOCOL, record, spread
from rich.console import Console
from rich.table import Table

from crd.comparison import (
    Line,
    as_dict,
    check_comparable,
    comparison_table,
    differences,
    intervals,
    read_evaluations,
    remarks,
    table,
    to_dict,
)
from crd.errors import CRDError
from crd.eval_record import EvalRecord
from crd.metrics.bootstrap import bootstrap_mean, paired_difference

NAN = math.nan
HELD_OUT = "held_out_clip"


@pytest.fixture
def first() -> EvalRecord:
    return record(
        {"reward": spread(0.5), HELD_OUT: spread(0.3, seed=1), "held_out_none": spread(NAN)},
        statistics={"brightness": spread(0.4, seed=2)},
        diversity=spread(0.2, seed=3),
    )


@pytest.fixture
def second(first: EvalRecord) -> EvalRecord:
    """A better model: every prompt gains, unequally; the second half has no held-out score."""
    gain = np.repeat(spread(0.1, 0.02, seed=4), 2)
    gaps = np.where(np.arange(64) < 32, first.scores[HELD_OUT] - 0.05, NAN)
    return replace(
        first,
        scores={"reward": first.scores["reward"] + gain, HELD_OUT: gaps, "reward_more": gain},
        drift={"kl_to_anchor": 0.15, "velocity_norm": 0.75},
    )


def shown(found: Table) -> list[str]:
    console = Console(width=300, record=True, color_system=None)
    with console.capture() as captured:
        console.print(found)
    return [" ".join(line.replace("│", " ").replace("┃", " ").split()) for line in captured.get().splitlines()]


def test_intervals_are_those_of_the_bootstrap(first: EvalRecord) -> None:
    found = intervals(first)
    assert list(found) == ["reward", HELD_OUT, "stat_brightness", "diversity"]  # none where nothing applies
    assert found["reward"] == bootstrap_mean(first.scores["reward"], first.prompt_id)
    assert found["diversity"].prompts == len(first.prompts)
    assert found["reward"].low < found["reward"].mean < found["reward"].high


def test_differences_are_paired(first: EvalRecord, second: EvalRecord) -> None:
    found = differences(second, first)
    assert list(found) == ["reward", HELD_OUT, "stat_brightness", "diversity"]  # what both have
    assert found["reward"] == paired_difference(second.scores["reward"], first.scores["reward"], first.prompt_id)
    assert found["reward"].mean == pytest.approx(0.1)
    # Pairs cancel what the prompts are worth: deviation 0.02, not 0.1.
    assert found["reward"].high - found["reward"].low < 0.02
    assert found[HELD_OUT].mean == pytest.approx(-0.05)
    assert found[HELD_OUT].prompts == 16
    back = differences(first, second)
    assert back["reward"].mean == pytest.approx(-found["reward"].mean)


def test_a_model_compared_with_itself(first: EvalRecord) -> None:
    for found in differences(first, first).values():
        assert found.mean == 0
        assert not found.known


def test_unpaired_evaluations_are_refused(first: EvalRecord, second: EvalRecord) -> None:
    for other in (replace(second, seed=1), replace(second, prompts=[f"other {n}" for n in range(32)])):
        with pytest.raises(CRDError, match="no pairs can be formed; use the same --prompts, --images and --seed"):
            check_comparable(Line("a", first), Line("b", other))


def test_what_was_measured_otherwise_is_refused(first: EvalRecord, second: EvalRecord) -> None:
    lines = Line("a", first), Line("b", second)
    check_comparable(*lines)
    larger = replace(second, protocol=replace(PROTOCOL, height=128, width=128))
    with pytest.raises(CRDError, match="a, CFG 1 and b, CFG 1 were measured differently: their height x width are 64"):
        check_comparable(lines[0], Line("b", larger))
    for one, other in ((replace(first, protocol=None), second), (first, replace(second, protocol=None))):
        with pytest.raises(CRDError, match=r"does not say how it was measured .* evaluate it again"):
            check_comparable(Line("a", one), Line("b", other))


def test_what_else_differs_is_said(first: EvalRecord, second: EvalRecord) -> None:
    assert remarks([Line("a", first), Line("b", second)]) == []
    longer = Line("b", replace(second, steps=40))
    assert remarks([Line("a", first), longer]) == [
        "b, CFG 1 was drawn in 40 steps and a, CFG 1 in 10: the differences are also those of the steps"
    ]
    multistep = Line("b", replace(second, solver="dpmsolver++"))
    assert remarks([Line("a", first), multistep]) == [
        "b, CFG 1 was drawn by dpmsolver++ and a, CFG 1 by euler: the differences are also those of the solver"
    ]
    unguided = Line("b", replace(second, protocol=replace(PROTOCOL, anchor_guidance=1.0)))
    (told,) = remarks([Line("a", first), unguided])
    assert "kl_to_anchor" in told
    assert "kl_to_anchor 0.1000 -" in shown(comparison_table([Line("a", first), unguided]))


def test_no_shared_image_is_no_difference(first: EvalRecord, second: EvalRecord) -> None:
    rest = np.where(np.arange(64) < 32, NAN, first.scores[HELD_OUT])
    found = differences(second, replace(first, scores={**first.scores, HELD_OUT: rest}))
    assert HELD_OUT not in found


def test_table(first: EvalRecord, second: EvalRecord) -> None:
    lines = shown(table([Line("base", first), Line("runs/[a]", replace(second, guidance=4.5))]))
    assert lines[0] == "mean [95% interval over prompts]"
    assert "base, CFG 1 runs/[a], CFG 4.5" in lines[2]
    assert "images 64 64" in lines
    assert "drawn in 10 steps, euler 10 steps, euler" in lines
    assert any(line.startswith("reward 0.505 [0.") for line in lines)  # spread 0.5, images 0.01 apart
    assert any(line.startswith("reward_more - 0.100 [") for line in lines)
    assert "kl_to_anchor 0.1000 0.1500" in lines
    assert not any("held_out_none" in line or "nan" in line for line in lines)


def test_comparison_table(first: EvalRecord, second: EvalRecord) -> None:
    found = comparison_table([Line("base", first), Line("run", second)])
    lines = shown(found)
    (reward,) = [line for line in lines if line.startswith("reward ")]
    assert reward.startswith("reward 0.505 [0.")
    assert "+0.100 [+0.09" in reward
    assert any(line.startswith(f"{HELD_OUT} ") and "-0.050" in line for line in lines)
    assert "velocity_norm 1.0000 -0.2500" in lines
    assert "kl_to_anchor 0.1000 +0.0500" in lines
    # All prompts alike: no interval, and nothing to write in bold.
    assert any(line.startswith("stat_brightness 0.405 [") and line.endswith(" +0.000") for line in lines)
    by_name = dict(zip(found.columns[0].cells, found.columns[2].cells, strict=True))
    assert by_name["reward"].style == "bold"  # type: ignore[union-attr]
    assert by_name["diversity"].style == ""  # type: ignore[union-attr]


def test_models_of_which_one_has_no_drift(first: EvalRecord, second: EvalRecord) -> None:
    lines = shown(comparison_table([Line("a", replace(first, drift={})), Line("b", second)]))
    assert not any(line.startswith("kl_to_anchor") for line in lines)
    lines = shown(comparison_table([Line("a", first), Line("b", replace(second, drift={}))]))
    assert "kl_to_anchor 0.1000 -" in lines


def test_json_and_back(first: EvalRecord, second: EvalRecord, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    lines = [Line("base", first), Line('runs/"a"', replace(second, guidance=4.5))]
    path.write_text(json.dumps([to_dict(line) for line in lines], allow_nan=False))
    again = read_evaluations(path)
    assert [line.title for line in again] == ["base, CFG 1", 'runs/"a", CFG 4.5']
    assert [to_dict(line) for line in again] == [to_dict(line) for line in lines]
    assert all(found.mean == 0 for found in differences(again[0].record, first).values())
    content = json.loads(path.read_text())
    assert [(entry["model"], entry["guidance"], entry["images"]) for entry in content] == [
        ("base", 1.0, 64), ('runs/"a"', 4.5, 64)
    ]  # fmt: skip
    assert content[0]["intervals"]["reward"]["mean"] == pytest.approx(0.505)
    assert as_dict(differences(first, first))["reward"] == {"mean": 0.0, "low": None, "high": None}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", "7", '["x"]', '[{"model": "a"}]', '[{"model": "a", "evaluation": {"role": "policy"}}]',
     '[{"model": "a", "guidance": 1.0, "tasks": []}]'],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "eval.json"
    path.write_text(content)
    with pytest.raises(CRDError, match=r"write it again|restore the file") as caught:
        read_evaluations(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(CRDError, match="no file"):
        read_evaluations(tmp_path / "nowhere.json")
