"""Prompts that are generated rather than read: `NAME:SPLIT[:COUNT]`. A new source is a function and one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from crd.errors import CRDError
from crd.geneval.metadata import TASKS, to_columns
from crd.geneval.prompts import benchmark, scene_key, training_prompts
from crd.tiny.scene_prompts import scene_prompts
from crd.tiny.vocabulary import prompts as world_prompts

WORLD_PROMPTS = 512
GENEVAL_PROMPTS = 50_000
GENEVAL_SEED = 0

Record = dict[str, Any]
T = TypeVar("T")


def _world(split: str, count: int | None) -> list[Record]:
    """Captions of the bundled world with a word to draw."""
    return [{"prompt": prompt} for prompt in world_prompts(split, count or WORLD_PROMPTS)]


def _scenes(split: str, count: int | None) -> list[Record]:
    """GenEval's tasks over the classes of the bundled world."""
    return [to_columns(metadata) for metadata in scene_prompts(split, count or WORLD_PROMPTS)]


def _geneval(split: str, count: int | None) -> list[Record]:
    """GenEval over the 80 COCO classes: a suite to test on, and the training mix without any scene of that suite.

    With a COUNT the test prompts are a part of the suite that holds the six tasks in the suite's proportions.
    """
    suite = benchmark(GENEVAL_SEED)
    if split == "train":
        tested = {scene_key(metadata) for metadata in suite}
        found = training_prompts(
            count or GENEVAL_PROMPTS, GENEVAL_SEED, keep=lambda metadata: scene_key(metadata) not in tested
        )
    elif count is None:
        found = suite
    elif count > len(suite):
        raise CRDError(f"geneval:test has {len(suite)} prompts, got the count {count}; ask for fewer, or omit it")
    else:
        found = interleave([[metadata for metadata in suite if metadata.tag == tag] for tag in TASKS])[:count]
    return [to_columns(metadata) for metadata in found]


SOURCES: dict[str, Callable[[str, int | None], list[Record]]] = {
    "world": _world,
    "scenes": _scenes,
    "geneval": _geneval,
}


def is_generated(source: str) -> bool:
    """Whether `source` begins with the name of a generator and a colon."""
    return source.partition(":")[0] in SOURCES and ":" in source


def generated_records(source: str) -> list[Record]:
    """The records of `NAME:train`, `NAME:test` or either with `:COUNT`; the same each time.

    Raises:
        CRDError: another split, or a count that is no number of 1 or more.
    """
    name, split, *rest = source.split(":")
    bad_count = len(rest) > 1 or any(not (text.isdecimal() and int(text) > 0) for text in rest)
    if split not in ("train", "test") or bad_count:
        raise CRDError(f"{name} prompts must be {name}:train, {name}:test or {name}:test:COUNT, got {source!r}")
    return SOURCES[name](split, int(rest[0]) if rest else None)


def interleave(parts: Sequence[Sequence[T]]) -> list[T]:
    """All items, each part spread evenly over the whole: any prefix holds the parts in nearly their proportions."""
    places = [((i + 0.5) / len(part), number, i) for number, part in enumerate(parts) for i in range(len(part))]
    return [parts[number][i] for _, number, i in sorted(places)]
