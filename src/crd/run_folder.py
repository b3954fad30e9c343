"""The folder of one run: resolved configuration, environment, sample sheets, summary."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from crd.atomic import replace_file
from crd.config import AUTO, RESUMABLE, CRDConfig
from crd.config_io import load_config
from crd.console import console
from crd.errors import CRDError
from crd.evaluation import EvalResult
from crd.evaluation_files import SAMPLES, UPDATE
from crd.grid import GridRow, draw_grid
from crd.run_summary import Scores, summary, summary_table
from crd.training_state import Progress

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
GIVEN_IN_PYTHON = "(given in Python)"
_SHEET = 12  # images on a sample sheet
_PACKAGES = (
    "crd",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "rapidocr",
    "onnxruntime",
    "numpy",
)


def recorded_config(
    config: CRDConfig, model: object, rewards: object, prompts: object, eval_prompts: object
) -> CRDConfig:
    """`config` with the trainer's arguments in place of the fields they replaced; None replaces nothing.

    An object has no name that a later `crd train --resume` could load, and the record says so.
    """
    replaced: dict[str, Any] = {}
    for field, value in (("model", model), ("prompts", prompts), ("eval_prompts", eval_prompts)):
        if value is not None:
            replaced[field] = _name(value)
    if rewards is not None:
        several = rewards if isinstance(rewards, Sequence) and not isinstance(rewards, str) else [rewards]
        replaced["rewards"] = tuple(_name(reward) for reward in several)
    return dataclasses.replace(config, **replaced)


def _name(value: object) -> str:
    return str(value) if isinstance(value, str | Path) else GIVEN_IN_PYTHON


class RunFolder:
    """Paths and small files of a run.

    Args:
        path: created by `create`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check_free(self) -> None:
        """Refuse, without making anything, a place where `create` could not make a run.

        Raises:
            CRDError: the folder already holds a run or other files, or cannot be written.
        """
        try:
            if self.path.exists() and any(self.path.iterdir()):
                raise CRDError(
                    f"output folder {self.path} is not empty; choose another output_dir, or --resume {self.path}"
                )
            above = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        except OSError as error:
            raise self._unusable(error) from error
        if not above.is_dir():
            raise self._unusable(f"{above} is a file")
        if not os.access(above, os.W_OK | os.X_OK):
            raise self._unusable(f"{above} is not writable")

    def _unusable(self, reason: object) -> CRDError:
        return CRDError(f"cannot make the run folder {self.path}: {reason}; choose another output_dir")

    def create(self, config: CRDConfig) -> None:
        """Make the folder and write `config.yaml` and `environment.json`.

        Raises:
            CRDError: as `check_free`.
        """
        self.check_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            self._write(CONFIG_FILE, config.to_yaml())
            self._write_json("environment.json", environment())
        except OSError as error:
            self.remove()
            raise CRDError(f"cannot write the run folder {self.path}: {error}; free space") from error

    def check_same(self, config: CRDConfig) -> None:
        """Refuse to go on with settings that would make it another run; where the run lies does not matter.

        Raises:
            CRDError: no run there, or a changed field that is not in `RESUMABLE`.
        """
        if not (self.path / CONFIG_FILE).is_file():
            raise CRDError(f"no run to resume in {self.path} (it has no {CONFIG_FILE}); start a new one")
        recorded = load_config(self.path / CONFIG_FILE)
        for name, value in dataclasses.asdict(recorded).items():
            now = config.__dict__[name]
            if now != value and value != AUTO and name not in RESUMABLE | {"output_dir"}:
                raise CRDError(f"{name} cannot change in a resumed run: it was {value!r}, got {now!r}; set it back")

    def record(self, config: CRDConfig) -> None:
        """Write `config.yaml` anew: a resumed run may have changed the fields in `RESUMABLE`.

        Raises:
            CRDError: it cannot be written.
        """
        with self._told_if_full():
            self._write(CONFIG_FILE, config.to_yaml())

    def forget_summary(self) -> None:
        """Delete the summary of a run that goes on.

        Raises:
            CRDError: it cannot be deleted.
        """
        with self._told_if_full():
            (self.path / SUMMARY_FILE).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete what `create` and a start that came to nothing have left."""
        shutil.rmtree(self.path, ignore_errors=True)

    def save_samples(self, update: int, result: EvalResult) -> None:
        """Sheet of the first images of an evaluation with their scores.

        Raises:
            CRDError: it cannot be written.
        """
        count = min(_SHEET, len(result.images))
        captions = [
            f"{score:.2f} {prompt}"
            for score, prompt in zip(result.record.scores["reward"][:count].tolist(), result.prompts, strict=False)
        ]
        folder = self.path / SAMPLES
        row = GridRow(f"update {update}", result.images[:count], captions)
        with self._told_if_full():
            folder.mkdir(exist_ok=True)
            draw_grid([row], [""] * count).save(folder / f"{UPDATE}{update:06d}.png")

    def summarise(self, progress: Progress, found: Scores) -> dict[str, float]:
        """Write summary.json, show it, and return what it holds.

        Args:
            progress: of the run.
            found: of `crd.run_summary.moments`.

        Raises:
            CRDError: it cannot be written.
        """
        content = summary(progress, found)
        with self._told_if_full():
            self._write_json(SUMMARY_FILE, content)
        console.print(summary_table(progress, found, str(self.path)))
        return content

    @contextmanager
    def _told_if_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CRDError(
                f"cannot write to the run folder {self.path}: {error}; free space and use --resume"
            ) from error

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self._write(name, json.dumps(content, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        replace_file(self.path / name, lambda path: path.write_text(text, encoding="utf-8"))


def environment() -> dict[str, Any]:
    """Versions and hardware, for the record."""
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": packages,
    }
