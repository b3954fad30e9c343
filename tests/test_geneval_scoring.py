from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crd.errors import CRDError
from crd.geneval import scoring
from crd.geneval.detections import Detections, Thresholds, kept, objects_to_color, with_colors
from crd.geneval.metadata import RELATIONS, Exclude, Include, Metadata
from crd.geneval.relations import relations
from crd.geneval.scoring import score_batch, score_image

Box = tuple[float, float, float, float]
Object = tuple[str, Box, float, str | None]

# Three boxes of 10 x 10 in a row. Neighbors are 40 apart: 40 - 0.1 * 20 = 38, 38 / 40 = 0.95 > 0.5.
LEFT, MIDDLE, RIGHT = (0.0, 0.0, 10.0, 10.0), (40.0, 0.0, 50.0, 10.0), (80.0, 0.0, 90.0, 10.0)


def test_names_are_imported_from_where_they_are_defined() -> None:
    assert all(getattr(scoring, name).__module__ == scoring.__name__ for name in scoring.__all__)


def scene(objects: list[Object]) -> Detections:
    return Detections(
        labels=tuple(label for label, *_ in objects),
        boxes=np.array([box for _, box, _, _ in objects], dtype=np.float64).reshape(-1, 4),
        scores=np.array([score for *_, score, _ in objects], dtype=np.float64),
        colors=tuple(color for *_, color in objects),
    )


def dog(box: Box = LEFT, score: float = 0.95, color: str | None = None) -> Object:
    return ("dog", box, score, color)


def cat(box: Box = MIDDLE, score: float = 0.95, color: str | None = None) -> Object:
    return ("cat", box, score, color)


def prompt(*include: Include, exclude: tuple[Exclude, ...] = (), tag: str = "single_object") -> Metadata:
    return Metadata(tag, "a photo", include, exclude)


def right_of_dog(relation: str = "right of") -> Metadata:
    return prompt(Include("dog", 1), Include("cat", 1, position=(relation, 0)), tag="position")


ONE_DOG = prompt(Include("dog", 1))
THREE_DOGS = prompt(Include("dog", 3), exclude=(Exclude("dog", 4),), tag="counting")
RED_DOG = prompt(Include("dog", 1, "red"), tag="colors")
TWO_RED_DOGS = prompt(Include("dog", 2, "red"), tag="colors")
RED_DOG_BLUE_CAT = prompt(Include("dog", 1, "red"), Include("cat", 1, "blue"), tag="color_attr")
PLACED = right_of_dog()
PLACED_IN_COLOR = prompt(Include("dog", 1, "red"), Include("cat", 1, "blue", ("right of", 0)), tag="position")
# Center offset (6, 8), distance 10. Both boxes are 5 x 5, so r = (6 - 0.1 * 10, 8 - 0.1 * 10) = (5, 7) and
# v = (0.5, 0.7): below, and exactly on the boundary of right of.
AT_HALF = [dog((10, 10, 15, 15)), cat((16, 18, 21, 23))]
# Offset (6.1, 8): v_x = 5.1 / sqrt(37.21 + 64) = 5.1 / 10.0603 = 0.5069.
BEYOND_HALF = [dog((10, 10, 15, 15)), cat((16.1, 18, 21.1, 23))]

