"""The reward contract: what a callable may take and return, and that nothing wrong becomes a number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crd.errors import CRDError, ServiceError
from crd.rewards import RewardSet, WeightedReward, resolve
from crd.rewards.ocr import OCRReward

IMAGES = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (10, 20, 30)]
PROMPTS = ["first", "second", "third"]


def redness(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [image.tobytes()[0] / 10 for image in images]


def returning(result: Any) -> RewardSet:
    def fixed(images: list[Image.Image], prompts: list[str]) -> Any:
        return result

    return RewardSet([fixed])


def score(rewards: RewardSet, **columns: list[Any]) -> list[float]:
    return rewards.score(IMAGES, PROMPTS, columns).total.tolist()


def test_total_is_the_weighted_sum_and_columns_are_unweighted() -> None:
    def length(images: list[Image.Image], prompts: list[str]) -> list[float]:
        return [len(prompt) for prompt in prompts]

    output = RewardSet([redness, length], [2.0, -0.5]).score(IMAGES, PROMPTS, {})
    assert output.total.tolist() == [2 * 1 - 2.5, 2 * 2 - 3.0, 2 * 3 - 2.5]
    assert output.total.dtype == torch.float64
    assert output.columns["redness"].tolist() == [1, 2, 3]
    assert output.columns["length"].tolist() == [5, 6, 5]


def test_none_is_left_out_of_the_sum_and_shown_as_nan() -> None:
    def partly(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        return [None, 5.0, None]

    output = RewardSet([redness, partly]).score(IMAGES, PROMPTS, {})
    assert output.total.tolist() == [1, 7, 3]
    assert [math.isnan(value) for value in output.columns["partly"].tolist()] == [True, False, True]


def test_an_image_no_reward_applies_to_is_an_error() -> None:
    with pytest.raises(CRDError, match=r"no reward with a weight applies to image 1 .*'second'"):
        score(returning([1.0, None, 1.0]))

    def unweighted(images: list[Image.Image], prompts: list[str]) -> list[float]:
        return [1.0, 1.0, 1.0]

    def partly(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        return [1.0, 1.0, None]

    with pytest.raises(CRDError, match="image 2"):
        score(RewardSet([partly, unweighted], [1.0, 0.0]))


@pytest.mark.parametrize(
    "result",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        np.array([1, 2, 3]),
        np.array([1, 2, 3], np.float32),
        torch.tensor([1, 2, 3]),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, requires_grad=True),
        [np.float32(1), np.int64(2), torch.tensor(3.0)],
        [True, np.array(2), 3.0],
    ],
)
def test_numbers_of_every_usual_type_are_taken(result: Any) -> None:
    assert score(returning(result)) == [1, 2, 3]


def test_a_scalar_stands_for_one_image_only() -> None:
    one = returning(torch.tensor(0.5))
    assert one.score(IMAGES[:1], PROMPTS[:1], {}).total.tolist() == [0.5]
    with pytest.raises(CRDError, match=r"\(B,\)=\(3,\), got \(\)"):
        score(one)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], r"one score per image \(3\), got 2"),
        (torch.zeros(4), r"\(B,\)=\(3,\), got \(4,\)"),
        (torch.zeros(3, 1), r"got \(3, 1\); return scores.squeeze\(-1\)"),
        (np.zeros((3, 1)), r"return scores.squeeze\(-1\)"),
        (torch.zeros(3, 2), r"got \(3, 2\)"),
        (None, "got None; is a `return` missing"),
        (0.5, "got float"),
        ((x for x in (1.0, 2.0, 3.0)), "got generator"),
        ({"a": 1.0, "b": 2.0, "c": 3.0}, "got dict"),
        ([1.0, "2", 3.0], "score 1 of reward 'fixed' must be a number or None, got str"),
        ([1.0, 2.0, torch.zeros(1)], r"score 2 .* got shape \(1,\)"),
        ([1.0, 2j, 3.0], "got complex"),
        (torch.zeros(3, dtype=torch.complex64), "must be real"),
        ([1.0, math.nan, 3.0], r"'fixed' of image 1 \(prompt 'second'\) is nan"),
        (torch.tensor([1.0, 2.0, math.inf]), r"of image 2 \(prompt 'third'\) is inf"),
        (np.array([-np.inf, 0, 0]), "of image 0 .* is -inf"),
    ],
)
def test_a_wrong_result_is_one_clear_line(result: Any, message: str) -> None:
    with pytest.raises(CRDError, match=message) as caught:
        score(returning(result))
    assert "fixed" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_exception_in_a_reward_keeps_its_cause_and_fits_one_line() -> None:
    def breaks(images: list[Image.Image], prompts: list[str]) -> list[float]:
        raise KeyError("server\nsaid no")

    with pytest.raises(CRDError, match=r"reward 'breaks' raised KeyError: .*server.*said no") as caught:
        score(RewardSet([breaks]))
    assert isinstance(caught.value.__cause__, KeyError)
    assert "\n" not in str(caught.value)


def test_a_score_outside_the_declared_range_is_an_error() -> None:
    redness_in_unit = UpToTwo()
    with pytest.raises(CRDError, match=r"of image 2 .* must lie in \[0.0, 2.0\], got 3.0"):
        score(RewardSet([redness_in_unit]))
    assert RewardSet([redness_in_unit]).rewards[0].range == (0.0, 2.0)
    assert RewardSet([redness]).rewards[0].range is None


class UpToTwo:
    score_range = (0.0, 2.0)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        return redness(images, prompts)


def test_columns_arrive_by_name_and_only_those_asked_for() -> None:
    seen: dict[str, Any] = {}

    def picky(images: list[Image.Image], prompts: list[str], tag: list[str], size: int = 7) -> list[float]:
        seen.update(tag=tag, size=size)
        return redness(images, prompts)

    def greedy(images: list[Image.Image], prompts: list[str], **columns: list[Any]) -> list[float]:
        seen.update(columns=columns)
        return redness(images, prompts)

    score(RewardSet([picky, greedy]), tag=["a", "b", "c"], other=[1, 2, 3])
    assert seen == {"tag": ["a", "b", "c"], "size": 7, "columns": {"tag": ["a", "b", "c"], "other": [1, 2, 3]}}


def test_a_missing_column_is_refused_at_load_time() -> None:
    def wants(images: list[Image.Image], prompts: list[str], *, target: list[str]) -> list[float]:
        return [0.0] * len(images)

    rewards = RewardSet([wants])
    rewards.check_prompts(PROMPTS, {"target": PROMPTS, "tag": PROMPTS})
    with pytest.raises(CRDError, match=r"'wants' needs the dataset column 'target'.*did you mean 'targets'"):
        rewards.check_prompts(PROMPTS, {"targets": PROMPTS})
    with pytest.raises(CRDError, match="got columns: none"):
        score(rewards)


def test_a_column_that_hides_images_is_refused() -> None:
    def greedy(images: list[Image.Image], prompts: list[str], **columns: list[Any]) -> list[float]:
        return [0.0] * len(images)

    with pytest.raises(CRDError, match="'images' collides"):
        RewardSet([greedy]).check_prompts(PROMPTS, {"images": PROMPTS})
    RewardSet([redness]).check_prompts(PROMPTS, {"images": PROMPTS})


def test_signatures_that_cannot_be_called_are_refused() -> None:
    with pytest.raises(CRDError, match=r"swap them"):
        RewardSet([lambda prompts, images: [0.0]])
    with pytest.raises(CRDError, match=r"by position, got \(images\)"):
        RewardSet([lambda images: [0.0]])


def test_lengths_that_disagree_are_our_own_mistake() -> None:
    with pytest.raises(ValueError, match=r"prompts must hold one entry per image \(3\), got 2"):
        RewardSet([redness]).score(IMAGES, PROMPTS[:2], {})
    with pytest.raises(ValueError, match="tag must hold"):
        RewardSet([redness]).score(IMAGES, PROMPTS, {"tag": [1]})


def test_no_images_give_no_scores() -> None:
    output = RewardSet([redness]).score([], [], {})
    assert output.total.shape == output.columns["redness"].shape == (0,)


def test_weights_and_names_are_checked() -> None:
    with pytest.raises(CRDError, match=r"one per reward \(1\), got 2"):
        RewardSet([redness], [1.0, 2.0])
    with pytest.raises(CRDError, match="must be finite, got nan"):
        RewardSet([redness], [math.nan])
    with pytest.raises(CRDError, match="all reward weights are 0"):
        RewardSet([redness], [0.0])
    with pytest.raises(CRDError, match="two rewards are named 'redness'"):
        RewardSet([redness, redness])
    with pytest.raises(CRDError, match="no reward given"):
        RewardSet([])
    assert RewardSet(redness).rewards == (WeightedReward("redness", redness, 1.0, None, "test_rewards:redness"),)


def test_resolve_names_paths_and_callables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(redness) is redness
    assert isinstance(resolve("ocr"), OCRReward)
    assert RewardSet(["ocr"]).rewards[0].name == RewardSet([OCRReward()]).rewards[0].name == "ocr"
    (tmp_path / "my_reward_file.py").write_text("def bright(images, prompts):\n    return [1.0] * len(images)\n")
    (tmp_path / "my_broken_file.py").write_text("import no_such_library\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in __import__("sys").path if path])
    assert score(RewardSet(["my_reward_file:bright"])) == [1, 1, 1]
    with pytest.raises(CRDError, match="no attribute 'brigt'; did you mean 'bright'"):
        resolve("my_reward_file:brigt")
    with pytest.raises(CRDError, match="ModuleNotFoundError: No module named 'no_such_library'"):
        resolve("my_broken_file:bright")
    with pytest.raises(CRDError, match="importing 'no_such_file' failed"):
        resolve("no_such_file:bright")


def test_an_unknown_name_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(CRDError, match=r"unknown reward 'orc'; known: .*geneval, .*, ocr, .*; did you mean 'ocr'"):
        resolve("orc")
    with pytest.raises(CRDError, match=r"known: .*; a custom reward is written"):
        resolve("blueness")
    with pytest.raises(CRDError, match="give both parts"):
        resolve("module:")
    with pytest.raises(CRDError, match="must be callable, got float"):
        resolve("math:pi")


class SelfTested:
    """A reward whose self-test gives `result`, or raises it."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        return [0.0] * len(images)

    def self_test(self) -> Any:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_self_test_refuses_constant_and_broken_scorers() -> None:
    RewardSet([redness, SelfTested([0.0, 1.0])]).self_test()
    RewardSet([SelfTested(None)]).self_test()
    with pytest.raises(CRDError, match="'SelfTested' gave constant scores"):
        RewardSet([SelfTested([0.5, 0.5])]).self_test()
    with pytest.raises(CRDError, match=r"'SelfTested' raised OSError: gone"):
        RewardSet([SelfTested(OSError("gone"))]).self_test()
    with pytest.raises(CRDError, match=r"^told$"):
        RewardSet([SelfTested(CRDError("told"))]).self_test()


