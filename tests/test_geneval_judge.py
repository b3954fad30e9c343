"""The judge of GenEval, and how it is made of names, files and settings."""

from __future__ import annotations

import importlib
import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detectors import CLASSES, SIZES, found, noise, pictures

from crd.errors import CRDError
from crd.geneval.detections import PUBLISHED, Detections, Thresholds
from crd.geneval.detectors import DETECTORS, JudgeConfig, judge_scope, judge_settings, load_judge
from crd.geneval.detectors.clip_color import CLIPColorClassifier
from crd.geneval.detectors.mask2former import Mask2FormerDetector
from crd.geneval.detectors.open_vocabulary import OpenVocabularyDetector
from crd.geneval.judge import CHUNK, NOTHING, GenEvalJudge
from crd.geneval.metadata import COCO_CLASSES, Exclude, Include, Metadata
from crd.tiny.detector import SceneDetector

PLAIN = Metadata("single_object", "a dog", (Include("dog", 1),))
GREEN = Metadata("colors", "a green dog", (Include("dog", 1, color="green"),))


class Scripted:
    """A detector that finds what it is told, in order."""

    classes, batch_size, picture_side = ("dog", "bear"), 8, None

    def __init__(self, answers: Sequence[Detections], gives_colors: bool = False) -> None:
        self.answers, self.gives_colors = list(answers), gives_colors

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        assert len(images) == len(self.answers)
        return self.answers


class Everywhere(Scripted):
    """A detector that finds a dog in every image, with a mask; the masks it gave before must be gone."""

    batch_size = 2

    def __init__(self) -> None:
        super().__init__([])
        self.chunks, self.masks = [], []

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        assert not any(mask() is not None for mask in self.masks)
        self.chunks.append(len(images))
        answers = [found(masks=np.ones((1, image.height, image.width), dtype=bool)) for image in images]
        self.masks += [weakref.ref(answer.masks) for answer in answers]
        return answers


class Sampled(Scripted):
    """A detector that brings a sample, and finds `answers` in it after nothing in a gray picture."""

    def samples(self) -> list[tuple[Image.Image, Metadata]]:
        return [(noise(8, 8), PLAIN)]

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        return [found(())] if images[0] is NOTHING else self.answers


class Named:
    """A classifier that calls everything `color` and keeps what it was asked."""

    def __init__(self, color: str) -> None:
        self.color, self.asked = color, []

    def classify(
        self, images: Sequence[Image.Image], detections: Sequence[Detections], indices: Sequence[Sequence[int]]
    ) -> list[list[str]]:
        self.asked.append([list(rows) for rows in indices])
        return [[self.color] * len(rows) for rows in indices]


class Masked(Named):
    """Likewise, of objects with masks."""

    def classify(
        self, images: Sequence[Image.Image], detections: Sequence[Detections], indices: Sequence[Sequence[int]]
    ) -> list[list[str]]:
        for image, objects in zip(images, detections, strict=True):
            assert objects.masks is not None
            assert objects.masks.shape[1:] == (image.height, image.width)
        return super().classify(images, detections, indices)


# --- judging ----------------------------------------------------------------------------------------------------------


def test_judge_colors_only_what_the_scores_read() -> None:
    objects = [found(("dog",)), found(("bear", "dog")), found(("bear",))]
    classifier = Named("green")
    judged, scores = GenEvalJudge(Scripted(objects), classifier).judge(pictures()[:3], [PLAIN, GREEN, GREEN])
    assert classifier.asked == [[[], [1], []]]
    assert [d.colors for d in judged] == [None, (None, "green"), None]
    assert scores.official.tolist() == [1, 1, 0]
    assert scores.reasons[2] == ("dog: expected 1, found 0",)
    _, wrong = GenEvalJudge(Scripted(objects), Named("red")).judge(pictures()[:3], [PLAIN, GREEN, GREEN])
    assert wrong.official.tolist() == [1, 0, 0]


def test_a_detector_that_names_colors_needs_no_classifier() -> None:
    objects = [replace(found(), colors=("green",))]
    judged, scores = GenEvalJudge(Scripted(objects, gives_colors=True)).judge(pictures()[:1], [GREEN])
    assert judged[0].colors == ("green",)
    assert scores.official.tolist() == [1]


def test_masks_are_in_memory_for_a_few_batches_only() -> None:
    detector, steps = Everywhere(), []
    images = [noise(20, 30, seed) for seed in range(21)]
    judge = GenEvalJudge(detector, Masked("green"))
    judged, scores = judge.judge(images, [GREEN, PLAIN, GREEN] * 7, lambda *step: steps.append(step))
    assert detector.chunks == [2 * CHUNK, 2 * CHUNK, 5]
    assert steps == [(8, 21), (16, 21), (21, 21)]
    assert not any(mask() is not None for mask in detector.masks)
    assert all(objects.masks is None for objects in judged)
    assert [objects.colors for objects in judged] == [("green",), None, ("green",)] * 7
    assert scores.official.tolist() == [1] * 21