# Terms of soft in the comments: count, then color and position where asked, for each include in turn.
CASES: dict[str, tuple[Metadata, list[Object], float, float, float]] = {
    # One object: 1 - |n - 1| / 1.
    "present": (ONE_DOG, [dog()], 1, 1, 1),
    "nothing_found": (ONE_DOG, [], 0, 0, 0),
    "class_absent": (ONE_DOG, [cat()], 0, 0, 0),
    "one_too_many": (ONE_DOG, [dog(), dog(MIDDLE)], 1, 0, 0),
    "confidence_is_not_above_itself": (ONE_DOG, [dog(score=0.3)], 0, 0, 0),
    "just_confident": (ONE_DOG, [dog(score=0.31)], 1, 1, 1),
    "only_the_confident_count": (ONE_DOG, [dog(), dog(MIDDLE, 0.3)], 1, 1, 1),
    # Two objects: 1 and 0; 1 and max(0, 1 - 2/1).
    "one_of_two": (prompt(Include("cat", 1), Include("dog", 1)), [cat()], 0, 0, 0.5),
    "floored_at_0": (prompt(Include("cat", 1), Include("dog", 1)), [cat(), dog(), dog(), dog(RIGHT)], 1, 0, 0.5),
    # Counting: 1 - |n - 3| / 3.
    "three": (THREE_DOGS, [dog()] * 3, 1, 1, 1),
    "too_few": (THREE_DOGS, [dog()] * 2, 0, 0, 2 / 3),
    "too_many_violates_exclude": (THREE_DOGS, [dog()] * 4, 0, 0, 2 / 3),
    "far_too_many": (THREE_DOGS, [dog()] * 7, 0, 0, 0),
    "zero_of_three": (THREE_DOGS, [], 0, 0, 0),
    "too_many_without_exclude": (prompt(Include("dog", 3), tag="counting"), [dog()] * 4, 1, 0, 2 / 3),
    "counting_leaves_out_0.9": (THREE_DOGS, [*[dog()] * 3, dog(RIGHT, 0.9)], 1, 1, 1),
    "counting_needs_more_than_0.9": (THREE_DOGS, [*[dog()] * 2, dog(RIGHT, 0.9)], 0, 0, 2 / 3),
    # 16 of 20 are kept: 1 - 12/4 < 0, and 16 >= 5; asked for 16, they are exact.
    "over_16": (prompt(Include("dog", 4), exclude=(Exclude("dog", 5),), tag="counting"), [dog()] * 20, 0, 0, 0),
    "over_16_is_16": (prompt(Include("dog", 16), tag="counting"), [dog()] * 20, 1, 1, 1),
    "exclude_of_another_class": (prompt(Include("dog", 1), exclude=(Exclude("cat", 1),)), [dog(), cat()], 0, 0, 1),
    "exclude_not_reached": (prompt(Include("dog", 1), exclude=(Exclude("cat", 2),)), [dog(), cat()], 1, 1, 1),
    # Colors.
    "color_right": (RED_DOG, [dog(color="red")], 1, 1, 1),
    "color_wrong": (RED_DOG, [dog(color="blue")], 0, 0, (1 + 0) / 2),
    "color_of_nothing": (RED_DOG, [], 0, 0, 0),
    "best_of_two_is_red": (RED_DOG, [dog(score=0.8, color="blue"), dog(color="red")], 1, 0, 0),
    "best_of_two_is_blue": (RED_DOG, [dog(color="blue"), dog(score=0.8, color="red")], 0, 0, 0),
    "one_of_two_colors_wrong": (TWO_RED_DOGS, [dog(color="red"), dog(color="blue")], 0, 0, (1 + 1 / 2) / 2),
    "color_not_read_if_too_few": (TWO_RED_DOGS, [dog(color="red")], 0, 0, (1 / 2 + 0) / 2),
    # Color attribution.
    "attribution_right": (RED_DOG_BLUE_CAT, [dog(color="red"), cat(color="blue")], 1, 1, 1),
    "attribution_swapped": (RED_DOG_BLUE_CAT, [dog(color="blue"), cat(color="red")], 0, 0, (1 + 0 + 1 + 0) / 4),
    "attribution_one_wrong": (RED_DOG_BLUE_CAT, [dog(color="red"), cat(color="red")], 0, 0, (1 + 1 + 1 + 0) / 4),
    "attribution_one_absent": (RED_DOG_BLUE_CAT, [cat(color="blue")], 0, 0, (0 + 0 + 1 + 1) / 4),
    # Position.
    "position_right": (PLACED, [dog(LEFT), cat(MIDDLE)], 1, 1, 1),
    "position_wrong": (PLACED, [dog(RIGHT), cat(MIDDLE)], 0, 0, (1 + 1 + 0) / 3),
    "position_target_absent": (PLACED, [cat()], 0, 0, (0 + 1 + 0) / 3),
    "position_subject_absent": (PLACED, [dog()], 0, 0, (1 + 0 + 0) / 3),
    "position_at_half": (PLACED, AT_HALF, 0, 0, (1 + 1 + 0) / 3),
    "position_at_half_is_below": (right_of_dog("below"), AT_HALF, 1, 1, 1),
    "position_beyond_half": (PLACED, BEYOND_HALF, 1, 1, 1),
    # Offset 2 = 0.1 * (10 + 10) is reduced to 0.
    "position_overlapping": (PLACED, [dog((0, 0, 10, 10)), cat((2, 0, 12, 10))], 0, 0, (1 + 1 + 0) / 3),
    "position_same_box": (PLACED, [dog(LEFT), cat(LEFT)], 0, 0, (1 + 1 + 0) / 3),
    # The best cat is right of the dog: official. Two cats: count 1 - 1/1, so no position either.
    "position_subject_twice": (PLACED, [dog(MIDDLE), cat(RIGHT), cat(LEFT, 0.8)], 1, 0, (1 + 0 + 0) / 3),
    # The best dog is left of the cat: official. Two dogs are no exact target.
    "position_target_twice": (PLACED, [dog(LEFT), dog(RIGHT, 0.8), cat(MIDDLE)], 1, 0, (0 + 1 + 0) / 3),
    "position_to_every_target": (
        prompt(Include("dog", 2), Include("cat", 1, position=("right of", 0)), tag="position"),
        [dog(LEFT), dog(RIGHT), cat(MIDDLE)], 0, 0, (1 + 1 + 0) / 3,
    ),
    "position_after_wrong_color": (
        PLACED_IN_COLOR, [dog(LEFT, color="red"), cat(MIDDLE, color="red")], 0, 0, (1 + 1 + 1 + 0 + 0) / 5,
    ),
    "position_to_target_of_wrong_color": (
        PLACED_IN_COLOR, [dog(LEFT, color="blue"), cat(MIDDLE, color="blue")], 0, 0, (1 + 0 + 1 + 1 + 0) / 5,
    ),
    # Three in a row, the second where it should not be: the third has no target.
    "position_chain_broken": (
        prompt(Include("dog", 1), Include("cat", 1, position=("right of", 0)),
               Include("cup", 1, position=("right of", 1)), tag="position"),
        [dog(MIDDLE), cat(LEFT), ("cup", RIGHT, 0.95, None)], 0, 0, (1 + 1 + 0 + 1 + 0) / 5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_hand_worked(case: str) -> None:
    metadata, objects, official, strict, soft = CASES[case]
    score = score_image(scene(objects), metadata)
    assert (score.official, score.strict) == (official, strict)
    assert score.soft == pytest.approx(soft, abs=1e-12)


@pytest.mark.parametrize(
    ("case", "soft"),
    [
        ("position_right", 1),
        ("position_wrong", (1 + 1 + 0 + 1) / 4),
        ("position_target_absent", (0 + 1 + 0) / 3),  # pairs never compared: nothing is appended
        ("position_subject_twice", (1 + 0 + 0) / 3),
        ("position_after_wrong_color", (1 + 1 + 1 + 0 + 0) / 5),
        ("floored_at_0", 0.5),
    ],
)
def test_paper_compat_appends_a_term_after_a_failed_relation_only(case: str, soft: float) -> None:
    metadata, objects, official, strict, _ = CASES[case]
    score = score_image(scene(objects), metadata, paper_compat=True)
    assert (score.official, score.strict) == (official, strict)
    assert score.soft == pytest.approx(soft, abs=1e-12)


@pytest.mark.parametrize(
    ("case", "reasons"),
    [
        ("present", []),
        ("nothing_found", ["dog: expected 1, found 0"]),
        ("one_too_many", ["dog: expected exactly 1, found 2"]),
        ("too_many_violates_exclude", ["dog: expected exactly 3, found 4", "dog: expected fewer than 4, found 4"]),
        ("one_of_two_colors_wrong", ["dog: expected 2 red, found 1 blue and 1 red"]),
        ("position_wrong", ["cat: expected right of dog, found left of"]),
        ("position_overlapping", ["cat: expected right of dog, found no relation"]),
        ("position_target_absent", ["dog: expected 1, found 0", "cat: expected right of dog, found no dog that fits"]),
    ],
)
def test_reasons(case: str, reasons: list[str]) -> None:
    metadata, objects, *_ = CASES[case]
    assert score_image(scene(objects), metadata).reasons == tuple(reasons)


def test_thresholds_can_be_set() -> None:
    found = scene([dog(score=0.5), dog(MIDDLE, 0.7)])
    assert score_image(found, ONE_DOG, Thresholds(confidence=0.6)).strict == 1
    assert score_image(found, ONE_DOG, Thresholds(max_objects=1)).strict == 1
    assert score_image(found, prompt(Include("dog", 2), tag="counting"), Thresholds(counting_confidence=0.4)).strict
    # Without reduction v = (6, 8) / 10.
    assert score_image(scene(AT_HALF), PLACED, Thresholds(position=0)).official == 1


@pytest.mark.parametrize(
    "wrong", [{"confidence": 1.1}, {"counting_confidence": math.nan}, {"max_objects": 0}, {"position": -0.1}]
)
def test_impossible_thresholds_are_told(wrong: dict[str, float]) -> None:
    with pytest.raises(CRDError, match=f"{next(iter(wrong))} must be"):
        Thresholds(**wrong)  # type: ignore[arg-type]


def test_more_objects_than_ever_count_are_told() -> None:
    with pytest.raises(CRDError, match=r"17 dog.*raise max_objects"):
        kept(scene([]), prompt(Include("dog", 16), exclude=(Exclude("dog", 17),)))


def test_kept_in_order_of_confidence_for_every_class_asked() -> None:
    found = scene([dog(score=0.5), cat(), dog(RIGHT, 0.9), ("cup", LEFT, 0.9, None)])
    indices = kept(found, prompt(Include("dog", 1), exclude=(Exclude("kite", 1),)))
    assert {name: i.tolist() for name, i in indices.items()} == {"dog": [2, 0], "kite": []}


@pytest.mark.parametrize("flip", [1, -1])
def test_ties_are_broken_by_box_then_color_then_not_looked_at(flip: int) -> None:
    lower = (0.0, 5.0, 10.0, 15.0)
    best_first = [dog(RIGHT, 0.97), dog(LEFT, color="blue"), dog(LEFT, color="red"), dog(LEFT), dog(lower), dog(MIDDLE)]
    found = scene(best_first[::flip])
    order = kept(found, ONE_DOG)["dog"]
    assert [best_first[::flip][i] for i in order] == best_first


def test_single_precision_scores_are_compared_as_such() -> None:
    # float32(0.3) is 0.30000001 in double precision.
    found = replace(scene([dog()]), scores=np.array([0.3], dtype=np.float32))
    assert score_image(found, ONE_DOG).official == 0


def test_masks_are_neither_needed_nor_read() -> None:
    found = scene([dog(LEFT), cat(MIDDLE)])
    masked = replace(found, masks=np.zeros((2, 8, 9), dtype=bool))
    assert score_image(masked, PLACED) == score_image(found, PLACED)
    chosen = masked.select([1])
    assert (chosen.labels, chosen.boxes.tolist()) == (("cat",), [list(MIDDLE)])
    assert chosen.masks is not None
    assert chosen.masks.shape == (1, 8, 9)
    assert len(masked.select([]).labels) == 0


@pytest.mark.parametrize("indices", [[2], [-1], [True, False], [[0]], [0.0]])
def test_indices_that_do_not_fit_are_told(indices: list[int]) -> None:
    found = scene([dog(), cat()])
    with pytest.raises(ValueError, match="integers from 0 to 1"):
        found.select(indices)
    with pytest.raises(ValueError, match="integers from 0 to 1"):
        with_colors(found, indices, ["red"] * len(indices))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["dog"]}, "labels must be a tuple"),
        ({"boxes": np.zeros((4,))}, r"boxes must be \(1, 4\) float numpy for 1 labels, got \(4,\) float64"),
        ({"boxes": np.zeros((1, 4), dtype=int)}, "int64"),
        ({"boxes": [[0.0, 0.0, 1.0, 1.0]]}, "got list"),
        ({"boxes": np.array([[0, 0, math.nan, 1]])}, "boxes must be finite, got nan"),
        ({"boxes": np.array([[2.0, 0, 1, 1]])}, "x0 <= x1.* for object 0"),
        ({"scores": np.zeros((1, 1))}, r"scores must be \(1,\)"),
        ({"scores": np.array([math.inf])}, "scores must be finite"),
        ({"masks": np.zeros((1, 8, 8))}, r"masks must be \(1, H, W\) bool numpy, got \(1, 8, 8\) float64"),
        ({"masks": np.zeros((2, 8, 8), dtype=bool)}, "masks must be"),
        ({"colors": ()}, "colors must be a tuple of 1"),
        ({"colors": (3,)}, "colors must be"),
    ],
)
def test_detections_that_do_not_fit_are_told(change: dict[str, object], message: str) -> None:
    fields = {"labels": ("dog",), "boxes": np.zeros((1, 4)), "scores": np.ones(1), **change}
    with pytest.raises(ValueError, match=message):
        Detections(**fields)  # type: ignore[arg-type]


