from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest

from crd.errors import CRDError
from crd.geneval.metadata import (
    COCO_CLASSES,
    COLORS,
    RELATIONS,
    TASKS,
    Exclude,
    Include,
    Metadata,
    parse_metadata,
    to_columns,
)
from crd.geneval.prompts import (
    MIX,
    benchmark,
    generate,
    is_held_out,
    noun_phrase,
    nth_prompt,
    prompt_count,
    scene_key,
    training_prompts,
)
from crd.tiny.scene_prompts import SCENE_CLASSES, TEST_MIX, pretraining_prompt, scene_prompts
from crd.tiny.vocabulary import TOKEN_WORDS

# One object of each COCO class, and two: written by hand, not by the code.
PHRASES = """
a person, two people; a bicycle, two bicycles; a car, two cars; a motorcycle, two motorcycles;
an airplane, two airplanes; a bus, two buses; a train, two trains; a truck, two trucks; a boat, two boats;
a traffic light, two traffic lights; a fire hydrant, two fire hydrants; a stop sign, two stop signs;
a parking meter, two parking meters; a bench, two benches; a bird, two birds; a cat, two cats; a dog, two dogs;
a horse, two horses; a sheep, two sheep; a cow, two cows; an elephant, two elephants; a bear, two bears;
a zebra, two zebras; a giraffe, two giraffes; a backpack, two backpacks; an umbrella, two umbrellas;
a handbag, two handbags; a tie, two ties; a suitcase, two suitcases; a frisbee, two frisbees;
a pair of skis, two pairs of skis; a snowboard, two snowboards; a sports ball, two sports balls; a kite, two kites;
a baseball bat, two baseball bats; a baseball glove, two baseball gloves; a skateboard, two skateboards;
a surfboard, two surfboards; a tennis racket, two tennis rackets; a bottle, two bottles; a wine glass, two wine glasses;
a cup, two cups; a fork, two forks; a knife, two knives; a spoon, two spoons; a bowl, two bowls; a banana, two bananas;
an apple, two apples; a sandwich, two sandwiches; an orange, two oranges; a head of broccoli, two heads of broccoli;
a carrot, two carrots; a hot dog, two hot dogs; a pizza, two pizzas; a donut, two donuts; a cake, two cakes;
a chair, two chairs; a couch, two couches; a potted plant, two potted plants; a bed, two beds;
a dining table, two dining tables; a toilet, two toilets; a tv, two tvs; a laptop, two laptops;
a computer mouse, two computer mice; a tv remote, two tv remotes; a computer keyboard, two computer keyboards;
a cell phone, two cell phones; a microwave, two microwaves; an oven, two ovens; a toaster, two toasters;
a sink, two sinks; a refrigerator, two refrigerators; a book, two books; a clock, two clocks; a vase, two vases;
a pair of scissors, two pairs of scissors; a teddy bear, two teddy bears; a hair drier, two hair driers;
a toothbrush, two toothbrushes
"""
TABLE = [tuple(entry.strip().split(", ")) for entry in PHRASES.strip().split(";")]


def test_articles_and_plurals_of_all_classes() -> None:
    assert [(noun_phrase(name), noun_phrase(name, 2)) for name in COCO_CLASSES] == TABLE


def test_colored_phrases() -> None:
    assert [noun_phrase("cat", color=color).split()[0] for color in COLORS] == ["a", "an"] + ["a"] * 8
    assert noun_phrase("umbrella", color="red") == "a red umbrella"
    assert noun_phrase("scissors", color="orange") == "a pair of orange scissors"
    assert noun_phrase("broccoli", color="purple") == "a head of purple broccoli"
    assert noun_phrase("scissors", 3) == "three pairs of scissors"
    assert noun_phrase("berry", 4) == "four berries"
    assert noun_phrase("toy", 4) == "four toys"


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (("single_object", 1), Metadata("single_object", "a photo of an apple", (Include("apple", 1),))),
        (
            ("two_object", 0),
            Metadata("two_object", "a photo of a cat and an apple", (Include("cat", 1), Include("apple", 1))),
        ),
        (
            ("counting", 2),
            Metadata("counting", "a photo of three cats", (Include("cat", 3),), (Exclude("cat", 4),)),
        ),
        (("colors", 3), Metadata("colors", "a photo of an orange apple", (Include("apple", 1, "orange"),))),
        (
            ("position", 1),
            Metadata(
                "position",
                "a photo of an apple left of a cat",
                (Include("cat", 1), Include("apple", 1, position=("left of", 0))),
            ),
        ),
        (
            ("color_attr", 0),
            Metadata(
                "color_attr",
                "a photo of a red cat and an orange apple",
                (Include("cat", 1, "red"), Include("apple", 1, "orange")),
            ),
        ),
    ],
    ids=TASKS,
)
def test_templates(number: tuple[str, int], expected: Metadata) -> None:
    assert nth_prompt(*number, classes=("cat", "apple")) == expected


