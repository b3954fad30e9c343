"""Atomic checkpoints in safetensors and JSON; a crash or a full disk never harms an earlier one.

checkpoints/update-000010/   policy.safetensors  old.safetensors  sampler.safetensors
                             optimizer.safetensors  state.json (counters, digests of the files)
checkpoints/best.json        which checkpoint had the best evaluation reward
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crd.atomic import replace_file, share
from crd.errors import CRDError

CHECKPOINTS = "checkpoints"
PREFIX = "update-"
STATE = "state.json"
BEST = "best.json"
SAVING, REPLACED = ".saving-", ".replaced-"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on exactly: named groups of tensors, and plain counters."""

    tensors: Mapping[str, Mapping[str, Tensor]]  # file stem -> name -> tensor
    counters: Mapping[str, Any]


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: created on first save.
        keep: how many of the newest to keep; the best is kept besides.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    @classmethod
    def of_run(cls, run: Path, keep: int = 1) -> CheckpointFolder:
        """Those in the folder `run`; `keep` matters to who saves."""
        return cls(run / CHECKPOINTS, keep)

    def updates(self) -> list[int]:
        """Updates with a complete checkpoint, oldest first."""
        try:
            complete = [path.name for path in self.folder.glob(f"{PREFIX}*") if (path / STATE).is_file()]
        except OSError as error:
            raise CRDError(f"cannot read the checkpoints in {self.folder}: {error}; check its permissions") from error
        return sorted(int(number) for name in complete if (number := name.removeprefix(PREFIX)).isdigit())

    def path(self, update: int) -> Path:
        return self.folder / f"{PREFIX}{update:06d}"

    def save(self, update: int, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, whole or not at all, then drop old ones.

        Raises:
            CRDError: it cannot be written (disk full, no permission); earlier checkpoints stay as they are.
        """
        temporary: Path | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=SAVING, dir=self.folder))
            for stem, tensors in checkpoint.tensors.items():
                save_file(dict(tensors), temporary / f"{stem}.safetensors")
            digests = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
            _write_json(temporary / STATE, {"update": update, "counters": checkpoint.counters, "sha256": digests})
            share(temporary)
            _sync(temporary)
            target = self.path(update)
            self._put(temporary, target)
        except (OSError, SafetensorError) as error:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            last = self.updates()
            kept = f"the last good one is {self.path(last[-1])}" if last else "there is none before it"
            raise CRDError(
                f"cannot save the checkpoint of update {update}: {error}; {kept}; free space and use --resume"
            ) from error
        self._drop_old(update)
        return target

    def load(self, update: int) -> Checkpoint:
        """Read a checkpoint back, every file checked against its digest.

        Raises:
            CRDError: missing, incomplete or corrupt; names an earlier usable one if there is one.
        """
        path = self.path(update)
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            tensors = {}
            for name, digest in state["sha256"].items():
                if _digest(path / name) != digest:
                    raise ValueError(f"{name} does not match its digest")
                tensors[name.removesuffix(".safetensors")] = load_file(path / name)
            return Checkpoint(tensors, state["counters"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            earlier = [number for number in self.updates() if number < update]
            hint = (
                f"--resume {self.path(earlier[-1])} goes back to update {earlier[-1]}" if earlier else "start a new run"
            )
            raise CRDError(f"checkpoint {path} is corrupt: {error}; {hint}") from error

    def mark_best(self, update: int, reward: float) -> None:
        """Record that the checkpoint of `update` has the best evaluation reward so far.

        Raises:
            CRDError: it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            best = {"update": update, "reward": reward}
            replace_file(self.folder / BEST, lambda path: _write_json(path, best))
        except OSError as error:
            raise CRDError(f"cannot write {self.folder / BEST}: {error}; free space and use --resume") from error

    def best(self) -> tuple[int, float] | None:
        """Update and reward of the best checkpoint."""
        try:
            content = json.loads((self.folder / BEST).read_text(encoding="utf-8"))
            return int(content["update"]), float(content["reward"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CRDError(f"{self.folder / BEST} is corrupt: {error}; delete it") from error

    def sweep(self) -> None:
        """Mend what an interrupted `save` left: half-written folders go, one that was being replaced comes back.

        Raises:
            CRDError: no permission.
        """
        try:
            for path in self.folder.glob(f"{REPLACED}*"):
                target = self.folder / path.name.removeprefix(REPLACED)
                if target.exists():
                    shutil.rmtree(path)
                else:
                    os.replace(path, target)
            for path in self.folder.glob(f"{SAVING}*"):
                shutil.rmtree(path)
        except OSError as error:
            raise CRDError(f"cannot tidy {self.folder}: {error}; check its permissions") from error

    def forget_after(self, update: int, rewards: Mapping[int, float]) -> None:
        """Drop the checkpoints of later updates: a run that goes on from `update` has not made them.

        Args:
            update: where the run goes on.
            rewards: evaluated update -> reward, of those that may be the best; if the best checkpoint was a later one,
                or an interruption came between a checkpoint and its mark, the best of those kept takes its place.

        Raises:
            CRDError: no permission, or a corrupt record of the best.
        """
        best = self.best()
        try:
            # Before the checkpoints: an interruption in between must not leave a best that is gone.
            if best is not None and best[0] > update:
                (self.folder / BEST).unlink()
                best = None
            kept = [number for number in self.updates() if number <= update and number in rewards]
            winner = max(kept, key=lambda number: rewards[number], default=None)
            if winner is not None and (best is None or rewards[winner] > best[1]):
                self.mark_best(winner, rewards[winner])
            for later in self.updates():
                if later > update:
                    self._remove(later)
        except OSError as error:
            raise CRDError(
                f"cannot drop the checkpoints after update {update}: {error}; delete them from {self.folder}"
            ) from error

    def _put(self, temporary: Path, target: Path) -> None:
        """Rename into place; what was there before is in the folder, under one name or the other, at all times."""
        aside = self.folder / f"{REPLACED}{target.name}"
        if target.exists():
            if aside.exists():
                shutil.rmtree(aside)
            os.replace(target, aside)
        try:
            os.replace(temporary, target)
        except OSError:
            if aside.exists():
                os.replace(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)

    def _drop_old(self, written: int) -> None:
        best = self.best()
        try:
            for update in self.updates()[: -self.keep]:
                if update != written and (best is None or update != best[0]):
                    self._remove(update)
        except OSError as error:
            raise CRDError(
                f"cannot drop an old checkpoint: {error}; {self.path(written)} is saved, use --resume"
            ) from error

    def _remove(self, update: int) -> None:
        # Without its state.json a half-deleted folder is no checkpoint.
        (self.path(update) / STATE).unlink()
        shutil.rmtree(self.path(update))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    """Flush the files to disk, so that the rename cannot survive a power cut that the content does not."""
    for path in folder.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