class Failing(SelfTested):
    """A reward that fails before it is asked for scores."""

    def __init__(self, level: int = 0) -> None:
        super().__init__([0.0, float(level)])

    def check_prompts(self, prompts: list[str]) -> None:
        raise KeyError("font")

    def use_device(self, device: str) -> None:
        raise RuntimeError("no such device")


class Unmade(Failing):
    def __init__(self, level: int) -> None:
        super().__init__(level)


def test_a_reward_that_fails_before_it_is_asked_is_told_in_one_line() -> None:
    with pytest.raises(CRDError, match=r"making reward .* raised TypeError: .*level.*; a class is called without"):
        RewardSet([Unmade])
    rewards = RewardSet([Failing])
    with pytest.raises(CRDError, match="'Failing', sent to cuda:9, raised RuntimeError: no such device"):
        rewards.use_device("cuda:9")
    # A service's error: it is no refusal, by which a held-out scorer would leave the prompt out.
    with pytest.raises(ServiceError, match="check of prompts by reward 'Failing' raised KeyError: 'font'"):
        rewards.check_prompts(["a"], {})


def test_prompts_a_reward_cannot_score_are_refused_at_load_time() -> None:
    rewards = RewardSet([redness, "ocr"])
    rewards.check_prompts(['a sign "A"'], {})
    with pytest.raises(CRDError, match="'a bare sign' has no text between double quotes"):
        rewards.check_prompts(['a sign "A"', "a bare sign"], {})


