"""The body of a request: its length-prefixed JSON header, then the images, one after the other.

    body = MAGIC, length of the header (4 bytes, big-endian), header (UTF-8 JSON), bytes of image 1, image 2, ...

docs/reward-server.md describes it for readers who write a client or a server of their own.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crd.errors import CRDError
from crd.records import ASKED
from crd.serving.wire_images import WireImage, byte_count, received
from crd.text_files import strict_json

PROTOCOL = 1
MAGIC = b"CRD1"
MAX_HEADER = 4_000_000  # bytes; as Python objects JSON takes many times its size
_LENGTH = struct.Struct(">I")
_START = len(MAGIC) + _LENGTH.size


@dataclass(frozen=True)
class Question:
    """What is asked about B images: B prompts, and dataset columns of length B, of the rewards named."""

    rewards: list[str]
    prompts: list[str]
    columns: Mapping[str, list[Any]]

    def to_dict(self) -> dict[str, Any]:
        return {"rewards": self.rewards, "prompts": self.prompts, "columns": dict(self.columns)}


def pack(question: Question, images: Sequence[WireImage]) -> bytes:
    """The body that asks for scores.

    Raises:
        CRDError: the header is longer than a server reads.
    """
    header = to_json({**question.to_dict(), "images": [image.entry() for image in images]})
    return b"".join([MAGIC, _LENGTH.pack(len(header)), header, *(image.data for image in images)])


def unpack(body: bytes, max_images: int, max_pixels: int) -> tuple[Question, list[WireImage]]:
    """The question and the images of a body; no image is decoded.

    Args:
        body: what was sent.
        max_images: most images.
        max_pixels: most pixels of all images together.

    Raises:
        CRDError: anything that is not exactly as `pack` has it, or beyond a limit.
    """
    if len(body) < _START or not body.startswith(MAGIC):
        raise CRDError(f"the body must begin with {MAGIC.decode()} and the length of its header, got {body[:8]!r}")
    (length,) = _LENGTH.unpack_from(body, len(MAGIC))
    if length > len(body) - _START:
        raise CRDError(f"the header should have {length} bytes, but {len(body) - _START} follow; send the whole body")
    values = from_json(body[_START : _START + length], "the header")
    entries = values.pop("images", None)
    question = read_question(values, max_images)
    if not isinstance(entries, list) or len(entries) != len(question.prompts):
        got = len(entries) if isinstance(entries, list) else type(entries).__name__
        raise CRDError(f"`images` must be a list of one entry a prompt ({len(question.prompts)}), got {got}")
    images, start = [], _START + length
    for entry in entries:
        stop = start + byte_count(entry)
        if stop > len(body):
            raise CRDError(f"the images should have {stop - len(body)} bytes more; send the whole body")
        images.append(received(entry, body[start:stop]))
        start = stop
    if start != len(body):
        raise CRDError(f"{len(body) - start} bytes follow the last image; leave them out")
    if (pixels := sum(image.pixels for image in images)) > max_pixels:
        raise CRDError(
            f"the images have {pixels} pixels together, at most {max_pixels} are taken; send fewer at a time"
        )
    return question, images


def read_question(values: Mapping[str, Any], max_images: int) -> Question:
    """A question from parsed JSON.

    Raises:
        CRDError: missing or further keys, wrong types, lengths that differ, or no prompts or too many.
    """
    if set(values) != {"rewards", "prompts", "columns"}:
        raise CRDError(f"needed are rewards, prompts and columns, got {sorted(values)!r:.100}")
    rewards, prompts, columns = values["rewards"], values["prompts"], values["columns"]
    for name, texts in (("rewards", rewards), ("prompts", prompts)):
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise CRDError(f"`{name}` must be a list of one or more strings, got {texts!r:.60}")
    if len(prompts) > max_images:
        raise CRDError(f"at most {max_images} images are taken at a time, got {len(prompts)}; send fewer")
    if not isinstance(columns, dict) or ASKED in columns:
        raise CRDError(f"`columns` must map names other than {ASKED!r} to lists, got {columns!r:.60}")
    for name, column in columns.items():
        if not isinstance(column, list) or len(column) != len(prompts):
            raise CRDError(f"column {name!r:.60} must be a list of one value a prompt ({len(prompts)})")
    return Question(rewards, prompts, columns)


def to_json(values: Mapping[str, Any]) -> bytes:
    """A header, or a body without images.

    Raises:
        CRDError: longer than a server reads.
    """
    text = json.dumps(values, allow_nan=False).encode()
    if len(text) > MAX_HEADER:
        count = len(values["prompts"])
        raise CRDError(f"prompts and columns of {count} images take {len(text)} bytes, a reward server reads "
                       f"{MAX_HEADER}; lower batch, or drop columns")  # fmt: skip
    return text


def from_json(text: bytes, what: str) -> dict[str, Any]:
    """The object of a JSON text: no NaN, no infinity, no repeated key.

    Raises:
        CRDError: it is anything else, or too long; begins with `what`.
    """
    if len(text) > MAX_HEADER:
        raise CRDError(f"{what} has {len(text)} bytes, at most {MAX_HEADER} are read; send fewer images at a time")
    try:
        values = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise CRDError(f"{what} is no JSON: {error!s:.100}") from error
    if not isinstance(values, dict):
        raise CRDError(f"{what} must be a JSON object, got {type(values).__name__}")
    return values


def plain_columns(columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Dataset columns as JSON carries them; tuples become lists.

    Raises:
        CRDError: a value that JSON cannot carry unchanged.
    """
    found = {}
    for name, values in columns.items():
        for value in values:
            if not _is_plain(value):
                raise CRDError(f"column {name!r} holds {value!r:.60}, which JSON does not carry; "
                               "use text, finite numbers, true, false, null, lists and objects")  # fmt: skip
        found[name] = list(values)
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return abs(value) < float("inf")  # false for NaN too
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, str | int)