@pytest.mark.parametrize("tag", TASKS)
def test_numbering_is_one_to_one_and_complete(tag: str) -> None:
    classes, colors = ("cat", "person", "skis", "apple"), ("red", "orange", "white")
    suite = [nth_prompt(tag, number, classes, colors) for number in range(prompt_count(tag, classes, colors))]
    assert len({metadata.prompt for metadata in suite}) == len(suite)
    pairs = len(list(permutations(classes, 2)))
    expected = {"single_object": 4, "two_object": pairs, "counting": 12, "colors": 9, "position": pairs * 4}
    assert len(suite) == expected.get(tag, 6 * 6)
    for metadata in suite:
        assert all(wanted.class_name in metadata.prompt or tag == "counting" for wanted in metadata.include)
        assert not any(wanted.class_name == "person" and wanted.color for wanted in metadata.include)
        names = [wanted.class_name for wanted in metadata.include]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("tag", TASKS)
def test_metadata_survives_json(tag: str) -> None:
    rng = random.Random(1)
    for metadata in (generate(tag, rng) for _ in range(50)):
        assert parse_metadata(json.loads(json.dumps(metadata.to_record())), "here") == metadata
        columns = to_columns(metadata)
        assert set(columns) == {"prompt", "tag", "include", "exclude"}
        assert parse_metadata(json.loads(json.dumps(columns)), "here") == metadata
        assert (columns["exclude"] == ()) == (tag != "counting")


def test_golden() -> None:
    rng = random.Random(43)
    assert generate("position", rng).prompt == "a photo of a cat left of a toothbrush"
    assert training_prompts(1, seed=0)[0].prompt == "a photo of a vase below a snowboard"


@pytest.mark.parametrize("draw", [training_prompts, lambda count, seed: benchmark(seed, count)])
def test_a_seed_names_its_prompts(draw: Callable[[int, int], list[Metadata]]) -> None:
    assert draw(40, 3) == draw(40, 3)
    assert draw(40, 3) != draw(40, 4)


def test_training_mix_is_exact() -> None:
    counts = Counter(metadata.tag for metadata in training_prompts(170, seed=0))
    assert counts == Counter({tag: 10 * weight for tag, weight in MIX.items()})
    # 20 = 17 + 3: quotas 8.24, 5.88, 3.53, 1.18, 1.18; the largest remainders are counting and color_attr.
    counts = Counter(metadata.tag for metadata in training_prompts(20, seed=0))
    assert counts == {"position": 8, "counting": 6, "color_attr": 4, "colors": 1, "two_object": 1}
    tags = [metadata.tag for metadata in training_prompts(170, seed=0)]
    assert tags != sorted(tags, key=list(MIX).index)


def test_a_prompt_repeats_only_after_all_others() -> None:
    drawn = [m.prompt for m in training_prompts(250, 0, ("cat", "dog", "cow"), mix={"counting": 1})]
    assert sorted(Counter(drawn).values()) == [27, 27] + [28] * 7
    # 882 of 3000 count, and there are 240 such prompts; all others are distinct.
    assert len({m.prompt for m in training_prompts(3000, 0)}) == 3000 - 882 + 240


