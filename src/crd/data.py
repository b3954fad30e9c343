"""Prompts: where they come from, in which order, and how they become groups of images to draw."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crd.errors import CRDError, told_of
from crd.geneval.metadata import is_benchmark_record, parse_metadata, record_columns
from crd.geneval.prompts import scene_key
from crd.prompt_sources import SOURCES, generated_records, interleave, is_generated
from crd.records import ASKED, PromptBatch
from crd.seeds import derive_seed, generator
from crd.text_files import read_lines


@dataclass(frozen=True)
class PromptDataset:
    """N prompts and their columns (each of length N), which reach the rewards by name."""

    prompts: tuple[str, ...]
    columns: Mapping[str, tuple[Any, ...]]

    def __len__(self) -> int:
        return len(self.prompts)


Prompts = PromptDataset | Sequence[str] | Sequence[Mapping[str, Any]] | str | Path


def load_prompts(source: Prompts) -> PromptDataset:
    """Prompts from a file, a generator, several of these joined by "+", or Python values.

    Args:
        source: a .txt (one prompt a line); a .jsonl (`prompt` plus columns; records with `tag` and `include` are
            GenEval's and checked as such if `include` lists objects with a "class"); `NAME:SPLIT[:COUNT]`, NAME
            world, scenes or geneval, SPLIT train or test; `A+B`, evenly interleaved, a column that one of them lacks
            being None there; `SOURCE@REWARD[,REWARD]`, judged by these rewards alone; strings or records, in Python.

    Raises:
        CRDError: no such file, an empty one, or a line that does not fit.
    """
    if isinstance(source, PromptDataset):
        return source
    if isinstance(source, Path):
        return _load_one(str(source))
    if not isinstance(source, str):
        return _from_records([_record(item, number) for number, item in enumerate(source, start=1)], "the dataset")
    # "+" and "@" may also be part of a file's name.
    if os.path.isfile(source) or not set("+@") & set(source):
        return _load_one(source)
    parts = source.split("+")
    if not all(parts):
        raise CRDError(f"joined prompts must be SOURCE+SOURCE, got {source!r}; remove the empty part")
    with told_of(source):
        return _join([_load_asked(part) for part in parts])


def _load_asked(source: str) -> PromptDataset:
    """One source, and the rewards that an "@" behind it names."""
    place, at, rewards = source.rpartition("@")
    if not at or os.path.isfile(source):
        return _load_one(source)
    names = rewards.split(",")
    if not place or not all(names):
        raise CRDError(f"prompts for some rewards must be SOURCE@REWARD or SOURCE@REWARD,REWARD, got {source!r}")
    dataset = _load_asked(place)
    if ASKED in dataset.columns:
        raise CRDError(f"{place} already says which rewards judge its prompts, got @{rewards} too; leave one out")
    return PromptDataset(dataset.prompts, {**dataset.columns, ASKED: (names,) * len(dataset)})


def _load_one(source: str) -> PromptDataset:
    return _from_records(generated_records(source) if is_generated(source) else _read_file(Path(source)), source)


def _join(parts: Sequence[PromptDataset]) -> PromptDataset:
    names = dict.fromkeys(name for part in parts for name in part.columns)
    return PromptDataset(
        prompts=tuple(interleave([part.prompts for part in parts])),
        columns={
            name: tuple(interleave([part.columns.get(name, (None,) * len(part)) for part in parts])) for name in names
        },
    )


def _record(item: Any, number: int) -> dict[str, Any]:
    if isinstance(item, str):
        return {"prompt": item}
    where = f"record {number} of the dataset"
    if not isinstance(item, Mapping) or not isinstance(item.get("prompt"), str):
        raise CRDError(f'{where} must be a string or have a string "prompt", got {item!r:.80}')
    return record_columns(item, where) if is_benchmark_record(item) else dict(item)


def _read_file(path: Path) -> list[dict[str, Any]]:
    missing = f"no prompt file at {path}; give a .txt, a .jsonl or {', '.join(f'{name}:train' for name in SOURCES)}"
    lines = read_lines(path, "prompt file", missing)
    if path.suffix == ".txt":
        return [{"prompt": line} for _, line in lines]
    if path.suffix != ".jsonl":
        raise CRDError(f"prompt files are .txt or .jsonl, got {path}")
    return [_json_record(line, f"{path} line {number}") for number, line in lines]


def _json_record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise CRDError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise CRDError(f'{where} must be an object with a string "prompt", got {line[:80]!r}')
    return record_columns(record, where) if is_benchmark_record(record) else record


def _from_records(records: Sequence[Mapping[str, Any]], source: str) -> PromptDataset:
    if not records:
        raise CRDError(f"{source} holds no prompts; add at least one")
    names = sorted(set().union(*records) - {"prompt"})
    for number, record in enumerate(records, start=1):
        missing = [name for name in ("prompt", *names) if name not in record]
        if missing:
            raise CRDError(
                f"{source}: record {number} lacks {missing[0]!r} that others have; give every record the same columns"
            )
    return PromptDataset(
        prompts=tuple(str(record["prompt"]) for record in records),
        columns={name: tuple(record[name] for record in records) for name in names},
    )


def count_shared(train: PromptDataset, held_out: PromptDataset) -> int:
    """How many prompts of `held_out` are also in `train`: the same text or, of GenEval's, the same scene."""
    texts, scenes = set(train.prompts), set(_scenes(train)) - {None}
    return sum(
        text in texts or scene in scenes for text, scene in zip(held_out.prompts, _scenes(held_out), strict=True)
    )


def _scenes(dataset: PromptDataset) -> list[str | None]:
    """`scene_key` of each GenEval prompt, None of the others."""
    names = [name for name in ("tag", "include", "exclude") if name in dataset.columns]
    found: list[str | None] = []
    for index, prompt in enumerate(dataset.prompts):
        record = {"prompt": prompt, **{name: dataset.columns[name][index] for name in names}}
        found.append(scene_key(parse_metadata(record, repr(prompt))) if is_benchmark_record(record) else None)
    return found


def epoch_order(size: int, position: int, count: int, seed: int) -> list[int]:
    """Indices of the prompts at positions `position .. position + count - 1` of an endless shuffled stream.

    Each epoch is a fresh permutation that depends on (seed, epoch) alone, so the position is all the state.
    """
    taken: list[int] = []
    while len(taken) < count:
        epoch, offset = divmod(position + len(taken), size)
        order = torch.randperm(size, generator=generator(seed, "epoch", epoch)).tolist()
        taken += order[offset : offset + count - len(taken)]
    return taken


def prompt_batch(dataset: PromptDataset, indices: Sequence[int], group_size: int, *seed_name: int | str) -> PromptBatch:
    """A group of `group_size` images for each prompt index; image seeds follow from `seed_name` and position."""
    per_image = [index for index in indices for _ in range(group_size)]
    return PromptBatch(
        prompts=[dataset.prompts[index] for index in per_image],
        group_id=torch.arange(len(indices)).repeat_interleave(group_size),
        columns={name: [values[index] for index in per_image] for name, values in dataset.columns.items()},
        image_seed=[derive_seed(*seed_name, number) for number in range(len(per_image))],
        image_id=torch.arange(len(per_image)),
    )
