"""Score a bundled-world pipeline folder on held-out prompts, words and scenes, at several guidance scales."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from crd.batch_sizes import BatchSize
from crd.data import load_prompts
from crd.engine import Engine
from crd.evaluation import EvalResult, Evaluator, SamplingSettings, encode_unconditional
from crd.grid import GridRow, draw_grid
from crd.loading import load_model
from crd.metrics.held_out import HeldOutScores
from crd.rewards import RewardSet
from crd.snapshots import ANCHOR

STEPS = 10
ROW_LENGTH = 12

Results = dict[float, EvalResult]


def drawing() -> SamplingSettings:
    """How the card's pictures are drawn."""
    return SamplingSettings(STEPS, 1.0, BatchSize("batch", 32), None, None)


def evaluate_scales(folder: Path, prompts: str, reward: str, scales: tuple[float, ...]) -> Results:
    """Held-out reward of a pipeline folder at each guidance scale, same noise; on the CPU."""
    model, engine, dataset = load_model(folder), Engine("auto", "cpu"), load_prompts(prompts)
    evaluator = Evaluator(
        model.backbone, model.snapshots, engine, RewardSet([reward]), HeldOutScores((), dataset), dataset,
        drawing(), encode_unconditional(model.backbone, engine), anchor_guidance=max(scales), images_per_prompt=1,
        seed=0,
    )  # fmt: skip
    return {scale: evaluator(ANCHOR, scale) for scale in scales}


def scales_grid(parts: Sequence[Results], scales: tuple[float, ...]) -> Image.Image:
    """A row of pictures for each scale, from the same noise; equally many of each part."""
    count = ROW_LENGTH // len(parts)
    rows = [
        GridRow(
            "no guidance" if scale == 1 else f"guidance {scale:g}",
            [image for results in parts for image in results[scale].images[:count]],
        )
        for scale in scales
    ]
    return draw_grid(rows, [prompt for results in parts for prompt in results[scales[0]].prompts[:count]])
