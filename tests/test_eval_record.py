"""Evaluations in memory and as JSON: the way there and back, and files that are no such thing."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_records import PROTOCOL, record

from crd.errors import CRDError
from crd.eval_record import EvalRecord, Protocol, parse_record, read_record, rounded
from crd.json_files import JsonObject

NAN = math.nan


@pytest.fixture
def example() -> EvalRecord:
    """Two prompts of two images, with every kind of gap."""
    one = record(
        {"reward": [0.25, 0.5], "held_out_clip": [NAN, 0.3], "held_out_none": [NAN, NAN]},
        statistics={"brightness": np.array([0.125, 1 / 3])},
        diversity=np.array([0.2, NAN]),
        drift={"kl_to_anchor": 0.1, "velocity_norm": NAN},
    )
    return replace(one, role="anchor", guidance=4.5, steps=7, seed=3, prompts=['a "cat"', "Ä → 日本\u2028x"])


def assert_equal(got: EvalRecord, wanted: EvalRecord) -> None:
    facts = ("role", "guidance", "steps", "solver", "seed", "prompts", "protocol")
    assert [getattr(got, name) for name in facts] == [getattr(wanted, name) for name in facts]
    assert got.prompt_id.dtype == np.int64
    for mine, theirs in ((got.scores, wanted.scores), (got.statistics, wanted.statistics)):
        assert list(mine) == list(theirs)
        for name, values in theirs.items():
            np.testing.assert_array_equal(mine[name], values)
    np.testing.assert_array_equal(got.prompt_id, wanted.prompt_id)
    np.testing.assert_array_equal(got.diversity, wanted.diversity)
    assert list(got.drift) == list(wanted.drift)
    np.testing.assert_array_equal(list(got.drift.values()), list(wanted.drift.values()))


def test_json_and_back_is_exact(example: EvalRecord, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    text = json.dumps(example.to_dict(), allow_nan=False)  # NaN is no JSON: gaps are null
    assert '"held_out_clip": [null, null, 0.3, 0.31]' in text
    path.write_text(text)
    assert_equal(read_record(path), example)


def test_further_keys_do_no_harm(example: EvalRecord) -> None:
    content = {**example.to_dict(), "update": 12, "pictures": {"file": "x.webp"}}
    assert_equal(parse_record(JsonObject(content, "x")), example)


def test_a_record_that_does_not_say_how_it_was_measured(example: EvalRecord) -> None:
    without = replace(example, protocol=None)
    content = without.to_dict()
    assert_equal(parse_record(JsonObject(content, "x")), without)
    del content["protocol"]  # older files
    assert_equal(parse_record(JsonObject(content, "x")), without)


def test_a_record_that_does_not_name_its_solver_is_of_euler(example: EvalRecord) -> None:
    content = replace(example, solver="dpmsolver++").to_dict()
    assert parse_record(JsonObject(content, "x")).solver == content.pop("solver") == "dpmsolver++"
    assert parse_record(JsonObject(content, "x")).solver == "euler"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"anchor_guidance": 1.0}, None),  # matters to the distance from the anchor alone
        ({"weights": {"ocr": 1.0, "watched": 0.0}}, None),
        ({"sources": {"reward_ocr": "ocr", "held_out_aesthetic": "aesthetic"}}, None),  # nothing of both to compare
        ({"width": 96}, "height x width are 64 x 64 and 64 x 96 px"),
        ({"weights": {"ocr": 1.0, "watched": 0.2}}, "rewards, by weight, are {'ocr': 1.0} and"),
        ({"sources": {"held_out_clip": "clip"}}, "their held_out_clip are by clip=/models/clip and clip"),
    ],
)
def test_what_keeps_protocols_from_being_compared(changes: dict[str, Any], told: str | None) -> None:
    other: Protocol = replace(PROTOCOL, **changes)
    found = PROTOCOL.unlike(other)
    assert (found is None) == (told is None) == (other.unlike(PROTOCOL) is None)
    assert told is None or told in (found or "")


def test_columns_and_means_leave_gaps_out(example: EvalRecord) -> None:
    columns = example.columns()
    assert list(columns) == ["reward", "held_out_clip", "held_out_none", "stat_brightness", "diversity"]
    assert [len(values) == len(prompts) for values, prompts in columns.values()] == [True] * 5
    means = example.metrics()
    assert "held_out_none" not in means
    assert means["held_out_clip"] == pytest.approx(0.305)
    assert means["reward"] == pytest.approx(0.38)
    assert means["diversity"] == 0.2
    assert means["kl_to_anchor"] == 0.1


def test_same_images(example: EvalRecord) -> None:
    other_model = replace(example, role="policy", guidance=1.0, steps=40, scores={"reward": example.scores["reward"]})
    assert example.same_images(other_model)
    assert not example.same_images(replace(example, seed=4))
    assert not example.same_images(replace(example, prompts=example.prompts[::-1]))
    assert not example.same_images(replace(example, prompt_id=np.array([0, 1, 0, 1])))
    assert not example.same_images(replace(example, prompt_id=np.array([0, 1])))


def test_six_digits() -> None:
    got = rounded(np.array([1 / 3, 123456789.0, -1e-12 / 3, 0.0, NAN]))
    np.testing.assert_array_equal(got, [0.333333, 123457000.0, -3.33333e-13, 0.0, NAN])
    np.testing.assert_array_equal(rounded(got), got)


def edit(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update(changes)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda content: content.pop("seed"), "has no 'seed'"),
        (lambda content: content.pop("model"), "has no 'model'"),
        (edit(guidance=None), "guidance must be a finite number, got None"),
        (edit(steps="many"), "steps must be an integer of at least 1, got 'many'"),
        (edit(solver="heun"), "solver must be one of euler, dpmsolver++, got 'heun'"),
        (edit(scores=[1.0]), "scores must be an object"),
        (edit(scores={"reward": [1.0]}), "reward must hold 4 numbers, got 1"),
        (edit(scores={"reward": ["good"] * 4}), "reward must be a list of numbers or null"),
        (edit(statistics={"brightness": [1.0] * 5}), "brightness must hold 4 numbers, got 5"),
        (edit(diversity=[0.1]), "diversity must hold 2 numbers, got 1"),
        (edit(prompt_index=[0, 0, 1, 2]), "prompt_index must be a list of integers from 0 to 1, got 2"),
        (edit(prompt_index=[0, 0, -1, 1]), "from 0 to 1, got -1"),
        (edit(prompt_index=[[0], [1]]), "from 0 to 1, got [0]"),
        (edit(prompts=None), "prompts must be a list"),
        (edit(protocol={"weights": {}}), "protocol has no 'sources'"),
        (edit(protocol={**dataclasses.asdict(PROTOCOL), "sources": {"reward_ocr": 1}}), "reward_ocr must be a string"),
    ],
)
def test_damaged_records_are_one_error(
    example: EvalRecord, tmp_path: Path, damage: Callable[[dict[str, Any]], object], told: str
) -> None:
    content = example.to_dict()
    damage(content)
    path = tmp_path / "update-000001.json"
    path.write_text(json.dumps(content))
    with pytest.raises(CRDError, match="restore the file") as caught:
        read_record(path)
    assert str(caught.value).startswith(str(path))
    assert told in str(caught.value)


@pytest.mark.parametrize("content", [b"", b'{"role": "pol', b"[]", b"null", b"\xff\xfe", b"7"])
def test_files_that_are_no_records(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "update-000001.json"
    path.write_bytes(content)
    with pytest.raises(CRDError, match=r"update-000001\.json "):
        read_record(path)
    with pytest.raises(CRDError, match=r"no file .*nowhere.json; restore it"):
        read_record(tmp_path / "nowhere.json")