def test_keep_filters() -> None:
    drawn = training_prompts(60, 0, keep=lambda m: all(wanted.class_name != "dog" for wanted in m.include))
    assert len(drawn) == 60
    assert not any("dog" in m.prompt.replace("hot dog", "") for m in drawn)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: generate("ocr", random.Random(0)), "no task 'ocr'"),
        (lambda: generate("two_object", random.Random(0), ("cat",)), "'two_object' has no prompts with 1 classes"),
        (lambda: generate("colors", random.Random(0), ("person",)), "a person has no color"),
        (lambda: generate("colors", random.Random(0), ("cat", "cat")), "class 'cat' twice"),
        (lambda: generate("color_attr", random.Random(0), colors=("red", "red")), "color 'red' twice"),
        (lambda: training_prompts(0, 0), "1 or more, got 0"),
        (lambda: training_prompts(5, 0, mix={"ocr": 1}), "weights of 0 or more"),
        (lambda: training_prompts(5, 0, mix={"colors": 0}), "not all 0"),
        (lambda: training_prompts(5, 0, mix={}), "not all 0"),
        (lambda: training_prompts(5, 0, mix={"colors": 3, "position": -1}), "weights of 0 or more"),
        (lambda: training_prompts(5, 0, mix={"counting": 1}, keep=lambda m: False), "none of the 240 prompts"),
        (lambda: benchmark(0, classes=()), "has no prompts"),
        (lambda: scene_prompts("valid", 4), "train or test, got 'valid'"),
        (lambda: scene_prompts("test", 0), "1 or more"),
    ],
)
def test_what_cannot_be_drawn(call: Callable[[], object], message: str) -> None:
    with pytest.raises(CRDError, match=message):
        call()


def test_benchmark_suite() -> None:
    suite = benchmark(0)
    assert len({metadata.prompt for metadata in suite}) == len(suite)
    assert [metadata.include[0].class_name for metadata in suite[:80]] == list(COCO_CLASSES)
    counts = Counter(metadata.tag for metadata in suite)
    assert list(counts) == list(TASKS)
    assert counts["single_object"] == 80
    assert all(70 <= counts[tag] <= 100 for tag in TASKS[1:])


def test_scene_key_ignores_which_object_is_named_first() -> None:
    classes = ("cat", "cup", "kite")
    for tag, pairs in (("two_object", 3), ("position", 3 * 4), ("color_attr", 3 * 90)):
        keys = Counter(scene_key(nth_prompt(tag, number, classes)) for number in range(prompt_count(tag, classes)))
        assert set(keys.values()) == {2}
        assert len(keys) == pairs
    left, right = ("left of", "right of")
    assert RELATIONS[:2] == (left, right)
    one = Metadata("position", "", (Include("cup", 1), Include("cat", 1, position=(left, 0))))
    two = Metadata("position", "", (Include("cat", 1), Include("cup", 1, position=(right, 0))))
    other = Metadata("position", "", (Include("cup", 1), Include("cat", 1, position=(right, 0))))
    assert scene_key(one) == scene_key(two) != scene_key(other)


@pytest.mark.parametrize("tag", TASKS)
def test_a_quarter_of_each_task_is_held_out(tag: str) -> None:
    prompts = [nth_prompt(tag, number, SCENE_CLASSES) for number in range(prompt_count(tag, SCENE_CLASSES))]
    share = sum(map(is_held_out, prompts)) / len(prompts)
    assert share == 0 if tag == "single_object" else 0.18 < share < 0.32


def test_scene_splits_share_no_scene() -> None:
    train, test = scene_prompts("train", 1500), scene_prompts("test", 600)
    assert Counter(m.tag for m in test) == dict.fromkeys(TEST_MIX, 100)
    assert Counter(m.tag for m in train) == {tag: 300 for tag in TEST_MIX if tag != "single_object"}
    assert {scene_key(m) for m in train}.isdisjoint(scene_key(m) for m in test)
    assert all(is_held_out(m) for m in test if m.tag != "single_object")
    assert len({m.prompt for m in test if m.tag == "counting"}) == 8
    assert {m.include[0].class_name for m in test if m.tag == "single_object"} == set(SCENE_CLASSES)
    assert scene_prompts("test", 50, seed=1) != scene_prompts("test", 50) == scene_prompts("test", 50)


def test_scene_words_are_tokens() -> None:
    words = {word for split in ("train", "test") for m in scene_prompts(split, 1500) for word in m.prompt.split()}
    # "an" is spelled in two letters.
    assert words - set(TOKEN_WORDS) == {"an"}


@pytest.mark.parametrize("rng", [np.random.default_rng(0), random.Random(0)], ids=["numpy", "python"])
def test_pretraining_prompts(rng: np.random.Generator | random.Random) -> None:
    start = time.perf_counter()
    drawn = [pretraining_prompt(rng) for _ in range(6000)]
    # It takes 26 us; a loaded machine may be slow, a list of all prompts made anew for each would be far slower.
    assert (time.perf_counter() - start) / len(drawn) < 500e-6
    assert not any(map(is_held_out, drawn))
    assert all(850 < number < 1150 for number in Counter(m.tag for m in drawn).values())
    assert len({m.prompt for m in drawn if m.tag == "single_object"}) == 12
