"""Score a bundled-world pipeline folder: OCR reward on held-out prompts at several guidance scales."""

from __future__ import annotations

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


def evaluate_scales(folder: Path, prompts: str, scales: tuple[float, ...]) -> dict[float, EvalResult]:
    """Held-out OCR reward of a pipeline folder at each guidance scale, same noise; on the CPU."""
    backbone, engine = load_backbone(folder), Engine("auto", "cpu")
    dataset, rewards, uncond = load_prompts(prompts), RewardSet(["ocr"]), encode_prompts(backbone, engine, [""])
    found = {}
    for scale in scales:
        settings = SamplingSettings(STEPS, scale, 32, None, None)
        found[scale] = evaluate(
            backbone, backbone.denoiser, engine, rewards, dataset, settings, uncond, images_per_prompt=1, seed=0
        )
    return found


def scales_grid(results: dict[float, EvalResult], scales: tuple[float, ...]) -> Image.Image:
    """A row of pictures for each scale, from the same noise."""
    rows = [
        GridRow("no guidance" if scale == 1 else f"guidance {scale:g}", results[scale].images[:ROW_LENGTH])
        for scale in scales
    ]
    return draw_grid(rows, results[scales[0]].prompts[:ROW_LENGTH])
