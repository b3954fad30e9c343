"""Hand-made evaluations: P prompts, K images each, one number a prompt for every column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from crd.eval_record import EvalRecord, Protocol

PROMPTS, IMAGES = 32, 2
PROTOCOL = Protocol({"ocr": 1.0}, {"reward_ocr": "ocr", "held_out_clip": "clip=/models/clip"}, 64, 64, 4.5)
DRIFT = {"kl_to_anchor": 0.1, "velocity_norm": 1.0}


def spread(mean: float, deviation: float = 0.1, prompts: int = PROMPTS, seed: int = 0) -> np.ndarray:
    """(P,) normal numbers, shifted and scaled to exactly this mean and standard deviation."""
    draws = np.random.default_rng(seed).normal(size=prompts)
    scaled: np.ndarray = mean + deviation * (draws - draws.mean()) / draws.std()
    return scaled


def record(
    scores: dict[str, Sequence[float] | np.ndarray],
    *,
    images: int = IMAGES,
    statistics: dict[str, np.ndarray] | None = None,
    diversity: np.ndarray | None = None,
    drift: dict[str, float] | None = None,
    **changes: Any,
) -> EvalRecord:
    """Scores and statistics are given by prompt; its images differ by 0.01."""
    prompts = len(next(iter(scores.values())))
    alone = np.full(prompts, np.nan)

    def by_image(values: Sequence[float] | np.ndarray) -> np.ndarray:
        return np.repeat(np.asarray(values, dtype=np.float64), images) + 0.01 * np.tile(np.arange(images), prompts)

    facts: dict[str, Any] = {
        "role": "policy", "guidance": 1.0, "steps": 10, "solver": "euler", "seed": 0,
        "prompts": [f"prompt {n}" for n in range(prompts)],
        "protocol": PROTOCOL,
    }  # fmt: skip
    return EvalRecord(
        **{**facts, **changes},
        prompt_id=np.repeat(np.arange(prompts), images),
        scores={name: by_image(values) for name, values in scores.items()},
        statistics={name: by_image(values) for name, values in (statistics or {}).items()},
        diversity=alone if diversity is None else diversity,
        drift=DRIFT if drift is None else drift,
    )
