"""Which rewards judge a prompt: those that the dataset column `rewards` names, or all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crd.errors import CRDError
from crd.records import ASKED
from crd.rewards.signature import quote


def rows_asked(
    prompts: Sequence[str], columns: Mapping[str, Sequence[Any]], known: Sequence[str]
) -> dict[str, list[int]]:
    """Indices of the prompts (or images) that each of the rewards `known` is asked about.

    Raises:
        CRDError: the column of a prompt is neither None nor a list of some of these rewards.
    """
    rows: dict[str, list[int]] = {name: [] for name in known}
    chosen = columns.get(ASKED, [None] * len(prompts))
    for index, (names, prompt) in enumerate(zip(chosen, prompts, strict=True)):
        if names is None:
            names = known
        listed = isinstance(names, list | tuple) and all(isinstance(name, str) and name in rows for name in names)
        if not listed or not names:
            raise CRDError(
                f"column {ASKED!r} of prompt {quote(prompt)} must list rewards of this run ({', '.join(known)}), "
                f"got {names!r:.60}; correct it, or make it null to ask all"
            )
        for name in dict.fromkeys(names):
            rows[name].append(index)
    return rows


def own_columns(columns: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> dict[str, list[Any]]:
    """The dataset columns of some prompts, without the one that is not the rewards' own."""
    return {name: [values[i] for i in rows] for name, values in columns.items() if name != ASKED}
