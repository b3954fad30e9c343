"""Detectors for GenEval, and how a judge is made of a name, a file or settings."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from crd.errors import CRDError, not_ours
from crd.geneval.detections import PUBLISHED, Thresholds
from crd.geneval.detectors.base import BATCH_SIZE, SCORE_FLOOR, ColorClassifier, Detector
from crd.geneval.detectors.config import JudgeConfig
from crd.geneval.detectors.scope import JudgeScope
from crd.text_files import known_fields, read_settings

if TYPE_CHECKING:
    from crd.geneval.judge import GenEvalJudge

__all__ = [
    "DETECTORS",
    "SCORE_FLOOR",
    "ColorClassifier",
    "Detector",
    "JudgeConfig",
    "judge_scope",
    "judge_settings",
    "load_judge",
]

# Name -> class. Strings, so that its libraries load only when it is asked for. A new detector is one file and one line
# here. Beside what `Detector` asks for it has `published_thresholds` (whether the published ones are made for it) and
# the classmethods `classes_for(JudgeConfig)`, which refuses settings that do not fit without loading a model, and
# `from_config(JudgeConfig)`.
DETECTORS: dict[str, str] = {
    "mask2former": "crd.geneval.detectors.mask2former:Mask2FormerDetector",
    "open-vocabulary": "crd.geneval.detectors.open_vocabulary:OpenVocabularyDetector",
    "tiny": "crd.tiny.detector:SceneDetector",
    "tiny-transformer": "crd.tiny.detector:TransformerSceneDetector",
}
CONFIDENCES = ("confidence", "counting_confidence")


def judge_settings(config: str | Mapping[str, Any] | JudgeConfig = "mask2former") -> JudgeConfig:
    """The settings of a judge, checked as far as they can be without its models.

    Args:
        config: a name of `DETECTORS`, a .yaml file of `JudgeConfig` fields (`thresholds` nested), or these fields.

    Raises:
        CRDError: no such file, an unknown name or setting (the nearest is named), a value that does not fit, or no
            thresholds for a detector that needs its own.
    """
    if isinstance(config, JudgeConfig):
        settings = config
    elif isinstance(config, Mapping):
        settings = _from_fields(config)
    elif config.endswith((".yaml", ".yml")):
        missing = f"no judge settings at {config}; give a .yaml file or one of {', '.join(DETECTORS)}"
        return read_settings(Path(config), "judge", missing, judge_settings)
    else:
        settings = JudgeConfig(detector=config)
    judge_scope(settings)
    return settings


def judge_scope(settings: JudgeConfig) -> JudgeScope:
    """What the judge of these settings can judge; no model is loaded.

    Raises:
        CRDError: as `judge_settings`.
    """
    kind = _detector_class(settings.detector)
    classes = kind.classes_for(settings)
    if settings.thresholds is None and not kind.published_thresholds:
        raise CRDError(_needs_thresholds(settings.detector))
    return JudgeScope(classes, kind.gives_colors or settings.color_model is not None, settings.thresholds or PUBLISHED)


def load_judge(config: str | Mapping[str, Any] | JudgeConfig = "mask2former", device: str = "auto") -> GenEvalJudge:
    """A judge, with CLIP for the colors unless its detector names them itself.

    Args:
        config: as of `judge_settings`.
        device: where its models go, unless the settings say; "auto" is a GPU if there is one.

    Raises:
        CRDError: as `judge_settings`, or a model that cannot be loaded.
    """
    from crd.geneval.judge import GenEvalJudge  # it imports this package

    settings = judge_settings(config)
    if settings.device == "auto":
        free = "cuda" if torch.cuda.is_available() else "cpu"
        settings = dataclasses.replace(settings, device=free if device == "auto" else device)
    with not_ours(f"loading the judge {settings.detector} on device {settings.device}", "check its settings"):
        detector: Detector = _detector_class(settings.detector).from_config(settings)
        own = detector.gives_colors or settings.color_model is None
        colors = None if own else _clip(settings, str(settings.color_model))
    return GenEvalJudge(detector, colors, settings.thresholds or PUBLISHED, settings.paper_compat)


def _from_fields(fields: Mapping[str, Any]) -> JudgeConfig:
    values = known_fields(fields, JudgeConfig, "judge setting")
    if isinstance(values.get("classes"), list):
        values["classes"] = tuple(values["classes"])
    if not isinstance(values.get("thresholds"), Mapping):
        return JudgeConfig(**values)
    given = known_fields(values["thresholds"], Thresholds, "threshold")
    settings = JudgeConfig(**{**values, "thresholds": Thresholds(**given)})
    if not set(CONFIDENCES) <= set(given) and not _detector_class(settings.detector).published_thresholds:
        raise CRDError(_needs_thresholds(settings.detector))
    return settings


def _needs_thresholds(detector: str) -> str:
    return (f"the scores of {detector} run lower than the published thresholds were made for; "
            f"give thresholds of your own, with {' and '.join(CONFIDENCES)}")  # fmt: skip


def _detector_class(name: str) -> Any:
    if name not in DETECTORS:
        near = difflib.get_close_matches(str(name), DETECTORS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CRDError(f"unknown detector {name!r}; known: {', '.join(sorted(DETECTORS))}, or a .yaml file{hint}")
    module, attribute = DETECTORS[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def _clip(settings: JudgeConfig, model: str) -> ColorClassifier:
    from crd.geneval.detectors.clip_color import CLIPColorClassifier
    from crd.geneval.detectors.loading import dtype_named

    return CLIPColorClassifier(
        model,
        device=settings.device,
        dtype=dtype_named(settings.dtype),
        batch_size=settings.batch_size or BATCH_SIZE,
    )
