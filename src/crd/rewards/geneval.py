"""GenEval reward: does the image show the objects, counts, colors and positions that its prompt asks for?

The columns `tag`, `include` and `exclude` of the benchmark's records say what is asked (`crd.geneval.metadata`); a
detector finds what is there. Rewards of one judge share its findings: logging `geneval-official` beside `geneval`
costs no second detection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from PIL import Image

from crd.errors import CRDError
from crd.geneval.detectors.base import WithSamples
from crd.geneval.metadata import parse_columns
from crd.geneval.scoring import Scores
from crd.geneval.shared import SharedJudge, shared_judge

BLIND_AFTER = 64  # images without a single object asked for, the first ever judged


class GenEvalReward:
    """Reward in [0, 1]: the `soft` score of GenEval by Mask2Former and CLIP, both from the hub.

    Subclasses name another judge (a detector, or a .yaml file of `JudgeConfig` fields) or another score;
    `crd.geneval.scoring.score_image` defines the scores. The judge is loaded when it is first needed.

    Raises:
        CRDError: a model cannot be loaded, metadata that does not fit, a class the detector does not know, or the
            detector finds nothing.
    """

    score_range = (0.0, 1.0)
    judge_name: ClassVar[str] = "mask2former"
    score: ClassVar[Literal["official", "strict", "soft"]] = "soft"

    def __init__(self) -> None:
        self._device = "auto"
        self._judged, self._found = 0, False

    def __call__(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        tag: Sequence[str],
        include: Sequence[Any],
        exclude: Sequence[Any],
    ) -> list[float]:
        """Scores of B images against the metadata of their prompts."""
        columns = {"tag": tag, "include": include, "exclude": exclude}
        scores = self._judge.scores(list(images), parse_columns(prompts, columns))
        self._refuse_blindness(scores)
        found: list[float] = getattr(scores, self.score).tolist()
        return found

    def use_device(self, device: str) -> None:
        """Where the judge's models go: called before they are loaded."""
        self._device = device

    def check_columns(self, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
        """Raise `CRDError` for the first prompt whose metadata does not fit, or names a class never detected."""
        self._judge.scope.check(list(dict.fromkeys(parse_columns(prompts, columns))))

    def self_test(self) -> None:
        """Load the judge, and refuse one that sees objects where there are none or misses those of its samples."""
        self._judge.judge.self_test()

    @property
    def _judge(self) -> SharedJudge:
        return shared_judge(self.judge_name, self._device)

    def _refuse_blindness(self, scores: Scores) -> None:
        """A detector without samples to be tested on is watched at the first images instead."""
        self._judged += len(scores.soft)
        self._found = self._found or bool(scores.soft.any())
        if not self._found and self._judged >= BLIND_AFTER and not isinstance(self._judge.judge.detector, WithSamples):
            raise CRDError(f"{self.judge_name} found none of the requested objects in the first {self._judged} images; "
                           "check the detector's weights")  # fmt: skip


class GenEvalOfficialReward(GenEvalReward):
    """Reward 0 or 1: GenEval's own score by Mask2Former and CLIP."""

    score = "official"


class TinyGenEvalReward(GenEvalReward):
    """Reward in [0, 1]: the `soft` score by the bundled world's own detector."""

    judge_name = "tiny"


class TinyGenEvalOfficialReward(TinyGenEvalReward):
    """Reward 0 or 1: GenEval's own score by the bundled world's own detector."""

    score = "official"


class TinyHeldOutGenEvalReward(TinyGenEvalReward):
    """Reward in [0, 1]: the `soft` score by the bundled world's second detector, trained apart from the first."""

    judge_name = "tiny-transformer"
