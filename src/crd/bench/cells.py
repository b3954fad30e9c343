"""The folder of one run of a benchmark: the run itself, what it printed, and what each attempt at it took.

settings.yaml    the configuration that it was started with
run/             the run folder
log.txt          what it printed, all attempts
attempts.jsonl   one line an attempt
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from crd.atomic import replace_file
from crd.bench.suite import EXECUTION, Cell
from crd.checkpoint import CHECKPOINTS
from crd.config import AUTO, CRDConfig
from crd.config_io import load_config
from crd.errors import CRDError
from crd.json_files import JsonObject, read_object_lines
from crd.loading import is_run
from crd.run_folder import CONFIG_FILE, SUMMARY_FILE

NEW, STARTED, FAILED, FINISHED = "new", "started", "failed", "finished"
RECORDED = "recorded"  # finished elsewhere: its numbers are there, its folder is not
# What may differ between the suite and a run that it goes on with: where it lies, and how it is executed.
_FREE = frozenset({"output_dir", *EXECUTION})


@dataclass(frozen=True)
class Attempt:
    """One process that worked on a run, from its start to its end."""

    began: str  # ISO 8601, UTC
    seconds: float  # wall clock, loading and evaluations included
    cpu_seconds: float  # of all its threads
    peak_bytes: int  # most memory that was resident at a time
    status: int  # of its exit; below 0 the signal that ended it
    stopped: bool  # by the harness, on request
    threads: int
    jobs: int  # runs at a time
    processor: str
    cores: int
    commit: str | None  # of the code; None = it does not lie in a git repository
    compile: str = "no"  # as in the configuration
    waited_seconds: float | None = None  # that its main thread was kept from a processor; None = not known

    @property
    def conditions(self) -> tuple[str, int, int, int, str]:
        """What seconds depend on beside the run: two runs of other conditions do not compare."""
        return self.processor, self.cores, self.jobs, self.threads, self.compile


class CellFolder:
    """Files of one run; nothing is created before `prepare`.

    Args:
        out: folder of the benchmark.
        cell: which run of it.
    """

    def __init__(self, out: Path, cell: Cell) -> None:
        self.cell, self.path = cell, out / cell.task / cell.arm / f"seed-{cell.seed}"
        self.run, self.log = self.path / "run", self.path / "log.txt"
        self._settings, self._attempts = self.path / "settings.yaml", self.path / "attempts.jsonl"

    def state(self) -> str:
        """How far the run is; one that was stopped, or whose harness died at the first attempt, is no failure."""
        if (self.run / SUMMARY_FILE).is_file():
            return FINISHED
        attempts = self.attempts()
        if attempts and not attempts[-1].stopped:
            return FAILED
        return STARTED if is_run(self.run) else NEW

    def check_same(self, config: CRDConfig) -> None:
        """Refuse a run that was made with other settings than `config`.

        Raises:
            CRDError: names a field that differs.
        """
        if not is_run(self.run):
            return
        check_settings(load_config(self.run / CONFIG_FILE), config, str(self.run),
                       "choose another --output_dir, or move that run away")  # fmt: skip

    def command(self, config: CRDConfig) -> list[str]:
        """The command that begins the run, or goes on with it; its settings are written down.

        Raises:
            CRDError: they cannot be written.
        """
        train = [sys.executable, "-m", "crd", "train"]
        if is_run(self.run):
            execution = [word for name in EXECUTION for word in (f"--{name}", str(config.__dict__[name]))]
            return [*train, "--resume", str(self.run), *execution]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for begun in self.run.glob(".tmp-*"):  # of a run that was killed before it had a configuration
                begun.unlink()
            replace_file(self._settings, lambda path: path.write_text(config.to_yaml(), encoding="utf-8"))
        except OSError as error:
            raise CRDError(
                f"cannot write {error.filename or self._settings}: {error}; choose another --output_dir"
            ) from error
        return [*train, str(self._settings)]

    def attempts(self) -> list[Attempt]:
        """Attempts so far, oldest first.

        Raises:
            CRDError: the file is damaged.
        """
        if not self._attempts.is_file():
            return []
        return [parse_attempt(line) for line in read_object_lines(self._attempts)[0]]

    def add(self, attempt: Attempt) -> None:
        """Record an attempt.

        Raises:
            CRDError: it cannot be written, or the file is damaged.
        """
        # The whole file anew: a line appended to one that a full disk cut off would be lost with it.
        lines = [json.dumps(dataclasses.asdict(one)) + "\n" for one in (*self.attempts(), attempt)]
        try:
            replace_file(self._attempts, lambda path: path.write_text("".join(lines), encoding="utf-8"))
        except OSError as error:
            raise CRDError(f"cannot write {self._attempts}: {error}; free space") from error

    def drop_checkpoints(self) -> None:
        """Remove what a finished run would only need to go on; its numbers and pictures stay.

        Raises:
            CRDError: it cannot be removed.
        """
        folder = self.run / CHECKPOINTS
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise CRDError(f"cannot remove {folder}: {error}; remove it, or use --keep-weights") from error

    def last_words(self, lines: int = 3) -> str:
        """The last lines that the run printed, in one."""
        if not self.log.is_file():
            return ""
        told = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        # Of a traceback, not the marks under its lines.
        return " / ".join([line for line in told if line.strip("^~ ")][-lines:])


def check_settings(made: CRDConfig, asked: CRDConfig, run: str, instead: str) -> None:
    """Refuse a run that was made with other settings than the suite asks for.

    Args:
        made: settings that the run was made with.
        asked: settings that it should have.
        run: what to call it.
        instead: what to do about it.

    Raises:
        CRDError: names a field that differs.
    """
    for name, was in dataclasses.asdict(made).items():
        wanted = asked.__dict__[name]
        # A run records what `auto` came to.
        if name not in _FREE and was != wanted and wanted != AUTO:
            raise CRDError(f"{run} was made with {name}={was!r}, the suite asks for {wanted!r}; {instead}")


def parse_attempt(line: JsonObject) -> Attempt:
    """An attempt as attempts.jsonl and cells.jsonl hold it.

    Raises:
        CRDError: it is damaged.
    """
    return Attempt(
        began=line.text("began"),
        seconds=line.real("seconds"),
        cpu_seconds=line.real("cpu_seconds"),
        peak_bytes=line.integer("peak_bytes"),
        status=line.integer("status", None),
        stopped=line.flag("stopped"),
        threads=line.integer("threads", 1),
        jobs=line.integer("jobs", 1),
        processor=line.text("processor"),
        cores=line.integer("cores", 1),
        commit=line.text("commit") if line.has("commit") else None,
        compile=line.text("compile") if line.has("compile") else "no",
        waited_seconds=line.real("waited_seconds") if line.has("waited_seconds") else None,
    )
