"""From images and their prompts to GenEval scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from PIL import Image

from crd.errors import CRDError
from crd.geneval.detections import PUBLISHED, Detections, Thresholds, kept, objects_to_color, with_colors
from crd.geneval.detectors.base import ColorClassifier, Detector, WithSamples
from crd.geneval.detectors.scope import JudgeScope
from crd.geneval.metadata import Include, Metadata
from crd.geneval.scoring import Scores, score_batch

CHUNK = 4  # batches of the detector whose masks are in memory at a time
LEAST = 0.9  # mean score of a detector's own samples
NOTHING = Image.new("RGB", (256, 256), (150, 150, 150))


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
        self.scope = JudgeScope(detector.classes, detector.gives_colors or colors is not None, thresholds)
        self.detector, self.colors, self.paper_compat = detector, colors, paper_compat

    def judge(
        self,
        images: Sequence[Image.Image],
        metadata: Sequence[Metadata],
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[list[Detections], Scores]:
        """The objects of B images, colors where the scores read them, and the scores.

        Masks are at the size of the images; they serve to name colors, and the objects are returned without them.

        Args:
            images: B images.
            metadata: the prompt of each of them.
            progress: called as `progress(done, B)` after every few batches.

        Raises:
            CRDError: as `JudgeScope.check`.
            ValueError: B differs.
        """
        if len(images) != len(metadata):
            raise ValueError(f"metadata must be one for each of the {len(images)} images, got {len(metadata)}")
        self.scope.check(metadata)
        found: list[Detections] = []
        size = CHUNK * self.detector.batch_size
        for start in range(0, len(images), size):
            found += self._find(images[start : start + size], metadata[start : start + size])
            if progress is not None:
                progress(len(found), len(images))
        return found, score_batch(found, metadata, self.scope.thresholds, self.paper_compat)

    def self_test(self) -> None:
        """Refuse a detector that sees objects where there are none, or misses those of its own samples.

        Raises:
            CRDError: it does.
        """
        name = self.detector.classes[0]
        asked = Metadata("single_object", f"a photo of a {name}", (Include(name, 1),))
        (found,), _ = self.judge([NOTHING], [asked])
        if len(kept(found, asked, self.scope.thresholds)[name]):
            raise CRDError(f"the detector finds {name!r} in an empty gray picture; check its weights")
        if isinstance(self.detector, WithSamples):
            images, wanted = zip(*self.detector.samples(), strict=True)
            mean = self.judge(images, wanted)[1].soft.mean()
            if mean < LEAST:
                raise CRDError(f"the detector scores its own samples {mean:.2f} on average, at least {LEAST} is "
                               "expected; reinstall crd, or train it again")  # fmt: skip

    def _find(self, images: Sequence[Image.Image], metadata: Sequence[Metadata]) -> list[Detections]:
        """The objects of a chunk of images, with colors and without masks."""
        found = self.detector.detect(images)
        if self.colors is not None and not self.detector.gives_colors:
            limits = self.scope.thresholds
            rows = [objects_to_color(d, m, limits).tolist() for d, m in zip(found, metadata, strict=True)]
            names = self.colors.classify(images, found, rows)
            found = [with_colors(*one) if one[1] else one[0] for one in zip(found, rows, names, strict=True)]
        return [replace(objects, masks=None) for objects in found]
