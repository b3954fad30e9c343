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

from crd.errors import CRDError

PREFIX = "update-"
STATE = "state.json"
BEST = "best.json"


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

    def updates(self) -> list[int]:
        """Updates with a complete checkpoint, oldest first."""
        found = (path.name.removeprefix(PREFIX) for path in self.folder.glob(f"{PREFIX}*") if (path / STATE).is_file())
        return sorted(int(number) for number in found if number.isdigit())

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
            temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=self.folder))
            for stem, tensors in checkpoint.tensors.items():
                save_file(dict(tensors), temporary / f"{stem}.safetensors")
            digests = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
            _write_json(temporary / STATE, {"update": update, "counters": checkpoint.counters, "sha256": digests})
            _sync(temporary)
            target = self.path(update)
            if target.exists():
                shutil.rmtree(target)
            os.replace(temporary, target)
        except (OSError, SafetensorError) as error:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            last = self.updates()
            kept = f"the last good one is {self.path(last[-1])}" if last else "there is none before it"
            raise CRDError(
                f"cannot save the checkpoint of update {update}: {error}; {kept}; free space and use --resume"
            ) from error
        self._drop_old()
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
        """Record that the checkpoint of `update` has the best evaluation reward so far."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{BEST}.tmp"
        _write_json(temporary, {"update": update, "reward": reward})
        os.replace(temporary, self.folder / BEST)

    def best(self) -> tuple[int, float] | None:
        """Update and reward of the best checkpoint."""
        try:
            content = json.loads((self.folder / BEST).read_text(encoding="utf-8"))
            return int(content["update"]), float(content["reward"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CRDError(f"{self.folder / BEST} is corrupt: {error}; delete it") from error

    def _drop_old(self) -> None:
        best = self.best()
        for update in self.updates()[: -self.keep]:
            if best is None or update != best[0]:
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
