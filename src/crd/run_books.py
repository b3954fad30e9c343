"""What a run writes while it goes: folder, metrics, sample sheets, checkpoints; the first process does, for all."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from crd.checkpoint import Checkpoint, CheckpointFolder
from crd.config import CRDConfig
from crd.evaluation import EvalResult
from crd.ranks import Ranks
from crd.run_folder import RunFolder
from crd.run_summary import moments
from crd.tracker import Tracker, read_metrics
from crd.training_state import Progress


class RunBooks:
    """The books of one run. All processes call alike; a full disk ends all of them.

    Args:
        config: of the run.
        recorded: the same as its folder records it.
        ranks: the processes.
    """

    def __init__(self, config: CRDConfig, recorded: CRDConfig, ranks: Ranks) -> None:
        self.recorded, self.ranks, self._config = recorded, ranks, config
        self.folder = RunFolder(Path(config.output_dir))
        self.checkpoints = CheckpointFolder.of_run(self.folder.path, config.keep_checkpoints)
        self._tracker: Tracker | None = None  # on the first process
        # Mean reward of the best checkpoint. In memory: other processes must not read a file that is being written.
        self.best: float | None = None
        self._saved: int | None = None  # the update of the last checkpoint
        self._clock = 0.0  # when `Progress.seconds` was last brought up to date

    def create(self) -> None:
        """Make the run folder; see `RunFolder.create`."""
        self.ranks.on_main(lambda: self.folder.create(self.recorded))

    def remove(self) -> None:
        """Delete the folder of a run that came to nothing."""
        if self.ranks.is_main:
            self.folder.remove()

    def reopen(self) -> None:
        """Check that the folder is this run's, and mend what an interruption left of its checkpoints."""
        with self.ranks.together():
            self.folder.check_same(self.recorded)
        self.ranks.on_main(self.checkpoints.sweep)

    def go_on_from(self, update: int, eligible: Mapping[int, float]) -> None:
        """Forget the checkpoints after `update`; `eligible`: update -> reward of those that may be the best."""

        def tidy() -> None:
            self.checkpoints.forget_after(update, eligible)
            self.folder.record(self.recorded)
            self.folder.forget_summary()

        self.ranks.on_main(tidy)
        with self.ranks.together():
            best = self.checkpoints.best()
        self.best = None if best is None else best[1]
        self._saved = update

    def has_evaluation(self, update: int) -> bool:
        """Whether metrics tell of an evaluation after `update`; not inside of `open`."""
        return any(record["update"] == update for record in read_metrics(self.folder.path, "eval"))

    @contextmanager
    def open(self, resume_from: int | None) -> Iterator[None]:
        """Keep metrics inside; records of updates after `resume_from` are dropped."""
        settings = dataclasses.asdict(self.recorded)
        tracker = self.ranks.on_main(
            lambda: Tracker(
                self.folder.path,
                tensorboard=self._config.tensorboard,
                wandb=self._config.wandb,
                config=settings,
                resume_from=resume_from,
            )
        )
        self._tracker, self._clock = tracker, time.perf_counter()
        try:
            yield
        finally:
            self._tracker = None
            if tracker is not None:
                tracker.close()

    def log(self, update: int, kind: str, metrics: Mapping[str, float]) -> None:
        """Record metrics, which every process has; see `Tracker.log`."""

        def write() -> None:
            if self._tracker is None:
                raise ValueError("metrics are logged inside of `open`")
            self._tracker.log(update, kind, metrics)

        self.ranks.on_main(write)

    def log_evaluation(self, update: int, result: EvalResult) -> None:
        """Record an evaluation's means, and a sheet of its images."""
        self.log(update, "eval", result.metrics())
        self.ranks.on_main(lambda: self.folder.save_samples(update, result))

    def save(self, progress: Progress, checkpoint: Callable[[], Checkpoint], *, sharded: bool) -> None:
        """Write a checkpoint, inside of `open`; each process makes it if the weights are sharded: it takes all of them.

        Args:
            progress: of the run; its seconds are brought up to date.
            checkpoint: makes it.
            sharded: whether weights are.
        """
        now = time.perf_counter()
        progress.seconds += now - self._clock
        self._clock = now
        update = progress.updates_done
        if sharded:
            content = checkpoint()
            self.ranks.on_main(lambda: self.checkpoints.save(update, content))
        else:
            self.ranks.on_main(lambda: self.checkpoints.save(update, checkpoint()))
        self._saved = update

    def is_best(self, reward: float) -> bool:
        """Whether a mean reward is above that of the best checkpoint."""
        return self.best is None or reward > self.best

    def mark_best(self, update: int, reward: float) -> None:
        """Record that the checkpoint of `update` is the best."""
        self.ranks.on_main(lambda: self.checkpoints.mark_best(update, reward))
        self.best = reward

    def has_checkpoint(self, update: int) -> bool:
        """Whether the last checkpoint is that of an update."""
        return update == self._saved

    def summarise(
        self, progress: Progress, anchor: Mapping[str, float] | None, base: Mapping[float, Mapping[str, float]]
    ) -> dict[str, float]:
        """Write and show the summary; {} on processes other than the first. See `moments` for the arguments."""

        def write() -> dict[str, float]:
            best = self.checkpoints.best()
            found = moments(read_metrics(self.folder.path, "eval"), None if best is None else best[0], anchor, base)
            return self.folder.summarise(progress, found)

        return self.ranks.on_main(write) or {}
