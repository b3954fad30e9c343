"""Runs of a benchmark, each in its own process, several at a time; a failure of one does not end the others."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType

from crd.bench.cells import Attempt, CellFolder
from crd.bench.machine import commit, processor, waited_seconds
from crd.config import CRDConfig
from crd.errors import CRDError

_LOOK = 0.2  # s between looks at the processes
_PATIENCE = 10.0  # s that a process has to end when asked to
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


@dataclass(frozen=True)
class Job:
    """A run to begin or to go on with."""

    folder: CellFolder
    config: CRDConfig  # of the run, its folder and threads included


@dataclass
class _Child:
    job: Job
    process: subprocess.Popen[bytes]
    began: datetime
    clock: float
    commit: str | None  # of the code that it started with


@contextmanager
def alone(out: Path) -> Iterator[int]:
    """The folder of a benchmark for this process and its children, until the last of them ends.

    Yields:
        The descriptor that children inherit: while one of them lives, nobody else gets the folder.

    Raises:
        CRDError: another process has it, or it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = (out / ".lock").open("w")
    except OSError as error:
        raise CRDError(f"cannot make the folder {out}: {error}; choose another --output_dir") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            told = f"another crd bench, or a run that one left behind, works in {out}; wait for it, or end it"
            raise CRDError(told) from error
        yield handle.fileno()


class Runner:
    """Processes of a benchmark.

    Args:
        jobs: most of them at a time.
        lock: of `alone`.
        started: told of every job when it starts.
        ended: told of every job when it ended by itself.
    """

    def __init__(
        self, jobs: int, lock: int, started: Callable[[Job], None], ended: Callable[[Job, Attempt], None]
    ) -> None:
        self._jobs, self._lock, self._started, self._ended = jobs, lock, started, ended
        self._running: list[_Child] = []

    def run(self, jobs: Sequence[Job]) -> None:
        """Work on all jobs in their order; on Ctrl-C and SIGTERM their processes end, and KeyboardInterrupt follows.

        Raises:
            CRDError: a file of the harness cannot be written.
        """
        waiting = deque(jobs)
        with _termination_interrupts():
            try:
                while waiting or self._running:
                    while waiting and len(self._running) < self._jobs:
                        self._start(waiting.popleft())
                    time.sleep(_LOOK)
                    self._reap(stopped=False)
            finally:
                self._stop()

    def _start(self, job: Job) -> None:
        command, code = job.folder.command(job.config), commit()
        threads = str(job.config.threads)
        try:
            with job.folder.log.open("ab") as log:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=[self._lock],
                    env={**os.environ, "OMP_NUM_THREADS": threads},
                )  # fmt: skip
        except OSError as error:
            raise CRDError(
                f"cannot start {job.folder.cell}: {error}; free space or memory, and run the suite again"
            ) from error
        self._running.append(_Child(job, process, datetime.now(timezone.utc), time.perf_counter(), code))
        self._started(job)

    def _reap(self, *, stopped: bool) -> None:
        """Record the processes that have ended."""
        for child in list(self._running):
            waited = waited_seconds(child.process.pid)  # before it is reaped, and then nobody knows
            # Not Popen.poll: only wait4 tells what this process, and no other, has used.
            try:
                pid, status, usage = os.wait4(child.process.pid, os.WNOHANG)
            except ChildProcessError as error:
                if not stopped:
                    told = f"how {child.job.folder.cell} ended is lost: SIGCHLD is ignored; run crd bench without that"
                    raise CRDError(told) from error
                self._running.remove(child)  # reaped when the interrupt came: what it took is lost
                continue
            if pid == 0:
                continue
            child.process.returncode = os.waitstatus_to_exitcode(status)
            self._running.remove(child)
            config = child.job.config
            assert config.threads is not None  # crd bench sets them
            attempt = Attempt(
                began=child.began.isoformat(timespec="seconds"),
                seconds=round(time.perf_counter() - child.clock, 3),
                cpu_seconds=round(usage.ru_utime + usage.ru_stime, 3),
                # Not below that of this process: Linux counts what a child has before exec. A run of tiny-sd3 has 2 GB.
                peak_bytes=usage.ru_maxrss * _MAXRSS_UNIT,
                status=child.process.returncode,
                stopped=stopped,
                threads=config.threads,
                jobs=self._jobs,
                processor=processor(),
                cores=os.cpu_count() or 1,
                commit=child.commit,
                compile=config.compile,
                waited_seconds=waited,
            )
            child.job.folder.add(attempt)
            if not stopped:
                self._ended(child.job, attempt)

    def _stop(self) -> None:
        """End all processes; what they have saved stays."""
        self._signal(signal.SIGTERM)
        deadline = time.perf_counter() + _PATIENCE
        while self._running:
            self._reap(stopped=True)
            if time.perf_counter() > deadline:
                self._signal(signal.SIGKILL)
            time.sleep(_LOOK / 10)

    def _signal(self, number: signal.Signals) -> None:
        for child in self._running:
            with suppress(ProcessLookupError):  # already reaped when the interrupt came
                os.kill(child.process.pid, number)  # Popen.send_signal would reap it unseen


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """SIGTERM is as Ctrl-C inside."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
