"""Detectors for GenEval, and how a judge is made of a name."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from crd.errors import CRDError
from crd.geneval.detections import Thresholds
from crd.geneval.detectors.base import SCORE_FLOOR, ColorClassifier, Detector
from crd.geneval.detectors.config import JudgeConfig

if TYPE_CHECKING:
    from crd.geneval.judge import GenEvalJudge

__all__ = ["DETECTORS", "SCORE_FLOOR", "ColorClassifier", "Detector", "JudgeConfig", "load_judge"]

# Name -> class with a classmethod `from_config(JudgeConfig)`. A new detector is one file and one line here. Strings, so
# that its libraries load only when it is asked for.
DETECTORS: dict[str, str] = {
    "mask2former": "crd.geneval.detectors.mask2former:Mask2FormerDetector",
    "open-vocabulary": "crd.geneval.detectors.open_vocabulary:OpenVocabularyDetector",
    "tiny": "crd.tiny.detector:SceneDetector",
    "tiny-transformer": "crd.tiny.detector:TransformerSceneDetector",
}


def load_judge(config: str | Mapping[str, Any] | JudgeConfig = "mask2former") -> GenEvalJudge:
    """A judge, with CLIP for the colors unless its detector names them itself.

    Args:
        config: a name of `DETECTORS`, or settings, as `JudgeConfig` or by its field names.

    Raises:
        CRDError: an unknown name or setting (the nearest is named), or a model that cannot be loaded.
    """
    from crd.geneval.judge import GenEvalJudge  # it imports this package

    settings = _settings(config)
    if settings.device == "auto":
        settings = dataclasses.replace(settings, device="cuda" if torch.cuda.is_available() else "cpu")
    module, name = _path(settings.detector).split(":")
    detector: Detector = getattr(importlib.import_module(module), name).from_config(settings)
    colors = None if detector.gives_colors or settings.color_model is None else _clip(settings, settings.color_model)
    return GenEvalJudge(detector, colors, settings.thresholds, settings.paper_compat)


def _settings(config: str | Mapping[str, Any] | JudgeConfig) -> JudgeConfig:
    if isinstance(config, JudgeConfig):
        return config
    if isinstance(config, str):
        return JudgeConfig(detector=config)
    values = _checked(config, JudgeConfig, "judge setting")
    if isinstance(values.get("thresholds"), Mapping):
        values["thresholds"] = Thresholds(**_checked(values["thresholds"], Thresholds, "threshold"))
    if "classes" in values and not isinstance(values["classes"], str):
        values["classes"] = tuple(values["classes"])
    return JudgeConfig(**values)


def _checked(values: Mapping[str, Any], kind: type[JudgeConfig | Thresholds], what: str) -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise CRDError(f"unknown {what} {key!r}; {hint}")
    return dict(values)


def _path(name: str) -> str:
    if name not in DETECTORS:
        near = difflib.get_close_matches(str(name), DETECTORS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CRDError(f"unknown detector {name!r}; known: {', '.join(sorted(DETECTORS))}{hint}")
    return DETECTORS[name]


def _clip(settings: JudgeConfig, model: str) -> ColorClassifier:
    from crd.geneval.detectors.clip_color import CLIPColorClassifier
    from crd.geneval.detectors.loading import dtype_named

    return CLIPColorClassifier(
        model, device=settings.device, dtype=dtype_named(settings.dtype), batch_size=settings.batch_size
    )
