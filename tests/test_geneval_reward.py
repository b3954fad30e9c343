"""The GenEval rewards: on the bundled world, and with random detectors of the real kinds."""

from __future__ import annotations

import io
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from test_geneval_judge import Scripted
from tiny_detectors import found, noise

from crd.data import PromptDataset, load_prompts
from crd.errors import CRDError
from crd.geneval.detections import Detections
from crd.geneval.judge import GenEvalJudge
from crd.geneval.metadata import parse_columns
from crd.geneval.shared import SharedJudge, shared_judge
from crd.rewards import RewardSet
from crd.rewards.geneval import BLIND_AFTER, GenEvalReward, TinyGenEvalReward
from crd.tiny.scenes import render_scene, scene_for

REWARDS = ["geneval-tiny", "geneval-tiny-official"]


@pytest.fixture(scope="module")
def drawn() -> tuple[PromptDataset, list[Image.Image]]:
    """Held-out prompts and a picture of each that shows just what it asks for."""
    dataset, rng = load_prompts("scenes:test:48"), np.random.default_rng(7)
    wanted = parse_columns(dataset.prompts, dataset.columns)
    return dataset, [Image.fromarray(render_scene(scene_for(metadata, rng))) for metadata in wanted]


def test_drawn_scenes_score_high_and_those_of_other_prompts_low(drawn: tuple[PromptDataset, list[Image.Image]]) -> None:
    dataset, pictures = drawn
    rewards = RewardSet(REWARDS, [1.0, 0.0])
    rewards.check_prompts(dataset.prompts, dataset.columns)
    rewards.self_test()
    right = rewards.score(pictures, dataset.prompts, dataset.columns)
    assert right.total.mean() > 0.95
    assert right.columns["geneval-tiny-official"].mean() > 0.9
    wrong = rewards.score(pictures[1:] + pictures[:1], dataset.prompts, dataset.columns)
    assert wrong.total.mean() < 0.3


def test_rewards_of_one_judge_share_a_detection(
    drawn: tuple[PromptDataset, list[Image.Image]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, pictures = drawn
    judge, calls = shared_judge("tiny", "auto").judge, []
    detect = judge.detector.detect
    monkeypatch.setattr(judge.detector, "detect", lambda images: (calls.append(len(images)), detect(images))[1])
    RewardSet(REWARDS).score(pictures[:5], dataset.prompts[:5], {k: v[:5] for k, v in dataset.columns.items()})
    assert calls == [5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"include": [{"class": "zebra", "count": 1}]}, "zebra.*does not know; its classes: apple"),
        ({"include": [{"class": "cup", "count": 0}]}, "count must be an integer of 1 or more, got 0"),
        ({"include": None}, "include must be a list, got None"),
    ],
)
def test_prompts_that_cannot_be_judged_are_refused(change: dict[str, Any], message: str) -> None:
    record = {"tag": "single_object", "include": [{"class": "cup", "count": 1}], "exclude": (), **change}
    dataset = PromptDataset(("p",), {name: (value,) for name, value in record.items()})
    with pytest.raises(CRDError, match=message):
        RewardSet(REWARDS).check_prompts(dataset.prompts, dataset.columns)


def test_prompts_without_metadata_are_refused() -> None:
    with pytest.raises(CRDError, match="reward 'geneval-tiny' needs the dataset column 'tag'"):
        RewardSet(REWARDS).check_prompts(["a cup"], {})


# --- one judge for all ------------------------------------------------------------------------------------------------


def test_the_last_images_are_not_kept_alive(drawn: tuple[PromptDataset, list[Image.Image]]) -> None:
    dataset, pictures = drawn
    judge, wanted = SharedJudge("tiny", "cpu"), parse_columns(dataset.prompts, dataset.columns)[:3]
    images = [picture.copy() for picture in pictures[:3]]
    first = judge.scores(images, wanted)
    assert judge.scores(list(images), wanted) is first
    gone = [weakref.ref(image) for image in images]
    images = [picture.copy() for picture in pictures[:3]]
    assert [image() for image in gone] == [None] * 3
    assert judge.scores(images, wanted) is not first


def test_a_judge_is_loaded_when_it_is_needed_and_where_the_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(settings: object, device: str) -> GenEvalJudge:
        loaded.append(device)
        return GenEvalJudge(Scripted([found(("bear",))]))

    monkeypatch.setattr("crd.geneval.shared.load_judge", load)
    shared_judge.cache_clear()
    dataset = load_prompts("scenes:test:6")
    for device in ("cpu", "cuda"):
        rewards = RewardSet(["geneval-tiny", "geneval-tiny-official"])
        rewards.check_prompts(dataset.prompts, dataset.columns)
        rewards.use_device(device)
        rewards.self_test()
    shared_judge.cache_clear()
    assert loaded == ["cpu", "cuda"]


