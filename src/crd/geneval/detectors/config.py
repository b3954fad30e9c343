"""The settings of a judge."""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass

from crd.errors import CRDError
from crd.geneval.detections import Thresholds
from crd.geneval.detectors.base import check_batch_size


@dataclass(frozen=True)
class JudgeConfig:
    """Which models look at the images; the defaults are the benchmark's pair in transformers' form.

    Raises:
        CRDError: a value of another type.
    """

    detector: str = "mask2former"  # a name of `crd.geneval.detectors.DETECTORS`
    model: str | None = None  # of the detector: a hub id or a folder; None = the detector's own default
    classes: tuple[str, ...] = ()  # that an open-vocabulary detector looks for
    color_model: str | None = "openai/clip-vit-large-patch14"  # None = no colors
    device: str = "auto"  # the run's; without a run, a GPU if there is one
    dtype: str = "float32"  # or bfloat16, float16
    batch_size: int | None = None  # images, or crops, at a time; None = 8, of the tiny detectors 64
    thresholds: Thresholds | None = None  # None = the published ones, where the detector is one they are made for
    paper_compat: bool = False  # of the soft score, see `crd.geneval.scoring.score_image`

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(JudgeConfig).items():
            value = self.__dict__[name]
            kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (typing.get_origin(hint) or hint,)
            if not isinstance(value, kinds):
                wanted = " or ".join("none" if kind is types.NoneType else kind.__name__ for kind in kinds)
                raise CRDError(f"{name} of a judge must be {wanted}, got {value!r:.60}")
        if self.batch_size is not None:
            check_batch_size("judge", self.batch_size)