def test_the_range_of_a_total_is_that_of_the_rewards_asked() -> None:
    def ranged(low: float, high: float) -> Any:
        def reward(images: list[Image.Image], prompts: list[str]) -> list[float]:
            return [low] * len(images)

        reward.score_range = (low, high)  # type: ignore[attr-defined]
        reward.__name__ = f"from_{low}"
        return reward

    rewards = RewardSet([ranged(0, 1), ranged(1, 5), ranged(7, 8), redness], [1, -0.5, 0, 2])
    columns = {"rewards": [["from_0"], ["from_0", "from_1"], ["from_0", "from_7"], ["redness", "from_1"]]}
    assert rewards.total_range(["a"] * 4, columns) == (-2.5, 1.0)  # 0 - 2.5 and 1 - 0.5; what has no range is left out
    assert rewards.total_range(["a"], {}) is None
    assert RewardSet(ranged(0, math.inf)).total_range(["a"], {}) is None


def test_a_reward_is_asked_only_about_the_prompts_that_name_it() -> None:
    seen: list[tuple[list[str], list[int]]] = []

    def picky(images: list[Image.Image], prompts: list[str], number: list[int]) -> list[float]:
        seen.append((prompts, number))
        return [10.0 * n for n in number]

    rewards = RewardSet([redness, picky])
    columns: dict[str, list[Any]] = {"rewards": [["redness"], None, ["picky"]], "number": [1, 2, 3]}
    output = rewards.score(IMAGES, PROMPTS, columns)
    assert seen == [(["second", "third"], [2, 3])]
    assert output.total.tolist() == [1, 2 + 20, 30]
    assert [math.isnan(value) for value in output.columns["redness"].tolist()] == [False, False, True]
    only = rewards.score(IMAGES[:1], PROMPTS[:1], {"rewards": [["redness"]], "number": [1]})
    assert len(seen) == 1
    assert set(only.metrics()) == {"reward", "reward_redness"}, "a mean over no image is left out, not NaN"


