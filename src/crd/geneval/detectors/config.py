"""The settings of a judge."""

from __future__ import annotations

from dataclasses import dataclass

from crd.geneval.detections import PUBLISHED, Thresholds


@dataclass(frozen=True)
class JudgeConfig:
    """Which models look at the images; the defaults are the benchmark's pair in transformers' form."""

    detector: str = "mask2former"  # a name of `crd.geneval.detectors.DETECTORS`
    model: str | None = None  # of the detector: a hub id or a folder; None = the detector's own default
    classes: tuple[str, ...] = ()  # that an open-vocabulary detector looks for
    color_model: str | None = "openai/clip-vit-large-patch14"  # None = no colors
    device: str = "auto"  # a GPU if there is one
    dtype: str = "float32"  # or bfloat16, float16
    batch_size: int = 8  # images, or crops, at a time
    thresholds: Thresholds = PUBLISHED
    paper_compat: bool = False  # of the soft score, see `crd.geneval.scoring.score_image`
