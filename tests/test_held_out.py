"""Held-out scorers: asked about what they can judge, never trained on, and named by `NAME` or `NAME=SOURCE`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from reward_functions import brightness, raising, too_short
from tiny_detectors import save_clip

from crd.data import PromptDataset, load_prompts
from crd.errors import CRDError
from crd.metrics.clipscore import CLIPScore
from crd.metrics.held_out import HeldOutScores
from crd.rewards import RewardSet
from crd.rewards.registry import REGISTRY, resolve, reward_name

GRAY = [Image.new("RGB", (8, 8), (level, level, level)) for level in (0, 51, 102, 153, 204, 255)]
PROMPT_ID = torch.tensor([2, 0, 1, 2, 0, 1])  # any order


class Signs:
    """Judges prompts with a quotation mark, and counts what it is asked."""

    judge_name = "reader"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if '"' not in prompt:
                raise CRDError(f"{prompt!r} asks for no text")

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        self.asked += prompts
        return brightness(images, prompts)


class OtherReader(Signs):
    """Another name, the same judge."""


class SourceReader:
    """A class that may be given a source."""

    def __init__(self, source: str = "its own") -> None:
        self.source = source

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        return brightness(images, prompts)


def dark_only(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
    return [score if score < 0.5 else None for score in brightness(images, prompts)]


def silent(images: list[Image.Image], prompts: list[str]) -> list[None]:
    return [None] * len(images)


def leveled(images: list[Image.Image], prompts: list[str], level: list[float]) -> list[float]:
    return [score - wanted for score, wanted in zip(brightness(images, prompts), level, strict=True)]


@pytest.fixture
def prompts() -> PromptDataset:
    return load_prompts(['a "cat"', "a dog", 'the "bird"'])


def test_scorers_are_asked_only_about_what_they_can_judge(prompts: PromptDataset) -> None:
    signs = Signs()
    held_out = HeldOutScores([signs, brightness], prompts)
    assert held_out.names == ["Signs", "brightness"]
    found = held_out.score(GRAY, PROMPT_ID)
    assert found["brightness"].tolist() == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert found["Signs"].isnan().tolist() == [False, False, True, False, False, True]
    assert found["Signs"][[0, 1, 3, 4]].tolist() == pytest.approx([0.0, 0.2, 0.6, 0.8])
    assert signs.asked == ['the "bird"', 'a "cat"', 'the "bird"', 'a "cat"']


def test_the_column_rewards_is_not_heeded_but_others_arrive() -> None:
    records = [{"prompt": "a", "level": 0.0, "rewards": ["ocr"]}, {"prompt": "b", "level": 0.5, "rewards": None}]
    held_out = HeldOutScores([leveled], load_prompts(records))
    found = held_out.score(GRAY[:3], torch.tensor([0, 1, 0]))
    assert found["leveled"].tolist() == pytest.approx([0.0, -0.3, 0.4])


def test_geneval_judges_the_scenes_of_joined_prompts(tmp_path: Path) -> None:
    (tmp_path / "signs.txt").write_text('a "cat"\n')
    joined = load_prompts(f"scenes:test:2+{tmp_path}/signs.txt")
    held_out = HeldOutScores(["geneval-tiny-held-out"], joined)
    held_out.use_device("cpu")
    images = [Image.new("RGB", (64, 64), "gray")] * 3
    found = held_out.score(images, torch.arange(3))["geneval-tiny-held-out"]
    assert found.isnan().tolist() == [prompt.startswith('a "') for prompt in joined.prompts]


def test_who_can_judge_nothing_is_refused(prompts: PromptDataset) -> None:
    with pytest.raises(CRDError, match="held_out Signs can judge none of the evaluation prompts: 'a dog' asks for no"):
        HeldOutScores([Signs()], load_prompts(["a dog", "a cow"]))
    with pytest.raises(CRDError, match=r"held_out leveled can judge none .* needs the dataset column 'level'"):
        HeldOutScores([leveled], prompts)
    with pytest.raises(CRDError, match="held_out scorers need evaluation prompts, got none"):
        HeldOutScores([brightness], None)
    with pytest.raises(CRDError, match="two rewards are named 'brightness'"):
        HeldOutScores([brightness, brightness], prompts)


def test_no_scorers(prompts: PromptDataset) -> None:
    for dataset in (prompts, None):
        nothing = HeldOutScores((), dataset)
        nothing.use_device("cpu")
        nothing.self_test()
        assert nothing.names == []
        assert nothing.score(GRAY, PROMPT_ID) == {}
        assert nothing.warn_of(RewardSet(brightness)) == []


def test_failures_name_the_scorer(prompts: PromptDataset) -> None:
    for scorer, message in (
        (raising, "'raising' raised RuntimeError: the scorer has no weights"),
        (too_short, "'too_short' must return one score per image"),
        (silent, "held_out silent gave no score for any of 6 images"),
    ):
        held_out = HeldOutScores([scorer], prompts)
        with pytest.raises(CRDError, match=message):
            held_out.check_answers(held_out.score(GRAY, PROMPT_ID), PROMPT_ID)


def test_no_answer_is_a_gap(prompts: PromptDataset) -> None:
    found = HeldOutScores([dark_only], prompts).score(GRAY, PROMPT_ID)["dark_only"]
    assert found.dtype == torch.float64
    assert found[:3].tolist() == pytest.approx([0.0, 0.2, 0.4])
    assert found[3:].isnan().all()


def test_a_broken_scorer_is_found_before_the_run(prompts: PromptDataset) -> None:
    class Constant(SourceReader):
        def self_test(self) -> list[float]:
            return [0.5, 0.5]

    with pytest.raises(CRDError, match="self-test of reward 'Constant' gave constant scores"):
        HeldOutScores([Constant()], prompts).self_test()


def test_warning_of_scorers_that_are_trained_on(prompts: PromptDataset) -> None:
    signs = load_prompts(['a "cat"'])
    trained = RewardSet([Signs(), brightness], [1.0, 1.0])
    assert HeldOutScores([SourceReader(), dark_only], prompts).warn_of(trained) == []
    (line,) = HeldOutScores([brightness, dark_only], prompts).warn_of(trained)
    assert line.startswith("held_out brightness is no independent judge: the run is trained on brightness")
    (line,) = HeldOutScores([OtherReader()], signs).warn_of(trained)
    assert line.startswith("held_out OtherReader is no independent judge: the run is trained on Signs")
    # A reward of weight 0 is logged, not trained on.
    assert HeldOutScores([brightness], prompts).warn_of(RewardSet([Signs(), brightness], [1.0, 0.0])) == []


def test_warning_of_one_detector_under_two_names() -> None:
    scenes, trained = load_prompts("scenes:test:2"), RewardSet("geneval-tiny")
    (line,) = HeldOutScores(["geneval-tiny-official"], scenes).warn_of(trained)
    assert "held_out geneval-tiny-official is no independent judge: the run is trained on geneval-tiny" in line
    assert HeldOutScores(["geneval-tiny-held-out"], scenes).warn_of(trained) == []


def test_a_registered_function_keeps_its_registered_name(
    monkeypatch: pytest.MonkeyPatch, prompts: PromptDataset
) -> None:
    monkeypatch.setitem(REGISTRY, "light", "reward_functions:brightness")
    held_out = HeldOutScores(["light"], prompts)
    assert held_out.names == ["light"]
    assert list(held_out.score(GRAY, PROMPT_ID)) == ["light"]
    assert held_out.warn_of(RewardSet("light"))


def test_name_and_source(tmp_path: Path, prompts: PromptDataset) -> None:
    clip = save_clip(tmp_path / "clip")
    scorer = resolve(f"clipscore={clip}")
    assert isinstance(scorer, CLIPScore)
    assert scorer.source == str(clip)
    assert resolve("clipscore").source == CLIPScore.published  # type: ignore[attr-defined]
    assert reward_name(f"clipscore={clip}", scorer) == "clipscore"
    held_out = HeldOutScores([f"clipscore={clip}"], prompts)
    held_out.use_device("cpu")
    held_out.self_test()
    found = held_out.score(GRAY, PROMPT_ID)
    assert list(found) == ["clipscore"]
    assert found["clipscore"].isfinite().all()
    # A source may hold further "=", and a class that is not registered takes one too.
    own = resolve("test_held_out:SourceReader=a=b")
    assert (own.source, reward_name("test_held_out:SourceReader=a=b", own)) == ("a=b", "SourceReader")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clipscore=", "names no source after the ="),
        ("geneval-tiny=x", "reward geneval-tiny takes no source, got 'x'"),
        ("reward_functions:brightness=x", "reward reward_functions:brightness takes no source"),
        ("clipscor=x", "unknown reward 'clipscor'.*did you mean 'clipscore'"),
        ("=x", "unknown reward ''"),
        ("test_held_out:Nothing=x", "has no attribute 'Nothing'"),
    ],
)
def test_names_with_a_source_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(CRDError, match=message):
        resolve(name)
