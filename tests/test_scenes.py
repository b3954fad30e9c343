"""Scenes of the bundled world: what is drawn is what the prompt asks for, and what the truth says."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from PIL import Image

from crd.errors import CRDError
from crd.geneval.metadata import COLORS, TASKS, Include, Metadata
from crd.geneval.scoring import score_batch, score_image
from crd.geneval.summary import summarise
from crd.tiny.objects import DRAWINGS, PALETTE, sprite
from crd.tiny.render import LEVELS, SIZE
from crd.tiny.scene_prompts import SCENE_CLASSES, pretraining_prompt, scene_prompts
from crd.tiny.scenes import GROUNDS, ObjectScene, ground_truth, render_scene, scene_for


def drawn(count: int, seed: int = 0) -> list[tuple[Metadata, ObjectScene]]:
    rng = np.random.default_rng(seed)
    return [(wanted, scene_for(wanted, rng)) for wanted in scene_prompts("test", count)]


def test_the_truth_of_a_scene_scores_one_in_all_six_tasks() -> None:
    pairs = drawn(300)
    scores = score_batch([ground_truth(scene) for _, scene in pairs], [wanted for wanted, _ in pairs])
    summary = summarise([wanted.tag for wanted, _ in pairs], scores)
    assert [(row.task, row.official, row.strict, row.soft) for row in summary.tasks] == [(t, 1, 1, 1) for t in TASKS]
    others = [wanted for wanted, _ in (*pairs[1:], pairs[0])]
    low = score_batch([ground_truth(scene) for _, scene in pairs], others)
    assert low.official.mean() < 0.05
    assert low.soft.mean() < 0.2


def test_objects_lie_inside_and_apart() -> None:
    for _, scene in drawn(200, seed=1):
        boxes = ground_truth(scene).boxes
        assert boxes.min() >= 1
        assert boxes.max() <= SIZE - 1
        for a, b in itertools.combinations(boxes, 2):
            assert max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= 1


def test_masks_fit_their_boxes_and_the_picture_shows_them() -> None:
    for _, scene in drawn(60, seed=2):
        truth, picture = ground_truth(scene), render_scene(scene).astype(int)
        bare = render_scene(ObjectScene((), scene.ground, scene.pattern, scene.texture_seed)).astype(int)
        assert truth.masks is not None
        for box, mask in zip(truth.boxes.astype(int), truth.masks, strict=True):
            inside = np.zeros_like(mask)
            inside[box[1] : box[3], box[0] : box[2]] = True
            assert not (mask & ~inside).any()
            assert 0.2 < mask.sum() / inside.sum() <= 1
        anywhere = np.zeros((SIZE, SIZE), bool)
        for box in truth.boxes.astype(int):
            anywhere[box[1] : box[3], box[0] : box[2]] = True
        assert (picture == bare).all(axis=-1)[~anywhere].all()
        assert (abs(picture - bare).sum(-1) > 20)[truth.masks.any(0)].mean() > 0.5  # white on snow differs little


def test_scenes_follow_from_the_seed() -> None:
    assert drawn(20, seed=3) == drawn(20, seed=3) != drawn(20, seed=4)
    scene = drawn(1)[0][1]
    assert (render_scene(scene) == render_scene(scene)).all()


@pytest.mark.parametrize("roam", [1.0, 0.2])
def test_objects_that_do_not_fit_are_refused(roam: float) -> None:
    crowd = Metadata("counting", "fourteen cups", (Include("cup", 14),))
    with pytest.raises(CRDError, match=r"the 14 objects of the prompt 'fourteen cups' do not fit .* ask for fewer"):
        scene_for(crowd, np.random.default_rng(0), roam)


def test_pictures_of_known_seeds_stay_as_they_are() -> None:
    rng, above = np.random.default_rng(11), Include("car", 1, "red", ("above", 0))
    asked = [(Include("cup", 5),), (Include("boat", 1), above), (Include("kite", 1, "blue"), Include("clock", 3))]
    scenes = [scene_for(Metadata("free", "", include), rng) for include in asked * 10]
    assert hashlib.sha256(repr(scenes).encode()).hexdigest()[:16] == "05cd7146030a8eab"


def test_every_class_has_a_drawing_and_every_color_a_paint() -> None:
    assert tuple(DRAWINGS) == SCENE_CLASSES
    assert tuple(PALETTE) == COLORS
    # The nearest paint to an object's mean body color is its own: colors can be told apart by pixels alone.
    for class_name, (color, paint) in itertools.product(SCENE_CLASSES, PALETTE.items()):
        picture = sprite(class_name, color, 24)
        solid = picture[picture[..., 3] > 0.99][:, :3]
        near = np.abs(solid - np.array(paint)).sum(-1) < 12
        assert near.mean() > 0.25, (class_name, color)


def test_drawings_differ_by_more_than_their_proportions() -> None:
    outlines = {}
    for class_name in SCENE_CLASSES:
        alpha = Image.fromarray((sprite(class_name, "red", 24)[..., 3] * 255).astype(np.uint8))
        outlines[class_name] = np.asarray(alpha.resize((24, 24), Image.Resampling.BILINEAR)) / 255
    for (one, a), (other, b) in itertools.combinations(outlines.items(), 2):
        assert np.abs(a - b).mean() > 0.05, (one, other)


def test_grounds_are_not_objects() -> None:
    for ground, paint in itertools.product(GROUNDS, PALETTE.values()):
        assert min(np.abs(np.subtract(shade, paint)).sum() for shade in ground) > 50


def test_the_lowest_level_is_one_object_near_the_middle() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted = pretraining_prompt(rng, LEVELS[0].tasks)
        (box,) = ground_truth(scene_for(wanted, rng, LEVELS[0].roam)).boxes
        assert np.abs((box[:2] + box[2:]) / 2 - SIZE / 2).max() <= 6
        (box,) = ground_truth(scene_for(wanted, rng, 0.0)).boxes
        assert np.abs((box[:2] + box[2:]) / 2 - SIZE / 2).max() <= 0.5
    assert {pretraining_prompt(rng, LEVELS[-1].tasks).tag for _ in range(100)} == set(TASKS)


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_a_drawn_relation_holds_with_room_to_spare(relation: str) -> None:
    rng = np.random.default_rng(5)
    asked = [m for m in scene_prompts("test", 240) if m.tag == "position" and m.include[1].position == (relation, 0)]
    assert asked
    for wanted in asked:
        truth = ground_truth(scene_for(wanted, rng))
        assert score_image(truth, wanted).official == 1
        away = truth.boxes + np.array([2.0, -2.0, 2.0, -2.0]) * np.arange(2)[:, None]
        assert score_image(type(truth)(truth.labels, away, truth.scores, None, truth.colors), wanted).official == 1
