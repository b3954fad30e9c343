"""Suite files: YAML to a `Suite`, every key and value checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crd.bench.suite import Suite, Sweep, Task
from crd.config import CRDConfig
from crd.config_io import over_fields
from crd.errors import CRDError, told_of
from crd.extends import extended
from crd.setting_checks import check_count, check_text
from crd.text_files import bundled, known_fields, parse_yaml, read_bundled

_SUITES = "crd.bench.suites"
_NEEDED = ("name", "reference", "seeds", "tasks", "arms")
_OWN = ("name", "about")  # not taken from the suite that is extended


def suites() -> list[str]:
    """Names of the bundled suites."""
    return bundled(_SUITES)


def read_suite(source: str) -> Suite:
    """A suite file, or a bundled suite by its name.

    The key `extends` names another one, which gives what this one leaves out. Tasks, arms and the arms of a task
    are put together name by name, and arms of one name setting by setting; every other key is taken or replaced as a
    whole.

    Raises:
        CRDError: no such file, an unknown key, a missing one, or something that is not what it should be.
    """
    with told_of(f"suite {source}"):
        return parse_suite(extended(source, _read_yaml, _over_suite, "a suite or a file"))


def _read_yaml(source: str) -> dict[str, Any]:
    return _mapping(parse_yaml(read_bundled(source, _SUITES, "suite"), source), source)


def _over_suite(suite: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    known = _mapping(suite.get("tasks"), "tasks")
    tasks = {**known, **_mapping(changes.get("tasks"), "tasks")}
    for name, task in known.items():
        was, now = _mapping(task, f"tasks.{name}"), _mapping(tasks[name], f"tasks.{name}")
        tasks[name] = {**was, **now, "arms": _over_arms(was, now)}
    taken = {key: value for key, value in suite.items() if key not in _OWN}
    return {**taken, **changes, "tasks": tasks, "arms": _over_arms(suite, changes)}


def _over_arms(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    was, arms = _settings_by_arm(values.get("arms"), "arms"), _settings_by_arm(changes.get("arms"), "arms")
    return {**was, **{name: over_fields(was.get(name, {}), settings) for name, settings in arms.items()}}


def parse_suite(content: Any) -> Suite:
    """The suite that parsed YAML describes, with nothing left to another suite.

    Raises:
        CRDError: as `read_suite`.
    """
    values = known_fields(_mapping(content, "a suite"), Suite, "key of a suite")
    for name in _NEEDED:
        if name not in values:
            raise CRDError(f"{name} is missing; a suite has {', '.join(_NEEDED)}")
    for name in ("name", "reference"):
        check_text(name, values[name], "a suite")
    if not isinstance(values["seeds"], list):
        raise CRDError(f"seeds of a suite must be a list of integers, got {values['seeds']!r}")
    for seed in values["seeds"]:
        check_count("seeds", seed, "a suite", 0)
    return Suite(
        name=values["name"],
        reference=values["reference"],
        seeds=tuple(values["seeds"]),
        tasks={name: _task(name, one) for name, one in _mapping(values["tasks"], "tasks").items()},
        arms=_settings_by_arm(values["arms"], "arms"),
        about=" ".join(str(values.get("about", "")).split()),
        settings=_mapping(values.get("settings"), "settings"),
        groups={name: _words(one, name) for name, one in _mapping(values.get("groups"), "groups").items()},
        sweeps={name: _sweep(name, one) for name, one in _mapping(values.get("sweeps"), "sweeps").items()},
        tell=_words(values["tell"], "tell") if "tell" in values else (),
    )


def _task(name: str, content: Any) -> Task:
    values = known_fields(_mapping(content, f"tasks.{name}"), Task, "key of a task")
    check_text("recipe", values.get("recipe"), f"task {name}")
    arms = _settings_by_arm(values.get("arms"), f"arms of task {name}")
    for arm, settings in arms.items():
        if "extends" in settings:
            raise CRDError(
                f"{arm} of arms of task {name} has extends, which is of all tasks; move it to the suite's arms"
            )
    return Task(values["recipe"], _mapping(values.get("settings"), f"settings of task {name}"), arms)


def _sweep(name: str, content: Any) -> Sweep:
    values = known_fields(_mapping(content, f"sweeps.{name}"), Sweep, "key of a sweep")
    check_text("field", values.get("field"), f"sweep {name}")
    for key in ("field", "by"):
        if (given := values.get(key)) is not None and given not in CRDConfig.__dataclass_fields__:
            raise CRDError(f"{key} of sweep {name} must be a field of the configuration, got {given!r}")
    default = CRDConfig.__dataclass_fields__[values["field"]].default
    if isinstance(default, bool) or not isinstance(default, int | float):
        raise CRDError(f"field of sweep {name} is what its results are drawn against, so a number, got "
                       f"{values['field']!r}")  # fmt: skip
    return Sweep(values["field"], _words(values.get("arms"), f"sweep {name}"), values.get("by"))


def _settings_by_arm(content: Any, what: str) -> dict[str, Mapping[str, Any]]:
    return {name: _mapping(one, f"{name} of {what}") for name, one in _mapping(content, what).items()}


def _words(content: Any, what: str) -> tuple[str, ...]:
    if not isinstance(content, list) or not content or not all(isinstance(word, str) for word in content):
        raise CRDError(f"{what} must be a list of names, got {content!r}")
    return tuple(content)


def _mapping(content: Any, what: str) -> dict[str, Any]:
    """`key: value` lines; none is none."""
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CRDError(f"{what} must be `key: value` lines, got {content!r}")
    return content
