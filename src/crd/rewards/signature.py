"""Which dataset columns a reward function takes, read from its signature."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from crd.errors import CRDError


@dataclass(frozen=True)
class ColumnUse:
    """Columns one reward takes: `required` must exist, `optional` may, `everything` means `**columns`."""

    reward: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    everything: bool
    reserved: tuple[str, ...]  # names of the two parameters that hold images and prompts

    def takes(self, column: str) -> bool:
        return column in self.required or column in self.optional or self.everything

    def check(self, available: Iterable[str]) -> None:
        """Raise `CRDError` for a required column that is missing, or one that hides images or prompts."""
        columns = list(available)
        for name in self.required:
            if name not in columns:
                there = ", ".join(columns) if columns else "none"
                near = difflib.get_close_matches(name, columns, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "add it to the dataset or give the parameter a default"
                raise CRDError(
                    f"reward {self.reward!r} needs the dataset column {name!r}, got columns: {there}; {hint}"
                )
        for name in self.reserved:
            if self.everything and name in columns:
                raise CRDError(
                    f"dataset column {name!r} collides with a parameter of reward {self.reward!r}; rename it"
                )


def column_use(reward: str, function: Callable[..., Any]) -> ColumnUse:
    """Read the signature `f(images, prompts, ...)` of a reward.

    Raises:
        CRDError: it cannot take two positional arguments, or takes them as (prompts, images).
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some C functions have no signature; they can name no column either
        return ColumnUse(reward, (), (), False, ())
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    positional = [parameter for parameter in parameters if parameter.kind in kinds]
    swallows = any(parameter.kind is Parameter.VAR_POSITIONAL for parameter in parameters)
    if len(positional) < 2 and not swallows:
        shown = ", ".join(str(parameter) for parameter in parameters)
        raise CRDError(f"reward {reward!r} must take (images, prompts, ...) by position, got ({shown}); add them")
    first_two = tuple(parameter.name for parameter in positional[:2])
    if first_two == ("prompts", "images"):
        raise CRDError(f"reward {reward!r} takes (prompts, images); the order is (images, prompts), swap them")
    named = positional[2:] + [p for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
    unnamed = [p.name for p in named if p.kind is Parameter.POSITIONAL_ONLY]
    if unnamed:
        raise CRDError(f"reward {reward!r}: columns arrive by name, {unnamed[0]!r} is positional-only; move the `/`")
    return ColumnUse(
        reward,
        required=tuple(p.name for p in named if p.default is Parameter.empty),
        optional=tuple(p.name for p in named if p.default is not Parameter.empty),
        everything=any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters),
        reserved=first_two,
    )


def quote(prompt: str, limit: int = 80) -> str:
    """A prompt as it appears in an error message: one line, cut at `limit` characters."""
    text = " ".join(prompt.split())
    return f"'{text}'" if len(text) <= limit else f"'{text[: limit - 3]}...'"
