"""The folder of one run: resolved configuration, environment, sample sheets, summary."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from crd.config import CRDConfig
from crd.errors import CRDError
from crd.evaluation import EvalResult
from crd.grid import GridRow, draw_grid

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
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


class RunFolder:
    """Paths and small files of a run.

    Args:
        path: created by `create`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, config: CRDConfig) -> None:
        """Make the folder and write `config.yaml` and `environment.json`.

        Raises:
            CRDError: the folder already holds a run or other files, or cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()):
                raise CRDError(
                    f"output folder {self.path} is not empty; choose another output_dir, or go on with --resume {self.path}"
                )
            (self.path / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
            self._write_json("environment.json", environment())
        except OSError as error:
            raise CRDError(f"cannot write the run folder {self.path}: {error}") from error

    def save_samples(self, update: int, result: EvalResult) -> None:
        """Sheet of the first images of an evaluation with their scores."""
        count = min(_SHEET, len(result.images))
        captions = [
            f"{score:.2f} {prompt}"
            for score, prompt in zip(result.rewards.total[:count].tolist(), result.prompts, strict=False)
        ]
        folder = self.path / "samples"
        folder.mkdir(exist_ok=True)
        row = GridRow(f"update {update}", result.images[:count], captions)
        draw_grid([row], [""] * count).save(folder / f"update-{update:06d}.png")

    def save_summary(self, summary: Mapping[str, Any]) -> None:
        self._write_json(SUMMARY_FILE, summary)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.path / name)


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
