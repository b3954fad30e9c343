"""Score a bundled-world pipeline during pretraining: stock sampling, OCR reward on held-out prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from crd.rewards.ocr import OCRReward
from crd.tiny.architecture import encode_captions
from crd.tiny.vocabulary import prompts as world_prompts


@torch.no_grad()
def sample_images(
    pipe: Any,
    captions: list[str],
    guidance_scale: float,
    steps: int = 10,
    batch: int = 32,
) -> list[Image.Image]:
    """One image a caption by the stock pipeline without T5 tokens; noise depends on the position in the list."""
    images: list[Image.Image] = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        joint, pooled = encode_captions(pipe, part, t5_length=0)
        empty_joint, empty_pooled = encode_captions(pipe, [""] * len(part), t5_length=0)
        images += pipe(
            prompt_embeds=joint,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=empty_joint,
            negative_pooled_prompt_embeds=empty_pooled,
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            height=64,
            width=64,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
        ).images
    return images


def evaluate_pipeline(
    pipe: Any, prompts: int, guidance_scales: tuple[float, ...], grid: Path | None = None
) -> dict[str, float]:
    """Mean OCR reward on `prompts` held-out captions at each guidance scale, as `reward_cfg_<scale>`."""
    captions = world_prompts("test", prompts)
    ocr = OCRReward()
    scores: dict[str, float] = {}
    rows: list[list[Image.Image]] = []
    for scale in guidance_scales:
        images = sample_images(pipe, captions, scale)
        values = ocr(images, captions)
        scores[f"reward_cfg_{scale:g}"] = sum(values) / len(values)
        rows.append(images[:12])
    if grid is not None:
        sheet = Image.new("RGB", (12 * 128, len(rows) * 128))
        for y, row in enumerate(rows):
            for x, image in enumerate(row):
                sheet.paste(image.resize((128, 128), Image.Resampling.NEAREST), (x * 128, y * 128))
        sheet.save(grid)
    return scores
