"""A reward behind servers: the same numbers as without them, whatever happens to the servers, or a clear end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from reward_functions import brightness, color_code, raising
from reward_servers import ServerProcess, colored, free_port, serving

from crd.config import CRDConfig
from crd.config_io import load_config
from crd.data import load_prompts
from crd.errors import CRDError, ServiceError
from crd.metrics.held_out import HeldOutScores
from crd.rewards import RewardSet
from crd.rewards.remote import RemoteReward
from crd.run_parts import load_judged
from crd.serving.announcement import Limits, ServerInfo
from crd.serving.remote_config import remote_config
from crd.tracker import read_metrics
from crd.trainer import CRDTrainer

IMAGES = [colored(number) for number in range(50)]
PROMPTS = [f"prompt {number}" for number in range(50)]
CODES = [float(number) for number in range(50)]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CRD_REWARD_TOKEN", "CRD_REWARD_WAIT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def remote(tmp_path: Path) -> Callable[..., RemoteReward]:
    """A remote reward with settings in a file."""

    def build(*servers: str, reward: str = "color_code", **settings: Any) -> RemoteReward:
        file = tmp_path / "servers.yaml"
        file.write_text(yaml.safe_dump({"servers": list(servers), **settings}))
        return RemoteReward(f"{file}#{reward}")

    return build


@dataclass
class Reply:
    """What a server in the test sends for scores: JSON, or another body or status; `drop` closes the connection."""

    scores: Any = None
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    after_s: float = 0.0
    drop: bool = False


@dataclass
class Scripted:
    """Announces `color_code` and answers for scores with `replies` in turn, the last of them from then on."""

    url: str = ""
    replies: list[Reply] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=ServerInfo.of(RewardSet(color_code), Limits()).to_dict)
    times: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send(Reply(body=json.dumps(state.info).encode()))

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            with state.lock:
                reply = state.replies[min(len(state.times), len(state.replies) - 1)]
                state.times.append(time.monotonic())
            time.sleep(reply.after_s)
            if not reply.drop:
                self.send(reply)

        def send(self, reply: Reply) -> None:
            body = json.dumps({"protocol": 1, "scores": reply.scores}).encode() if reply.body is None else reply.body
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    state = Scripted()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


GOOD = Reply({"color_code": [0.0, 1.0]})


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_remote_scores_are_the_local_ones(encoding: str, remote: Callable[..., RemoteReward]) -> None:
    with serving([brightness, color_code]) as url:
        local = RewardSet([brightness, color_code]).score(IMAGES, PROMPTS, {})
        settings = {"batch": 7, "encoding": encoding}
        both = [remote(url, reward="brightness", **settings), remote(url, **settings)]
        found = RewardSet(both).score(IMAGES, PROMPTS, {})
    assert list(found.columns) == ["brightness", "color_code"]
    assert found.total.tolist() == local.total.tolist()


def test_named_as_a_source_it_has_the_name_of_its_reward() -> None:
    with serving([color_code]) as one, serving([color_code]) as two:
        rewards = RewardSet([f"remote={one}+{two}/#color_code"], [0.5])
        assert rewards.weights == {"color_code": 0.5}
        assert rewards.score(IMAGES, PROMPTS, {}).total.tolist() == [code / 2 for code in CODES]


def test_the_limits_of_a_server_are_kept(remote: Callable[..., RemoteReward]) -> None:
    seen: list[int] = []

    def widths(images: list[Image.Image], prompts: list[str]) -> list[float]:
        seen.append(len(images))
        return [float(image.width) for image in images]

    images = [Image.new("RGB", (size, 10)) for size in (10, 90, 20, 30, 40, 5, 5, 5, 5)]
    with serving([widths], limits=Limits(3, 100_000, 1000)) as url:
        assert remote(url, reward="widths", concurrency=1)(images, [""] * 9) == [10, 90, 20, 30, 40, 5, 5, 5, 5]
        assert seen == [2, 3, 3, 1]
        with pytest.raises(ServiceError, match="1010 pixels together, at most 1000"):
            remote(url, reward="widths")([Image.new("RGB", (101, 10))], [""])
    with (
        serving([widths], limits=Limits(3, 500, 1000)) as url,
        pytest.raises(ServiceError, match="lower batch, or raise"),
    ):
        remote(url, reward="widths")([Image.new("RGB", (20, 10))], [""])


def test_several_servers_share_the_work(remote: Callable[..., RemoteReward]) -> None:
    seen: dict[str, list[int]] = {"first": [], "second": []}

    def server_named(name: str) -> Any:
        def reward(images: list[Image.Image], prompts: list[str]) -> list[float]:
            seen[name].append(len(images))
            time.sleep(0.05)
            return color_code(images, prompts)

        reward.__name__ = "color_code"
        return reward

    with serving([server_named("first")]) as one, serving([server_named("second")]) as two:
        assert remote(one, two, batch=5)(IMAGES, PROMPTS) == CODES
    assert all(seen.values())
    assert sum(map(sum, seen.values())) == 50


def test_one_of_two_servers_is_dead(remote: Callable[..., RemoteReward], capsys: pytest.CaptureFixture[str]) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    with serving([color_code]) as alive:
        reward = remote(dead, alive, batch=5, wait_s=0)
        reward.self_test()
        printed = " ".join(capsys.readouterr().out.split())
        assert f"warn: no reward server: {dead}: Connection refused" in printed
        assert f"{alive} serves color_code" in printed
        assert reward(IMAGES, PROMPTS) == CODES


def test_all_servers_are_dead(remote: Callable[..., RemoteReward]) -> None:
    dead = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    with pytest.raises(ServiceError, match=r"no reward server answers \(.*refused; .*refused\), waited 0 s"):
        remote(*dead, wait_s=0)(IMAGES, PROMPTS)
    started = time.monotonic()
    with pytest.raises(ServiceError, match=r"waited 0\.7 s"):
        remote(*dead, wait_s=0.7)(IMAGES, PROMPTS)
    assert 0.7 <= time.monotonic() - started < 5


def test_more_clients_than_the_queue_holds_come_back_later(remote: Callable[..., RemoteReward]) -> None:
    def quick(images: list[Image.Image], prompts: list[str]) -> list[float]:
        time.sleep(0.01)
        return color_code(images, prompts)

    with serving([quick], max_queue=2) as url:
        assert remote(url, reward="quick", batch=4, concurrency=6)(IMAGES, PROMPTS) == CODES


def test_a_server_killed_and_started_again_in_the_middle(capsys: pytest.CaptureFixture[str]) -> None:
    """A loop of scoring, as of training: the kill costs time and no score; without patience it ends."""
    server = ServerProcess(["reward_functions:slow_color_code"], free_port(), "token")
    server.start()
    patient, hasty = (remote_with(server.url, wait_s) for wait_s in (60, 0))

    def die_and_return() -> None:
        time.sleep(0.5)
        server.kill()
        time.sleep(0.5)
        server.start(wait=False)

    try:
        rounds = [patient(IMAGES[:10], PROMPTS[:10])]
        assassin = threading.Thread(target=die_and_return)
        assassin.start()
        while assassin.is_alive():
            rounds.append(patient(IMAGES[:10], PROMPTS[:10]))
        rounds.append(patient(IMAGES[:10], PROMPTS[:10]))
        assert all(scores == CODES[:10] for scores in rounds)
        printed = " ".join(capsys.readouterr().out.split())
        assert "waiting up to 60 s for a reward server" in printed
        assert f"{server.url} answers again" in printed
        assert hasty(IMAGES[:2], PROMPTS[:2]) == CODES[:2]
        server.kill()
        with pytest.raises(ServiceError, match=r"no reward server answers .*refused"):
            hasty(IMAGES[:2], PROMPTS[:2])
    finally:
        server.kill()


def remote_with(url: str, wait_s: float) -> RemoteReward:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRD_REWARD_TOKEN", "token")
        patch.setenv("CRD_REWARD_WAIT", str(wait_s))
        reward = RemoteReward(f"{url}#slow_color_code")
    reward.config = replace(reward.config, batch=5, max_retries=1)
    return reward


def test_a_wrong_token_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving([color_code], "right-token") as url:
        for token in ("", "wrong-token"):
            monkeypatch.setenv("CRD_REWARD_TOKEN", token)
            with pytest.raises(ServiceError, match=r"answered 401: wrong or missing token.*set the token") as refused:
                RemoteReward(f"{url}#color_code").self_test()
            assert "right-token" not in str(refused.value)
            assert not token or token not in str(refused.value)
        monkeypatch.setenv("CRD_REWARD_TOKEN", "right-token")
        assert RemoteReward(f"{url}#color_code")(IMAGES, PROMPTS) == CODES


@pytest.mark.parametrize(
    "reply",
    [
        Reply({"color_code": [0.0]}),
        Reply({"color_code": [0.0, 1.0, 2.0]}),
        Reply({"color_code": [0.0, "1.0"]}),
        Reply({"color_code": [0.0, True]}),
        Reply({"color_code": [0.0, [1.0]]}),
        Reply({"color_code": 1.0}),
        Reply({"other": [0.0, 1.0]}),
        Reply({"color_code": [0.0, 1.0], "other": [0.0, 1.0]}),
        Reply({}),
        Reply([0.0, 1.0]),
        Reply(body=b'{"protocol": 1, "scores": {"color_code": [0.0, NaN]}}'),
        Reply(body=b'{"protocol": 1, "scores": {"color_code": [0.0, Infinity]}}'),
        Reply(body=b'{"protocol": 1, "scores": {"color_code": [0.0, 1e999]}}'),
        Reply(body=b'{"protocol": 1, "scores": {"color_code": [0, 1' + b"0" * 400 + b"]}}"),
        Reply(body=b'{"protocol": 2, "scores": {"color_code": [0.0, 1.0]}}'),
        Reply(body=b'{"scores": {"color_code": [0.0, 1.0]}}'),
        Reply(body=b'{"protocol": 1, "scores": {"color_code": [9, 9], "color_code": [0.0, 1.0]}}'),
        Reply(body=b"<html>welcome</html>"),
        Reply(body=b""),
        Reply(body=b"\x80\x04]."),
        Reply(body=b"[" * 100_000),
        Reply(body=b" " * 5_000_000),
        Reply(status=302, headers={"Location": "http://127.0.0.1:1/"}),
        Reply(status=204, body=b""),
        Reply(status=413),
        Reply(status=422),
        Reply(status=404),
    ],
    ids=lambda reply: repr(reply)[:60],
)
def test_nonsense_is_an_error_and_never_a_score(
    reply: Reply, scripted: Scripted, remote: Callable[..., RemoteReward]
) -> None:
    scripted.replies = [reply, GOOD]
    with pytest.raises(ServiceError):
        remote(scripted.url)(IMAGES[:2], PROMPTS[:2])


def test_a_score_out_of_the_announced_range_is_an_error(
    scripted: Scripted, remote: Callable[..., RemoteReward]
) -> None:
    scripted.info["rewards"][0]["range"] = [0, 1]
    scripted.replies = [Reply({"color_code": [None, 1.0]}), Reply({"color_code": [0.0, 1.5]})]
    reward = remote(scripted.url)
    assert reward(IMAGES[:2], PROMPTS[:2]) == [None, 1.0]
    with pytest.raises(ServiceError, match=r"in \[0, 1\], or null, got 1\.5"):
        reward(IMAGES[:2], PROMPTS[:2])


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=500, body=b'{"error": "out of memory"}'),
        Reply(status=504, body=b"<html>"),
        Reply(status=502, body=b"<html>"),
        Reply(status=503, body=b"<html>"),
        Reply(drop=True),
        Reply(body=b'{"protocol": 1', headers={"Content-Length": "1000"}),
        Reply({"color_code": [9.0, 9.0]}, after_s=0.6),
    ],
    ids=["500", "504", "502 of a proxy", "503 of a proxy", "dropped", "cut off", "silent"],
)
def test_a_batch_that_failed_is_sent_again_a_bounded_number_of_times(
    reply: Reply, scripted: Scripted, remote: Callable[..., RemoteReward]
) -> None:
    scripted.replies = [reply, GOOD]
    settings = {"timeout_s": 0.3, "wait_s": 20}
    assert remote(scripted.url, max_retries=1, **settings)(IMAGES[:2], PROMPTS[:2]) == [0.0, 1.0]
    assert len(scripted.times) == 2
    scripted.replies = [reply]
    with pytest.raises(ServiceError, match="got no scores, the last of 2 tries"):
        remote(scripted.url, max_retries=1, **settings)(IMAGES[:2], PROMPTS[:2])
    assert len(scripted.times) == 4


def test_a_server_that_hangs_leaves_its_batches_to_another(
    scripted: Scripted, remote: Callable[..., RemoteReward]
) -> None:
    """However slow the other is, and though the first one goes on to announce itself."""

    def slow(images: list[Image.Image], prompts: list[str]) -> list[float]:
        time.sleep(0.5)
        return color_code(images, prompts)

    slow.__name__ = "color_code"
    scripted.replies = [Reply(after_s=3)]
    with serving([slow]) as url:
        assert remote(scripted.url, url, timeout_s=2, batch=10, max_retries=1, concurrency=1)(IMAGES, PROMPTS) == CODES
    assert scripted.times


def test_what_a_server_says_is_passed_on(remote: Callable[..., RemoteReward]) -> None:
    with serving([raising]) as url, pytest.raises(CRDError, match="RuntimeError: the scorer has no weights"):
        RewardSet(remote(url, reward="raising", max_retries=0)).score(IMAGES, PROMPTS, {})


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(
    scripted: Scripted, remote: Callable[..., RemoteReward]
) -> None:
    busy = Reply(status=429, headers={"Retry-After": "1"})
    scripted.replies = [busy, GOOD]
    assert remote(scripted.url, max_retries=0, wait_s=0)(IMAGES[:2], PROMPTS[:2]) == [0.0, 1.0]
    assert 1.0 <= scripted.times[1] - scripted.times[0] < 3.0
    scripted.replies = [busy]
    with pytest.raises(ServiceError, match=r"the queue was full for 0\.5 s"):
        remote(scripted.url, timeout_s=0.5)(IMAGES[:2], PROMPTS[:2])


def test_servers_that_differ_are_refused(scripted: Scripted, remote: Callable[..., RemoteReward]) -> None:
    with serving([color_code], limits=Limits(max_images=5)) as url:
        with pytest.raises(ServiceError, match="start all servers alike"):
            remote(url, scripted.url).self_test()
        with pytest.raises(ServiceError, match=r"has no reward 'ocr', it serves color_code"):
            remote(url, reward="ocr").self_test()
    scripted.info["protocol"] = 2
    with pytest.raises(ServiceError, match="does not answer as a reward server: protocol must be 1, got 2"):
        remote(scripted.url).self_test()


class Leveled:
    """Needs a column, may take another, and refuses some prompts."""

    judge_name = "eye"

    def __call__(
        self, images: list[Image.Image], prompts: list[str], level: list[Any], shift: Sequence[float] = ()
    ) -> list[float | None]:
        return [None if one is None else one["up"] + more for one, more in zip(level, shift, strict=True)]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if "?" in prompt:
                raise CRDError(f"{prompt!r} asks a question")


def test_columns_and_prompts_are_checked_before_and_sent_with_the_images(remote: Callable[..., RemoteReward]) -> None:
    levels = [None if number % 7 == 0 else {"up": number / 8} for number in range(50)]
    columns = {"level": levels, "shift": [0.5] * 50, "other": [object()] * 50}
    with serving([Leveled()]) as url:
        rewards = RewardSet([remote(url, reward="Leveled", batch=8)])
        rewards.check_prompts(PROMPTS, columns)
        found = rewards.scores(IMAGES, PROMPTS, columns)["Leveled"]
        with pytest.raises(CRDError, match="reward 'Leveled' needs the dataset column 'level', got columns: shift"):
            rewards.check_prompts(PROMPTS, {"shift": [0.5] * 50})
        with pytest.raises(CRDError, match="'why\\?' asks a question"):
            rewards.check_prompts([*PROMPTS[1:], "why?"], columns)
        with pytest.raises(CRDError, match="column 'level' holds nan, which JSON does not carry"):
            rewards.check_prompts(["x"], {"level": [float("nan")]})
    local = RewardSet(Leveled()).scores(IMAGES, PROMPTS, columns)["Leveled"]
    assert [x for x in found.tolist() if x == x] == [x for x in local.tolist() if x == x]
    assert found.isnan().tolist() == local.isnan().tolist()
    assert found.isnan().sum() == 8


def test_as_a_held_out_scorer_it_is_asked_what_it_can_judge_and_warned_of(remote: Callable[..., RemoteReward]) -> None:
    prompts = load_prompts([{"prompt": text, "level": 1, "shift": 0} for text in ("one", "two?", "three")])
    with serving([Leveled()]) as url:
        reward = remote(url, reward="Leveled", wait_s=0)
        held_out = HeldOutScores([reward], prompts)
        assert held_out._judged["Leveled"][1].tolist() == [0, 2]
        assert held_out.warn_of(RewardSet([Leveled()])) != []

        def other(images: list[Image.Image], prompts: list[str]) -> list[float]:
            return []

        other.judge_name = "eye"  # type: ignore[attr-defined]
        assert held_out.warn_of(RewardSet([other])) != []
        assert held_out.warn_of(RewardSet([brightness])) == []
    with pytest.raises(ServiceError, match="no reward server answers"):  # and is not taken for a refused prompt
        HeldOutScores([reward], prompts)


def test_sources_are_written_in_configurations(tmp_path: Path) -> None:
    sources = ("remote=http://a:8000+http://b:8000#ocr", "geneval", "remote=servers.yaml#hpsv2")
    assert load_config(None, {"rewards": ",".join(sources)}).rewards == sources
    assert load_config(None, {"rewards": f"[{', '.join(sources)}]"}).rewards == sources
    (tmp_path / "run.yaml").write_text(f"rewards: [{', '.join(sources)}]\n")
    assert load_config(tmp_path / "run.yaml").rewards == sources


def test_no_images_ask_nobody(remote: Callable[..., RemoteReward], scripted: Scripted) -> None:
    assert remote(scripted.url)([], []) == []
    assert scripted.times == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "written remote=http://host:port#NAME"),
        ("http://a:8000", "written remote=http://host:port#NAME"),
        ("http://a:8000#", "written remote=http://host:port#NAME"),
        ("#ocr", "written remote=http://host:port#NAME"),
        ("http://a:8000+http://a:8000/#ocr", "different addresses"),
        ("http://a:8000+b:8000#ocr", "must be of the form http://host:port, got 'b:8000'"),
        ("http://a:8000?x=1#ocr", "must be of the form"),
        ("http://me:secret@a:8000#ocr", "an address holds no password, that of a does"),
        ("nowhere.yaml#ocr", "no reward servers at nowhere.yaml"),
    ],
)
def test_sources_that_do_not_fit(source: str | None, message: str) -> None:
    with pytest.raises(CRDError) as refused:
        RemoteReward(source)
    assert message in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "servers must be a list of addresses"),
        ({"servers": "http://a:1"}, "servers must be a list of addresses"),
        ({"servers": []}, "one or several different addresses"),
        ({"server": ["http://a:1"]}, "did you mean 'servers'?"),
        ({"servers": ["http://a:1"], "wait_s": -1}, "wait_s of the reward servers must be a number of at least 0"),
        ({"servers": ["http://a:1"], "timeout_s": 0}, "timeout_s of the reward servers must be a positive number"),
        ({"servers": ["http://a:1"], "batch": 0}, "batch of the reward servers must be a whole number of at least 1"),
        ({"servers": ["http://a:1"], "max_retries": 1.5}, "max_retries of the reward servers"),
        ({"servers": ["http://a:1"], "encoding": "jpeg"}, "must be one of raw, png, got 'jpeg'"),
        ({"servers": ["http://a:1"], "token_file": 3}, "token_file of the reward servers must be text"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "servers.yaml"
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(CRDError) as refused:
        remote_config(str(file))
    assert message in str(refused.value)
    assert str(file) in str(refused.value)


def test_how_long_to_wait_comes_from_the_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert remote_config("http://a:1").wait_s == 300
    monkeypatch.setenv("CRD_REWARD_WAIT", "7.5")
    assert remote_config("http://a:1+https://b/rewards/").servers == ("http://a:1", "https://b/rewards")
    assert remote_config("http://a:1").wait_s == 7.5
    file = tmp_path / "servers.yaml"
    file.write_text("servers: [http://a:1]\nwait_s: 3\n")
    assert remote_config(str(file)).wait_s == 3
    for text in ("soon", "-1", "inf"):
        monkeypatch.setenv("CRD_REWARD_WAIT", text)
        with pytest.raises(CRDError):
            remote_config("http://a:1")


def test_training_on_a_remote_reward_is_training_on_the_local_one(
    config: CRDConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRD_REWARD_TOKEN", "never-written-down")
    with serving([brightness], "never-written-down") as url:
        runs = {"local": "reward_functions:brightness", "remote": f"remote={url}#brightness"}
        for name, reward in runs.items():
            args = replace(config, rewards=(reward,), group_size=3, eval_prompts=None, output_dir=str(tmp_path / name))
            CRDTrainer(args=args).train()
    local, far = (read_metrics(tmp_path / name, "train") for name in runs)
    assert len(local) == 2
    for mine, theirs in zip(local, far, strict=True):
        assert {k: v for k, v in mine.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}
    written = [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    assert any(b"#brightness" in path.read_bytes() for path in written)
    assert not any(b"never-written-down" in path.read_bytes() for path in written)


def test_training_whose_server_dies_saves_stops_and_goes_on(
    config: CRDConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server dies over the images of the second update."""
    monkeypatch.setenv("CRD_REWARD_WAIT", "0")
    monkeypatch.setenv("DIE_AT_CALL", "2")
    config = replace(config, eval_prompts=None)
    server = ServerProcess(["reward_functions:killed"], free_port())
    server.start()
    try:
        args = replace(config, rewards=(f"remote={server.url}#killed",))
        with pytest.raises(CRDError, match="no reward server answers"):
            CRDTrainer(args=args).train()
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["update-000001"]
        monkeypatch.setenv("DIE_AT_CALL", "1000")
        server.start()
        CRDTrainer(args=args).train(resume=True)
    finally:
        server.kill()
    CRDTrainer(args=replace(config, output_dir=str(tmp_path / "local"))).train()
    rewards = [
        [line["reward"] for line in read_metrics(run, "train")] for run in (tmp_path / "run", tmp_path / "local")
    ]
    assert rewards[0] == rewards[1]
    assert len(rewards[0]) == 2


def test_servers_are_not_waited_for_longer_than_processes_wait_for_each_other(
    remote: Callable[..., RemoteReward], tmp_path: Path, prompt_file: Path
) -> None:
    reward = remote("http://127.0.0.1:1", wait_s=600)
    for patience in (600.0, 30.0):
        with pytest.raises(CRDError, match=r"may wait 600 s .* lower its wait_s, or raise peer_timeout"):
            RewardSet([reward], patience=patience)
        with pytest.raises(CRDError, match=f"give up after peer_timeout={patience:g} s"):
            HeldOutScores([reward], load_prompts(["a"]), patience)
    assert RewardSet([reward], patience=601.0).rewards
    # Before any server is waited for; in one process nobody waits.
    config = CRDConfig(
        rewards=(f"remote={tmp_path / 'servers.yaml'}#color_code",), prompts=str(prompt_file), peer_timeout=60.0
    )
    with pytest.raises(CRDError, match="give up after peer_timeout=60 s"):
        load_judged(config, processes=2)
    remote("http://127.0.0.1:1", wait_s=0)
    with pytest.raises(CRDError, match="no reward server answers"):
        load_judged(config, processes=2)
