"""Score a bundled-world pipeline folder on held-out prompts, words and scenes, at several guidance scales."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from crd.backbones import load_backbone
from crd.data import load_prompts
from crd.engine import Engine
from crd.evaluation import EvalResult, SamplingSettings, encode_prompts, evaluate
from crd.grid import GridRow, draw_grid
from crd.rewards import RewardSet

STEPS = 10
ROW_LENGTH = 12

Results = dict[float, EvalResult]


def evaluate_scales(folder: Path, prompts: str, reward: str, scales: tuple[float, ...]) -> Results:
    """Held-out reward of a pipeline folder at each guidance scale, same noise; on the CPU."""
    backbone, engine = load_backbone(folder), Engine("auto", "cpu")
    dataset, rewards, uncond = load_prompts(prompts), RewardSet([reward]), encode_prompts(backbone, engine, [""])
    found = {}
    for scale in scales:
        settings = SamplingSettings(STEPS, scale, 32, None, None)
        found[scale] = evaluate(
            backbone, backbone.denoiser, engine, rewards, dataset, settings, uncond, images_per_prompt=1, seed=0
        )
    return found


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
