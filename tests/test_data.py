from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crd.data import PromptDataset, count_shared, epoch_order, load_prompts, prompt_batch
from crd.errors import CRDError
from crd.geneval.metadata import TASKS, Metadata, parse_metadata
from crd.geneval.prompts import is_held_out, scene_key
from crd.prompt_sources import interleave
from crd.tiny.vocabulary import is_test_word


def test_text_files_hold_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text('  a "cat"\n\nthe dög \n', encoding="utf-8")
    assert load_prompts(path) == PromptDataset(('a "cat"', "the dög"), {})


def test_jsonl_columns_keep_their_values(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    records: list[dict[str, Any]] = [{"prompt": "a", "target": {"n": 1}}, {"prompt": "b", "target": None}]
    path.write_text("\n\n".join(json.dumps(record) for record in records))
    dataset = load_prompts(str(path))
    assert dataset.prompts == ("a", "b")
    assert dataset.columns == {"target": ({"n": 1}, None)}
    assert load_prompts(records) == dataset
    assert load_prompts(dataset) is dataset


def test_world_prompts_have_quoted_words_of_their_split() -> None:
    for split in ("train", "test"):
        dataset = load_prompts(f"world:{split}:40")
        assert len(dataset) == 40
        assert all(is_test_word(prompt.split('"')[1]) == (split == "test") for prompt in dataset.prompts)
    assert load_prompts("world:train") == load_prompts("world:train")


def metadata_of(dataset: PromptDataset) -> list[Metadata]:
    assert set(dataset.columns) == {"tag", "include", "exclude"}
    return [
        parse_metadata({"prompt": prompt, **{name: values[i] for name, values in dataset.columns.items()}}, "here")
        for i, prompt in enumerate(dataset.prompts)
    ]


def test_scene_prompts_carry_what_to_draw() -> None:
    train, test = metadata_of(load_prompts("scenes:train")), metadata_of(load_prompts("scenes:test:60"))
    assert (len(train), len(test)) == (512, 60)
    assert not any(map(is_held_out, train))
    assert Counter(metadata.tag for metadata in test) == dict.fromkeys(TASKS, 10)
    assert load_prompts("scenes:train:9") == load_prompts("scenes:train:9")


def test_geneval_training_has_no_scene_of_the_suite() -> None:
    train, test = metadata_of(load_prompts("geneval:train:3000")), metadata_of(load_prompts("geneval:test"))
    assert len(train) == 3000
    assert {scene_key(metadata) for metadata in train}.isdisjoint(scene_key(metadata) for metadata in test)
    part = metadata_of(load_prompts("geneval:test:30"))
    assert set(part) < set(test)
    assert set(Counter(metadata.tag for metadata in part).values()) <= {4, 5, 6}


def test_benchmark_files_become_columns(tmp_path: Path) -> None:
    path = tmp_path / "evaluation_metadata.jsonl"
    # The form of the published file: `exclude` in counting records alone.
    path.write_text(
        '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}\n'
        '{"tag": "counting", "include": [{"class": "bus", "count": 2}], "exclude": [{"class": "bus", "count": 3}], '
        '"prompt": "a photo of two buss"}\n'
    )
    dataset = load_prompts(path)
    assert dataset.columns["exclude"] == ((), [{"class": "bus", "count": 3}])
    assert dataset.columns["tag"] == ("single_object", "counting")
    assert dataset.columns["include"][0] == [{"class": "bench", "count": 1}]
    assert load_prompts([json.loads(line) for line in path.read_text().splitlines()]) == dataset


def test_benchmark_records_keep_columns_of_other_rewards(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    bench = {"prompt": "a", "tag": "colors", "include": [{"class": "bench", "count": 1}], "rewards": ["geneval"]}
    path.write_text(json.dumps(bench))
    assert load_prompts(path).columns == {
        "tag": ("colors",), "include": (bench["include"],), "exclude": ((),), "rewards": (["geneval"],)
    }  # fmt: skip
    with pytest.raises(CRDError, match="record 2 of the dataset: unknown key 'exlude'"):
        load_prompts([bench, {**bench, "exlude": []}])


def test_columns_named_like_those_of_the_benchmark_are_anyones(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    records = [
        {"prompt": "a", "tag": 3, "include": "x", "exlude": 1},
        {"prompt": "b", "tag": 4, "include": [], "exlude": 2},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    assert load_prompts(path).columns == {"tag": (3, 4), "include": ("x", []), "exlude": (1, 2)}
    assert load_prompts(records) == load_prompts(path)


def test_prompts_may_hold_a_line_separator(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False) + "\r\n", encoding="utf-8", newline="")
    assert load_prompts(path).prompts == ("a\u2028b",)


def test_joined_sources_are_interleaved(tmp_path: Path) -> None:
    joined = load_prompts("world:train:6+scenes:train:3")
    world, scenes = load_prompts("world:train:6"), load_prompts("scenes:train:3")
    assert len(joined) == 9
    assert [prompt in world.prompts for prompt in joined.prompts] == [True, False, True] * 3
    assert tuple(prompt for prompt in joined.prompts if prompt in scenes.prompts) == scenes.prompts
    assert [tag is None for tag in joined.columns["tag"]] == [True, False, True] * 3
    path = tmp_path / "a+b.txt"
    path.write_text("one\ntwo\n")
    assert load_prompts(str(path)).prompts == ("one", "two")
    other = tmp_path / "c.jsonl"
    other.write_text('{"prompt": "three", "n": 3}')
    assert load_prompts(f"{other}+world:train:1").columns == {"n": (3, None)}


@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_interleaving_keeps_order_and_proportions(sizes: list[int]) -> None:
    parts = [[(part, i) for i in range(size)] for part, size in enumerate(sizes)]
    merged = interleave(parts)
    for part, items in enumerate(parts):
        assert [item for item in merged if item[0] == part] == items
        for length in range(len(merged)):
            taken = sum(item[0] == part for item in merged[:length])
            assert abs(taken - length * len(items) / len(merged)) <= len(parts) / 2 + 0.5


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.csv", "a\n", "are .txt or .jsonl"),
        ("p.jsonl", "{", "line 1 is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n\n["b"]', "line 3 must be an object"),
        ("p.jsonl", '{"prompt": 3}', 'string "prompt"'),
        ("p.jsonl", '{"prompt": "a", "x": 1}\n{"prompt": "b"}', "record 2 lacks 'x'"),
        ("p.jsonl", '\n{"prompt": "b", "tag": "colors", "include": [{"class": "cat"}]}', "p.jsonl line 2: .* count"),
        (
            "p.jsonl",
            '{"prompt": "b", "tag": "x", "include": [{"class": "cat", "count": 1}]}',
            "line 1: tag must be one of",
        ),
        ("p.jsonl", '{"prompt": "b", "tag": "x", "include": [{"class": 1}], "exlude": []}', "unknown key 'exlude'"),
    ],
)
def test_files_that_do_not_fit(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(CRDError, match=message) as error:
        load_prompts(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", "no prompt file at nowhere.txt"),
        ("world:valid", "world:test:COUNT"),
        ("world:test:0", "world:test:COUNT"),
        ("world:test:1:2", "world:test:COUNT"),
        ("scenes:", "scenes:test:COUNT"),
        ("geneval:train:²", "geneval:test:COUNT"),
        ("geneval:test:9999", "ask for fewer"),
        ("world:train:2+", "empty part"),
        ("world:train:2+scenes:no", "scenes:test:COUNT"),
        ("scene:train", "no prompt file at scene:train; give a .txt, a .jsonl or world:train, scenes:train"),
        ([], "no prompts"),
        ([1], "record 1"),
        ([{"prompt": "a"}, {"text": "b"}], "record 2"),
        ([{"prompt": None}], "record 1"),
    ],
)
def test_sources_that_do_not_fit(source: Any, message: str) -> None:
    with pytest.raises(CRDError, match=message):
        load_prompts(source)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CRDError, match="not UTF-8"):
        load_prompts(path)


@settings(max_examples=40)
@given(size=st.integers(1, 7), cuts=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 3))
def test_order_does_not_depend_on_how_the_stream_is_cut(size: int, cuts: list[int], seed: int) -> None:
    taken: list[int] = []
    for count in cuts:
        taken += epoch_order(size, len(taken), count, seed)
    assert taken == epoch_order(size, 0, sum(cuts), seed)
    for start in range(0, len(taken) - size + 1, size):
        assert sorted(taken[start : start + size]) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    order = epoch_order(50, 0, 100, seed=0)
    assert order[:50] != order[50:]
    assert order != epoch_order(50, 0, 100, seed=1)