def test_only_colors_that_are_read_are_asked_for() -> None:
    found = scene([dog(score=0.8), dog(), cat(), ("cup", LEFT, 0.95, None)])
    assert objects_to_color(found, RED_DOG).tolist() == [1]
    assert objects_to_color(found, RED_DOG_BLUE_CAT).tolist() == [1, 2]
    assert objects_to_color(found, TWO_RED_DOGS).tolist() == [0, 1]
    assert objects_to_color(found, prompt(Include("dog", 3, "red"))).tolist() == []
    assert objects_to_color(found, ONE_DOG).tolist() == []
    assert score_image(with_colors(found, [1], ["red"]), RED_DOG).official == 1


@pytest.mark.parametrize("colors", [None, (None, "red")])
def test_a_color_never_looked_at_is_told(colors: tuple[str | None, ...] | None) -> None:
    found = replace(scene([dog(), cat()]), colors=colors)
    with pytest.raises(ValueError, match=r"color of object 0 \(dog\)"):
        score_image(found, RED_DOG)
    with pytest.raises(ValueError, match="each of the 1 indices, got 2"):
        with_colors(found, [0], ["red", "blue"])


def scalar_relations(a: Box, b: Box, threshold: float) -> list[bool]:
    offset = [(a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2 for i in (0, 1)]
    sizes = [(a[i + 2] - a[i]) + (b[i + 2] - b[i]) for i in (0, 1)]
    reduced = [math.copysign(max(abs(d) - threshold * s, 0), d) for d, s in zip(offset, sizes, strict=True)]
    if abs(reduced[0]) < 1e-3 and abs(reduced[1]) < 1e-3:
        return [False] * 4
    distance = math.sqrt(offset[0] * offset[0] + offset[1] * offset[1])
    x, y = reduced[0] / distance, reduced[1] / distance
    return [x < -0.5, x > 0.5, y < -0.5, y > 0.5]


# Whole pixels and few scores, so that ties and boundaries are common and shifted scenes are exact.
boxes = st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(0, 10)] * 2).map(
    lambda b: (float(b[0]), float(b[1]), float(b[0] + b[2]), float(b[1] + b[3]))
)
things = st.tuples(
    st.sampled_from(["dog", "cat", "cup"]), boxes, st.sampled_from([0.2, 0.3, 0.5, 0.9, 0.95]),
    st.sampled_from(["red", "blue"]),
)  # fmt: skip
scenes = st.lists(things, max_size=8)
# Objects of one class and one score, so that what is best is a matter of ties.
ties = st.lists(st.builds(dog, st.sampled_from([LEFT, RIGHT]), color=st.sampled_from(["red", "blue"])), max_size=4)


