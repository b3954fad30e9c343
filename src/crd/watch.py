"""Evaluation inside training: the history of a run's evaluations, what the alarm says of them, which one is best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from crd.alarm import NOTHING, OFF, RAISE_KL, STOP, TELL, WARN, Evaluated, Event, check, fallen, held_out_columns
from crd.console import console
from crd.errors import CRDError
from crd.eval_record import EvalRecord
from crd.evaluation import EvalResult, Evaluator
from crd.evaluation_files import TILES, EvaluationFiles
from crd.snapshots import ANCHOR, POLICY


@dataclass(frozen=True)
class Verdict:
    """What an evaluation means for the run."""

    result: EvalResult
    events: list[Event]
    stop: bool
    raise_kl: bool
    eligible: bool  # as the best of the run: no held-out score is below the base model's beyond its noise


class Watch:
    """Evaluates a run's policy, compares it with the base model on the same noise, and keeps the record.

    Args:
        evaluator: of the run.
        run: its folder.
        action: "off" records evaluations alone; "warn" tells and records events; "stop" ends the run at a warning,
            "raise_kl" strengthens its anchor.
    """

    def __init__(self, evaluator: Evaluator, run: Path, action: str) -> None:
        self.evaluator, self.action, self.ranks = evaluator, action, evaluator.engine.ranks
        self.files = EvaluationFiles(run)
        self.history: list[Evaluated] = []
        self.guided: EvalRecord | None = None  # the base model at the anchor's scale, once it is drawn

    def go_back(self, update: int) -> None:
        """Take up the record of a run that goes on from `update`, without what came later.

        Args:
            update: below 0, the run starts over.

        Raises:
            CRDError: the record is damaged, of other prompts, without its beginning, or cannot be written.
        """
        history = self.files.history(update)
        if update >= 0 and (not history or history[0].update != 0):
            raise CRDError(f"{self.files.folder} lacks the evaluation of update 0, with which later ones are compared; "
                           "restore it, or start a new run")  # fmt: skip
        guided = self.files.base(self.evaluator.anchor_guidance) if history else None
        for record in [*(one.record for one in history), *([] if guided is None else [guided])]:
            self._check_drawn_alike(record)
            if not self.evaluator.draws(record):
                raise CRDError(f"the evaluation prompts are not those of the run: {self.files.folder} holds "
                               f"{len(record.prompts)} others; restore the prompts, or start a new run")  # fmt: skip
            told = None if record.protocol is None else record.protocol.unlike(self.evaluator.protocol)
            if told is not None:
                raise CRDError(f"the evaluations in {self.files.folder} were measured otherwise than this run would: "
                               f"{told}; set it back, or start a new run")  # fmt: skip
        if history and self.action != OFF:
            self.files.tile(0, 0)  # what an event would show must be there
        # Nothing is dropped before all is read: a refused resume changes nothing.
        self.ranks.on_main(lambda: self._tidy(update))
        self.history, self.guided = history, guided

    def evaluate(self, update: int, *, can_stop: bool = True, can_raise: bool = True) -> Verdict:
        """Evaluate the policy, keep the record, and judge it.

        Args:
            update: that it comes after.
            can_stop: whether there is anything left to stop; else a warning is told only.
            can_raise: the same of the KL strengths.

        Raises:
            CRDError: a scorer failed, the record cannot be written, or the pictures of the base model are lost.
        """
        result = self.evaluator(POLICY)
        if self.guided is None and self.action != OFF:
            guided = self._guided_base(result if update == 0 else None)
            self.guided = guided.record
            self._keep(lambda: self.files.save_base(guided))
        self.history.append(Evaluated(update, result.record))
        self._keep(lambda: self.files.save_policy(update, result))
        # A run that is resumed with the alarm off still has the guided base model's record.
        events = [] if self.action == OFF or self.guided is None else check(self.history, self.guided)
        possible = {STOP: can_stop, RAISE_KL: can_raise}
        action = self.action if possible.get(self.action, False) else TELL
        for event in events:
            self._tell(event, action if event.level == WARN else NOTHING, result)
        warned = any(event.level == WARN for event in events)
        return Verdict(
            result, events, stop=warned and action == STOP, raise_kl=warned and action == RAISE_KL,
            eligible=self._eligible(result.record),
        )  # fmt: skip

    def base(self, guidance: float) -> EvalRecord:
        """The base model at a CFG scale, on the same prompts and noise; what was drawn before is not drawn again."""
        if self.guided is not None and guidance == self.guided.guidance:
            return self.guided
        if self.history and guidance == self.history[0].record.guidance:
            return replace(self.history[0].record, role=ANCHOR)
        return self.evaluator(ANCHOR, guidance).record

    def eligible(self) -> dict[int, float]:
        """Update -> mean reward, of the evaluations after training that may be the best of the run."""
        return {
            one.update: one.record.metrics()["reward"] for one in self.history[1:] if self._eligible(one.record)
        }  # fmt: skip

    def _guided_base(self, untrained: EvalResult | None) -> EvalResult:
        """The base model at the anchor's scale; before training it is the policy, if that has the same scale."""
        if untrained is not None and untrained.record.guidance == self.evaluator.anchor_guidance:
            return EvalResult(replace(untrained.record, role=ANCHOR), untrained.images)
        return self.evaluator(ANCHOR, self.evaluator.anchor_guidance)

    def _check_drawn_alike(self, record: EvalRecord) -> None:
        settings = self.evaluator.settings
        if (record.steps, record.solver) != (settings.steps, settings.solver):
            raise CRDError(f"the evaluations in {self.files.folder} were drawn in {record.steps} steps of "
                           f"{record.solver}, this run draws in {settings.steps} of {settings.solver}; set it back, or "
                           "start a new run")  # fmt: skip

    def _eligible(self, record: EvalRecord) -> bool:
        base = self.history[0].record
        return not any(fallen(record, base, column) for column in held_out_columns(record))

    def _tell(self, event: Event, action: str, result: EvalResult) -> None:
        style = "yellow" if event.level == WARN else ""
        console.print(f"{event.level}: update {event.update}: {event.message}", style=style, markup=False)
        index = self._example(event.column, result.record)
        # The first process alone has the files and the pictures.
        self._keep(lambda: self.files.save_event(event, action, self.files.tile(0, index), result.images[index]))

    def _example(self, column: str | None, now: EvalRecord) -> int:
        """Of the images that are kept, the one in which a score or statistic changed most since the base model."""
        base = self.history[0].record
        columns = {**now.scores, **now.statistics}, {**base.scores, **base.statistics}
        name = column if column in columns[0] else "reward"
        change = np.abs(np.nan_to_num(columns[0][name] - columns[1][name]))
        return int(change[:TILES].argmax())

    def _tidy(self, update: int) -> None:
        try:
            self.files.forget_after(update)
        except OSError as error:
            raise CRDError(f"cannot tidy {self.files.folder}: {error}; check its permissions") from error

    def _keep(self, write: Callable[[], object]) -> None:
        """Write on the first process, which alone has the images."""
        self.ranks.on_main(lambda: self._write(write))

    def _write(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            raise CRDError(f"cannot write to {self.files.run}: {error}; free space and use --resume") from error
