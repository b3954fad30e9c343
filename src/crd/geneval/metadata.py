"""What a GenEval prompt asks for: typed, checked, and in the benchmark's own JSON form."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crd.errors import CRDError

KEYS = ("tag", "include", "exclude", "prompt")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
# The 80 classes of COCO under the names that the benchmark's prompts use, in COCO's order.
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


@dataclass(frozen=True)
class Include:
    """`count` objects of a class; all of `color`, and in `position` = (relation, index of an earlier include)."""

    class_name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Exclude:
    """Fewer than `count` objects of a class."""

    class_name: str
    count: int


@dataclass(frozen=True)
class Metadata:
    """One prompt of the benchmark and what an image of it must show."""

    tag: str
    prompt: str
    include: tuple[Include, ...]
    exclude: tuple[Exclude, ...] = ()

    def to_record(self) -> dict[str, Any]:
        """The benchmark's JSON object; `exclude` only where there is one, as in its files."""
        include = []
        for wanted in self.include:
            entry: dict[str, Any] = {"class": wanted.class_name, "count": wanted.count}
            if wanted.color is not None:
                entry["color"] = wanted.color
            if wanted.position is not None:
                entry["position"] = list(wanted.position)
            include.append(entry)
        record: dict[str, Any] = {"tag": self.tag, "include": include}
        if self.exclude:
            record["exclude"] = [{"class": e.class_name, "count": e.count} for e in self.exclude]
        return {**record, "prompt": self.prompt}


def parse_metadata(record: Mapping[str, Any], where: str) -> Metadata:
    """The typed form of a JSON object of the benchmark.

    Args:
        record: with `tag`, `include`, `prompt` and, if there is one, `exclude`.
        where: names the record in errors.

    Raises:
        CRDError: a key is missing, unknown or of the wrong type; a task, color, relation or count that does not exist;
            a position that refers to itself or to a later include.
    """
    unknown = sorted(set(record) - set(KEYS))
    if unknown:
        raise CRDError(f"{where}: unknown key {unknown[0]!r}; GenEval records have {', '.join(KEYS)}")
    for key, kind in (("tag", str), ("prompt", str), ("include", list | tuple)):
        if not isinstance(record.get(key), kind):
            raise CRDError(f"{where}: {key} must be a {'list' if key == 'include' else 'string'}, "
                           f"got {record.get(key)!r:.60}")  # fmt: skip
    if record["tag"] not in TASKS:
        near = difflib.get_close_matches(record["tag"], TASKS, n=1)
        raise CRDError(f"{where}: tag must be one of {', '.join(TASKS)}, got {record['tag']!r:.60}"
                       + (f"; did you mean {near[0]!r}?" if near else ""))  # fmt: skip
    exclude = record.get("exclude")
    if exclude is None:  # left out, or the null of a table whose other rows have one
        exclude = ()
    if not isinstance(exclude, list | tuple):
        raise CRDError(f"{where}: exclude must be a list, got {exclude!r:.60}")
    if not record["include"]:
        raise CRDError(f"{where}: include is empty; name at least one object")
    return Metadata(
        tag=record["tag"],
        prompt=record["prompt"],
        include=tuple(_include(entry, index, f"{where}: include {index}") for index, entry in
                      enumerate(record["include"])),
        exclude=tuple(Exclude(*_class_and_count(entry, {"class", "count"}, f"{where}: exclude {index}"))
                      for index, entry in enumerate(exclude)),
    )  # fmt: skip


def is_benchmark_record(record: Mapping[str, Any]) -> bool:
    """Whether a dataset record is one of GenEval's, not one with columns of its own named `tag` and `include`."""
    include = record.get("include")
    if "tag" not in record or not isinstance(include, list | tuple):
        return False
    return any(isinstance(entry, Mapping) and "class" in entry for entry in include)


def to_columns(metadata: Metadata) -> dict[str, Any]:
    """A dataset record: `prompt`, and the columns `tag`, `include`, `exclude` in the benchmark's JSON form.

    `exclude` is always there, () where there is none.
    """
    return {"exclude": (), **metadata.to_record()}


def record_columns(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A GenEval record, checked, as `to_columns` gives it, and the columns for other rewards that it also holds.

    Raises:
        CRDError: as `parse_metadata`; or `exclude` is missing and another key looks like it.
    """
    columns = {name: value for name, value in record.items() if name not in KEYS}
    for name in columns:
        # The other keys cannot be misspelt, or it would be no such record.
        if "exclude" not in record and difflib.get_close_matches(name.lower(), ["exclude"], cutoff=0.75):
            raise CRDError(f"{where}: unknown key {name!r}; did you mean 'exclude'? Otherwise rename it")
    return {**columns, **to_columns(parse_metadata({n: v for n, v in record.items() if n in KEYS}, where))}


def parse_columns(prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[Metadata]:
    """The typed form of dataset columns `tag`, `include`, `exclude` of B prompts.

    Raises:
        CRDError: a column is missing, or as `parse_metadata`.
    """
    for name in ("tag", "include", "exclude"):
        if name not in columns:
            raise CRDError(f"GenEval prompts need the column {name!r}, got {', '.join(columns) or 'none'}; "
                           "use scenes:test, geneval:test or a file of the benchmark")  # fmt: skip
    rows = zip(prompts, columns["tag"], columns["include"], columns["exclude"], strict=True)
    return [
        parse_metadata({"tag": tag, "include": include, "exclude": exclude, "prompt": prompt}, f"prompt {prompt!r:.60}")
        for prompt, tag, include, exclude in rows
    ]


def _include(entry: Any, index: int, where: str) -> Include:
    class_name, count = _class_and_count(entry, {"class", "count", "color", "position"}, where)
    color, position = entry.get("color"), entry.get("position")
    if color is not None and color not in COLORS:
        raise CRDError(f"{where}: color must be one of {', '.join(COLORS)}, got {color!r}")
    if position is not None:
        if not (isinstance(position, list | tuple) and len(position) == 2 and position[0] in RELATIONS):
            raise CRDError(f"{where}: position must be [relation, index], relation one of {', '.join(RELATIONS)}, "
                           f"got {position!r:.60}")  # fmt: skip
        if index == 0:
            raise CRDError(f"{where}: position must refer to an earlier include, but this is the first; list it later")
        if not _is_integer(position[1]) or not 0 <= position[1] < index:
            raise CRDError(f"{where}: position must refer to an earlier include (0 to {index - 1}), "
                           f"got {position[1]!r:.60}")  # fmt: skip
        position = (position[0], position[1])
    return Include(class_name, count, color, position)


def _class_and_count(entry: Any, keys: set[str], where: str) -> tuple[str, int]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("class"), str):
        raise CRDError(f'{where} must be an object with a string "class", got {entry!r:.60}')
    unknown = sorted(set(entry) - keys)
    if unknown:
        raise CRDError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(keys))}")
    count: Any = entry.get("count")
    if not _is_integer(count) or count < 1:
        raise CRDError(f"{where}: count must be an integer of 1 or more, got {count!r:.60}")
    return entry["class"], count


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