def test_batch_groups_images_and_repeats_columns() -> None:
    dataset = load_prompts([{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}])
    # The same prompt twice in one update is two groups: each is complete on its own.
    batch = prompt_batch(dataset, [1, 0, 1], 2, 0, "rollout", 5)
    assert batch.prompts == ["b", "b", "a", "a", "b", "b"]
    assert batch.columns == {"n": [2, 2, 1, 1, 2, 2]}
    assert batch.group_id.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(set(batch.image_seed)) == 6
    assert prompt_batch(dataset, [1, 0, 1], 2, 0, "rollout", 5).image_seed == batch.image_seed
    assert set(prompt_batch(dataset, [1, 0, 1], 2, 0, "rollout", 6).image_seed).isdisjoint(batch.image_seed)


def test_rewards_of_a_source_are_named_behind_an_at_sign(tmp_path: Path) -> None:
    dataset = load_prompts("world:train:2@ocr+scenes:train:2@geneval-tiny,other")
    by_prompt = dict(zip(dataset.prompts, dataset.columns["rewards"], strict=True))
    assert sorted(map(tuple, by_prompt.values())) == [("geneval-tiny", "other")] * 2 + [("ocr",)] * 2
    assert all(('"' in prompt) == (names == ["ocr"]) for prompt, names in by_prompt.items())
    odd = tmp_path / "me@home.txt"
    odd.write_text("a\n")
    assert load_prompts(str(odd)).columns == {}
    for source in ("world:train:2@", "@ocr", "world:train:2@ocr,"):
        with pytest.raises(CRDError, match="SOURCE@REWARD"):
            load_prompts(source)


