"""Held-out scores of a fixed prompt set: by scorers that a run watches and is not trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from crd.data import PromptDataset
from crd.errors import CRDError, ServiceError
from crd.rewards import RewardFunction, RewardSet
from crd.rewards.asked import own_columns


class HeldOutScores:
    """Scorers under the reward contract, each asked about those prompts of a dataset that it can judge.

    The dataset's column `rewards` is not heeded: it says what is trained on.

    Args:
        scorers: names, `NAME=SOURCE`, `module:function` strings or callables, as for rewards; may be empty.
        dataset: the evaluation prompts; None: no scorers.
        patience: as of `RewardSet`.

    Raises:
        CRDError: an unknown or repeated name, one that may wait too long, or a scorer that can judge none of the
            prompts.
    """

    def __init__(
        self, scorers: Sequence[str | RewardFunction], dataset: PromptDataset | None, patience: float = math.inf
    ) -> None:
        if scorers and dataset is None:
            raise CRDError("held_out scorers need evaluation prompts, got none; set eval_prompts, or leave them out")
        self.dataset = dataset or PromptDataset((), {})
        self.scorers = RewardSet(scorers, gaps=True, patience=patience) if scorers else None
        self._judged = {}
        for reward in () if self.scorers is None else self.scorers.rewards:
            alone = RewardSet(reward.function, gaps=True)
            self._judged[reward.name] = alone, _judged(reward.name, alone, self.dataset)

    @property
    def names(self) -> list[str]:
        """Names of the scorers."""
        return list(self._judged)

    @property
    def sources(self) -> dict[str, str]:
        """How each scorer was asked for, by name."""
        return {} if self.scorers is None else self.scorers.sources

    def use_device(self, device: str) -> None:
        """Tell scorers that have networks of their own where the run computes."""
        if self.scorers is not None:
            self.scorers.use_device(device)

    def self_test(self) -> None:
        """Refuse a broken scorer; see `RewardSet.self_test`."""
        if self.scorers is not None:
            self.scorers.self_test()

    def warn_of(self, rewards: RewardSet) -> list[str]:
        """One line for each scorer that the run is also trained on, by its name or by the same judge under another."""
        trained = {reward.name: reward for reward in rewards.rewards if reward.weight != 0}
        judges = {judge: name for name, reward in trained.items() if (judge := reward.judge) is not None}
        held_out = () if self.scorers is None else self.scorers.rewards
        lines = []
        for scorer in held_out:
            same = scorer.name if scorer.name in trained else judges.get(scorer.judge or "")
            if same is not None:
                lines.append(f"held_out {scorer.name} is no independent judge: the run is trained on {same}, "
                             "which judges by the same means")  # fmt: skip
        return lines

    def score(self, images: Sequence[Image.Image], prompt_id: Tensor) -> dict[str, Tensor]:
        """Scores of B images by each scorer, (B,) float64; NaN where it has no answer.

        Args:
            images: B PIL images.
            prompt_id: (B,) int64 index of each image's prompt in the dataset.

        Raises:
            CRDError: a scorer failed.
        """
        found: dict[str, Tensor] = {}
        for name, (scorer, judged) in self._judged.items():
            asked = torch.isin(prompt_id, judged).nonzero()[:, 0].tolist()
            rows = prompt_id[asked].tolist()
            prompts = [self.dataset.prompts[row] for row in rows]
            chosen = [images[i] for i in asked], prompts, own_columns(self.dataset.columns, rows)
            (scores,) = scorer.scores(*chosen).values()
            found[name] = torch.full((len(images),), math.nan, dtype=torch.float64)
            found[name][asked] = scores
        return found

    def check_answers(self, scores: Mapping[str, Tensor], prompt_id: Tensor) -> None:
        """Refuse scores (B,), by name, of all images of an evaluation when a scorer gave none.

        Raises:
            CRDError: a scorer answered for none of the images that it was asked about.
        """
        for name, (_, judged) in self._judged.items():
            asked = torch.isin(prompt_id, judged)
            if bool(asked.any()) and bool(scores[name][asked].isnan().all()):
                raise CRDError(f"held_out {name} gave no score for any of {int(asked.sum())} images; check the scorer")


def _judged(name: str, scorer: RewardSet, dataset: PromptDataset) -> Tensor:
    """Indices of the prompts that one scorer does not refuse."""
    judged, first = [], None
    for index, prompt in enumerate(dataset.prompts):
        try:
            scorer.check_prompts([prompt], own_columns(dataset.columns, [index]))
        except ServiceError:  # says nothing about the prompt
            raise
        except CRDError as error:
            first = first or error
        else:
            judged.append(index)
    if not judged:
        raise CRDError(f"held_out {name} can judge none of the evaluation prompts: {first}")
    return torch.tensor(judged)
