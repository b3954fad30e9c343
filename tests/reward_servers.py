"""Reward servers for tests: real ones under uvicorn, in a thread or in a process of their own."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from crd.rewards import RewardFunction, RewardSet
from crd.serving.announcement import Limits
from crd.serving.server import RewardServer, listen
from crd.serving.service import RewardService
from crd.serving.wire import Question, pack
from crd.serving.wire_images import encode

HERE = Path(__file__).parent


@contextmanager
def serving(
    rewards: Sequence[str | RewardFunction],
    token: str | None = None,
    limits: Limits | None = None,
    max_queue: int = 16,
    ready: bool = True,
    inside: list[Callable[[], int]] | None = None,
) -> Iterator[str]:
    """The address of a server in a thread; `inside` is given what tells how many requests are in its queue."""
    listening = listen("127.0.0.1", 0)
    service = RewardService(RewardSet(rewards), limits or Limits(), max_queue)
    server = RewardServer(service, token)
    if inside is not None:
        inside.append(lambda: service._inside)
    thread = threading.Thread(target=lambda: asyncio.run(server.answer(listening, "cpu")))
    thread.start()
    port = listening.getsockname()[1]
    try:
        if ready:
            wait_until(lambda: request(port, "GET", "/healthz")[0] == 200)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


@dataclass
class ServerProcess:
    """`crd serve-reward` in a process, which may be killed and started again on the same port."""

    rewards: list[str]
    port: int
    token: str | None = None
    process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *options: str, wait: bool = True) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        environment |= {} if self.token is None else {"CRD_REWARD_TOKEN": self.token}
        command = [sys.executable, "-m", "crd", "serve-reward", *self.rewards, "--port", str(self.port), *options]
        self.process = subprocess.Popen(
            command, cwd=HERE, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if wait:
            wait_until(lambda: request(self.port, "GET", "/healthz")[0] == 200)

    def kill(self) -> None:
        """As a machine dies."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def stop(self) -> str:
        """As Ctrl-C does; what it printed."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=20)[0]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_until(holds: Callable[[], bool], seconds: float = 40.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if holds():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def request(
    port: int, method: str, path: str, body: Any = None, token: str | None = None, **headers: str
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, JSON and headers of one plain request; names of headers in small letters."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        own = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            own["Authorization"] = f"Bearer {token}"
        connection.request(method, path, body, own)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), {name.lower(): text for name, text in answer.getheaders()}
    finally:
        connection.close()


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def colored(number: int, size: tuple[int, int] = (4, 3)) -> Image.Image:
    """An image of one color, which is its number."""
    return Image.new("RGB", size, (number // 65536, number // 256 % 256, number % 256))


def question(images: Sequence[Image.Image], reward: str = "color_code", encoding: Any = "raw") -> bytes:
    """The body that asks for the scores of some images."""
    asked = Question([reward], [f"image {number}" for number in range(len(images))], {})
    return pack(asked, [encode(image, encoding) for image in images])