def test_columns_are_required_only_where_the_reward_is_asked() -> None:
    def picky(images: list[Image.Image], prompts: list[str], number: list[int]) -> list[float]:
        return [0.0] * len(images)

    rewards = RewardSet([redness, picky])
    columns: dict[str, list[Any]] = {"rewards": [["redness"]] * 3}
    rewards.check_prompts(PROMPTS, columns)
    assert rewards.score(IMAGES, PROMPTS, columns).total.tolist() == [1, 2, 3]
    columns["rewards"][1] = ["redness", "picky"]
    with pytest.raises(CRDError, match="reward 'picky' needs the dataset column 'number', got columns: none"):
        rewards.check_prompts(PROMPTS, columns)


@pytest.mark.parametrize(
    "names", [["ocr"], "redness", [], (), 3, True, {"redness": 1}, [["redness"]], [3], ["redness", None]], ids=str
)
def test_prompts_that_name_no_reward_of_the_run_are_refused(names: Any) -> None:
    columns = {"rewards": [names, None, None]}
    for check in (RewardSet([redness]).check_prompts, lambda *rest: RewardSet([redness]).score(IMAGES, *rest)):
        with pytest.raises(
            CRDError, match=r"column 'rewards' of prompt 'first' must list rewards of this run \(redness\)"
        ):
            check(PROMPTS, columns)


def test_prompts_that_only_rewards_of_weight_0_judge_are_refused_at_load_time() -> None:
    def logged(images: list[Image.Image], prompts: list[str]) -> list[float]:
        return [0.0] * len(images)

    rewards = RewardSet([redness, logged], [1.0, 0.0])
    rewards.check_prompts(PROMPTS, {"rewards": [None, ("logged", "redness"), ["redness"]]})
    with pytest.raises(CRDError, match="prompt 'third' is judged by logged alone, of weight 0"):
        rewards.check_prompts(PROMPTS, {"rewards": [None, None, ["logged"]]})


def test_prompt_checks_see_what_the_reward_is_asked_about() -> None:
    class Strict:
        asked: tuple[list[str], dict[str, list[Any]]]

        def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
            return [0.0] * len(images)

        def check_prompts(self, prompts: list[str]) -> None:
            assert prompts == ["third"]

        def check_columns(self, prompts: list[str], columns: dict[str, list[Any]]) -> None:
            self.asked = (prompts, columns)

    strict = Strict()
    RewardSet([redness, strict]).check_prompts(
        PROMPTS, {"rewards": [["redness"], ["redness"], ["Strict"]], "number": [1, 2, 3]}
    )
    assert strict.asked == (["third"], {"number": [3]})
