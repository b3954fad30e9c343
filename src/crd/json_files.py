"""JSON files of runs and evaluations, every value checked as it is read, every complaint with its file and line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crd.errors import CRDError
from crd.text_files import read_text


class JsonObject:
    """A JSON object and the place it came from; numbers may be null, which is read as NaN.

    Args:
        content: the object.
        where: file, and line if it has several, for messages.
    """

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content, self.where = content, where

    def has(self, name: str) -> bool:
        """Whether `name` is there and not null."""
        return self.content.get(name) is not None

    def text(self, name: str) -> str:
        value = self._value(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        return value

    def one_of(self, name: str, known: Sequence[str]) -> str:
        text = self.text(name)
        if text not in known:
            raise self._wrong(name, f"one of {', '.join(known)}", text)
        return text

    def integer(self, name: str, least: int | None = 0) -> int:
        value = self._value(name)
        if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
            raise self._wrong(name, "an integer" if least is None else f"an integer of at least {least}", value)
        return value

    def flag(self, name: str) -> bool:
        value = self._value(name)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def number(self, name: str) -> float:
        value = self._value(name)
        if not _is_number(value):
            raise self._wrong(name, "a number or null", value)
        return _number(value)

    def real(self, name: str) -> float:
        """A number that must be there."""
        value = self.number(name)
        if math.isnan(value):
            raise self._wrong(name, "a finite number", self.content[name])
        return value

    def inner(self, name: str) -> JsonObject:
        value = self._value(name)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object", value)
        return JsonObject(value, f"{self.where}, {name}")

    def items(self, name: str) -> list[Any]:
        value = self._value(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a list", value)
        return value

    def objects(self, name: str) -> list[JsonObject]:
        """The entries of a list, each of which must be an object."""
        entries = enumerate(self.items(name), start=1)
        return [_object(entry, f"{self.where}, {name} entry {number}") for number, entry in entries]

    def texts(self, name: str) -> tuple[str, ...]:
        values = self.items(name)
        for value in values:
            if not isinstance(value, str):
                raise self._wrong(name, "a list of strings", value)
        return tuple(values)

    def indices(self, name: str, below: int) -> np.ndarray:
        """(N,) int64, each in [0, below)."""
        values = self.items(name)
        for value in values:
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
                raise self._wrong(name, f"a list of integers from 0 to {below - 1}", value)
        return np.array(values, dtype=np.int64)

    def numbers(self, name: str, length: int) -> np.ndarray:
        """(length,) float64, NaN for null."""
        values = self.items(name)
        if len(values) != length:
            raise CRDError(f"{self.where}: {name} must hold {length} numbers, got {len(values)}; restore the file")
        for value in values:
            if not _is_number(value):
                raise self._wrong(name, "a list of numbers or null", value)
        return np.array([_number(value) for value in values], dtype=np.float64)

    def columns(self, length: int) -> dict[str, np.ndarray]:
        """Every entry of the object, each of which must be a list of that many numbers or null."""
        return {name: self.numbers(name, length) for name in self.content}

    def all_texts(self) -> dict[str, str]:
        """Every entry of the object, each of which must be a string."""
        return {name: self.text(name) for name in self.content}

    def all_numbers(self, without: Sequence[str] = ()) -> dict[str, float]:
        """Every other entry of the object, each of which must be a number or null."""
        return {name: self.number(name) for name in self.content if name not in without}

    def _value(self, name: str) -> Any:
        if name not in self.content:
            raise CRDError(f"{self.where} has no {name!r}; restore the file")
        return self.content[name]

    def _wrong(self, name: str, wanted: str, got: Any) -> CRDError:
        return CRDError(f"{self.where}: {name} must be {wanted}, got {_short(got)}; restore the file")


def read_object(path: Path) -> JsonObject:
    """The JSON object that a file holds.

    Raises:
        CRDError: no such file, unreadable, or not one JSON object.
    """
    return _object(_parse(_text(path), str(path)), str(path))


def read_objects(path: Path) -> list[JsonObject]:
    """The JSON objects of a file that holds a list of them.

    Raises:
        CRDError: no such file, unreadable, or not a JSON list of objects.
    """
    content = _parse(_text(path), str(path))
    if not isinstance(content, list):
        raise CRDError(f"{path} must hold a JSON list, got {_short(content)}; restore the file")
    return [_object(entry, f"{path} entry {number}") for number, entry in enumerate(content, start=1)]


def read_object_lines(path: Path) -> tuple[list[JsonObject], bool]:
    """The JSON objects of a file with one a line, and whether its last line was cut off.

    Only a last line without its line end may be broken: that is what an interruption leaves, and it is left out.

    Raises:
        CRDError: unreadable, or a line that is not a JSON object.
    """
    lines = _text(path).split("\n")
    found: list[JsonObject] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            where = f"{path} line {number}"
            found.append(_object(_parse(line, where), where))
        except CRDError:
            if number < len(lines):
                raise
            return found, True
    return found, False


def _text(path: Path) -> str:
    return read_text(path, "file", f"no file {path}; restore it")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CRDError(f"{where} is not valid JSON: {error}; restore the file, or remove that part") from error


def _object(content: Any, where: str) -> JsonObject:
    if not isinstance(content, dict):
        raise CRDError(f"{where} must hold a JSON object, got {_short(content)}; restore the file")
    return JsonObject(content, where)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _number(value: float | None) -> float:
    # Infinite is no more plottable than missing.
    return float(value) if value is not None and math.isfinite(value) else math.nan


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