def test_a_bar_shows_the_detection(
    drawn: tuple[PromptDataset, list[Image.Image]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, pictures = drawn
    output = io.StringIO()
    monkeypatch.setattr("crd.console.console", Console(file=output, force_terminal=True, width=80))
    SharedJudge("tiny", "cpu").scores(pictures[:2], parse_columns(dataset.prompts, dataset.columns)[:2])
    assert "GenEval" in output.getvalue()
    assert "2/2" in output.getvalue()


# --- the reward of the benchmark's own detectors ----------------------------------------------------------------------


class Same(Scripted):
    """A detector that finds the same in every image."""

    def __init__(self, *labels: str) -> None:
        super().__init__([])
        self.labels = labels

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        return [found(self.labels)] * len(images)


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> Same:
    """What every reward's judge looks through."""
    judge, detector = SharedJudge("mask2former", "cpu"), Same()
    judge.__dict__["judge"] = GenEvalJudge(detector)
    monkeypatch.setattr("crd.rewards.geneval.shared_judge", lambda name, device: judge)
    return detector


def dog_scores(rewards: RewardSet, count: int) -> list[float]:
    """Of new images, all of which should show a dog."""
    columns = {"tag": ["single_object"] * count, "include": [[{"class": "dog", "count": 1}]] * count}
    images = [noise(8, 8) for _ in range(count)]
    return rewards.score(images, ["a dog"] * count, {**columns, "exclude": [()] * count}).total.tolist()


def test_a_detector_that_never_finds_anything_is_refused(detector: Same) -> None:
    rewards, some = RewardSet("geneval"), BLIND_AFTER // 2 + 1
    assert dog_scores(rewards, some) == [0] * some
    with pytest.raises(CRDError, match=f"found none of the requested objects in the first {2 * some} images; check"):
        dog_scores(rewards, some)
    detector.labels = ("bear",)
    with pytest.raises(CRDError, match=f"mask2former found none .* in the first {BLIND_AFTER} images"):
        dog_scores(RewardSet("geneval-official"), BLIND_AFTER)


def test_a_detector_that_found_something_may_find_nothing_later(detector: Same) -> None:
    rewards = RewardSet("geneval-official")
    detector.labels = ("dog",)
    assert dog_scores(rewards, 1) == [1]
    detector.labels = ()
    assert dog_scores(rewards, BLIND_AFTER) == [0] * BLIND_AFTER


def test_the_tiny_detectors_are_tested_on_drawings_instead() -> None:
    dataset = load_prompts("scenes:test:70")
    blank = [Image.new("RGB", (64, 64), (150, 150, 150)) for _ in dataset.prompts]
    rewards = RewardSet(TinyGenEvalReward())
    rewards.self_test()
    assert rewards.score(blank, dataset.prompts, dataset.columns).total.tolist() == [0] * 70


@pytest.fixture(scope="module")
def judge_file(detector_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A judge of a random Mask2Former and CLIP."""
    path = tmp_path_factory.mktemp("judge") / "judge.yaml"
    models = {"model": str(detector_folders["mask2former"]), "color_model": str(detector_folders["clip"])}
    path.write_text(json.dumps({"detector": "mask2former", **models, "thresholds": {"counting_confidence": 0.5}}))
    return str(path)


def test_geneval_and_its_official_score_by_mask2former_and_clip(
    judge_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GenEvalReward, "judge_name", judge_file)
    judge = shared_judge(judge_file, "cpu")
    images = [noise(16, 16, seed) for seed in range(2)]
    objects = judge.judge.detector.detect(images)
    sure = [{label for label, s in zip(o.labels, o.scores, strict=True) if s > 0.3} for o in objects]
    count = [label for label, s in zip(objects[1].labels, objects[1].scores, strict=True) if s > 0.5].count("bench")
    assert "bench" in sure[0]
    assert count >= 1
    absent = next(name for name in ("person", "zebra", "toilet") if name not in sure[0])
    records = [
        {"tag": "two_object", "include": [{"class": "bench", "count": 1}, {"class": absent, "count": 1}]},
        {"tag": "counting", "include": [{"class": "bench", "count": count + 1}]},
        {"tag": "colors", "include": [{"class": "bench", "count": 1, "color": "red"}]},
    ]
    dataset = load_prompts([{"exclude": (), **r, "prompt": f"prompt {n}"} for n, r in enumerate(records)])
    rewards = RewardSet(["geneval", "geneval-official"], [1.0, 0.0])
    rewards.check_prompts(dataset.prompts, dataset.columns)
    rewards.use_device("cpu")
    rewards.self_test()
    output = rewards.score([images[0], images[1], images[1]], dataset.prompts, dataset.columns)
    soft, official = output.columns["geneval"].tolist(), output.columns["geneval-official"].tolist()
    benches = [label for label, s in zip(objects[0].labels, objects[0].scores, strict=True) if s > 0.3].count("bench")
    assert soft[0] == pytest.approx(max(0, 2 - benches) / 2)
    assert soft[1] == pytest.approx(count / (count + 1))
    assert official[:2] == [0, 0]
    assert official[2] in (0, 1)  # whichever color a random CLIP sees
    wanted = parse_columns(dataset.prompts, dataset.columns)
    assert judge.scores([images[1]], wanted[2:]).official.tolist() == official[2:]


def test_a_file_that_does_not_fit_is_refused_with_the_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GenEvalReward, "judge_name", str(tmp_path / "judge.yaml"))
    (tmp_path / "judge.yaml").write_text("detector: mask2former\nthreshold: {confidence: 0.4}")
    dataset = load_prompts("geneval:test:6")
    with pytest.raises(CRDError, match=r"judge\.yaml: unknown judge setting 'threshold'; did you mean 'thresholds'\?"):
        RewardSet("geneval").check_prompts(dataset.prompts, dataset.columns)
