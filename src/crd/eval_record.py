"""The numbers of one evaluation, image by image, in memory and as JSON: what alarm, comparison and report read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crd.flow import EULER, SOLVERS
from crd.json_files import JsonObject, read_object

REWARD, HELD_OUT = "reward_", "held_out_"  # and the name of a scorer
STATISTIC, DIVERSITY = "stat_", "diversity"


@dataclass(frozen=True)
class Protocol:
    """How images were measured, beside what an `EvalRecord` says of how they were drawn."""

    weights: Mapping[str, float]  # of each reward in the total, by name
    sources: Mapping[str, str]  # "reward_NAME", "held_out_NAME" -> the scorer as it was asked for
    height: int  # px
    width: int
    anchor_guidance: float  # of the base model that `kl_to_anchor` is the distance to

    def unlike(self, other: Protocol) -> str | None:
        """What keeps the scores of the two from being compared, and what it is in both; None = nothing does.

        A scorer that only one of them has, or a reward of weight 0, keeps nothing from being compared. The anchor's
        scale matters to `kl_to_anchor` alone.
        """
        if (self.height, self.width) != (other.height, other.width):
            return f"their height x width are {self.height} x {self.width} and {other.height} x {other.width} px"
        summed = [{name: one.weights[name] for name in sorted(one.weights) if one.weights[name]}
                  for one in (self, other)]  # fmt: skip
        if summed[0] != summed[1]:
            return f"their rewards, by weight, are {summed[0]} and {summed[1]}"
        for column in sorted(self.sources.keys() & other.sources.keys()):
            if self.sources[column] != other.sources[column]:
                return f"their {column} are by {self.sources[column]} and {other.sources[column]}"
        return None


@dataclass(frozen=True)
class EvalRecord:
    """An evaluation of B images of P prompts; NaN stands for "does not apply"."""

    role: str  # "policy", or "anchor" = the base model
    guidance: float
    steps: int
    solver: str  # of the ODE that drew them
    seed: int
    prompts: list[str]  # P
    prompt_id: np.ndarray  # (B,) int64, into `prompts`
    protocol: Protocol | None  # None = the file it was read from does not say
    scores: Mapping[str, np.ndarray]  # "reward", "reward_NAME", "held_out_NAME" -> (B,) float64
    statistics: Mapping[str, np.ndarray]  # of pixels, name -> (B,) float64
    diversity: np.ndarray  # (P,) float64, NaN for a prompt of one image
    drift: Mapping[str, float]  # "kl_to_anchor", "kl_to_base", "velocity_norm", and what was asked for besides

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
            "solver": self.solver,
            "seed": self.seed,
            "prompts": self.prompts,
            "prompt_index": self.prompt_id.tolist(),
            "protocol": None if self.protocol is None else dataclasses.asdict(self.protocol),
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
    """The record in a file of `EvalRecord.to_dict`; other keys beside it are left alone.

    Raises:
        CRDError: it cannot be read, or is no such record.
    """
    return parse_record(read_object(path))


def parse_record(found: JsonObject) -> EvalRecord:
    """The record of a JSON object.

    Raises:
        CRDError: it is no such record.
    """
    prompts = list(found.texts("prompts"))
    prompt_id = found.indices("prompt_index", len(prompts))
    return EvalRecord(
        role=found.text("role"),
        guidance=found.real("guidance"),
        steps=found.integer("steps", 1),
        # Files that do not say are older than the choice.
        solver=found.one_of("solver", SOLVERS) if found.has("solver") else EULER,
        seed=found.integer("seed", None),
        prompts=prompts,
        prompt_id=prompt_id,
        protocol=_parse_protocol(found.inner("protocol")) if found.has("protocol") else None,
        scores=found.inner("scores").columns(len(prompt_id)),
        statistics=found.inner("statistics").columns(len(prompt_id)),
        diversity=found.numbers("diversity", len(prompts)),
        drift=found.inner("model").all_numbers(),
    )


def _parse_protocol(found: JsonObject) -> Protocol:
    weights = found.inner("weights")
    return Protocol(
        weights={name: weights.real(name) for name in weights.content},
        sources=found.inner("sources").all_texts(),
        height=found.integer("height", 1),
        width=found.integer("width", 1),
        anchor_guidance=found.real("anchor_guidance"),
    )


def _numbers(values: np.ndarray) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
