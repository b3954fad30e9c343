"""From YAML files and command line text to a `CRDConfig`, every value checked against its field's type."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from crd.config import CRDConfig
from crd.errors import CRDError
from crd.extends import extended
from crd.text_files import bundled, parse_yaml, read_bundled

_RECIPES = "crd.recipes"


def load_config(source: str | Path | None, overrides: Mapping[str, Any] | None = None) -> CRDConfig:
    """A YAML file, or the name of a bundled recipe, plus overrides.

    The key `extends` names another recipe or file, whose values hold wherever this one gives none.

    Args:
        source: path, recipe name such as "ocr-tiny", or None for the defaults.
        overrides: field -> value; strings are read as YAML.

    Raises:
        CRDError: no such file, not a mapping, an unknown key (the nearest is named), or a wrong type.
    """
    values = {} if source is None else extended(str(source), _read_yaml, over_fields, "a recipe or a file")
    return config_from(over_fields(values, overrides or {}))


def over_fields(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes` in place of fields that both name, whichever way they are spelled."""
    field_names(values)
    replaced = field_names(changes)
    return {**{key: value for key, value in values.items() if key.replace("-", "_") not in replaced}, **changes}


def field_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values by field name: `group-size` is `group_size`.

    Raises:
        CRDError: one field in both spellings.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in found:
            raise CRDError(f"{name} is given in two spellings, with - and with _; keep one")
        found[name] = value
    return found


def config_from(values: Mapping[str, Any]) -> CRDConfig:
    """A CRDConfig from plain values, each checked against its field's type."""
    hints = typing.get_type_hints(CRDConfig)
    checked: dict[str, Any] = {}
    keys = {key.replace("-", "_"): key for key in values}
    for name, value in field_names(values).items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see docs/configuration.md"
            raise CRDError(f"unknown configuration key {keys[name]!r}; {hint}")
        checked[name] = _coerce(name, value, hints[name])
    return CRDConfig(**checked)


def recipes() -> list[str]:
    """Names of the bundled recipes."""
    return bundled(_RECIPES)


def _read_yaml(source: str | Path) -> dict[str, Any]:
    content = parse_yaml(read_bundled(str(source), _RECIPES, "configuration"), source) or {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CRDError(f"{source} must hold `key: value` lines, got {type(content).__name__}")
    return content


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type; strings from the command line are read as YAML first."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    options = typing.get_args(hint) if union else (hint,)
    if type(None) in options and (value is None or value in ("none", "null")):
        return None
    if isinstance(value, str) and str not in options:
        text = value
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        if any(typing.get_origin(o) is tuple for o in options) and not isinstance(value, list) and value is not None:
            value = [part.strip() for part in text.split(",") if part.strip()]
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, Sequence):
            items = [value] if isinstance(value, str) else list(value)
            arguments = typing.get_args(option)
            if arguments[-1] is not Ellipsis and len(items) != len(arguments):
                raise CRDError(f"{name} must hold {len(arguments)} values, got {items}")
            return tuple(_coerce(name, item, arguments[0]) for item in items)
        if typing.get_origin(option) is typing.Literal and value in typing.get_args(option):
            return value
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if option is float and isinstance(value, str):
            try:  # YAML reads 1e-4 as a string
                return float(value)
            except ValueError:
                continue
        if option is str and isinstance(value, str):
            return value
        if option is str and value is False:  # a bare `no` is a boolean to YAML
            return "no"
    wanted = hint.__name__ if isinstance(hint, type) else str(hint).removeprefix("typing.")
    if literals := [text for option in options for text in typing.get_args(option) if isinstance(text, str)]:
        wanted = f"a number or {' or '.join(literals)}"
    raise CRDError(f"{name} must be {wanted}, got {value!r}")