def test_prompts_that_cannot_be_judged_are_refused_before_any_image() -> None:
    judge = GenEvalJudge(Scripted([found()]))
    judge.scope.check([PLAIN])
    with pytest.raises(CRDError, match="'a green dog' asks for a color and this judge names none"):
        judge.scope.check([PLAIN, GREEN])
    cat = Metadata("single_object", "a cat", (Include("cat", 1),))
    no_cat = Metadata("counting", "a dog", (Include("dog", 1),), (Exclude("cat", 1),))
    for metadata in (cat, no_cat):
        with pytest.raises(CRDError, match="about 'cat', which the detector does not know; its classes: dog, bear"):
            judge.judge(pictures()[:1], [metadata])
    many = Metadata("counting", "17 dogs", (Include("dog", 17),))
    with pytest.raises(CRDError, match="raise max_objects"):
        judge.scope.check([many])
    with pytest.raises(ValueError, match="one for each of the 2 images, got 1"):
        judge.judge(pictures()[:2], [PLAIN])
    with pytest.raises(CRDError, match=r"^confidence must be at least 0\.05, .*, got 0\.01"):
        GenEvalJudge(Scripted([]), thresholds=Thresholds(confidence=0.01))


def test_self_test() -> None:
    GenEvalJudge(Scripted([found(("bear",))])).self_test()
    # Two dogs score 0 where one is asked for, and are still two too many.
    for ghosts in (("dog",), ("dog", "dog")):
        with pytest.raises(CRDError, match="the detector finds 'dog' in an empty gray picture; check its weights"):
            GenEvalJudge(Scripted([found(ghosts)])).self_test()
    GenEvalJudge(Sampled([found()])).self_test()
    with pytest.raises(CRDError, match=r"scores its own samples 0\.00 on average, at least 0\.9 is expected"):
        GenEvalJudge(Sampled([found(("bear",))])).self_test()


# --- settings ---------------------------------------------------------------------------------------------------------


def test_load_judge_builds_the_pair(detector_folders: dict[str, Path]) -> None:
    models = {"model": str(detector_folders["mask2former"]), "color_model": str(detector_folders["clip"])}
    judge = load_judge({**models, "batch_size": 2, "thresholds": {"confidence": 0.2}})
    assert isinstance(judge.detector, Mask2FormerDetector)
    assert isinstance(judge.colors, CLIPColorClassifier)
    assert judge.detector.batch_size == judge.colors.batch_size == 2
    assert judge.scope.thresholds == Thresholds(confidence=0.2)
    plain = load_judge(models)
    assert plain.scope.thresholds == PUBLISHED
    assert plain.detector.batch_size == plain.colors.batch_size == 8