def test_rewards_behind_an_at_sign_belong_to_the_last_source_alone() -> None:
    dataset = load_prompts("world:train:2+scenes:train:2@geneval-tiny")
    by_prompt = zip(dataset.prompts, dataset.columns["rewards"], strict=True)
    assert all(names == (None if '"' in prompt else ["geneval-tiny"]) for prompt, names in by_prompt)


def test_rewards_of_a_source_are_named_once(tmp_path: Path) -> None:
    with pytest.raises(CRDError, match=r"^world:train:2@ocr@geneval: world:train:2@ocr already says which rewards"):
        load_prompts("world:train:2@ocr@geneval")
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "rewards": ["ocr"]}')
    with pytest.raises(CRDError, match=r"p.jsonl already says which rewards judge its prompts, got @geneval too"):
        load_prompts(f"world:train:2+{path}@geneval")


@pytest.mark.parametrize("source", ["a+b.txt@ocr", "a+b.txt", "b.txt@ocr", "world:train:2+b.txt"])
def test_errors_of_a_part_show_the_whole_source(source: str) -> None:
    with pytest.raises(CRDError) as error:
        load_prompts(source)
    assert str(error.value).startswith(f"{source}: no prompt file at ")


def test_prompts_in_both_datasets_are_counted() -> None:
    def cups(prompt: str, count: int, **columns: Any) -> dict[str, Any]:
        return {"prompt": prompt, "tag": "counting", "include": [{"class": "cup", "count": count}], **columns}

    words = load_prompts(["a", "b", "c"])
    assert count_shared(words, load_prompts(["d", "b", "b"])) == 2
    # The benchmark says "two cups" in other words, and the same scene it is.
    scenes = load_prompts([cups("two cups", 2), cups("three cups", 3, exclude=[{"class": "cup", "count": 4}])])
    assert count_shared(scenes, load_prompts([cups("a photo of 2 cups", 2), cups("4", 4)])) == 1
    assert count_shared(scenes, load_prompts([{"prompt": "three cups"}])) == 1
    assert count_shared(words, scenes) == 0
