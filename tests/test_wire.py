"""The format of requests to a reward server: what is packed is what is read, and nothing else is."""

from __future__ import annotations

import io
import json
import struct
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from crd.errors import CRDError
from crd.rewards import RewardSet
from crd.serving.announcement import Limits, ServerInfo
from crd.serving.wire import MAGIC, MAX_HEADER, Question, from_json, pack, plain_columns, to_json, unpack
from crd.serving.wire_images import Encoding, encode

ASKED = Question(["one", "two"], ["a cat", 'x "ß\n'], {"level": [1, None], "tag": [[{"a": 0.5}], "b"]})


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def body(header: Any = None, data: bytes = b"abc", **changed: Any) -> bytes:
    """A body of one raw pixel, with some values of its header in place of the right ones."""
    right = {
        "rewards": ["one"],
        "prompts": ["a cat"],
        "columns": {},
        "images": [{"encoding": "raw", "bytes": 3, "shape": [1, 1, 3], "dtype": "uint8"}],
    }
    text = json.dumps({**right, **changed} if header is None else header).encode()
    return MAGIC + struct.pack(">I", len(text)) + text + data


def png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def as_png(data: bytes) -> bytes:
    return body(data=data, images=[{"encoding": "png", "bytes": len(data)}])


def read(data: bytes, images: int = 8, pixels: int = 10_000) -> Any:
    return unpack(data, images, pixels)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=2),
    encoding=st.sampled_from(["raw", "png"]),
)
def test_what_is_packed_is_read(sizes: list[tuple[int, int]], encoding: Encoding) -> None:
    images = [noise(*size) for size in sizes]
    question, received = read(pack(ASKED, [encode(image, encoding) for image in images]))
    assert question == ASKED
    for image, sent in zip(received, images, strict=True):
        decoded = image.decode()
        assert (decoded.mode, decoded.size) == ("RGB", sent.size)
        assert decoded.tobytes() == sent.tobytes()


def test_a_body_written_by_hand() -> None:
    """2 x 1 px, red and blue: what docs/reward-server.md tells another language to send."""
    text = (
        b'{"rewards": ["ocr"], "prompts": ["p"], "columns": {}, '
        b'"images": [{"encoding": "raw", "bytes": 6, "shape": [1, 2, 3], "dtype": "uint8"}]}'
    )
    question, (image,) = read(b"CRD1" + bytes([0, 0, 0, len(text)]) + text + bytes([255, 0, 0, 0, 0, 255]))
    assert question == Question(["ocr"], ["p"], {})
    assert [image.decode().getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (0, 0, 255)]


@given(st.data())
def test_a_damaged_body_is_refused_or_read_and_never_fails_otherwise(data: st.DataObject) -> None:
    whole = bytearray(pack(ASKED, [encode(noise(5, 4), "png"), encode(noise(2, 3), "raw")]))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    for damaged in (bytes(whole), cut, data.draw(st.binary(max_size=200)), MAGIC + cut):
        with suppress(CRDError):
            _, images = read(damaged)
            for image in images:
                image.decode()


