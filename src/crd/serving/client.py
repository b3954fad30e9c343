"""One reward server as its clients see it: three requests, and what can become of them."""

from __future__ import annotations

import http.client
import math
import ssl
import sys
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from crd.errors import CRDError, ServiceError
from crd.rewards.signature import quote
from crd.serving.announcement import RewardCard, ServerInfo
from crd.serving.wire import MAX_HEADER, PROTOCOL, Question, from_json, to_json

CONNECT_S = 10.0  # also for what a server offers, which it tells without scoring
MAX_ANSWER = MAX_HEADER
REFUSED, NOT_FOUND, TOO_LONG, UNFIT, BUSY = (401, 403), 404, (408, 504), 422, 429
ABSENT = (502, 503)  # a proxy without its server, or whose server broke off; a server that loads or closes


class NoAnswerError(Exception):
    """A request without an answer, which another server or a later time may give.

    `down`: the server cannot be asked at all. `sent`: it may have worked on the request, and failed over it.
    `retry_after`: seconds after which a busy server wants to be asked again; None = it is not busy.
    """

    def __init__(self, reason: str, *, down: bool, sent: bool, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.down, self.sent, self.retry_after = down, sent, retry_after


class RewardClient:
    """Asks one server; each request has a connection of its own, so that none is held over a restart.

    Args:
        url: such as http://host:8000.
        token: or None.
        timeout_s: seconds of silence that are waited for.
    """

    def __init__(self, url: str, token: str | None, timeout_s: float) -> None:
        self.url, self._timeout_s = url, timeout_s
        self._parts = urlsplit(url)
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def info(self) -> ServerInfo:
        """What the server offers.

        Raises:
            NoAnswerError: no answer.
            ServiceError: it refuses the token, or is no reward server of this protocol.
        """
        values = self._ask("GET", "/v1/info", None, min(CONNECT_S, self._timeout_s))
        try:
            return ServerInfo.from_dict(values)
        except CRDError as error:
            raise ServiceError(f"{self.url} does not answer as a reward server: {error}") from error

    def check(self, question: Question) -> None:
        """Raise `CRDError` for prompts and columns that the server's reward refuses; else as `score`."""
        self._ask("POST", "/v1/check", to_json(question.to_dict()), self._timeout_s)

    def score(self, body: bytes, card: RewardCard, count: int) -> list[float | None]:
        """The scores of the `count` images of a body by one reward.

        Raises:
            NoAnswerError: no answer.
            ServiceError: a refused request, or an answer that is not `count` finite numbers or null, in range.
        """
        answer = self._ask("POST", "/v1/score", body, self._timeout_s)
        scores = answer.get("scores")
        found = scores.get(card.name) if isinstance(scores, dict) else None
        right = answer.get("protocol") == PROTOCOL and isinstance(scores, dict) and set(scores) == {card.name}
        if not right or not isinstance(found, list) or len(found) != count:
            raise ServiceError(f"{self.url} must answer with {count} scores of {card.name!r}, got {answer!r:.150}")
        return [self._number(score, card) for score in found]

    def _number(self, score: Any, card: RewardCard) -> float | None:
        if score is None:
            return None
        low, high = card.range or (-math.inf, math.inf)
        if type(score) not in (int, float) or not low <= score <= high or abs(score) > sys.float_info.max:
            told = "finite" if card.range is None else f"in [{low}, {high}]"
            raise ServiceError(
                f"scores of {card.name!r} from {self.url} must be numbers, {told}, or null, got {score!r:.60}"
            )
        return float(score)

    def _ask(self, method: str, path: str, body: bytes | None, timeout_s: float) -> dict[str, Any]:
        status, headers, text = self._exchange(method, path, body, timeout_s)
        if status == 200:
            try:
                return from_json(text, "the answer")
            except CRDError as error:
                raise ServiceError(f"{self.url}{path} does not answer as a reward server: {error}") from error
        reason = _reason(text)
        told = f"{self.url} answered {status}{reason and f': {reason}'}"
        if status in REFUSED:
            raise ServiceError(f"{told}; set the token that the server was started with")
        if status == NOT_FOUND:
            raise ServiceError(f"{told}; is this the address of a reward server?")
        if status == UNFIT and path == "/v1/check":
            raise CRDError(f"{self.url}: {reason}")
        if status == BUSY:
            raise NoAnswerError(told, down=False, sent=False, retry_after=_seconds(headers.get("Retry-After")))
        if status in ABSENT:
            # A server that turns work away says why; behind a proxy that answers for it, it may have died of the work.
            raise NoAnswerError(told, down=True, sent=method == "POST" and not (status == 503 and reason))
        if status >= 500 or status in TOO_LONG:
            raise NoAnswerError(told, down=False, sent=True)
        raise ServiceError(f"{told}; see docs/reward-server.md")

    def _exchange(
        self, method: str, path: str, body: bytes | None, timeout_s: float
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = self._connection()
        try:
            connection.connect()
        except OSError as error:
            raise NoAnswerError(f"{self.url}: {_told(error)}", down=True, sent=False) from error
        try:
            connection.sock.settimeout(timeout_s)
            # A server that refuses a body may close in the middle of it; its answer says why.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, self._parts.path + path, body, {**self._headers, "Connection": "close"})
            answer = connection.getresponse()
            text = answer.read(MAX_ANSWER + 1)
        except TimeoutError as error:
            reason = f"{self.url} was silent for {timeout_s:g} s"
            raise NoAnswerError(reason, down=False, sent=True) from error
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswerError(f"{self.url} broke off: {_told(error)}", down=True, sent=True) from error
        finally:
            connection.close()
        if answer.length and len(text) <= MAX_ANSWER:
            raise NoAnswerError(f"{self.url} broke off in the middle of its answer", down=True, sent=True)
        return answer.status, answer.headers, text

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=CONNECT_S)
        return http.client.HTTPSConnection(host, port, timeout=CONNECT_S, context=ssl.create_default_context())


def _reason(text: bytes) -> str:
    """What the server says is wrong, in one line; empty if it says nothing."""
    try:
        said = from_json(text, "the answer").get("error")
    except CRDError:  # a proxy's page, say
        return ""
    return quote(said, limit=300)[1:-1] if isinstance(said, str) else ""


def _seconds(text: str | None) -> float:
    """Of a header Retry-After, which may also be missing or a date."""
    return float(text) if text is not None and text.isdigit() and len(text) < 5 else 1.0


def _told(error: Exception) -> str:
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or f"{type(error).__name__} {error}".strip()
