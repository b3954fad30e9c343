"""Work for several reward servers: whoever is free takes the next piece, and a server that fails gives it back."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Generic, TypeVar

from crd.console import console, progress_steps
from crd.errors import ServiceError
from crd.serving.client import NoAnswerError, RewardClient
from crd.serving.remote_config import RemoteConfig

FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 10.0  # between tries of one server; doubles, and varies so that clients spread

T = TypeVar("T")


class Server:
    """One server, and whether it can be asked. `lock` guards the rest."""

    def __init__(self, client: RewardClient) -> None:
        self.client = client
        self.lock = threading.Lock()
        self.known = False  # it has told what it offers since it was last found down
        self.down_since: float | None = None  # on the monotonic clock
        self.reason = ""
        self.failures = 0  # tries in a row that found it down


class Dispatch(Generic[T]):
    """The answers to some pieces of work, in their order, by any of the servers.

    A piece goes back and to the next free server when its own is gone, busy or fails over it; `RemoteConfig` says how
    often and how long. One piece without an answer in these bounds ends them all: nothing is left out or made up.

    Args:
        servers: that may be asked.
        config: bounds.
        meet: asks a server what it offers, and raises `ServiceError` if that is not what the others do.
        pieces: each asks a server one thing.
        title: of the progress bar.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        config: RemoteConfig,
        meet: Callable[[RewardClient], object],
        pieces: Sequence[Callable[[RewardClient], T]],
        title: str,
    ) -> None:
        self._servers, self._config, self._meet, self._pieces = servers, config, meet, pieces
        self._title = title
        self._changed = threading.Condition()  # guards all that follows
        self._pending = deque(range(len(pieces)))
        self._answers: dict[int, T] = {}
        self._failure: BaseException | None = None
        self._tries = [0] * len(pieces)
        self._failed_at: dict[int, Server] = {}
        self._busy_since: dict[int, float] = {}
        self._told_to_wait = False
        self._over = False
        self._random = Random()

    def run(self) -> list[T]:
        """All answers.

        Raises:
            ServiceError: no server was there for `wait_s`, a piece failed too often, or a server answers nonsense.
            CRDError: what else a piece raised.
        """
        for server in self._servers:
            server.down_since = None  # waiting begins anew with each call
            for _ in range(min(self._config.concurrency, len(self._pieces))):
                # Daemons: nothing waits for one that still knocks at a silent machine.
                threading.Thread(target=self._work, args=(server,), daemon=True).start()
        try:
            with progress_steps(self._title) as progress:
                while not self._finished():
                    progress(len(self._answers), len(self._pieces))
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()
        if self._failure is not None:
            raise self._failure
        return [self._answers[number] for number in range(len(self._pieces))]

    def _finished(self) -> bool:
        """Wait for another answer; whether it was the last, or there will be none."""
        with self._changed:
            answers = len(self._answers)
            ended = answers == len(self._pieces) or self._failure is not None
            if not ended:
                self._changed.wait_for(lambda: self._failure is not None or len(self._answers) > answers)
            return ended

    def _work(self, server: Server) -> None:
        try:
            while self._reach(server) and (number := self._take(server)) is not None:
                self._try(server, number)
        except BaseException as error:  # raised again where `run` waits
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _reach(self, server: Server) -> bool:
        """Wait until the server is there, without holding work that others could do; False when all is over."""
        while not self._over:
            with server.lock:
                if server.known:
                    return True
                if self._over:
                    break
                try:
                    self._meet(server.client)
                except NoAnswerError as trouble:
                    delay = self._found_down(server, trouble)
                else:
                    self._found_up(server)
                    return True
            self._pause(delay)
        return False

    def _take(self, server: Server) -> int | None:
        """A piece of work for the server, once there is one; None when all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._piece_for(server) is not None)
            number = None if self._over else self._piece_for(server)
            if number is not None:
                self._pending.remove(number)
            return number

    def _piece_for(self, server: Server) -> int | None:
        """The next piece; one that this server failed over is for the others, as long as one of them is there."""
        alone = all(one is server or one.down_since is not None for one in self._servers)
        return next((one for one in self._pending if alone or self._failed_at.get(one) is not server), None)

    def _try(self, server: Server, number: int) -> None:
        try:
            answer = self._pieces[number](server.client)
        except NoAnswerError as trouble:
            # Before the piece is given back: another thread of this server would send it to the dying one at once.
            with server.lock:
                if trouble.down:
                    delay = self._found_down(server, trouble)
                elif trouble.sent:
                    server.known = False  # it may hang: whether it is there is asked before it gets another piece
            self._give_back(number, server, trouble)
            if not trouble.down:
                delay = self._delay(self._tries[number]) if trouble.retry_after is None else trouble.retry_after
            self._pause(delay)
        else:
            with self._changed:
                self._answers[number] = answer
                self._changed.notify_all()

    def _give_back(self, number: int, server: Server, trouble: NoAnswerError) -> None:
        """For another try; raises `ServiceError` when there were enough."""
        config, now = self._config, time.monotonic()
        with self._changed:
            if trouble.sent:
                self._tries[number] += 1
                self._failed_at[number] = server
                if self._tries[number] > config.max_retries:
                    raise ServiceError(f"a batch got no scores, the last of {self._tries[number]} tries: {trouble}; "
                                       "see the server's log") from trouble  # fmt: skip
            if trouble.retry_after is None:
                self._busy_since.pop(number, None)
            elif now - self._busy_since.setdefault(number, now) > config.timeout_s:
                raise ServiceError(f"the queue was full for {config.timeout_s:g} s: {trouble}; start another server, "
                                   "or raise timeout_s") from trouble  # fmt: skip
            self._pending.appendleft(number)
            self._changed.notify_all()

    def _found_down(self, server: Server, trouble: NoAnswerError) -> float:
        """Note it; seconds until the next try. Raises `ServiceError` when all servers were down for `wait_s`."""
        now = time.monotonic()
        server.known, server.reason = False, str(trouble)
        server.failures += 1
        if server.down_since is None:
            server.down_since = now
            with self._changed:
                self._changed.notify_all()
        delay, down = self._delay(server.failures), [one.down_since for one in self._servers]
        since = [moment for moment in down if moment is not None]
        if len(since) < len(down):
            return delay
        left = self._config.wait_s - (now - max(since))
        reasons = "; ".join(one.reason for one in self._servers)
        if left <= 0:
            raise ServiceError(f"no reward server answers ({reasons}), waited {self._config.wait_s:g} s; start one, "
                               "and go on") from trouble  # fmt: skip
        self._tell_to_wait(f"waiting up to {self._config.wait_s:g} s for a reward server: {reasons}")
        return min(delay, left)

    def _found_up(self, server: Server) -> None:
        server.known, server.down_since, server.failures = True, None, 0
        with self._changed:
            if self._told_to_wait:
                console.print(f"{server.client.url} answers again", markup=False, highlight=False)
            self._told_to_wait = False

    def _tell_to_wait(self, line: str) -> None:
        with self._changed:
            if not self._told_to_wait:
                console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
            self._told_to_wait = True

    def _delay(self, failures: int) -> float:
        longest = min(FIRST_DELAY_S * 2.0 ** max(0, failures - 1), LONGEST_DELAY_S)
        return longest * self._random.uniform(0.5, 1.0)

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._over, timeout=seconds)