@pytest.mark.parametrize("cut", [0, 3, 4, 7, 8, 20, -3, -1])
def test_a_body_cut_off_is_refused(cut: int) -> None:
    with pytest.raises(CRDError):
        read(body()[:cut])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04\x95pickle", "must begin with CRD1"),
        (body() + b"x", "1 bytes follow the last image"),
        (body(data=b"ab"), "should have 1 bytes more"),
        (MAGIC + b"\xff\xff\xff\xff{}", "the header should have 4294967295 bytes, but 2 follow"),
        (body(header=[1]), "must be a JSON object, got list"),
        (MAGIC + struct.pack(">I", 4) + b"{{{{", "is no JSON"),
        (MAGIC + struct.pack(">I", 9) + b'{"a":NaN}', "NaN is no JSON number"),
        (MAGIC + struct.pack(">I", 13) + b'{"a":1,"a":2}', "a key is repeated"),
        (MAGIC + struct.pack(">I", 100_000) + b"[" * 100_000, "is no JSON"),
        (body(more=1), "needed are rewards, prompts and columns"),
        (body(prompts=[]), "`prompts` must be a list of one or more strings"),
        (body(prompts=[1]), "`prompts` must be a list of one or more strings"),
        (body(prompts=["x"] * 9), "at most 8 images are taken at a time, got 9"),
        (body(rewards="one"), "`rewards` must be a list of one or more strings"),
        (body(columns=[]), "`columns` must map names"),
        (body(columns={"rewards": [["one"]]}), "names other than 'rewards'"),
        (body(columns={"level": [1, 2]}), "column 'level' must be a list of one value a prompt (1)"),
        (body(images=[]), "one entry a prompt (1), got 0"),
        (body(images=["x"]), "an image needs `bytes`"),
        (body(images=[{"bytes": -3}]), "an image needs `bytes`"),
        (body(images=[{"bytes": True}]), "an image needs `bytes`"),
        (body(images=[{"encoding": "pickle", "bytes": 3}]), "encoding must be one of raw, png, got 'pickle'"),
        (body(images=[{"encoding": ["raw"], "bytes": 3}]), "encoding must be one of"),
        (body(images=[{"encoding": "raw", "bytes": 3}]), "a raw image needs the keys"),
        (
            body(images=[{"encoding": "raw", "bytes": 3, "shape": [1, 1, 3], "dtype": "float32"}]),
            "dtype of raw images must be uint8, got 'float32'",
        ),
        (
            body(images=[{"encoding": "raw", "bytes": 3, "shape": [1, 2, 3], "dtype": "uint8"}]),
            "a raw image of shape [1, 2, 3] has 6 bytes, got 3",
        ),
        *(
            (
                body(images=[{"encoding": "raw", "bytes": 3, "shape": shape, "dtype": "uint8"}]),
                "shape of raw images must be [height, width, 3]",
            )
            for shape in ([3], [1, 3, 1], [3, 1, 1], [-1, -1, 3], [1.0, 1, 3], [True, 1, 3], "113", None)
        ),
        (as_png(b"GIF89a" + b"\0" * 40), "is no PNG file"),
        (as_png(png(noise(4, 4).convert("L"))), "8-bit RGB, got bit depth 8, color type 0"),
        (as_png(png(noise(4, 4).convert("RGBA"))), "8-bit RGB, got bit depth 8, color type 6"),
        (as_png(png(noise(4, 4).convert("P"))), "8-bit RGB, got bit depth 8, color type 3"),
    ],
)
def test_what_is_no_body(data: bytes, message: str) -> None:
    with pytest.raises(CRDError) as refused:
        read(data)
    assert message in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_png_bomb_is_refused_by_its_first_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was decoded"))
    for width, height, message in ((60_000, 60_000, "3600000000 pixels"), (2**32 - 1, 2**32 - 1, "pixels together")):
        start = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBB", width, height, 8, 2)
        with pytest.raises(CRDError, match=message):
            read(as_png(start + b"\0" * 100))
    with pytest.raises(CRDError, match="must have pixels, got 0 x 5"):
        read(as_png(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBB", 0, 5, 8, 2) + b"\0" * 9))


def test_a_png_that_lies_about_its_size_or_is_cut_off_is_refused() -> None:
    for data in (png(noise(30, 30))[:-400], png(noise(4, 4))[:30] + b"\0" * 30):
        _, (image,) = read(as_png(data))
        with pytest.raises(CRDError, match="damaged PNG"):
            image.decode()


def test_a_second_header_of_another_size_is_refused_undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    small = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    large = png(noise(400, 300))
    _, (image,) = read(as_png(large[:8] + small + large[8:]), pixels=1)
    monkeypatch.setattr(PngImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(CRDError, match=r"PNG of 1 x 1 px, RGB, is of \(400, 300\), RGB, in a later header"):
        image.decode()


def test_pixels_are_counted_over_all_images() -> None:
    data = pack(ASKED, [encode(noise(10, 10), "raw"), encode(noise(10, 11), "png")])
    assert len(read(data, pixels=210)[1]) == 2
    with pytest.raises(CRDError, match="210 pixels together, at most 209"):
        read(data, pixels=209)


def test_only_rgb_is_sent() -> None:
    for mode in ("L", "RGBA", "P", "CMYK"):
        with pytest.raises(CRDError, match=f"must be RGB, got {mode}"):
            encode(Image.new(mode, (2, 2)), "raw")


def test_columns_that_json_would_change_are_refused() -> None:
    kept = {"a": [None, True, 1, -0.5, "x", [{"b": []}]]}
    assert plain_columns(kept) == kept
    assert json.loads(json.dumps(plain_columns({"a": [(1, 2)]}))) == {"a": [[1, 2]]}
    for value in (float("nan"), float("inf"), {1: 2}, b"x", object(), [{"a": {1}}]):
        with pytest.raises(CRDError, match="column 'a' holds"):
            plain_columns({"a": ["fine", value]})


def test_a_header_has_a_longest_length() -> None:
    with pytest.raises(CRDError, match="lower batch"):
        to_json(Question(["r"], ["x" * MAX_HEADER], {}).to_dict())
    with pytest.raises(CRDError, match="at most"):
        from_json(b" " * (MAX_HEADER + 1), "the header")


class Leveled:
    score_range = (0.0, 2.0)
    judge_name = "eye"

    def __call__(
        self, images: list[Image.Image], prompts: list[str], level: list[int], more: Any = None
    ) -> list[float]:
        return [1.0] * len(images)


def test_what_a_server_announces_is_read_as_it_was() -> None:
    info = ServerInfo.of(RewardSet([Leveled(), "jpeg-compressibility"]), Limits(3, 10_000, 50))
    card = info.rewards[0]
    assert (card.required, card.optional, card.range, card.judge) == (("level",), ("more",), (0.0, 2.0), "eye")
    assert ServerInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": 2},
        {"protocol": None},
        {"more": 1},
        {"encodings": ["raw"]},
        {"rewards": {}},
        {"rewards": ["one"]},
        {"limits": {"max_images": 0, "max_body": 1, "max_pixels": 1}},
        {"limits": {"max_images": 1, "max_body": 1}},
        {"limits": {"max_images": 1, "max_body": 1, "max_pixels": 10**12}},
    ],
    ids=str,
)
def test_other_announcements_are_refused(change: dict[str, Any]) -> None:
    right = ServerInfo.of(RewardSet([Leveled()]), Limits()).to_dict()
    for name, value in (("name", 1), ("required", "level"), ("everything", 0), ("range", [1]), ("range", [2, 1])):
        with pytest.raises(CRDError):
            ServerInfo.from_dict({**right, "rewards": [{**right["rewards"][0], name: value}]})
    with pytest.raises(CRDError):
        ServerInfo.from_dict({**right, **change})
