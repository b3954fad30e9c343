"""The numbers of one evaluation, image by image, in memory and as JSON: what alarm, comparison and report read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crd.errors import CRDError

STATISTIC, DIVERSITY = "stat_", "diversity"


@dataclass(frozen=True)
class EvalRecord:
    """An evaluation of B images of P prompts; NaN stands for "does not apply"."""

    role: str  # "policy", or "anchor" = the base model
    guidance: float
    steps: int
    seed: int
    prompts: list[str]  # P
    prompt_id: np.ndarray  # (B,) int64, into `prompts`
    scores: Mapping[str, np.ndarray]  # "reward", "reward_NAME", "held_out_NAME" -> (B,) float64
    statistics: Mapping[str, np.ndarray]  # of pixels, name -> (B,) float64
    diversity: np.ndarray  # (P,) float64, NaN for a prompt of one image
    drift: Mapping[str, float]  # of velocities: "kl_to_anchor", "velocity_norm"

    def metrics(self) -> dict[str, float]:
        """Mean of everything where it applies; what applies nowhere is left out."""
        means = {
            name: float(np.nanmean(values))
            for name, (values, _) in self.columns().items()
            if not np.isnan(values).all()
        }
        return {**means, **self.drift}

    def columns(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Every score, statistic and the diversity: name -> values and the index of each value's prompt."""
        statistics = {f"{STATISTIC}{name}": values for name, values in self.statistics.items()}
        found = {name: (values, self.prompt_id) for name, values in {**self.scores, **statistics}.items()}
        return {**found, DIVERSITY: (self.diversity, np.arange(len(self.prompts)))}

    def same_images(self, other: EvalRecord) -> bool:
        """Whether the images of both were drawn for the same prompts from the same noise, and so form pairs."""
        return (
            (self.prompts, self.seed) == (other.prompts, other.seed)
            and self.prompt_id.tolist() == other.prompt_id.tolist()
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON holds it; `parse_record` reads it back."""
        return {
            "role": self.role,
            "guidance": self.guidance,
            "steps": self.steps,
            "seed": self.seed,
            "prompts": self.prompts,
            "prompt_index": self.prompt_id.tolist(),
            "scores": {name: _numbers(values) for name, values in self.scores.items()},
            "statistics": {name: _numbers(values) for name, values in self.statistics.items()},
            "diversity": _numbers(self.diversity),
            "model": {name: _number(value) for name, value in self.drift.items()},
        }


def rounded(values: np.ndarray) -> np.ndarray:
    """Six digits of each number: what is below is noise, and files are half as long.

    Done before anything reads a record, so that a resumed run, which has it from its file, decides alike.
    """
    return np.array([float(f"{value:.6g}") for value in values.tolist()], dtype=np.float64)


def read_record(path: Path) -> EvalRecord:
    """The record in a file of `EvalRecord.to_dict`.

    Raises:
        CRDError: it cannot be read, or is no such record.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return parse_record(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CRDError(
            f"cannot read the evaluation {path}: {type(error).__name__} {error}; restore or remove it"
        ) from error


def parse_record(content: Mapping[str, Any]) -> EvalRecord:
    """The record of parsed JSON.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is no such record.
    """
    record = EvalRecord(
        role=str(content["role"]),
        guidance=float(content["guidance"]),
        steps=int(content["steps"]),
        seed=int(content["seed"]),
        prompts=[str(prompt) for prompt in content["prompts"]],
        prompt_id=np.array(content["prompt_index"], dtype=np.int64),
        scores={name: _array(values) for name, values in content["scores"].items()},
        statistics={name: _array(values) for name, values in content["statistics"].items()},
        diversity=_array(content["diversity"]),
        drift={name: math.nan if value is None else float(value) for name, value in content["model"].items()},
    )
    images, prompts = len(record.prompt_id), len(record.prompts)
    lengths = {name: len(values) for name, values in {**record.scores, **record.statistics}.items()}
    for name, length in lengths.items():
        if length != images:
            raise ValueError(f"{images} images but {length} values of {name}")
    if len(record.diversity) != prompts:
        raise ValueError(f"{prompts} prompts but {len(record.diversity)} values of {DIVERSITY}")
    if not np.isin(record.prompt_id, np.arange(prompts)).all():
        raise ValueError(f"prompt_index must lie below {prompts}, the number of prompts")
    return record


def _numbers(values: np.ndarray) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _array(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else float(value) for value in values], dtype=np.float64)
