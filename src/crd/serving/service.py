"""Rewards behind a queue: loaded once, asked by one batch at a time in a thread of their own."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal, TypeVar

from crd.errors import CRDError, ServiceError, told_of
from crd.records import ASKED
from crd.rewards import RewardSet
from crd.serving.announcement import Limits, ServerInfo
from crd.serving.wire import Question
from crd.serving.wire_images import WireImage

LONGEST_RETRY_S = 60

T = TypeVar("T")


class RefusedError(Exception):
    """A request that gets no scores, and the HTTP status that says why."""

    def __init__(self, status: int, reason: str, retry_after: int | None = None, *, close: bool = False) -> None:
        super().__init__(reason)
        self.status, self.retry_after = status, retry_after
        self.close = close  # the connection too: the rest of the body is not wanted


@contextmanager
def refused(status: int) -> Iterator[None]:
    """A `CRDError` inside becomes a refusal; one of a reward that is broken is a failure, whatever was asked."""
    try:
        yield
    except ServiceError as error:
        raise RefusedError(500, str(error)) from error
    except CRDError as error:
        raise RefusedError(status, str(error)) from error


class RewardService:
    """Scores of one `RewardSet` for any number of clients; nothing but the event loop calls it.

    Args:
        rewards: what is served.
        limits: announced, and for whoever reads requests.
        max_queue: requests inside at a time: uploading, waiting or being scored.
    """

    def __init__(self, rewards: RewardSet, limits: Limits, max_queue: int) -> None:
        self.info = ServerInfo.of(rewards, limits)
        self.limits = limits
        self.status: Literal["loading", "ready", "failed", "closing"] = "loading"
        self._rewards = rewards
        self._max_queue, self._inside = max_queue, 0
        self._turn = asyncio.Lock()  # lets waiting requests through in their order
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward-server")
        self._last_s = 1.0  # which the last batch took

    async def load(self, device: str) -> None:
        """Bring the networks to `device` and run the self-tests.

        Raises:
            CRDError: a reward is broken.
        """

        def load() -> None:
            self._rewards.use_device(device)
            self._rewards.self_test()

        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, load)
        except BaseException:
            self.status = "failed"
            raise
        if self.status == "loading":
            self.status = "ready"

    def close(self) -> None:
        """Refuse all that is not being scored yet."""
        self.status = "closing"

    def enter(self) -> None:
        """Take a place in the queue, which `leave` gives back.

        Raises:
            RefusedError: not ready, or the queue is full.
        """
        self.check_ready()
        if self._inside >= self._max_queue:
            wait = min(max(1, math.ceil(self._last_s)), LONGEST_RETRY_S)
            raise RefusedError(429, f"{self._inside} requests are in the queue, it holds no more; try later", wait)
        self._inside += 1

    def leave(self) -> None:
        self._inside -= 1

    def check_ready(self) -> None:
        """Raise `RefusedError` while loading and when closing."""
        if self.status != "ready":
            raise RefusedError(503, f"the server is {self.status}; try later", 1)

    async def score(
        self, question: Question, images: Sequence[WireImage], gone: Callable[[], Awaitable[bool]]
    ) -> dict[str, list[float | None]]:
        """Scores of the rewards asked for, by name; None where one does not apply.

        Args:
            question: about the images.
            images: as received.
            gone: whether nobody waits for the answer any more; asked when it is this request's turn.

        Raises:
            RefusedError: an unknown reward or a damaged image (422), a reward that failed (500), or a shutdown (503).
        """
        self._check_names(question)

        def work() -> dict[str, list[float | None]]:
            decoded = []
            for number, image in enumerate(images):
                with refused(422), told_of(f"image {number}"):
                    decoded.append(image.decode())
            with refused(500):
                found = self._rewards.scores(decoded, question.prompts, _columns(question))
            return {
                name: [None if math.isnan(score) else score for score in found[name].tolist()]
                for name in question.rewards
            }

        return await self._in_turn(work, gone)

    async def check(self, question: Question, gone: Callable[[], Awaitable[bool]]) -> None:
        """Refuse prompts and columns that the rewards asked for cannot score.

        Raises:
            RefusedError: as `score`; 422 is the rewards' own complaint.
        """
        self._check_names(question)

        def work() -> None:
            with refused(422):
                self._rewards.check_prompts(question.prompts, _columns(question))

        await self._in_turn(work, gone)

    async def _in_turn(self, work: Callable[[], T], gone: Callable[[], Awaitable[bool]]) -> T:
        async with self._turn:
            self.check_ready()
            if await gone():
                raise RefusedError(499, "the client has gone")
            started = time.monotonic()
            try:
                return await asyncio.get_running_loop().run_in_executor(self._thread, work)
            finally:
                self._last_s = time.monotonic() - started

    def _check_names(self, question: Question) -> None:
        for name in question.rewards:
            if name not in self.info.names:
                raise RefusedError(422, f"no reward {name!r:.60} here; this server has {', '.join(self.info.names)}")
        if len(set(question.rewards)) != len(question.rewards):
            raise RefusedError(422, f"a reward is asked for twice: {question.rewards!r:.100}")


def _columns(question: Question) -> dict[str, list[object]]:
    """The columns, with the one that tells a `RewardSet` whom to ask."""
    return {**question.columns, ASKED: [question.rewards] * len(question.prompts)}
