"""Numbers of a run on their way to people: metrics.jsonl always, TensorBoard and Weights & Biases by choice."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from crd.atomic import replace_file
from crd.console import console
from crd.errors import CRDError, not_ours
from crd.eval_record import EvalRecord

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_id.txt"

# Of an update's metrics, those a person watches in the terminal; objectives need not have them all.
_SHOWN = ("reward", "implicit_reward_std", "implicit_reward_correlation", "kl", "gradient_norm")


class Tracker:
    """Writes one JSON line a record, flushed, and mirrors numbers to the chosen viewers.

    Args:
        folder: of the run.
        tensorboard: event files go to `folder/tensorboard`.
        wandb: log to Weights & Biases (extra `wandb`); a resumed run goes on in the same one there.
        config: shown by Weights & Biases.
        resume_from: records of later updates are dropped (an interrupted run wrote them after its checkpoint).
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool,
        wandb: bool,
        config: Mapping[str, Any],
        resume_from: int | None = None,
    ) -> None:
        self.path = folder / METRICS_FILE
        purge = None if resume_from is None else resume_from + 1
        try:
            if resume_from is not None:
                _drop_later(self.path, resume_from)
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge) if tensorboard else None
        except OSError as error:
            raise CRDError(f"cannot write metrics to {folder}: {error}; free space") from error
        self._wandb = _start_wandb(folder, config) if wandb else None

    def log(self, update: int, kind: str, metrics: Mapping[str, float]) -> None:
        """Record metrics of `kind` ("train", "eval") after `update` updates.

        Raises:
            CRDError: the disk is full or not writable.
        """
        record = {"update": update, "kind": kind, **metrics}
        try:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")
            for name, value in metrics.items():
                if self._writer is not None:
                    self._writer.add_scalar(f"{kind}/{name}", value, update)
        except OSError as error:
            raise CRDError(
                f"cannot write metrics to {self.path.parent}: {error}; free space and use --resume"
            ) from error
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in metrics.items()}, step=update)

    def close(self) -> None:
        if self._writer is not None:
            # A full disk has been told by `log` or by the checkpoint; metrics.jsonl holds the same numbers.
            with suppress(OSError):
                self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Records of one kind, oldest first; [] if the run has none.

    Raises:
        CRDError: the file cannot be read.
    """
    try:
        return [record for record in _records(folder / METRICS_FILE) if record["kind"] == kind]
    except (OSError, UnicodeDecodeError) as error:
        raise CRDError(f"cannot read {folder / METRICS_FILE}: {error}; restore the file") from error


def print_update(update: int, updates: int, metrics: Mapping[str, float], seconds: float) -> None:
    """One line about an update, in the terminal."""
    shown = {name: metrics[name] for name in _SHOWN if name in metrics}
    numbers = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown.items())
    console.print(f"update {update}/{updates}  {numbers}  {seconds:.1f} s", highlight=False)


def print_evaluation(update: int, record: EvalRecord) -> None:
    """One line about an evaluation of the policy, in the terminal."""
    how = "no CFG" if record.guidance == 1 else f"guidance {record.guidance:g}"
    reward, images = record.metrics()["reward"], len(record.prompt_id)
    console.print(f"update {update}: held-out reward {reward:.3f} ({images} images, {how})")


def _records(path: Path) -> list[dict[str, Any]]:
    """All complete records: an interruption may have cut the last line off."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("update"), int) and "kind" in record:
            found.append(record)
    return found


def _drop_later(path: Path, update: int) -> None:
    if not path.exists():
        return
    kept = "".join(json.dumps(record) + "\n" for record in _records(path) if record["update"] <= update)
    replace_file(path, lambda temporary: temporary.write_text(kept, encoding="utf-8"))


def _start_wandb(folder: Path, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise CRDError('wandb=true needs Weights & Biases; pip install -e ".[wandb]"') from error
    known = _wandb_id(folder)
    with not_ours("wandb.init", "log in with `wandb login`, set WANDB_MODE=offline, or leave wandb out"):
        return wandb.init(project="crd", dir=str(folder), config=dict(config), id=known, resume="allow")


def _wandb_id(folder: Path) -> str:
    """The run's own id there, drawn once."""
    path = folder / WANDB_ID_FILE
    try:
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CRDError(f"cannot read or write {path}: {error}; check the run folder") from error
