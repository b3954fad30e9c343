from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crd.errors import CRDError
from crd.geneval.metadata import (
    COCO_CLASSES,
    COLORS,
    RELATIONS,
    TASKS,
    Exclude,
    Include,
    Metadata,
    is_benchmark_record,
    parse_columns,
    parse_metadata,
    record_columns,
)

# One line of each shape that the benchmark's evaluation_metadata.jsonl has.
OFFICIAL = """\
{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
{"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}], \
"prompt": "a photo of two clocks"}
{"tag": "position", "include": [{"class": "cow", "count": 1}, \
{"class": "tv", "count": 1, "position": ["left of", 0]}], "prompt": "a photo of a tv left of a cow"}
{"tag": "color_attr", "include": [{"class": "cup", "count": 1, "color": "red"}, \
{"class": "book", "count": 1, "color": "pink"}], "prompt": "a photo of a red cup and a pink book"}
"""


def record(**changes: Any) -> dict[str, Any]:
    return {"tag": "colors", "prompt": "a red cup", "include": [{"class": "cup", "count": 1}]} | changes


@st.composite
def metadatas(draw: st.DrawFn) -> Metadata:
    def include(index: int) -> Include:
        position = st.tuples(st.sampled_from(RELATIONS), st.integers(0, index - 1)) if index else st.none()
        return Include(
            draw(st.sampled_from(COCO_CLASSES)),
            draw(st.integers(1, 9)),
            draw(st.none() | st.sampled_from(COLORS)),
            draw(st.none() | position),
        )

    return Metadata(
        draw(st.sampled_from(TASKS)),
        draw(st.text()),
        tuple(include(index) for index in range(draw(st.integers(1, 3)))),
        tuple(draw(st.lists(st.builds(Exclude, st.sampled_from(COCO_CLASSES), st.integers(1, 9)), max_size=2))),
    )


@given(metadatas())
def test_records_come_back_the_same(metadata: Metadata) -> None:
    assert parse_metadata(metadata.to_record(), "here") == metadata
    assert parse_metadata(json.loads(json.dumps(metadata.to_record())), "here") == metadata


def test_the_official_format_comes_back_letter_by_letter() -> None:
    found = [parse_metadata(json.loads(line), "here") for line in OFFICIAL.splitlines()]
    assert [m.tag for m in found] == ["single_object", "counting", "position", "color_attr"]
    assert found[1].exclude == (Exclude("clock", 3),)
    assert found[2].include == (Include("cow", 1), Include("tv", 1, position=("left of", 0)))
    assert found[3].include[1].color == "pink"
    assert "".join(json.dumps(m.to_record()) + "\n" for m in found) == OFFICIAL


def test_nulls_of_a_table_are_as_if_left_out() -> None:
    entry = {"class": "cup", "count": 1, "color": None, "position": None}
    assert parse_metadata(record(include=[entry], exclude=None), "here") == parse_metadata(record(), "here")


def test_the_lists_of_names_are_those_of_the_benchmark() -> None:
    assert (len(TASKS), len(COCO_CLASSES), len(set(COCO_CLASSES)), len(COLORS)) == (6, 80, 80, 10)


