"""A reward that is computed elsewhere: by one or several servers that `crd serve-reward` started."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from PIL import Image

from crd.console import console
from crd.errors import CRDError, ServiceError
from crd.serving.announcement import Limits, RewardCard
from crd.serving.client import NoAnswerError, RewardClient
from crd.serving.dispatch import Dispatch, Server
from crd.serving.remote_config import remote_config
from crd.serving.wire import Question, pack, plain_columns
from crd.serving.wire_images import encode

BODY_SHARE = 0.9  # of a body for bare pixels; the rest is for prompts, columns, and what PNG adds to noise

T = TypeVar("T")


class RemoteReward:
    """The reward NAME of every server of a source; each image gets the score that one of them computed for it.

    While no server is there, a call waits as long as its settings say, and then raises: no score is made up. Servers
    must announce the same reward and limits.

    Args:
        source: `SOURCE#NAME`, SOURCE as `remote_config` reads it: `http://gpu1:8000+http://gpu2:8000#ocr`, or
            `servers.yaml#ocr`.

    Raises:
        CRDError: no NAME, or settings or a token that do not fit.
    """

    def __init__(self, source: str | None = None) -> None:
        place, _, self.reward_name = (source or "").rpartition("#")
        if not place or not self.reward_name:
            raise CRDError(f"a remote reward is written remote=http://host:port#NAME or remote=servers.yaml#NAME, got "
                           f"remote{f'={source}' if source else ''}; name the server and its reward")  # fmt: skip
        self.config = remote_config(place)
        token = self.config.token()
        self._servers = [Server(RewardClient(url, token, self.config.timeout_s)) for url in self.config.servers]
        self._offer: tuple[RewardCard, Limits] | None = None
        self._lock = threading.Lock()  # several servers may be met at a time

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], **columns: Sequence[Any]) -> list[Any]:
        """Scores of B images by the servers, in their order; None where the reward does not apply."""
        card, limits = self._announced()
        taken = self._taken(columns)

        def piece(rows: range) -> Callable[[RewardClient], list[float | None]]:
            def ask(client: RewardClient) -> list[float | None]:
                sent = [encode(images[row], self.config.encoding) for row in rows]
                body = pack(_question(card.name, prompts, taken, rows), sent)
                if len(body) > limits.max_body:
                    raise ServiceError(f"{len(rows)} images take {len(body)} bytes, {client.url} reads "
                                       f"{limits.max_body}; lower batch, or raise the server's --max-body")  # fmt: skip
                return client.score(body, card, len(rows))

            return ask

        pieces = [piece(rows) for rows in _batches(images, self.config.batch, limits)]
        return [score for scores in self._ask(pieces) for score in scores]

    def check_columns(self, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
        """Refuse prompts and columns that the servers' reward refuses.

        Raises:
            CRDError: a column is missing, or the reward's own complaint; `ServiceError` if no server can tell.
        """
        card, limits = self._announced()
        card.columns.check(columns)
        taken = self._taken(columns)
        step = min(self.config.batch, limits.max_images)
        batches = [range(start, min(start + step, len(prompts))) for start in range(0, len(prompts), step)]
        self._ask([partial(_check, _question(card.name, prompts, taken, rows)) for rows in batches])

    def self_test(self) -> None:
        """Tell what each server offers, or that it is not there; the servers tested their rewards when they started.

        Raises:
            ServiceError: none is there, or they differ.
        """
        self._announced()
        for server in self._servers:
            try:
                names = self._meet(server.client)
            except NoAnswerError as trouble:
                console.print(f"warn: no reward server: {trouble}", style="yellow", markup=False, highlight=False)
            else:
                console.print(f"{server.client.url} serves {', '.join(names)}", markup=False, highlight=False)

    @property
    def wait_s(self) -> float:
        """Seconds that a call may wait for a server."""
        return self.config.wait_s

    @property
    def judge_name(self) -> str:
        """What the servers' reward judges by; its own name if it does not say."""
        return self._announced()[0].judge or self.reward_name

    def _announced(self) -> tuple[RewardCard, Limits]:
        if self._offer is None:
            self._ask([self._meet])
        assert self._offer is not None  # a piece was answered, so a server was met
        return self._offer

    def _meet(self, client: RewardClient) -> list[str]:
        """The names of the rewards of a server, whose offer of ours must be that of the others."""
        info = client.info()
        cards = [card for card in info.rewards if card.name == self.reward_name]
        if not cards:
            raise ServiceError(f"{client.url} has no reward {self.reward_name!r}, it serves {', '.join(info.names)}; "
                               "name one of them after the #")  # fmt: skip
        offer = cards[0], info.limits
        with self._lock:
            if self._offer is not None and offer != self._offer:
                raise ServiceError(f"{client.url} offers {offer}, another server, or the same one before, "
                                   f"{self._offer}; start all servers alike")  # fmt: skip
            self._offer = offer
        return info.names

    def _ask(self, pieces: Sequence[Callable[[RewardClient], T]]) -> list[T]:
        return Dispatch(self._servers, self.config, self._meet, pieces, f"reward {self.reward_name}").run()

    def _taken(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        uses = self._announced()[0].columns
        return plain_columns({name: values for name, values in columns.items() if uses.takes(name)})


def _check(question: Question, client: RewardClient) -> None:
    client.check(question)


def _question(name: str, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]], rows: range) -> Question:
    return Question(
        [name], [prompts[row] for row in rows], {key: [v[row] for row in rows] for key, v in columns.items()}
    )


def _batches(images: Sequence[Image.Image], most: int, limits: Limits) -> Iterator[range]:
    """Neighbouring images, as many at a time as asked for and as the limits allow, at least one."""
    most = min(most, limits.max_images)
    pixels = min(limits.max_pixels, int(BODY_SHARE * limits.max_body) // 3)
    start, inside = 0, 0
    for row, image in enumerate(images):
        own = image.width * image.height
        if row > start and (row - start == most or inside + own > pixels):
            yield range(start, row)
            start, inside = row, 0
        inside += own
    if images:
        yield range(start, len(images))
