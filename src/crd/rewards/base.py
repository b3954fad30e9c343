"""The reward contract: `f(images, prompts, **columns) -> list[float | None]`, checked and summed.

A reward takes the images (B PIL images) and the prompts (B strings) by position, and the dataset columns that
its signature names (all of them if it takes `**columns`). It returns B numbers, higher is better; None means
"does not apply to this image". It may also carry

- `score_range = (low, high)`: a score outside is an error, and it is the scale a report may draw;
- `check_prompts(prompts)`: called when prompts are loaded; raises `CRDError` for one it cannot score;
- `check_columns(prompts, columns)`: the same with the dataset columns it takes;
- `judge_name`: what it judges by; two rewards of one judge are no independent judges of each other;
- `reward_name`: under which its scores are logged, where the name of its class does not tell;
- `leaves_gaps`: if true, None may also stand for a score that failed. That is no basis for training;
- `wait_s`: how many seconds a call may wait for something to be there, while other processes wait for it;
- `use_device(device)`: called once the run's device is known, before `self_test`: "cpu", "cuda", "cuda:1";
- `self_test()`: called before step 0; raises `CRDError` if the scorer is broken; may return sample scores,
  which must then differ.

A failing reward stops the run: a score invented in its place would be trained on. The dataset column `rewards` says
which rewards are asked about a prompt (a list of names; None or no such column: all).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from crd.errors import CRDError, ServiceError, not_ours, one_line
from crd.records import ASKED, RewardOutput
from crd.rewards.abilities import (
    ColumnChecking,
    DeviceUsing,
    GapLeaving,
    Judging,
    PromptChecking,
    Ranged,
    SelfTesting,
    Waiting,
)
from crd.rewards.asked import own_columns, rows_asked
from crd.rewards.registry import resolve, reward_name, reward_path
from crd.rewards.signature import ColumnUse, column_use, quote
from crd.rewards.values import score_list

__all__ = ["RewardFunction", "RewardSet", "WeightedReward", "resolve"]

RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class WeightedReward:
    """One named reward, its weight in the total, and the range its scores must keep (None = any)."""

    name: str
    function: RewardFunction
    weight: float
    range: tuple[float, float] | None
    source: str  # as it was asked for: a name, `NAME=SOURCE`, or `module:function`, also of a callable

    @property
    def judge(self) -> str | None:
        """What it judges by, if it says so."""
        return self.function.judge_name if isinstance(self.function, Judging) else None

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise CRDError(f"reward weight of {self.name!r} must be finite, got {self.weight}; give a number")


class RewardSet:
    """Several rewards as one: `total_i = Σ_j weight_j score_ij` over the rewards j that apply to image i.

    Args:
        functions: names of bundled rewards (`"ocr"`), `"module.path:function"` strings, or callables;
                one of them may stand alone.
        weights: one finite number per reward; None = 1 each. A weight of 0 logs a reward, no more.
        gaps: whether a reward with a weight may answer None for scores that failed; not if it is trained on.
        patience: s after which those that wait for the scores give up.

    Raises:
        CRDError: unknown name, repeated name, wrong number of weights, all weights 0, a callable that cannot take
            `(images, prompts)`, one that leaves gaps where there may be none, or may wait as long as the patience.
    """

    def __init__(
        self,
        functions: str | RewardFunction | Sequence[str | RewardFunction],
        weights: Sequence[float] | None = None,
        *,
        gaps: bool = False,
        patience: float = math.inf,
    ) -> None:
        if isinstance(functions, str) or callable(functions):
            functions = [functions]
        if not functions:
            raise CRDError("no reward given; name at least one, for example `ocr`")
        chosen = [1.0] * len(functions) if weights is None else [float(weight) for weight in weights]
        if len(chosen) != len(functions):
            raise CRDError(f"reward weights must be one per reward ({len(functions)}), got {len(chosen)}; match them")
        if not any(chosen):
            raise CRDError("all reward weights are 0; give at least one reward a weight")
        self.rewards = tuple(_weighted(function, weight) for function, weight in zip(functions, chosen, strict=True))
        self.uses = tuple(column_use(reward.name, reward.function) for reward in self.rewards)
        for reward in self.rewards:
            if reward.weight != 0 and not gaps and isinstance(reward.function, GapLeaving):
                _refuse_gaps(reward.name, reward.function)
            if isinstance(reward.function, Waiting) and reward.function.wait_s >= patience:
                raise CRDError(f"reward {reward.name!r} may wait {reward.function.wait_s:g} s for its server, and the "
                               f"other processes give up after peer_timeout={patience:g} s; lower its wait_s, or raise "
                               "peer_timeout above it")  # fmt: skip
        names = [reward.name for reward in self.rewards]
        for name in names:
            if names.count(name) > 1:
                raise CRDError(f"two rewards are named {name!r}; rename one (its `__name__` is the name)")

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each reward by name."""
        return {reward.name: reward.weight for reward in self.rewards}

    @property
    def sources(self) -> dict[str, str]:
        """How each reward was asked for, by name."""
        return {reward.name: reward.source for reward in self.rewards}

    def check_prompts(self, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
        """Refuse, at load time, prompts that the rewards asked about them cannot score; columns included.

        Args:
            prompts: P prompts.
            columns: dataset columns, each of length P.

        Raises:
            CRDError: a prompt names an unknown reward, or none with a weight; a column that a reward requires is
                missing; or from a reward's own `check_prompts` or `check_columns`, naming the prompt.
            ServiceError: these checks failed by themselves.
        """
        rows = rows_asked(prompts, columns, list(self.weights))
        judged = {row for reward in self.rewards if reward.weight != 0 for row in rows[reward.name]}
        for index, prompt in enumerate(prompts):
            if index not in judged:
                raise CRDError(
                    f"prompt {quote(prompt)} is judged by {', '.join(columns[ASKED][index])} alone, of weight 0; "
                    f"remove it, or name a reward with a weight in its column {ASKED!r}"
                )
        for reward, use in zip(self.rewards, self.uses, strict=True):
            asked = rows[reward.name]
            if not asked:
                continue
            chosen, own = [prompts[i] for i in asked], own_columns(columns, asked)
            use.check(own)
            # Another error than a refusal says nothing about the prompts.
            with not_ours(f"the check of prompts by reward {reward.name!r}", "fix the reward", ServiceError):
                if isinstance(reward.function, PromptChecking):
                    reward.function.check_prompts(chosen)
                if isinstance(reward.function, ColumnChecking):
                    reward.function.check_columns(chosen, own)

    def total_range(self, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> tuple[float, float] | None:
        """Lowest and highest total that images of P prompts can have when every reward asked about them applies.

        Prompts that a reward without a range, or with an unbounded one, is asked about are left out; None if no prompt
        is left.
        """
        rows = rows_asked(prompts, columns, list(self.weights))
        lows, highs = [0.0] * len(prompts), [0.0] * len(prompts)
        for reward in self.rewards:
            if reward.weight == 0:
                continue
            low, high = sorted(reward.weight * end for end in reward.range or (math.nan, math.nan))
            for row in rows[reward.name]:
                lows[row] += low
                highs[row] += high
        known = [(low, high) for low, high in zip(lows, highs, strict=True) if math.isfinite(high - low)]
        return (min(low for low, _ in known), max(high for _, high in known)) if known else None

    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> RewardOutput:
        """Score B images and sum: `total_i = Σ_j weight_j score_ij`, j over the rewards that apply.

        Args:
            images: B PIL images.
            prompts: B prompts.
            columns: dataset columns, each of length B.

        Returns:
            `RewardOutput(total (B,) float64, columns: name -> (B,) float64, NaN where it does not apply)`.

        Raises:
            CRDError: a reward raised, returned the wrong length, type or shape, NaN, infinity or a score
                outside its range, or no reward with a weight applies to an image.
            ValueError: images, prompts and columns differ in length.
        """
        scored = self.scores(images, prompts, columns)
        total = torch.zeros(len(images), dtype=torch.float64)
        counted = torch.zeros(len(images), dtype=torch.bool)
        for reward in self.rewards:
            total += reward.weight * scored[reward.name].nan_to_num(nan=0.0)
            # A weight of 0 adds nothing: an image that only such rewards judge would get a silent 0.
            counted |= ~scored[reward.name].isnan() & (reward.weight != 0)
        if not counted.all():
            index = int((~counted).nonzero()[0])
            raise CRDError(
                f"no reward with a weight applies to image {index} (prompt {quote(prompts[index])}); "
                "remove the prompt or add a reward that scores it"
            )
        return RewardOutput(total, scored)

    def scores(
        self, images: Sequence[Image.Image], prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> dict[str, Tensor]:
        """Every reward's own scores: name -> (B,) float64, NaN where it does not apply; arguments as in `score`.

        Raises:
            CRDError: a reward raised, or returned what it may not.
            ValueError: images, prompts and columns differ in length.
        """
        _check_lengths(len(images), prompts, columns)
        scored: dict[str, Tensor] = {}
        rows = rows_asked(prompts, columns, list(self.weights))
        for reward, use in zip(self.rewards, self.uses, strict=True):
            scored[reward.name] = torch.full((len(images),), math.nan, dtype=torch.float64)
            if asked := rows[reward.name]:
                chosen = [images[i] for i in asked], [prompts[i] for i in asked], own_columns(columns, asked)
                scored[reward.name][asked] = _scores_of(reward, use, *chosen)
        return scored

    def use_device(self, device: str) -> None:
        """Tell every reward that has networks of its own where the run computes.

        Raises:
            CRDError: a reward cannot go there.
        """
        for reward in self.rewards:
            if isinstance(reward.function, DeviceUsing):
                with not_ours(f"reward {reward.name!r}, sent to {device},", "check the device"):
                    reward.function.use_device(device)

    def self_test(self) -> None:
        """Run every reward's own `self_test()`; refuse one that fails or scores all its samples alike."""
        for reward in self.rewards:
            if not isinstance(reward.function, SelfTesting):
                continue
            with not_ours(f"self-test of reward {reward.name!r}", "fix the reward"):
                scores = reward.function.self_test()
            if scores is not None and len(set(scores)) < 2:
                raise CRDError(
                    f"self-test of reward {reward.name!r} gave constant scores {list(scores)}; "
                    "a constant reward trains nothing, check the scorer"
                )


def _weighted(function: str | RewardFunction, weight: float) -> WeightedReward:
    resolved = resolve(function)
    score_range = resolved.score_range if isinstance(resolved, Ranged) else None
    source = function if isinstance(function, str) else reward_path(function)
    return WeightedReward(reward_name(function, resolved), resolved, weight, score_range, source)


def _refuse_gaps(name: str, function: GapLeaving) -> None:
    if function.leaves_gaps:
        raise CRDError(f"reward {name!r} would take an image whose score failed for one that it does not apply to; "
                       "set its on_failure to error, or use it as held_out or with weight 0")  # fmt: skip


def _check_lengths(count: int, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
    for name, values in {"prompts": prompts, **columns}.items():
        if len(values) != count:
            raise ValueError(f"{name} must hold one entry per image ({count}), got {len(values)}")


def _scores_of(
    reward: WeightedReward,
    use: ColumnUse,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> Tensor:
    """Scores (B,) float64 of one reward, validated; NaN stands for None."""
    use.check(columns)
    taken = {name: list(values) for name, values in columns.items() if use.takes(name)}
    try:
        result = reward.function(list(images), list(prompts), **taken)
    except CRDError as error:
        raise CRDError(f"reward {reward.name!r}: {error}") from error
    except Exception as error:
        raise CRDError(f"reward {reward.name!r} raised {one_line(error)}; fix the reward") from error
    scores = score_list(reward.name, result, len(images))
    for index, score in enumerate(scores):
        _check_score(reward, index, score, prompts[index])
    return torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float64)


def _check_score(reward: WeightedReward, index: int, score: float | None, prompt: str) -> None:
    if score is None:
        return
    where = f"reward {reward.name!r} of image {index} (prompt {quote(prompt)})"
    if not math.isfinite(score):
        raise CRDError(f"{where} is {score}; return a finite number, or None if it does not apply")
    if reward.range is not None and not reward.range[0] <= score <= reward.range[1]:
        raise CRDError(f"{where} must lie in {list(reward.range)}, got {score}; fix the reward or its score_range")