def wanted(**changes: Any) -> dict[str, Any]:
    return record(include=[{"class": "dog", "count": 1}, {"class": "cup", "count": 1} | changes])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record(colour="red"), "^here: unknown key 'colour'; GenEval records have tag"),
        (record(tag=3), "^here: tag must be a string, got 3"),
        (record(prompt=None), "^here: prompt must be a string, got None"),
        (record(include="cup"), "^here: include must be a list, got 'cup'"),
        (record(include=[]), "^here: include is empty; name at least one object"),
        (record(exclude={"class": "cup", "count": 1}), "^here: exclude must be a list, got {'class'"),
        (record(exclude=""), "^here: exclude must be a list, got ''"),
        (record(exclude=[{"class": "cup", "count": 1, "color": "red"}]), "^here: exclude 0: unknown key 'color'"),
        (record(exclude=[{"class": "cup"}]), "^here: exclude 0: count must be an integer of 1 or more, got None"),
        (record(include=["cup"]), "^here: include 0 must be an object with a string \"class\", got 'cup'"),
        (record(include=[{"count": 1}]), '^here: include 0 must be an object with a string "class"'),
        (wanted(amount=1), "^here: include 1: unknown key 'amount'; known: class, color, count, position"),
        (wanted(count=0), "^here: include 1: count must be an integer of 1 or more, got 0"),
        (wanted(count=True), "count must be an integer of 1 or more, got True"),
        (wanted(count="2"), "count must be an integer of 1 or more, got '2'"),
        (wanted(color="grey"), "^here: include 1: color must be one of red, .*, white, got 'grey'"),
        (wanted(color=["red"]), r"color must be one of .*, got \['red'\]"),
        (wanted(position="above"), r"^here: include 1: position must be \[relation, index\], .*, got 'above'"),
        (wanted(position=["over", 0]), "relation one of left of, right of, above, below"),
        (wanted(position=["above", 0, 0]), r"position must be \[relation, index\]"),
        (wanted(position=["above", 1]), r"position must refer to an earlier include \(0 to 0\), got 1"),
        (wanted(position=["above", -1]), "earlier include .* got -1"),
        (wanted(position=["above", "0"]), "earlier include .* got '0'"),
        (wanted(position=["above", False]), "earlier include .* got False"),
        (
            record(include=[{"class": "cup", "count": 1, "position": ["above", 0]}]),
            "^here: include 0: position must refer to an earlier include, but this is the first; list it later",
        ),
    ],
)
def test_records_that_do_not_fit_are_told(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(CRDError, match=message):
        parse_metadata(bad, "here")


@pytest.mark.parametrize(("tag", "nearest"), [("countin", "counting"), ("color", "colors"), ("Position", "position")])
def test_a_task_that_does_not_exist_names_the_nearest(tag: str, nearest: str) -> None:
    """A misspelt "counting" would be judged at another confidence."""
    with pytest.raises(CRDError, match=f"^here: tag must be one of single_object, .*, got '{tag}'; .* '{nearest}'"):
        parse_metadata(record(tag=tag), "here")
    with pytest.raises(CRDError, match=r"got 'x'$"):
        parse_metadata(record(tag="x"), "here")


def test_one_prompt_may_ask_for_two_things() -> None:
    cups = [record(include=[{"class": "cup", "count": count}]) for count in (1, 2, 1)]
    columns = {name: [cup.get(name) for cup in cups] for name in ("tag", "include", "exclude")}
    found = parse_columns([cup["prompt"] for cup in cups], columns)
    assert [metadata.include[0].count for metadata in found] == [1, 2, 1]
    assert found == [parse_metadata(cup, "here") for cup in cups]


@pytest.mark.parametrize(
    ("own", "benchmark"),
    [
        (record(), True),
        (record(include=[{"class": "cup"}, "cup"]), True),
        ({"tag": 3, "include": "x"}, False),
        ({"tag": "x", "include": ["x"]}, False),
        ({"tag": "x", "include": []}, False),
        ({"tag": "x", "include": [{"id": 3}]}, False),
        ({"include": [{"class": "cup", "count": 1}]}, False),
    ],
)
def test_records_are_told_from_columns_of_the_same_names(own: dict[str, Any], benchmark: bool) -> None:
    assert is_benchmark_record(own) is benchmark


def test_columns_of_other_rewards_stay() -> None:
    extra = {"rewards": ["ocr"], "tags": ["a"], "included": 1, "prompt_2": "b"}
    assert record_columns(record(**extra), "here") == {**record(**extra), "exclude": ()}
    assert record_columns(record(exclude=None, exlude=[]), "here")["exlude"] == []
    for misspelt in ("exlude", "excludes", "Excluded"):
        with pytest.raises(CRDError, match=f"^here: unknown key '{misspelt}'; did you mean 'exclude'"):
            record_columns(record(**{misspelt: []}), "here")