@st.composite
def prompts(draw: st.DrawFn) -> Metadata:
    include = []
    for index in range(draw(st.integers(1, 3))):
        position = st.tuples(st.sampled_from(RELATIONS), st.integers(0, index - 1)) if index else st.none()
        include.append(
            Include(
                draw(st.sampled_from(["dog", "cat", "cup"])),
                draw(st.integers(1, 3)),
                draw(st.sampled_from([None, "red", "blue"])),
                draw(st.none() | position),
            )
        )
    exclude = draw(st.lists(st.builds(Exclude, st.sampled_from(["dog", "cat"]), st.integers(1, 4)), max_size=1))
    return prompt(*include, exclude=tuple(exclude), tag=draw(st.sampled_from(["counting", "two_object"])))


@given(st.lists(boxes, max_size=4), st.lists(boxes, max_size=4), st.sampled_from([0.0, 0.1, 0.25]))
def test_relations_equal_the_scalar_reference(a: list[Box], b: list[Box], threshold: float) -> None:
    seen = relations(np.array(a).reshape(-1, 4), np.array(b).reshape(-1, 4), threshold)
    assert seen.shape == (len(a), len(b), 4)
    assert seen.tolist() == [[scalar_relations(one, other, threshold) for other in b] for one in a]


@given(st.lists(boxes, min_size=1, max_size=4), st.lists(boxes, min_size=1, max_size=4))
def test_relations_seen_from_the_other_side_are_opposite(a: list[Box], b: list[Box]) -> None:
    opposite = [RELATIONS.index(name) for name in ("right of", "left of", "below", "above")]
    there, back = relations(np.array(a), np.array(b)), relations(np.array(b), np.array(a))
    assert np.array_equal(there, back.transpose(1, 0, 2)[..., opposite])


