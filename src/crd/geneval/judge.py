"""From images and their prompts to GenEval scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from crd.errors import CRDError
from crd.geneval.detections import PUBLISHED, Detections, Thresholds, kept, objects_to_color, with_colors
from crd.geneval.detectors.base import SCORE_FLOOR, ColorClassifier, Detector
from crd.geneval.metadata import Metadata
from crd.geneval.scoring import Scores, score_batch

_NOTHING = Detections((), np.empty((0, 4)), np.empty(0))


class GenEvalJudge:
    """A detector, a color classifier and the benchmark's rules.

    Args:
        detector: finds the objects.
        colors: names their colors; not needed if the detector does, or no prompt asks for one.
        thresholds: which objects count.
        paper_compat: of the soft score, see `score_image`.

    Raises:
        CRDError: a confidence below the floor of detectors, of whose objects they report none.
    """

    def __init__(
        self,
        detector: Detector,
        colors: ColorClassifier | None = None,
        thresholds: Thresholds = PUBLISHED,
        paper_compat: bool = False,
    ) -> None:
        for name in ("confidence", "counting_confidence"):
            if getattr(thresholds, name) < SCORE_FLOOR:
                raise CRDError(f"{name} must be at least {SCORE_FLOOR}, the least that detectors report, "
                               f"got {getattr(thresholds, name)}")  # fmt: skip
        self.detector, self.colors = detector, colors
        self.thresholds, self.paper_compat = thresholds, paper_compat

    def check_prompts(self, metadata: Sequence[Metadata]) -> None:
        """Whether these prompts can be judged, before any image exists.

        Raises:
            CRDError: a class that the detector does not know, which would score as absent; a color, and nothing here
                that names colors; more objects than the thresholds let count.
        """
        known = set(self.detector.classes)
        for wanted in metadata:
            named = [entry.class_name for entry in wanted.include] + [entry.class_name for entry in wanted.exclude]
            for name in named:
                if name not in known:
                    raise CRDError(f"prompt {wanted.prompt!r:.80} is about {name!r}, which the detector does not know; "
                                   f"its classes: {', '.join(self.detector.classes)}")  # fmt: skip
            colored = any(entry.color is not None for entry in wanted.include)
            if colored and self.colors is None and not self.detector.gives_colors:
                raise CRDError(f"prompt {wanted.prompt!r:.80} asks for a color and this judge names none; "
                               "give it a color classifier")  # fmt: skip
            kept(_NOTHING, wanted, self.thresholds)

    def judge(self, images: Sequence[Image.Image], metadata: Sequence[Metadata]) -> tuple[list[Detections], Scores]:
        """The objects of B images, colors where the scores read them, and the scores.

        Args:
            images: B images.
            metadata: the prompt of each of them.

        Raises:
            CRDError: as `check_prompts`.
            ValueError: B differs.
        """
        if len(images) != len(metadata):
            raise ValueError(f"metadata must be one for each of the {len(images)} images, got {len(metadata)}")
        self.check_prompts(metadata)
        found = self.detector.detect(images)
        if not self.detector.gives_colors and self.colors is not None:
            found = self._colored(self.colors, images, found, metadata)
        return found, score_batch(found, metadata, self.thresholds, self.paper_compat)

    def _colored(
        self,
        classifier: ColorClassifier,
        images: Sequence[Image.Image],
        found: list[Detections],
        metadata: Sequence[Metadata],
    ) -> list[Detections]:
        rows = [objects_to_color(d, m, self.thresholds).tolist() for d, m in zip(found, metadata, strict=True)]
        names = classifier.classify(images, found, rows)
        return [with_colors(*one) if one[1] else one[0] for one in zip(found, rows, names, strict=True)]
