"""Prompts: where they come from, in which order, and how they become groups of images to draw."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crd.errors import CRDError
from crd.geneval.metadata import parse_metadata
from crd.geneval.prompts import to_columns
from crd.prompt_sources import SOURCES, generated_records, interleave, is_generated
from crd.records import PromptBatch
from crd.seeds import derive_seed, generator
from crd.text_files import read_text


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
            GenEval's and checked as such); `NAME:SPLIT[:COUNT]`, NAME world, scenes or geneval, SPLIT train or test;
            `A+B`, evenly interleaved, a column that one of them lacks being None there; `SOURCE@REWARD[,REWARD]`,
            judged by these rewards alone; strings or records.

    Raises:
        CRDError: no such file, an empty one, or a line that does not fit.
    """
    if isinstance(source, PromptDataset):
        return source
    if isinstance(source, Path):
        return _load_one(str(source))
    if not isinstance(source, str):
        return _from_records([_record(number, item) for number, item in enumerate(source, start=1)], "the dataset")
    # A "+" may also be part of a file's name.
    if "+" not in source or os.path.isfile(source):
        return _load_one(source)
    parts = source.split("+")
    if not all(parts):
        raise CRDError(f"joined prompts must be SOURCE+SOURCE, got {source!r}; remove the empty part")
    return _join([_load_one(part) for part in parts])


def _load_one(source: str) -> PromptDataset:
    place, at, rewards = source.rpartition("@")
    if at and not os.path.isfile(source):
        names = rewards.split(",")
        if not place or not all(names):
            raise CRDError(f"prompts for some rewards must be SOURCE@REWARD or SOURCE@REWARD,REWARD, got {source!r}")
        dataset = _load_one(place)
        return PromptDataset(dataset.prompts, {**dataset.columns, "rewards": (names,) * len(dataset)})
    return _from_records(generated_records(source) if is_generated(source) else _read_file(Path(source)), source)


def _join(parts: Sequence[PromptDataset]) -> PromptDataset:
    names = dict.fromkeys(name for part in parts for name in part.columns)
    return PromptDataset(
        prompts=tuple(interleave([part.prompts for part in parts])),
        columns={
            name: tuple(interleave([part.columns.get(name, (None,) * len(part)) for part in parts])) for name in names
        },
    )


def _record(number: int, item: Any) -> dict[str, Any]:
    if isinstance(item, str):
        return {"prompt": item}
    if not isinstance(item, Mapping) or not isinstance(item.get("prompt"), str):
        raise CRDError(f'record {number} of the dataset must be a string or have a string "prompt", got {item!r:.80}')
    return dict(item)


def _read_file(path: Path) -> list[dict[str, Any]]:
    missing = f"no prompt file at {path}; give a .txt, a .jsonl or {', '.join(f'{name}:train' for name in SOURCES)}"
    lines = read_text(path, "prompt file", missing).splitlines()
    if path.suffix == ".txt":
        return [{"prompt": line.strip()} for line in lines if line.strip()]
    if path.suffix != ".jsonl":
        raise CRDError(f"prompt files are .txt or .jsonl, got {path}")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CRDError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise CRDError(f'{path} line {number} must be an object with a string "prompt", got {line[:80]!r}')
        if "tag" in record and "include" in record:
            record = to_columns(parse_metadata(record, f"{path} line {number}"))
        records.append(record)
    return records


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
    )
