"""The HTTP side of a reward server: who may ask, how much is read, and what is answered."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from crd.serving.service import RefusedError, RewardService, refused
from crd.serving.wire import MAX_HEADER, PROTOCOL, from_json, read_question, unpack

SILENCE_S = 30.0  # that a client may keep in the middle of its body

T = TypeVar("T")


def build_app(service: RewardService, token: str | None) -> FastAPI:
    """The endpoints of docs/reward-server.md.

    Args:
        service: answers the questions.
        token: that every request but `GET /healthz` must carry; None = none.
    """
    # No pages about itself: they would answer without a token.
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    limits = service.limits

    @app.exception_handler(RefusedError)
    async def refuse(request: Request, refusal: RefusedError) -> Response:
        headers = {"Connection": "close"} if refusal.close else {}
        if refusal.retry_after is not None:
            headers["Retry-After"] = str(refusal.retry_after)
        return _answer({"error": " ".join(str(refusal).split())}, refusal.status, headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return _answer({"error": f"{error.detail}: {request.method} {request.url.path}"}, error.status_code)

    @app.get("/healthz")
    async def healthz() -> Response:
        ready = service.status == "ready"
        return _answer({"status": service.status, "rewards": service.info.names}, 200 if ready else 503)

    @app.get("/v1/info")
    async def info(request: Request) -> Response:
        _check_token(request, token)
        service.check_ready()
        return _answer(service.info.to_dict())

    @app.post("/v1/check")
    async def check(request: Request) -> Response:
        _check_token(request, token)

        async def answer(body: bytes) -> dict[str, Any]:
            with refused(422):
                question = read_question(from_json(body, "the body"), limits.max_images)
            await service.check(question, request.is_disconnected)
            return {"protocol": PROTOCOL}

        return await _admit(service, request, MAX_HEADER, answer)

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        _check_token(request, token)

        async def answer(body: bytes) -> dict[str, Any]:
            with refused(422):
                question, images = unpack(body, limits.max_images, limits.max_pixels)
            del body  # while this request waits for its turn, its images lie in memory once
            return {"protocol": PROTOCOL, "scores": await service.score(question, images, request.is_disconnected)}

        return await _admit(service, request, limits.max_body, answer)

    return app


async def _admit(
    service: RewardService, request: Request, most: int, answer: Callable[[bytes], Awaitable[dict[str, Any]]]
) -> Response:
    """What `answer` makes of the body, of `most` bytes at most; no body is kept without a place in the queue."""
    length = request.headers.get("content-length")
    if length is not None and int(length) > most:
        raise _too_large(most)
    try:
        service.enter()
    except RefusedError:
        # Read and thrown away: a client in the middle of its body would see a broken connection, not the answer.
        async for _ in _body(request, most):
            pass
        raise
    try:
        return _answer(await answer(b"".join([chunk async for chunk in _body(request, most)])))
    finally:
        service.leave()


async def _body(request: Request, most: int) -> AsyncIterator[bytes]:
    """The body as it comes in; stops at the first byte too many, whatever its length was said to be."""
    stream, count = request.stream(), 0
    while True:
        try:
            chunk = await asyncio.wait_for(_next(stream), SILENCE_S)
        except asyncio.TimeoutError as error:
            raise RefusedError(408, f"the body stopped for {SILENCE_S:g} s; send it whole", close=True) from error
        except ClientDisconnect as error:
            raise RefusedError(499, "the client has gone") from error
        if chunk is None:
            return
        count += len(chunk)
        if count > most:
            raise _too_large(most)
        yield chunk


async def _next(stream: AsyncIterator[bytes]) -> bytes | None:
    async for chunk in stream:
        return chunk
    return None


def _too_large(most: int) -> RefusedError:
    return RefusedError(413, f"the body is larger than {most} bytes; send fewer images at a time", close=True)


def _check_token(request: Request, token: str | None) -> None:
    if token is None:
        return
    given = request.headers.get("authorization", "").encode("latin-1")
    # In constant time: how long a comparison takes would tell how much of a guess is right.
    if not hmac.compare_digest(given, f"Bearer {token}".encode()):
        raise RefusedError(401, "wrong or missing token; send it as `Authorization: Bearer TOKEN`", close=True)


def _answer(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # Pure ASCII: a prompt that an error quotes may hold what UTF-8 cannot.
    return Response(json.dumps(content, allow_nan=False), status, headers, media_type="application/json")
