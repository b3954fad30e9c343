"""Rewards of the images that are finished, by a thread, while the rest of a rollout is drawn."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from PIL import Image
from torch import Tensor

from crd.records import PromptBatch, RewardOutput
from crd.rewards import RewardSet


class ScoringThread:
    """One thread that scores parts of a rollout in their order; as a context, it ends with it.

    It takes no part in exchanges between processes. An error of a reward is raised by `result`.

    Args:
        rewards: to ask.
        batch: images of this process.
        places: of those that count, in ascending order; the others are drawn, but judged elsewhere.
    """

    def __init__(self, rewards: RewardSet, batch: PromptBatch, places: Tensor) -> None:
        self._rewards, self._batch, self._counted = rewards, batch, frozenset(places.tolist())
        self._pending: list[Future[RewardOutput]] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards")

    def __enter__(self) -> ScoringThread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Also after an error and Ctrl-C: a reward that is at work must not meet the next update's.
        self._thread.shutdown(wait=True, cancel_futures=True)

    def begin(self) -> None:
        """A rollout begins; parts of one that broke off do not count."""
        for future in self._pending:
            future.cancel()
        self._pending.clear()

    def take(self, rows: Tensor, images: list[Image.Image]) -> None:
        """Score the images of `rows` (n,) when those before them are done."""
        chosen = [place for place, row in enumerate(rows.tolist()) if row in self._counted]
        if chosen:
            batch, judged = self._batch.select(rows[chosen]), [images[place] for place in chosen]
            self._pending.append(self._thread.submit(self._rewards.score, judged, batch.prompts, batch.columns))

    def result(self) -> RewardOutput:
        """Scores of all images that count, once they are there.

        Raises:
            CRDError: of a reward.
        """
        parts = [future.result() for future in self._pending]
        if not parts:  # this process has images of others alone
            none = self._batch.select(torch.arange(0))
            return self._rewards.score([], none.prompts, none.columns)
        return RewardOutput(
            torch.cat([part.total for part in parts]),
            {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns},
        )
