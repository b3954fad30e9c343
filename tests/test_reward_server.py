"""The reward server under uvicorn, asked as any program may ask it: right, wrong, too much and all at once."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from reward_functions import brightness, color_code, raising
from reward_servers import ServerProcess, colored, free_port, port_of, question, request, serving, wait_until

from crd.cli import main
from crd.errors import CRDError
from crd.rewards import RewardSet
from crd.serving import app
from crd.serving.announcement import Limits
from crd.serving.server import RewardServer, is_loopback, listen
from crd.serving.service import RewardService
from crd.serving.tokens import read_token
from crd.serving.wire import MAGIC, Question, pack
from crd.serving.wire_images import encode

TOKEN = "a-long-secret"
SMALL = Limits(max_images=8, max_body=100_000, max_pixels=2_000)


class Picky:
    """Judges loud prompts alone; the rest it leaves to others. Needs a column."""

    judge_name = "ear"

    def __call__(self, images: list[Image.Image], prompts: list[str], level: list[Any]) -> list[float | None]:
        return [number if "!" in text else None for number, text in zip(level, prompts, strict=True)]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if "?" in prompt:
                raise CRDError(f"{prompt} asks a question")
            if "#" in prompt:
                raise KeyError("#")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving([color_code, brightness, raising, Picky()], TOKEN, SMALL, max_queue=256) as address:
        yield address


@pytest.fixture
def port(url: str) -> int:
    return port_of(url)


def score(port: int, body: Any, token: str | None = TOKEN) -> tuple[int, dict[str, Any], dict[str, str]]:
    return request(port, "POST", "/v1/score", body, token)


def head(length: str) -> bytes:
    """The first lines of a request with the right token."""
    return f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n{length}\r\n\r\n".encode()


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_each_image_gets_its_score(port: int, encoding: str) -> None:
    status, answer, _ = score(port, question([colored(n) for n in (7, 300, 70_000)], encoding=encoding))
    assert (status, answer) == (200, {"protocol": 1, "scores": {"color_code": [7.0, 300.0, 70_000.0]}})


def test_several_rewards_columns_and_none(port: int) -> None:
    asked = Question(["brightness", "Picky"], ["quiet", "loud!"], {"level": [1, 0.25]})
    status, answer, _ = score(
        port, pack(asked, [encode(Image.new("RGB", (2, 2), c), "raw") for c in ("white", "black")])
    )
    assert (status, answer["scores"]) == (200, {"brightness": [1.0, 0.0], "Picky": [None, 0.25]})


def test_200_requests_at_once_get_their_own_scores(port: int) -> None:
    def ask(number: int) -> list[float]:
        images = [colored(number * 5 + k, (3 + number % 4, 2)) for k in range(1 + number % 5)]
        status, answer, _ = score(port, question(images, encoding=("raw", "png")[number % 2]))
        assert status == 200, answer
        return list(answer["scores"]["color_code"])

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, range(200)))
    for number, scores in enumerate(answers):
        assert scores == [float(number * 5 + k) for k in range(1 + number % 5)]


@pytest.mark.parametrize("given", [None, "", "a-long-secre", TOKEN + "x", "\xe9"])
def test_a_wrong_token_gets_nothing(port: int, given: str | None) -> None:
    for method, path in (("GET", "/v1/info"), ("POST", "/v1/score"), ("POST", "/v1/check")):
        status, answer, headers = request(port, method, path, question([colored(1)]), given)
        assert (status, headers["connection"]) == (401, "close")
        assert "token" in answer["error"]
        assert TOKEN not in str(answer)


def test_health_needs_no_token_and_info_tells_what_is_served(port: int) -> None:
    status, health, _ = request(port, "GET", "/healthz")
    assert (status, health["status"], health["rewards"][-1]) == (200, "ready", "Picky")
    status, info, _ = request(port, "GET", "/v1/info", token=TOKEN)
    assert info["rewards"][-1] == {
        "name": "Picky", "required": ["level"], "optional": [], "everything": False, "range": None, "judge": "ear",
    }  # fmt: skip
    assert info["limits"] == {"max_images": 8, "max_body": 100_000, "max_pixels": 2_000}
    for path in ("/", "/docs", "/openapi.json", "/v1/scores"):
        assert request(port, "GET", path, token=TOKEN)[0] == 404


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "must begin with CRD1"),
        (b"\x80\x04K\x01.", "must begin with CRD1"),
        (MAGIC + b"\0\0\0\x05{nope", "is no JSON"),
        (question([colored(1)])[:-1], "send the whole body"),
        (question([colored(1)] * 9), "at most 8 images"),
        (question([colored(1, (50, 41))]), "2050 pixels together, at most 2000"),
        (question([colored(1)], "nobody"), "no reward 'nobody' here; this server has color_code, brightness"),
        (question([colored(1)], "Picky"), "needs the dataset column 'level'"),
    ],
)
def test_garbage_is_refused_in_one_line(port: int, body: bytes, message: str) -> None:
    status, answer, _ = score(port, body)
    assert status == 422 or (status == 500 and "column" in message)
    assert message in answer["error"]
    assert "\n" not in answer["error"]


def test_a_damaged_png_and_a_bomb_are_refused(port: int) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((30, 30), 90).convert("RGB").save(buffer, format="PNG")
    whole = buffer.getvalue()
    bomb = whole[:16] + struct.pack(">II", 50_000, 50_000) + whole[24:]
    asked = Question(["color_code"], ["x"], {})
    for data, message in ((whole[:500], "image 0: damaged PNG"), (bomb, "2500000000 pixels together")):
        image = encode(colored(1), "png")
        object.__setattr__(image, "data", data)
        status, answer, _ = score(port, pack(asked, [image]))
        assert (status, message in answer["error"]) == (422, True), answer


def test_a_reward_that_fails_says_why(port: int) -> None:
    status, answer, _ = score(port, question([colored(1)], "raising"))
    assert (status, answer["error"]) == (
        500, "reward 'raising' raised RuntimeError: the scorer has no weights; fix the reward",
    )  # fmt: skip


def test_prompts_are_checked_without_images(port: int) -> None:
    def check(prompts: list[str], columns: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        body = json.dumps({"rewards": ["Picky"], "prompts": prompts, "columns": columns})
        return request(port, "POST", "/v1/check", body, TOKEN)[:2]

    assert check(["one"], {"level": [1]}) == (200, {"protocol": 1})
    assert check(["two?"], {"level": [1]}) == (422, {"error": "two? asks a question"})
    # The reward's own fault, which says nothing about the prompt.
    status, answer = check(["three#"], {"level": [1]})
    assert (status, "raised KeyError: '#'" in answer["error"]) == (500, True)
    assert check(["one"], {})[0] == 422
    assert check(["one"], {"level": 1})[0] == 422


def test_a_length_of_1_gb_is_refused_unread(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as one:
        one.sendall(head("Content-Length: 1000000000"))
        answer = one.recv(65536)  # not a byte of the body was sent
        assert answer.startswith(b"HTTP/1.1 413"), answer
        while more := one.recv(65536):  # and the server closes
            answer += more
    assert b"larger than 100000 bytes" in answer


def test_a_body_without_a_length_is_read_to_the_limit_only(port: int) -> None:
    sent = 0
    with socket.create_connection(("127.0.0.1", port), timeout=10) as one:
        one.sendall(head("Transfer-Encoding: chunked"))
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        with suppress(OSError):  # reset, or a broken pipe
            while sent < 200_000_000:
                one.sendall(chunk)
                sent += 65536
    assert sent < 50_000_000  # what the buffers of the connection hold


def test_a_client_that_stops_in_its_body_does_not_hold_a_place(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SILENCE_S", 0.3)
    with socket.create_connection(("127.0.0.1", port_of(url)), timeout=10) as one:
        one.sendall(head("Content-Length: 100") + b"CRD")
        assert one.recv(100).startswith(b"HTTP/1.1 408")


class Held:
    """Color codes, once it is let go; keeps the sizes of its batches."""

    def __init__(self) -> None:
        self.go_on, self.batches = threading.Event(), list[int]()

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        self.batches.append(len(images))
        assert self.go_on.wait(30)
        return color_code(images, prompts)

    def ask(self, port: int, count: int = 1) -> tuple[int, dict[str, Any], dict[str, str]]:
        return request(port, "POST", "/v1/score", question([colored(5)] * count, "Held"))


def test_a_full_queue_sends_clients_away_and_the_loop_stays_awake() -> None:
    held = Held()
    with serving([held], max_queue=2) as url, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(held.ask, port_of(url)) for _ in range(8)]
        wait_until(lambda: sum(future.done() for future in asked) == 6)
        assert request(port_of(url), "GET", "/healthz")[0] == 200  # while a batch is being scored
        held.go_on.set()
        answers = [future.result() for future in asked]
    assert sorted(status for status, _, _ in answers) == [200] * 2 + [429] * 6
    for status, answer, headers in answers:
        if status == 429:
            assert int(headers["retry-after"]) >= 1
            assert "it holds no more" in answer["error"]
        else:
            assert answer["scores"] == {"Held": [5.0]}


def test_a_client_that_left_the_queue_costs_nothing() -> None:
    held, inside = Held(), list[Any]()
    with serving([held], inside=inside) as url, ThreadPoolExecutor(2) as pool:
        port = port_of(url)
        first = pool.submit(held.ask, port, 1)
        wait_until(lambda: held.batches == [1])
        left = http.client.HTTPConnection("127.0.0.1", port)
        left.request("POST", "/v1/score", question([colored(1)] * 2, "Held"))
        wait_until(lambda: inside[0]() == 2)
        left.close()
        last = pool.submit(held.ask, port, 3)
        wait_until(lambda: inside[0]() == 3)
        held.go_on.set()
        assert (first.result()[0], last.result()[0]) == (200, 200)
    assert held.batches == [1, 3]


def test_a_server_that_stops_finishes_the_batch_and_sends_the_rest_away() -> None:
    held, inside = Held(), list[Any]()
    with ThreadPoolExecutor(3) as pool:
        with serving([held], inside=inside) as url:
            asked = [pool.submit(held.ask, port_of(url)) for _ in range(3)]
            wait_until(lambda: inside[0]() == 3)
            threading.Timer(0.5, held.go_on.set).start()
        answers = [future.result() for future in asked]
    assert sorted(status for status, _, _ in answers) == [200, 503, 503]
    assert {answer.get("error", "scored") for _, answer, _ in answers} == {"scored", "the server is closing; try later"}


class Loading:
    """Brightness, after a self-test that takes as long as it is told to."""

    def __init__(self, error: str = "") -> None:
        self.go_on, self.error, self.device = threading.Event(), error, ""

    def use_device(self, device: str) -> None:
        self.device = device

    def self_test(self) -> None:
        self.go_on.wait(20)
        if self.error:
            raise CRDError(self.error)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        return brightness(images, prompts)


def test_while_loading_it_says_so() -> None:
    reward = Loading()
    with serving([reward], ready=False) as url:
        port = port_of(url)
        wait_until(lambda: request(port, "GET", "/healthz")[1]["status"] == "loading")
        assert request(port, "GET", "/healthz")[0] == 503
        status, answer, headers = request(port, "POST", "/v1/score", question([colored(0)], "Loading"))
        assert (status, answer["error"], headers["retry-after"]) == (503, "the server is loading; try later", "1")
        reward.go_on.set()
        wait_until(lambda: request(port, "GET", "/healthz")[0] == 200)
        assert request(port, "POST", "/v1/score", question([colored(0)], "Loading"))[0] == 200
    assert reward.device == "cpu"


def test_a_broken_reward_ends_the_server() -> None:
    reward = Loading("no weights")
    reward.go_on.set()
    server = RewardServer(RewardService(RewardSet([reward]), Limits(), 4), None)
    with listen("127.0.0.1", 0) as listening, pytest.raises(CRDError, match="no weights"):
        asyncio.run(server.answer(listening, "cpu"))


def test_a_process_that_gets_1_gb_does_not_grow() -> None:
    server = ServerProcess(["reward_functions:color_code"], free_port(), TOKEN)
    server.start("--max-body", "1", "--max-images", "4")
    try:
        assert server.process is not None
        status = Path(f"/proc/{server.process.pid}/status")
        if not status.exists():
            pytest.skip("no /proc here")

        def peak() -> int:
            (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
            return int(line.split()[1]) * 1000

        before = peak()
        megabyte = b"x" * 1_000_000
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as one, suppress(OSError):
                one.sendall(head("Content-Length: 1000000000"))
                for _ in range(1000):
                    one.sendall(megabyte)
        assert peak() - before < 20_000_000
        assert request(server.port, "POST", "/v1/score", question([colored(9)]), TOKEN)[1]["scores"] == {
            "color_code": [9.0]
        }
    finally:
        printed = server.stop()
    assert TOKEN not in printed
    assert f"serving remote={server.url}#color_code" in printed
    assert "ready" in printed
    assert "stopped" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jpeg-compressibility", "--host", "0.0.0.0"], "can be reached from other machines, which takes a token"),
        (["jpeg-compressibility", "--host", "::"], "takes a token"),
        (["jpeg-compressibility", "--host", "somewhere"], "takes a token"),
        (["jpeg-compresibility"], "did you mean 'jpeg-compressibility'?"),
        (["jpeg-compressibility", "--port", "0"], "must be an integer from 1 to 65535"),
        (["jpeg-compressibility", "--max-queue", "0"], "must be an integer of 1 or more"),
        (["jpeg-compressibility", "--max-pixels", "100000000"], "at most 89478485"),
        (["jpeg-compressibility", "--device", "tpu"], "must be auto, cpu, cuda or cuda:N"),
        (["jpeg-compressibility", "--token-file", "nowhere"], "no token file at nowhere"),
        ([], "REWARD"),
    ],
)
def test_bad_arguments_are_told_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CRD_REWARD_TOKEN", raising=False)
    assert main(["serve-reward", *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in " ".join(printed.split())
    assert "Traceback" not in printed


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert main(["serve-reward", "jpeg-compressibility", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_which_hosts_are_this_machine_alone() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example", ""))


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRD_REWARD_TOKEN", "from-the-environment")
    assert read_token(None) == "from-the-environment"
    file = tmp_path / "token"
    file.write_text("from-a-file\n")
    assert read_token(str(file)) == "from-a-file"
    assert read_token(None, "CRD_NOBODY_SETS_THIS") is None
    for content in ("", " \n", "two words", "two\nlines", "gr\u00fcn"):
        file.write_text(content)
        with pytest.raises(CRDError) as refused:
            read_token(str(file))
        assert content.strip() == "" or content not in str(refused.value)
