"""What a benchmark compares: tasks, arms and seeds, and the configuration of every run. `suite_file.py` reads it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crd.config import CRDConfig
from crd.config_io import field_names, load_config, over_fields
from crd.errors import CRDError, told_of
from crd.extends import extended

MOST_LINES = 8  # of a figure: as many colors can be told apart
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
# How runs are executed: options of the harness, which change what a run costs and, but for rounding, nothing else.
EXECUTION = ("threads", "compile")
_RESERVED = frozenset({"seed", "output_dir", *EXECUTION})  # the harness sets these, run by run
# What decides how images are measured, and when (a noisy curve crosses any level earlier if it is evaluated more
# often): rewards of arms that differ here do not compare.
_MEASURED = ("model", "rewards", "reward_weights", "eval_prompts", "eval_images", "eval_steps", "eval_every", "solver",
             "held_out", "height", "width", "mixed_precision", "base_dtype")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run of a suite."""

    task: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}/{self.arm}/seed-{self.seed}"


@dataclass(frozen=True)
class Task:
    """What the arms are trained for."""

    recipe: str  # or a configuration file
    settings: Mapping[str, Any] = field(default_factory=dict)  # over the suite's
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of single arms on this task, over all others


@dataclass(frozen=True)
class Sweep:
    """Arms that differ in a number: what comes of it is drawn against that number."""

    field: str  # of the configuration
    arms: tuple[str, ...]
    by: str | None = None  # a field of the configuration, a line for each of its values


def group_figure(task: str, group: str) -> str:
    """Name of the figure of a group of arms; "" is all of them."""
    return f"{task}-{group or 'arms'}"


def group_samples(task: str, group: str) -> str:
    """Name of the sample sheet of a group, likewise."""
    return f"{group_figure(task, group)}-samples"


def sweep_figure(task: str, sweep: str) -> str:
    """Name of the figure of a sweep."""
    return f"{task}-sweep-{sweep}"


