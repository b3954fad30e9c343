"""Reading a person's text file or settings, with the same complaints everywhere."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml

from crd.errors import CRDError, told_of

T = TypeVar("T")


def read_text(path: Path, kind: str, missing: str) -> str:
    """Contents of a UTF-8 file.

    Args:
        path: the file.
        kind: what it is to the user, such as "prompt file".
        missing: the message when there is no such file.

    Raises:
        CRDError: no such file, not UTF-8, or unreadable.
    """
    try:
        if not path.is_file():
            raise CRDError(missing)
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CRDError(f"{path} is not UTF-8 text: {error.reason}; save it as UTF-8") from error
    except OSError as error:
        raise CRDError(f"cannot read the {kind} {path}: {error.strerror}; check the path") from error


def read_bundled(source: str, package: str, kind: str) -> str:
    """A text file or, unless there is one of that name, the YAML file of `package` that is called so.

    Args:
        source: path, or name.
        package: a folder of this one, such as "crd.recipes".
        kind: as for `read_text`.

    Raises:
        CRDError: as `read_text`; tells the names.
    """
    names = bundled(package)
    if source in names and not Path(source).is_file():
        return files(package).joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    return read_text(Path(source), kind, f"no {kind} at {source}; give a YAML file or one of {', '.join(names)}")


def bundled(package: str) -> list[str]:
    """Names of the YAML files of a package."""
    return sorted(path.name.removesuffix(".yaml") for path in files(package).iterdir() if path.name.endswith(".yaml"))


def parse_yaml(text: str, source: str | Path) -> Any:
    """What a YAML text of `source` holds.

    Raises:
        CRDError: it is not YAML, or has a key twice.
    """
    try:
        return yaml.load(text, _StrictLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise CRDError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error


class _StrictLoader(yaml.SafeLoader):
    """Without repeated keys, of which YAML readers keep the last one and say nothing."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # As written: what a merge key (<<) brings in later may be given again.
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is repeated", problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node


def strict_json(text: str | bytes) -> Any:
    """What a JSON text holds, without the NaN and infinity that Python takes for numbers, and no key twice.

    Raises:
        ValueError: it is not that.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_repeats)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found


def read_settings(path: Path, kind: str, missing: str, build: Callable[[Mapping[Any, Any]], T]) -> T:
    """What `build` makes of the `key: value` lines of a YAML file; other arguments as `read_text`.

    Raises:
        CRDError: as `read_text`, it holds something else, or the complaint of `build`, which names the file.
    """
    values = parse_yaml(read_text(path, kind, missing), path)
    if not isinstance(values, dict):
        raise CRDError(f"{path} must hold `key: value` lines, got {type(values).__name__}")
    with told_of(str(path)):
        return build(values)


def known_fields(values: Mapping[Any, Any], kind: type, what: str) -> dict[str, Any]:
    """The values, all of whose keys are fields of the dataclass `kind`.

    Args:
        values: parsed settings.
        kind: what they are for.
        what: one of them to the user, such as "judge setting".

    Raises:
        CRDError: an unknown key; names the nearest.
    """
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise CRDError(f"unknown {what} {key!r}; {hint}")
    return dict(values)


def read_lines(path: Path, kind: str, missing: str) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, stripped, each with its number from 1; arguments as `read_text`.

    Only line ends end a line: JSON strings may hold other separators, such as U+2028, as they are.
    """
    lines = enumerate(read_text(path, kind, missing).split("\n"), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip()]
