"""What a judge can judge, known before its models are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crd.errors import CRDError
from crd.geneval.detections import Detections, Thresholds, kept
from crd.geneval.detectors.base import SCORE_FLOOR
from crd.geneval.metadata import Metadata

_NOTHING = Detections((), np.empty((0, 4)), np.empty(0))


@dataclass(frozen=True)
class JudgeScope:
    """The classes that a judge finds, whether it names colors, and which objects it counts.

    Raises:
        CRDError: a confidence below the floor of detectors, of whose objects they report none.
    """

    classes: tuple[str, ...]
    names_colors: bool
    thresholds: Thresholds

    def __post_init__(self) -> None:
        for name in ("confidence", "counting_confidence"):
            if getattr(self.thresholds, name) < SCORE_FLOOR:
                raise CRDError(f"{name} must be at least {SCORE_FLOOR}, the least that detectors report, "
                               f"got {getattr(self.thresholds, name)}")  # fmt: skip

    def check(self, metadata: Sequence[Metadata]) -> None:
        """Whether these prompts can be judged, before any image exists.

        Raises:
            CRDError: a class that the detector does not know, which would score as absent; a color, and nothing here
                that names colors; more objects than the thresholds let count.
        """
        known = set(self.classes)
        for wanted in metadata:
            named = [entry.class_name for entry in wanted.include] + [entry.class_name for entry in wanted.exclude]
            for name in named:
                if name not in known:
                    raise CRDError(f"prompt {wanted.prompt!r:.80} is about {name!r}, which the detector does not know; "
                                   f"its classes: {', '.join(self.classes)}")  # fmt: skip
            if not self.names_colors and any(entry.color is not None for entry in wanted.include):
                raise CRDError(f"prompt {wanted.prompt!r:.80} asks for a color and this judge names none; "
                               "give it a color classifier")  # fmt: skip
            kept(_NOTHING, wanted, self.thresholds)