@dataclass(frozen=True)
class Suite:
    """Every arm on every task with every seed; settings of an arm go over the task's, and these over the suite's.

    Raises:
        CRDError: names that do not fit together.
    """

    name: str
    reference: str  # the arm that others are compared with
    seeds: tuple[int, ...]
    tasks: Mapping[str, Task]
    # name -> fields of the configuration, and `extends`: an arm whose settings hold where this one gives none
    arms: Mapping[str, Mapping[str, Any]]
    about: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # over the recipes
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # arms of one table and figure
    sweeps: Mapping[str, Sweep] = field(default_factory=dict)
    tell: tuple[str, ...] = ()  # further values of results.jsonl, for the tables

    def __post_init__(self) -> None:
        for name in (self.name, *self.tasks, *self.arms, *self.groups, *self.sweeps):
            if not _NAME.fullmatch(name):
                raise CRDError(f"names are also names of files, so lower case a-z, 0-9 and ._- only, got {name!r}")
        if not self.tasks or not self.seeds:
            raise CRDError("a suite needs at least one task and one seed; add them")
        if len(set(self.seeds)) < len(self.seeds):
            raise CRDError(f"seeds must differ, got {list(self.seeds)}; name each once")
        self._check_arms([self.reference], "reference")
        for name, task in self.tasks.items():
            self._check_arms(task.arms, f"tasks.{name}.arms")
            for arm in self.arms:
                with told_of(f"arm {arm}"):
                    self._set_on(task, arm)
        for name, arms in {**self.groups, **{key: one.arms for key, one in self.sweeps.items()}}.items():
            self._check_arms(arms, name)
        self._check_figures()
        for title, arms in self.tables().items():
            if len(arms) > MOST_LINES:
                raise CRDError(f"{title or 'a suite'} has {len(arms)} arms with the reference, and a figure tells "
                               f"{MOST_LINES} apart; make smaller `groups`")  # fmt: skip

    def _check_figures(self) -> None:
        """Refuse two figures of one name."""
        written: list[str] = []
        for task in self.tasks:
            for name in self.tables():
                written += [group_figure(task, name), group_samples(task, name)]
            written += [sweep_figure(task, name) for name in self.sweeps]
        for name in written:
            if written.count(name) > 1:
                raise CRDError(f"two figures would be called {name}; rename a task, a group or a sweep")

    def _check_arms(self, arms: Iterable[str], where: str) -> None:
        for arm in arms:
            if arm not in self.arms:
                raise CRDError(f"{where} names the arm {arm!r}; known: {', '.join(self.arms)}")

    def _set_on(self, task: Task, arm: str) -> dict[str, Any]:
        """What an arm sets on a task: its settings there, over its others, over those of the arm that it extends."""

        def read(name: str) -> dict[str, Any]:
            self._check_arms([name], "extends")
            return over_fields(self.arms[name], task.arms.get(name, {}))

        return extended(arm, read, over_fields, "an arm")

    def tables(self) -> dict[str, tuple[str, ...]]:
        """The arms of each table and figure, the reference first; one of all arms if there are no groups."""
        groups = self.groups or {"": tuple(self.arms)}
        return {name: tuple(dict.fromkeys((self.reference, *arms))) for name, arms in groups.items()}

    def cells(self, tasks: Sequence[str] = (), arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Cell]:
        """The runs in their order: the first seed of all tasks and arms comes first. An empty choice is all.

        Raises:
            CRDError: the suite has no such task, arm or seed.
        """
        asked: tuple[tuple[str, Sequence[object], Sequence[object]], ...] = (
            ("task", tasks, tuple(self.tasks)), ("arm", arms, tuple(self.arms)), ("seed", seeds, self.seeds)
        )  # fmt: skip
        for what, chosen, known in asked:
            for one in chosen:
                if one not in known:
                    raise CRDError(f"suite {self.name} has no {what} {one!r}; it has {', '.join(map(str, known))}")
        return [
            Cell(task, arm, seed)
            for seed in self.seeds
            if not seeds or seed in seeds
            for task in self.tasks
            if not tasks or task in tasks
            for arm in self.arms
            if not arms or arm in arms
        ]

    def config(self, cell: Cell, output_dir: Path, execution: Mapping[str, Any]) -> CRDConfig:
        """The configuration of one run; `execution` has values for some of `EXECUTION`.

        Raises:
            CRDError: no such recipe, an unknown field, a value that is refused, or one that the harness cannot use.
        """
        task, found = self.tasks[cell.task], dict[str, Any]()
        for layer in (self.settings, task.settings, self._set_on(task, cell.arm)):
            found |= field_names(layer)
        for name in sorted(found.keys() & _RESERVED):
            raise CRDError(f"{name} follows from the suite's seeds and the options of crd bench; leave it out")
        found |= {"seed": cell.seed, "output_dir": str(output_dir), **execution}
        config = load_config(task.recipe, found)
        if config.eval_prompts is None:
            raise CRDError("eval_prompts must name prompts, got none: rewards on them are what is compared")
        if config.automatic:
            raise CRDError(f"micro_batch and rollout_batch must be numbers, got {config.micro_batch} and "
                           f"{config.rollout_batch}: what runs cost is counted from them")  # fmt: skip
        if config.alarm == "stop":
            raise CRDError("alarm must not be stop: runs that end early are not equally long; use warn")
        return config

    def check_measured(self, configs: Mapping[str, CRDConfig]) -> None:
        """Refuse arms of one task (name -> configuration) whose images are measured otherwise, or after other updates.

        Raises:
            CRDError: says what differs.
        """
        (first, known), *others = configs.items()
        for arm, config in others:
            for name in _MEASURED:
                if (now := config.__dict__[name]) != (was := known.__dict__[name]):
                    raise CRDError(f"arms {first} and {arm} cannot be compared: {name} is {was!r} and {now!r}; set it "
                                   "for the suite or the task, or make two tasks")  # fmt: skip
