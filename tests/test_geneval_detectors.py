"""Detectors of GenEval on random models, against plain readings of the same outputs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_detectors
import torch
import torch.nn.functional as F
from tiny_detectors import CLASSES, LABELS, found, noise, pictures
from transformers.modeling_outputs import ModelOutput

from crd.errors import CRDError
from crd.geneval.detections import Thresholds
from crd.geneval.detectors import SCORE_FLOOR
from crd.geneval.detectors.base import boxes_of_masks, equal_size_batches
from crd.geneval.detectors.clip_color import TEMPLATES, CLIPColorClassifier, crop_object
from crd.geneval.detectors.mask2former import MAX_INSTANCES, Mask2FormerDetector, coco_labels, instances
from crd.geneval.detectors.open_vocabulary import OpenVocabularyDetector, without_duplicates
from crd.geneval.metadata import COCO_CLASSES, COLORS


@pytest.fixture(scope="module")
def mask2former(detector_folders: dict[str, Path]) -> Mask2FormerDetector:
    return Mask2FormerDetector(detector_folders["mask2former"], batch_size=2, short_side=64, long_side=96)


@pytest.fixture(scope="module")
def clip(detector_folders: dict[str, Path]) -> CLIPColorClassifier:
    return CLIPColorClassifier(detector_folders["clip"], batch_size=2)


@pytest.fixture(scope="module", params=["grounding-dino", "owlv2"])
def open_vocabulary(request: pytest.FixtureRequest, detector_folders: dict[str, Path]) -> OpenVocabularyDetector:
    return OpenVocabularyDetector(detector_folders[request.param], CLASSES, batch_size=2)


# --- what every detector does -----------------------------------------------------------------------------------------


def check_properties(detector: Mask2FormerDetector | OpenVocabularyDetector) -> None:
    images = pictures()
    together = detector.detect(images)
    assert len(together) == len(images)
    for image, objects in zip(images, together, strict=True):
        n, (width, height) = len(objects.labels), image.size
        assert n > 0
        assert set(objects.labels) <= set(detector.classes)
        assert objects.boxes.shape == (n, 4)
        assert objects.boxes.dtype == np.float64
        assert (objects.boxes >= 0).all()
        assert (objects.boxes <= (width, height, width, height)).all()
        assert (objects.boxes[:, :2] < objects.boxes[:, 2:]).all()
        assert objects.scores.dtype == np.float64
        assert ((objects.scores >= SCORE_FLOOR) & (objects.scores <= 1)).all()
        assert (np.diff(objects.scores) <= 0).all()
        if objects.masks is not None:
            assert objects.masks.shape == (n, height, width)
            assert objects.masks.any(axis=(1, 2)).all()
            np.testing.assert_array_equal(objects.boxes, boxes_of_masks(objects.masks))
    for image, objects in zip(images, together, strict=True):
        alone = detector.detect([image])[0]
        assert alone.labels == objects.labels
        np.testing.assert_allclose(alone.scores, objects.scores, atol=1e-4)
        # A pixel on the edge of a mask may fall on either side of it.
        np.testing.assert_allclose(alone.boxes, objects.boxes, atol=1 if objects.masks is not None else 1e-3)
        if objects.masks is not None and alone.masks is not None:
            assert (alone.masks == objects.masks).mean() > 0.999
    backward = detector.detect(images[::-1])[::-1]
    assert [objects.labels for objects in backward] == [objects.labels for objects in together]
    assert detector.detect([]) == []


def test_mask2former_properties(mask2former: Mask2FormerDetector) -> None:
    check_properties(mask2former)


def test_open_vocabulary_properties(open_vocabulary: OpenVocabularyDetector) -> None:
    check_properties(open_vocabulary)
    assert all(objects.masks is None for objects in open_vocabulary.detect(pictures()))


def test_the_floor_lies_below_the_published_thresholds() -> None:
    assert 0 < SCORE_FLOOR < Thresholds().confidence


def test_batches_hold_one_size_and_every_image_once() -> None:
    images = pictures()
    batches = list(equal_size_batches(images, 2))
    assert sorted(index for batch in batches for index in batch) == list(range(len(images)))
    assert all(len(batch) <= 2 and len({images[index].size for index in batch}) == 1 for batch in batches)


def test_boxes_end_after_the_last_pixel() -> None:
    masks = np.zeros((2, 5, 7), dtype=bool)
    masks[0, 3, 6] = True
    masks[1, 1:3, 0:4] = True
    np.testing.assert_array_equal(boxes_of_masks(masks), [[6, 3, 7, 4], [0, 1, 4, 3]])


# --- Mask2Former ------------------------------------------------------------------------------------------------------


def disc(height: int, width: int, center: tuple[float, float], radius: float, inside: float = 4.0) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.where((y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2, inside, -inside)


def class_logits(queries: Sequence[tuple[int, float]]) -> torch.Tensor:
    """(Q, 81): each query has one class with this probability, else "no object"."""
    probabilities = torch.full((len(queries), 81), 1e-9, dtype=torch.float64)
    for row, (label, probability) in enumerate(queries):
        probabilities[row, 80] = 1 - probability
        probabilities[row, label] = probability
    return probabilities.log()


def test_a_known_disc_gives_its_box_label_and_score() -> None:
    size = (48, 64)
    masks = torch.stack([disc(*size, (20.0, 30.0), 8.0), disc(*size, (20.0, 30.0), 4.0), disc(*size, (0.0, 0.0), 0.1)])
    logits = class_logits([(17, 0.8), (3, 0.9), (5, 0.99)])
    scores, labels, seen = instances(logits, masks, size, size, size)
    sure = 1 / (1 + math.exp(-4))
    assert labels.tolist() == [3, 17]  # the third has an empty mask
    torch.testing.assert_close(scores.double(), torch.tensor([0.9, 0.8]).double() * sure, atol=1e-5, rtol=0)
    assert torch.equal(seen, masks[[1, 0]] > 0)  # one does not cut the other
    np.testing.assert_array_equal(boxes_of_masks(seen.numpy())[1], [22, 12, 38, 28])


def test_padding_is_no_part_of_the_image() -> None:
    # The network saw 64 x 96, of which the upper left 48 x 80 is the image, itself 24 x 40.
    masks = disc(64, 96, (24.0, 40.0), 16.0)[None]
    _, _, seen = instances(class_logits([(0, 0.9)]), masks, (64, 96), (48, 80), (24, 40))
    np.testing.assert_array_equal(boxes_of_masks(seen.numpy()), [[12, 4, 28, 20]])


def test_instances_equal_a_plain_reading() -> None:
    torch.manual_seed(1)
    logits, masks = torch.randn(15, 81) * 4, torch.randn(15, 12, 14) * 3
    padded, resized, size = (96, 128), (90, 120), (45, 60)
    scores, labels, seen = instances(logits, masks, padded, resized, size)
    pairs = [(p.item(), q, c) for q, row in enumerate(logits.softmax(-1)) for c, p in enumerate(row[:80])]
    expected = []
    for probability, query, label in sorted(pairs, reverse=True)[:MAX_INSTANCES]:
        large = F.interpolate(masks[query][None, None], padded, mode="bilinear", align_corners=False)
        own = F.interpolate(large[:, :, : resized[0], : resized[1]], size, mode="bilinear", align_corners=False)[0, 0]
        certain = [value.sigmoid().item() for value in own[own > 0]]
        score = probability * sum(certain) / len(certain) if certain else 0.0
        if score >= SCORE_FLOOR:
            expected.append((score, label, own > 0))
    expected.sort(key=lambda one: -one[0])
    assert len(expected) > 10
    np.testing.assert_allclose(scores, [one[0] for one in expected], rtol=1e-5)
    assert labels.tolist() == [one[1] for one in expected]
    assert torch.equal(seen, torch.stack([one[2] for one in expected]))


def test_instances_equal_those_of_transformers_where_both_agree(mask2former: Mask2FormerDetector) -> None:
    # With masks at 384 x 384, an image of that size and 100 queries, nothing that transformers does otherwise shows.
    torch.manual_seed(2)
    logits, masks = torch.randn(100, 81) * 4, F.interpolate(torch.randn(1, 100, 9, 9) * 5, (384, 384), mode="bilinear")
    scores, labels, seen = instances(logits, masks[0], (384, 384), (384, 384), (384, 384))
    output = ModelOutput(class_queries_logits=logits[None], masks_queries_logits=masks)
    theirs = mask2former._processor.post_process_instance_segmentation(
        output, threshold=SCORE_FLOOR, target_sizes=[(384, 384)], return_binary_maps=True
    )[0]
    order = sorted(range(len(scores)), key=lambda i: -theirs["segments_info"][i]["score"])
    assert labels.tolist() == [theirs["segments_info"][i]["label_id"] for i in order]
    np.testing.assert_allclose(scores, [theirs["segments_info"][i]["score"] for i in order], atol=2e-6)
    assert torch.equal(seen, theirs["segmentation"][order].bool())


def test_nothing_to_see_is_no_objects() -> None:
    scores, labels, masks = instances(class_logits([(0, 0.01)]), torch.ones(1, 4, 4), (16, 16), (16, 16), (16, 16))
    assert (len(scores), len(labels), masks.shape) == (0, 0, (0, 16, 16))


def test_coco_names_become_the_benchmarks() -> None:
    assert coco_labels(LABELS, "a model") == COCO_CLASSES
    shuffled = [LABELS[index] for index in np.random.default_rng(0).permutation(80)]
    assert set(coco_labels(shuffled, "a model")) == set(COCO_CLASSES)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([*LABELS, "wall-other-merged"], "'wall-other-merged', no class of GenEval"),
        (
            [f"LABEL_{index}" for index in range(80)],
            "'LABEL_0', 'LABEL_1', 'LABEL_2', 'LABEL_3', 'LABEL_4' and 75 more",
        ),
        ([name for name in LABELS if name not in ("toaster", "sofa")], "no label for 'couch', 'toaster'"),
        ([*LABELS, "television"], "two labels for 'tv'"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels: list[str], message: str) -> None:
    with pytest.raises(CRDError, match=f"^a model has .*{message}") as caught:
        coco_labels(labels, "a model")
    assert "\n" not in str(caught.value)


def test_labels_are_checked_at_load(tmp_path: Path) -> None:
    with pytest.raises(CRDError, match="'oboe', no class of GenEval"):
        Mask2FormerDetector(tiny_detectors.save_mask2former(tmp_path, [*LABELS[:-1], "oboe"]))


def test_network_sees_the_benchmarks_resolution(
    detector_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The checkpoint's processor asks for squares of 384.
    detector = Mask2FormerDetector(detector_folders["mask2former"], short_side=60, long_side=100)
    shapes = []
    monkeypatch.setattr(detector._model, "forward", lambda pixel_values: shapes.append(pixel_values.shape) or 1 / 0)
    for width, height in ((512, 512), (512, 1024), (50, 40)):
        with pytest.raises(ZeroDivisionError):
            detector.detect([noise(width, height)])
    assert [tuple(shape[-2:]) for shape in shapes] == [(64, 64), (128, 64), (64, 96)]  # of 60, 100 x 50, 60 x 75


# --- open vocabulary --------------------------------------------------------------------------------------------------


def test_grounding_dino_scores_a_class_by_its_own_tokens(
    detector_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = OpenVocabularyDetector(detector_folders["grounding-dino"], CLASSES)
    # [CLS] bear . teddy bear . dog . [SEP]
    logits = torch.full((1, 4, 40), -torch.inf)
    logits[0, :, :9] = -4
    logits[0, 0, [1]] = 2.0  # a bear
    logits[0, 1, [3, 4]] = torch.tensor([3.0, 1.0])  # a teddy bear
    logits[0, 2, [1, 4]] = 1.0  # the "bear" of both: a bear
    logits[0, 3, [2, 5]] = 9.0  # periods are nobody's
    boxes = torch.tensor([[[0.25 + 0.15 * i, 0.5, 0.1, 0.2] for i in range(4)]])
    monkeypatch.setattr(detector._model, "forward", lambda **_: ModelOutput(logits=logits, pred_boxes=boxes))
    objects = detector.detect([noise(40, 20)])[0]

    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    expected = {
        "bear": [sigmoid(2), sigmoid(1)],
        "teddy bear": [(sigmoid(3) + sigmoid(1)) / 2],
    }
    for name, scores in expected.items():
        np.testing.assert_allclose(
            [s for s, label in zip(objects.scores, objects.labels, strict=True) if label == name], scores, rtol=1e-5
        )
    assert len(objects.labels) == 3
    best = objects.boxes[objects.labels.index("bear")]
    np.testing.assert_allclose(best, [0.2 * 40, 0.4 * 20, 0.3 * 40, 0.6 * 20], rtol=1e-5)


def test_owlv2_boxes_are_those_of_the_padded_square(
    detector_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = OpenVocabularyDetector(detector_folders["owlv2"], CLASSES)
    logits = torch.tensor([[[1.0, 2.0, -1.0], [-9.0, -9.0, -9.0], [0.0, -1.0, -2.0]]])
    boxes = torch.tensor([[[0.3, 0.2, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2], [0.5, 0.8, 0.2, 0.2]]])
    monkeypatch.setattr(detector._model, "forward", lambda **_: ModelOutput(logits=logits, pred_boxes=boxes))
    objects = detector.detect([noise(100, 50)])[0]
    assert objects.labels == ("teddy bear",)  # the second is below the floor, the third lies in the padding
    np.testing.assert_allclose(objects.boxes, [[20, 10, 40, 30]], rtol=1e-5)
    np.testing.assert_allclose(objects.scores, [1 / (1 + math.exp(-2))], rtol=1e-6)


def test_open_vocabulary_equals_the_models_own_post_processing(open_vocabulary: OpenVocabularyDetector) -> None:
    # One class of one token, and everything kept: then both libraries' readings are the same.
    image = noise(48, 40)
    single = OpenVocabularyDetector(open_vocabulary._model.config._name_or_path, ("dog",), overlap=1)
    tokens = {name: ids.clone() for name, ids in single._tokens.items()}
    pixels = single._processor(images=[image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = single._model(pixel_values=pixels, **tokens)
    if single._grounding:
        output.logits[..., [0, 2, 3]] = -torch.inf  # theirs is the best of all tokens, ours that of the class
        scores = output.logits.sigmoid().amax(-1)[0]
        center, size = output.pred_boxes[0].split(2, dim=-1)
        boxes = torch.cat([center - size / 2, center + size / 2], -1) * torch.tensor([48, 40, 48, 40])
    else:
        theirs = single._processor.post_process_object_detection(output, threshold=0.0, target_sizes=[(40, 48)])[0]
        scores, boxes = theirs["scores"], theirs["boxes"]
    boxes = boxes.numpy().clip(0, (48, 40, 48, 40))
    visible = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (scores.numpy() >= SCORE_FLOOR)
    order = np.argsort(-scores.numpy()[visible], kind="stable")
    objects = single.detect([image])[0]
    np.testing.assert_allclose(objects.scores, scores.numpy()[visible][order], rtol=1e-5)
    np.testing.assert_allclose(objects.boxes, boxes[visible][order], atol=1e-4)


def test_duplicates_go_and_neighbors_and_other_classes_stay() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [8, 0, 18, 10], [0, 0, 10, 8]], dtype=float)
    labels = np.array([0, 0, 1, 0, 0])
    assert without_duplicates(boxes, labels, 0.7).tolist() == [0, 2, 3]
    assert without_duplicates(boxes, labels, 0.85).tolist() == [0, 2, 3, 4]
    assert without_duplicates(boxes[:0], labels[:0], 0.7).tolist() == []


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((), "classes must be a list of names"),
        ("dog", "classes must be a list of names"),
        (("dog", "st. bernard"), r"without \. and \?, got 'st\. bernard'"),
        (("dog", "Dog"), "'dog' is named twice"),
        (tuple(f"dog {letter}" for letter in "abcdefghijklmnopqrst"), "20 classes take 62 tokens, the model reads 40"),
    ],
)
def test_classes_that_cannot_be_looked_for(
    detector_folders: dict[str, Path], classes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(CRDError, match=message):
        OpenVocabularyDetector(detector_folders["grounding-dino"], classes)


def test_owlv2_names_the_class_that_is_too_long(detector_folders: dict[str, Path]) -> None:
    long = "a" * 30  # the tokenizer of these tests makes a token of each letter
    with pytest.raises(CRDError, match=f"'{long}' takes [0-9]+ tokens, the model reads 32; shorten it"):
        OpenVocabularyDetector(detector_folders["owlv2"], ("dog", long))


# --- colors -----------------------------------------------------------------------------------------------------------


def test_color_embeddings_are_normalized_averaged_and_normalized(clip: CLIPColorClassifier) -> None:
    tokenizer, model = clip._tokenizer, clip._model
    assert TEMPLATES[1].format(color="red", name="dog") == "a photo of a red-colored dog"
    expected = []
    for color in COLORS:
        mean = torch.zeros(16)
        for text in (f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"):
            tokens = tokenizer([text], return_tensors="pt")
            with torch.no_grad():
                embedding = model.text_projection(model.text_model(input_ids=tokens["input_ids"]).pooler_output)[0]
            mean += embedding / embedding.norm() / 3
        expected.append(mean / mean.norm())
    torch.testing.assert_close(clip.color_embeddings("dog"), torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert clip.color_embeddings("dog") is clip.color_embeddings("dog")


def test_colors_are_the_nearest_text_in_any_batching(
    clip: CLIPColorClassifier, detector_folders: dict[str, Path]
) -> None:
    images = pictures()
    objects = [found(("dog", "bear", "dog")) for _ in images]
    rows = [[0, 2], [], [1], [2, 1, 0], [0]]
    answers = clip.classify(images, objects, rows)
    assert [len(names) for names in answers] == [2, 0, 1, 3, 1]
    for image, objects_of, wanted, names in zip(images, objects, rows, answers, strict=True):
        for row, name in zip(wanted, names, strict=True):
            embedding = clip.image_embeddings([crop_object(image, objects_of, row)])[0]
            similar = clip.color_embeddings(objects_of.labels[row]) @ embedding
            assert name == COLORS[int(similar.argmax())]
    assert CLIPColorClassifier(detector_folders["clip"], batch_size=64).classify(images, objects, rows) == answers


@pytest.mark.parametrize("color", ["green", "white"])
def test_an_image_that_embeds_as_a_color_has_it(detector_folders: dict[str, Path], color: str) -> None:
    clip = CLIPColorClassifier(detector_folders["clip"])
    target = clip.color_embeddings("dog")[COLORS.index(color)]
    with torch.no_grad():  # every image's embedding is that of the color
        clip._model.vision_model.post_layernorm.weight.zero_()
        clip._model.vision_model.post_layernorm.bias.fill_(1 / 16)
        clip._model.visual_projection.weight.copy_(target[:, None].expand(-1, 16))
    assert clip.classify(pictures()[:1], [found(("dog", "dog"))], [[1, 0]]) == [[color, color]]


def test_crop_is_gray_outside_the_mask_and_untouched_inside() -> None:
    image = noise(40, 30)
    masks = np.zeros((1, 30, 40), dtype=bool)
    masks[0, 6:20, 8:18] = True
    crop = crop_object(image, found(masks=masks), 0)
    assert crop.size == (16, 20)  # the box, x 4 to 20, y 4 to 24
    pixels, original = np.asarray(crop), np.asarray(image)[4:24, 4:20]
    inside = masks[0, 4:24, 4:20]
    assert (pixels[~inside] == 0x99).all()
    np.testing.assert_array_equal(pixels[inside], original[inside])
    np.testing.assert_array_equal(np.asarray(crop_object(image, found(), 0)), original)


@pytest.mark.parametrize(
    ("box", "size"), [((3.2, 4.0, 3.4, 9.0), (1, 5)), ((39.9, 29.9, 40, 30), (1, 1)), ((-2.0, 0, 5.0, 80), (5, 30))]
)
def test_crop_has_a_pixel_and_stays_inside(box: tuple[float, ...], size: tuple[int, int]) -> None:
    objects = replace(found(), boxes=np.array([box]))
    assert crop_object(noise(40, 30), objects, 0).size == size


@pytest.mark.parametrize("size", [(1, 1), (3, 17), (17, 3), (1, 60)])
def test_thin_crops_are_read(clip: CLIPColorClassifier, size: tuple[int, int]) -> None:
    # Three rows of pixels look like three channels.
    assert clip.image_embeddings([noise(*size)]).shape == (1, 16)


def test_masks_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"image's size \(30, 40\), got \(40, 30\)"):
        crop_object(noise(40, 30), found(masks=np.ones((1, 40, 30), dtype=bool)), 0)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_bfloat16_sees_much_the_same(detector_folders: dict[str, Path]) -> None:
    image, folder = noise(48, 40), detector_folders["mask2former"]
    exact, rough = (
        Mask2FormerDetector(folder, short_side=64, long_side=96, dtype=dtype).detect([image])[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rough.scores.dtype == np.float64
    assert abs(exact.scores[0] - rough.scores[0]) < 0.1


def test_loading_failures_are_one_line(detector_folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CRDError, match=r"no model at .*nowhere; give a folder in transformers format or a hub id"):
        Mask2FormerDetector(tmp_path / "nowhere")
    with pytest.raises(CRDError, match=r"mask2former detector needs a model of type mask2former, got .* of type clip"):
        Mask2FormerDetector(detector_folders["clip"])
    with pytest.raises(CRDError, match=r"type grounding-dino or owlv2, got .* of type mask2former"):
        OpenVocabularyDetector(detector_folders["mask2former"], CLASSES)
    with pytest.raises(CRDError, match=r"color classifier needs a model of type clip, got .* of type owlv2"):
        CLIPColorClassifier(detector_folders["owlv2"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(CRDError, match=r"cannot load .*damaged or incomplete") as caught:
        CLIPColorClassifier(tmp_path)
    assert "\n" not in str(caught.value)


def test_without_scipy_the_extra_is_named(detector_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crd.geneval.detectors.loading.importlib.util.find_spec", lambda name: None)
    with pytest.raises(CRDError, match=r'Mask2Former needs scipy; pip install -e "\.\[geneval\]"'):
        Mask2FormerDetector(detector_folders["mask2former"])
    with pytest.raises(CRDError, match=r'OWLv2 needs scipy; pip install -e "\.\[geneval\]"'):
        OpenVocabularyDetector(detector_folders["owlv2"], CLASSES)


def test_missing_weights_are_not_made_up(detector_folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in detector_folders["clip"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CRDError, match=r"lacks 1 weights, visual_projection\.weight"):
        CLIPColorClassifier(tmp_path)