def test_relations_shorter_than_a_thousandth_of_a_pixel_are_none() -> None:
    # Points, so nothing is reduced: v = (1, 0) wherever there is a relation.
    origin = np.zeros((1, 4))
    assert not relations(np.array([[0.0009, 0, 0.0009, 0]]), origin).any()
    assert relations(np.array([[0.0011, 0, 0.0011, 0]]), origin).tolist() == [[[False, True, False, False]]]
    with pytest.raises(ValueError, match=r"boxes_b must be \(N, 4\), got \(4,\)"):
        relations(origin, origin[0])


@given(scenes | ties, prompts() | st.just(RED_DOG), st.booleans(), st.randoms(use_true_random=False))
def test_the_order_of_objects_changes_nothing(
    objects: list[Object], metadata: Metadata, compat: bool, random: object
) -> None:
    shuffled = list(objects)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    expected = score_image(scene(objects), metadata, paper_compat=compat)
    assert score_image(scene(shuffled), metadata, paper_compat=compat) == expected


@given(
    scenes, prompts(), st.integers(-64, 64), st.integers(-64, 64), st.sampled_from([0.25, 0.5, 1.0, 2.0, 1024.0])
)  # fmt: skip
def test_place_and_scale_of_the_scene_change_nothing(
    objects: list[Object], metadata: Metadata, right: int, down: int, factor: float
) -> None:
    found = scene(objects)
    moved = replace(found, boxes=factor * (found.boxes + np.array([right, down, right, down])))
    assert score_image(moved, metadata) == score_image(found, metadata)


