"""The bundled world's detectors: what they find, what they decode, and that their training resumes exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from crd.errors import CRDError
from crd.geneval.detections import Detections
from crd.geneval.metadata import COLORS
from crd.tiny.detector import FOLDER, SceneDetector, decode, iou, load_detector, save_detector, to_boxes
from crd.tiny.detector_card import found_objects, fresh_scenes, images_per_second, judged_drawings
from crd.tiny.detector_data import DISTURBANCES, IGNORED, Objects, disturb, draw_pictures, targets
from crd.tiny.detector_networks import ARCHITECTURES, CELLS, CHANNELS, PARTS, build_network
from crd.tiny.scene_prompts import SCENE_CLASSES
from crd.tiny.train_detector import detector_loss, main

NAMES = tuple(ARCHITECTURES)


@pytest.mark.parametrize("which", NAMES)
def test_fresh_scenes(which: str) -> None:
    detector = SceneDetector(which)
    pictures, truth = fresh_scenes(200)
    detected = detector.detect(pictures)
    found = found_objects(detected, truth, 0.3)
    assert min(found.precision, found.recall, found.color) >= 0.97
    assert found_objects(detected, truth, 0.9).recall >= 0.95
    assert (FOLDER / f"{which}.safetensors").stat().st_size <= 4e6


def test_drawings_score_high_by_the_detector_and_those_of_other_prompts_low() -> None:
    detector = SceneDetector("conv")
    for row in judged_drawings(detector, 180).tasks:
        assert row.soft >= 0.95, row
    assert judged_drawings(detector, 180, other=True).overall.soft < 0.25


def left_to_right(found: Detections) -> Detections:
    """The objects that count, in an order that near-equal scores do not change."""
    sure = found.select(np.flatnonzero(found.scores > 0.3))
    return sure.select(np.argsort(sure.boxes[:, 0]))


@pytest.mark.parametrize("which", NAMES)
def test_company_changes_nothing_and_sizes_scale(which: str) -> None:
    detector, (pictures, _) = SceneDetector(which, batch_size=3), fresh_scenes(24)
    compared = 0
    together = detector.detect(pictures)
    for picture, here in zip(pictures, together, strict=True):
        (alone,) = detector.detect([picture])
        assert alone.labels == here.labels
        np.testing.assert_allclose(alone.boxes, here.boxes, atol=1e-3)
        np.testing.assert_allclose(alone.scores, here.scores, atol=1e-4)
        double = picture.resize((128, 64), Image.Resampling.NEAREST)
        (wide,) = detector.detect([double])
        # Shrinking the picture again may tip a doubtful object over the line; those that count are the same.
        one, two = left_to_right(alone), left_to_right(wide)
        if one.labels == two.labels:
            compared += 1
            np.testing.assert_allclose(two.boxes, one.boxes * [2, 1, 2, 1], atol=3)
    assert compared >= 20


@pytest.mark.parametrize("which", NAMES)
def test_plain_pictures_hold_nothing(which: str) -> None:
    plain = [Image.new("RGB", (64, 64), (shade, shade, 128)) for shade in range(0, 256, 32)]
    assert all(not (found.scores > 0.3).any() for found in SceneDetector(which).detect(plain))
    assert SceneDetector(which).detect([]) == []


def test_decode_hand_worked() -> None:
    predictions = torch.full((2, CHANNELS, CELLS, CELLS), -10.0)
    predictions[:, PARTS[0] : PARTS[0] + 4] = 0.0
    cup, red = SCENE_CLASSES.index("cup"), PARTS[0] + 4 + COLORS.index("red")
    # Picture 0, cell row 4, column 9: center (4 * 9.5, 4 * 4.5) = (38, 18); a raw 0.5 moves it by 2 px; sides 16.
    predictions[0, cup, 4, 9] = 3.0
    predictions[0, PARTS[0], 4, 9] = 0.5
    predictions[0, red, 4, 9] = 5.0
    predictions[0, cup, 4, 10] = 2.0  # a neighbouring cell that is less sure
    predictions[0, cup, 4, 7] = 1.0  # two cells on: its box overlaps by (16 - 10) / (16 + 10): another object
    predictions[0, cup, 6, 9] = 2.5  # box 2 px left and 8 px down: IoU 14 * 8 / (512 - 112) = 0.28, another object
    first, second = decode(predictions)
    assert second.labels == ()
    assert first.labels == ("cup", "cup", "cup")
    assert first.colors is not None
    assert first.colors[0] == "red"
    np.testing.assert_allclose(first.boxes[0], [32, 10, 48, 26])
    np.testing.assert_allclose(first.scores, torch.tensor([3.0, 2.5, 1.0]).sigmoid(), atol=1e-6)
    predictions[0, PARTS[0], 4, 7] = 2.0  # its center moves by 8 px to (38, 18): IoU 14 / 18, the same place
    assert decode(predictions)[0].labels == ("cup", "cup")


def test_boxes_and_iou() -> None:
    raw = torch.zeros(1, 4, CELLS, CELLS)
    raw[0, 2, 0, 0] = torch.log(torch.tensor(2.0))
    assert to_boxes(raw)[0, 0].tolist() == pytest.approx([2 - 16, 2 - 8, 2 + 16, 2 + 8])
    a, b = torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[2.0, 0, 6, 4], [4.0, 0, 8, 4]])
    assert iou(a, b).tolist() == [pytest.approx([8 / 24, 0])]


def test_targets_hand_worked() -> None:
    # Center (10, 6): cell row 1, column 2. Its eight neighbours know box and color and may or may not name the class.
    objects = Objects(torch.tensor([1]), torch.tensor([3]), torch.tensor([4]), torch.tensor([[4.0, 2.0, 16.0, 10.0]]))
    wanted = targets(objects, 2)
    assert not wanted.near[0].any()
    assert wanted.near[1].nonzero().tolist() == [[y, x] for y in range(3) for x in range(1, 4)]
    assert wanted.classes[1, 3, 1, 2] == 1
    assert (wanted.classes[1, 3] == IGNORED).sum() == 8
    assert (wanted.classes[1].sum(), (wanted.classes[1] != 0).sum()) == (1 - 8, 9)
    assert wanted.boxes[1, :, 0, 1].tolist() == [4, 2, 16, 10]
    assert wanted.colors[1, 1, 2] == 4


def test_loss_is_least_where_the_answer_is_right() -> None:
    objects = Objects(torch.tensor([0]), torch.tensor([3]), torch.tensor([4]), torch.tensor([[4.0, 2.0, 20.0, 18.0]]))
    wanted = targets(objects, 1)
    right = torch.full((1, CHANNELS, CELLS, CELLS), -12.0)
    right[:, PARTS[0] : PARTS[0] + 4] = 0
    for y, x in wanted.near[0].nonzero().tolist():  # center (12, 10) from the center of each cell, in cells of 4 px
        right[0, PARTS[0] : PARTS[0] + 2, y, x] = torch.tensor([12 / 4 - x - 0.5, 10 / 4 - y - 0.5])
    right[0, 3, 2, 3] = 12.0
    right[0, PARTS[0] + 4 + 4] = 12.0
    losses = detector_loss(right, wanted)
    assert sum(losses.values()).item() < 0.05
    changes = ((3, "class", -14.0), (PARTS[0] + 2, "box", -1.5), (PARTS[0] + 4 + 5, "color", 20.0))
    for channel, name, change in changes:
        worse = right.clone()
        worse[0, channel] += change
        assert detector_loss(worse, wanted)[name] > losses[name] + 0.01, name


def test_disturbed_boxes_follow_the_objects() -> None:
    rng, generator = np.random.default_rng(3), torch.Generator().manual_seed(0)
    images, objects = draw_pictures(rng, 16)
    moved, there = disturb(images, objects, DISTURBANCES["rough"], None, generator)
    assert moved.shape == images.shape
    assert (moved.abs() <= 1).all()
    assert not torch.equal(there.boxes, objects.boxes)
    # A white square at the place of an object is found again where its box went.
    for row in range(len(objects.picture)):
        x0, y0, x1, y1 = objects.boxes[row].int().tolist()
        square = torch.full((16, 3, 64, 64), -1.0)
        square[objects.picture[row], :, y0:y1, x0:x1] = 1.0
        after, to = disturb(square, objects, DISTURBANCES["rough"], None, torch.Generator().manual_seed(row))
        bright = (after[objects.picture[row]].mean(0) > 0).nonzero().float()
        low, high = bright.amin(0).flip(0), bright.amax(0).flip(0) + 1
        torch.testing.assert_close(torch.cat([low, high]), to.boxes[row].clamp(0, 64), atol=1.6, rtol=0)


@pytest.mark.parametrize("which", NAMES)
def test_fragments_and_words_are_nothing(which: str) -> None:
    # A quarter of these pictures holds an object of which a part is erased, a tenth holds none.
    images, objects = draw_pictures(np.random.default_rng(5), 300)
    pictures = [Image.fromarray(image) for image in ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()]
    counts = [int((found.scores > 0.3).sum()) for found in SceneDetector(which).detect(pictures)]
    expected = torch.bincount(objects.picture, minlength=300).tolist()
    assert np.mean(np.equal(counts, expected)) >= 0.95


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_detector(build_network("conv"), "conv", tmp_path)
    assert load_detector("conv", tmp_path).training is False
    with pytest.raises(CRDError, match=r"no detector description at .*transformer.json"):
        load_detector("transformer", tmp_path)
    with pytest.raises(CRDError, match="the detector must be one of conv, transformer, got 'yolo'"):
        load_detector("yolo", tmp_path)
    about = json.loads((tmp_path / "conv.json").read_text())
    (tmp_path / "conv.json").write_text(json.dumps({**about, "classes": about["classes"][::-1]}))
    with pytest.raises(CRDError, match="classes must be"):
        load_detector("conv", tmp_path)
    (tmp_path / "conv.json").write_text(json.dumps(about))
    data = (tmp_path / "conv.safetensors").read_bytes()
    (tmp_path / "conv.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CRDError, match="do not fit the conv network"):
        load_detector("conv", tmp_path)


def test_training_resumes_exactly(tmp_path: Path) -> None:
    common = ["--batch", "8", "--save-every", "16", "--images"]
    main([*common, "32", "--work", str(tmp_path / "a"), "--out", str(tmp_path / "a")])
    # Interrupted: the second half belongs to a run of the same length.
    main([*common, "32", "--work", str(tmp_path / "b"), "--out", str(tmp_path / "b"), "--stop-at", "16"])
    assert not (tmp_path / "b" / "conv.safetensors").exists()
    main([*common, "32", "--work", str(tmp_path / "b"), "--out", str(tmp_path / "b")])
    one, two = load_file(tmp_path / "a" / "conv.safetensors"), load_file(tmp_path / "b" / "conv.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("which", NAMES)
def test_hundreds_of_images_a_second(which: str) -> None:
    assert images_per_second(SceneDetector(which), fresh_scenes(512)[0]) >= 200