def test_open_vocabulary_from_a_file(detector_folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "owl.yaml"
    path.write_text(
        f"detector: open-vocabulary\nmodel: {detector_folders['owlv2']}\nclasses: [bear, teddy bear, dog]\n"
        "color_model: null\nbatch_size: 2\nthresholds: {confidence: 0.2, counting_confidence: 0.4, position: 0.2}\n"
    )
    scope = judge_scope(judge_settings(str(path)))
    assert (scope.classes, scope.names_colors) == (CLASSES, False)
    judge = load_judge(str(path))
    assert isinstance(judge.detector, OpenVocabularyDetector)
    assert judge.scope == scope
    assert scope.thresholds == Thresholds(0.2, 0.4, position=0.2)
    judged, scores = judge.judge(pictures(), [PLAIN] * len(SIZES))
    assert len(judged) == len(SIZES)
    assert scores.soft.shape == (len(SIZES),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("detectr: mask2former", r"judge\.yaml: unknown judge setting 'detectr'; did you mean 'detector'\?"),
        ("detector: mask-former", r"judge\.yaml: unknown detector 'mask-former'.*did you mean 'mask2former'\?"),
        ("thresholds: {confidense: 0.5}", r"judge\.yaml: unknown threshold 'confidense'; did you mean 'confidence'\?"),
        ("thresholds: {confidence: high}", r"judge\.yaml: confidence must be from 0 to 1, got 'high'"),
        ("thresholds: {confidence: 0.01}", r"judge\.yaml: confidence must be at least 0\.05"),
        ("thresholds: {position: true}", r"judge\.yaml: position must be a finite number, 0 or more, got True"),
        ("thresholds: 0.5", r"judge\.yaml: thresholds of a judge must be Thresholds or none, got 0\.5"),
        ("model: 3", r"judge\.yaml: model of a judge must be str or none, got 3"),
        ("batch_size: 0", r"judge\.yaml: judge: batch_size must be an integer of 1 or more, got 0"),
        ("detector: tiny\nclasses: [cup]", r"judge\.yaml: the tiny detectors have fixed classes"),
        ("- mask2former", r"judge\.yaml must hold `key: value` lines, got list"),
        ("", r"judge\.yaml must hold `key: value` lines, got NoneType"),
        ("detector: [", r"judge\.yaml is not valid YAML"),
    ],
)
def test_files_that_do_not_fit(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "judge.yaml").write_text(text)
    with pytest.raises(CRDError, match=message) as caught:
        judge_settings(str(tmp_path / "judge.yaml"))
    assert "\n" not in str(caught.value)
    with pytest.raises(CRDError, match=r"no judge settings at .*nowhere\.yaml; give a \.yaml file or one of mask2"):
        judge_settings(str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("mask-former", r"unknown detector 'mask-former'; known: .*mask2former.*; did you mean 'mask2former'\?"),
        ("yolo", r"unknown detector 'yolo'; known: .*, or a \.yaml file$"),
        ({"detectr": "mask2former"}, r"unknown judge setting 'detectr'; did you mean 'detector'\?"),
        ({"detector": "mask2former", "classes": ["dog"]}, "knows the 80 classes of COCO only"),
        ({"detector": "mask2former", "classes": "dog"}, "classes of a judge must be tuple, got 'dog'"),
        ({"detector": "mask2former", "dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ("open-vocabulary", r"classes must be a list of names to look for, got \(\); list them in .*a \.yaml file"),
    ],
)
def test_judge_settings_that_do_not_fit(config: str | dict[str, object], message: str) -> None:
    if not isinstance(config, dict) or "dtype" not in config:  # of which only the model's own library knows
        with pytest.raises(CRDError, match=message):
            judge_settings(config)
    with pytest.raises(CRDError, match=message):
        load_judge(config)


@pytest.mark.parametrize("thresholds", [None, {}, {"confidence": 0.2}, {"counting_confidence": 0.4}])
def test_open_vocabulary_needs_thresholds_of_its_own(thresholds: dict[str, float] | None) -> None:
    settings = {"detector": "open-vocabulary", "classes": ["dog"], "thresholds": thresholds}
    with pytest.raises(CRDError, match="give thresholds of your own, with confidence and counting_confidence"):
        judge_settings(settings)
    with pytest.raises(CRDError, match="run lower than the published thresholds were made for"):
        load_judge(JudgeConfig("open-vocabulary", classes=("dog",)))


def test_every_registered_detector_can_be_built_from_settings() -> None:
    for name, path in DETECTORS.items():
        module, attribute = path.split(":")
        kind = getattr(importlib.import_module(module), attribute)
        assert callable(kind.from_config)
        settings = JudgeConfig(name, classes=() if kind.published_thresholds else CLASSES, thresholds=PUBLISHED)
        assert judge_scope(settings).classes == kind.classes_for(settings)
    assert judge_scope(JudgeConfig()).classes == COCO_CLASSES


# --- where it computes ------------------------------------------------------------------------------------------------


def test_device_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked: list[str] = []
    monkeypatch.setattr(SceneDetector, "__init__", lambda self, which, batch_size, device, folder: asked.append(device))
    load_judge("tiny", "cpu")
    load_judge("tiny")
    load_judge({"detector": "tiny", "device": "cpu"}, "cuda:1")
    assert asked == ["cpu", "cuda", "cpu"]


@pytest.mark.parametrize("device", ["gpu", "cuda:77"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(CRDError, match=f"loading the judge tiny on device {device} raised .*; check its settings"):
        load_judge({"detector": "tiny", "device": device})


def test_tiny_detectors_take_batch_size_and_folder(tmp_path: Path) -> None:
    judge = load_judge({"detector": "tiny", "batch_size": 3})
    assert judge.detector.batch_size == 3
    assert load_judge("tiny").detector.batch_size == 64
    (tmp_path / "judge.yaml").write_text(json.dumps({"detector": "tiny", "model": str(tmp_path)}))
    with pytest.raises(CRDError, match="no detector description at"):
        load_judge(str(tmp_path / "judge.yaml"))


# --- the whole of it --------------------------------------------------------------------------------------------------


def test_a_whole_judgment_with_real_networks(detector_folders: dict[str, Path]) -> None:
    detector = Mask2FormerDetector(detector_folders["mask2former"], batch_size=1, short_side=64, long_side=96)
    judge = GenEvalJudge(detector, CLIPColorClassifier(detector_folders["clip"]), Thresholds(confidence=0.06))
    images = pictures()
    assert len(images) > CHUNK
    wanted = [objects.labels[0] for objects in detector.detect(images)]
    prompts = [Metadata("colors", f"a red {name}", (Include(name, 1, color="red"),)) for name in wanted]
    judged, scores = judge.judge(images, prompts)
    assert all(d.colors is not None and len(set(d.colors) - {None}) == 1 for d in judged)
    right = ["red" in (d.colors or ()) for d in judged]
    assert scores.official.tolist() == right