@given(scenes, prompts(), st.lists(boxes, max_size=20))
def test_classes_not_asked_for_change_nothing(objects: list[Object], metadata: Metadata, kites: list[Box]) -> None:
    more: list[Object] = [*[("kite", box, 0.99, None) for box in kites], *objects]
    assert score_image(scene(more), metadata) == score_image(scene(objects), metadata)


@given(st.lists(st.tuples(scenes, prompts()), max_size=4), st.booleans())
def test_a_batch_equals_one_by_one(batch: list[tuple[list[Object], Metadata]], compat: bool) -> None:
    found, metadata = [scene(objects) for objects, _ in batch], [m for _, m in batch]
    scores = score_batch(found, metadata, paper_compat=compat)
    single = [score_image(f, m, paper_compat=compat) for f, m in zip(found, metadata, strict=True)]
    assert scores.official.shape == scores.strict.shape == scores.soft.shape == (len(batch),)
    assert scores.official.tolist() == [s.official for s in single]
    assert scores.strict.tolist() == [s.strict for s in single]
    assert scores.soft.tolist() == [s.soft for s in single]
    assert scores.reasons == tuple(s.reasons for s in single)


def test_a_batch_of_unequal_lengths_is_told() -> None:
    with pytest.raises(ValueError, match="each of the 1 images, got 2"):
        score_batch([scene([])], [ONE_DOG, ONE_DOG])


@given(scenes, prompts(), st.booleans())
def test_how_the_three_scores_are_ordered(objects: list[Object], metadata: Metadata, compat: bool) -> None:
    score = score_image(scene(objects), metadata, paper_compat=compat)
    assert {score.official, score.strict} <= {0.0, 1.0}
    assert 0 <= score.soft <= 1
    assert score.official >= score.strict
    if score.strict:
        assert score.soft == 1
    assert (not score.reasons) == bool(score.strict)
    if score.official:
        assert all("exactly" in reason for reason in score.reasons)
    if score.soft == 1 and not metadata.exclude and not compat:
        assert score.strict


@given(st.lists(things, max_size=8, unique_by=lambda thing: thing[:3]), prompts())
def test_the_colors_to_look_at_are_all_and_only_those_read(objects: list[Object], metadata: Metadata) -> None:
    found = scene(objects)
    blank = replace(found, colors=None)
    needed = objects_to_color(blank, metadata)
    looked = with_colors(blank, needed, [objects[i][3] or "" for i in needed])
    assert score_image(looked, metadata) == score_image(found, metadata)
    assert objects_to_color(looked, metadata).tolist() == needed.tolist()
    for i in range(len(needed)):
        rest = np.delete(needed, i)
        with pytest.raises(ValueError, match=f"color of object {needed[i]}"):
            score_image(with_colors(blank, rest, [objects[j][3] or "" for j in rest]), metadata)
