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
from crd.geneval.metadata import parse_columns, parse_metadata
from crd.geneval.shared import shared_judge

NOTHING = Image.new("RGB", (256, 256), (150, 150, 150))


class GenEvalReward:
    """Reward in [0, 1]: the `soft` score of GenEval by Mask2Former and CLIP, both from the hub.

    Subclasses name another judge or another score; `crd.geneval.scoring.score_image` defines the scores.

    Raises:
        CRDError: a model cannot be loaded, metadata that does not fit, or a class the detector does not know.
    """

    score_range = (0.0, 1.0)
    judge_name: ClassVar[str] = "mask2former"
    score: ClassVar[Literal["official", "strict", "soft"]] = "soft"

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
        scores = shared_judge(self.judge_name).scores(list(images), parse_columns(prompts, columns))
        found: list[float] = getattr(scores, self.score).tolist()
        return found

    def check_columns(self, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
        """Raise `CRDError` for the first prompt whose metadata does not fit, or names a class never detected."""
        distinct = list(dict.fromkeys(parse_columns(prompts, columns)))
        shared_judge(self.judge_name).judge.check_prompts(distinct)

    def self_test(self) -> None:
        """Refuse a detector that sees objects where there are none."""
        wanted = parse_metadata({"tag": "single_object", "include": [{"class": "car", "count": 1}],
                                 "prompt": "a photo of a car"}, "self-test")  # fmt: skip
        if shared_judge(self.judge_name).scores([NOTHING], [wanted]).soft[0] > 0:
            raise CRDError(f"the {self.judge_name} detector finds a car in an empty gray picture; check its weights")


class GenEvalOfficialReward(GenEvalReward):
    """Reward 0 or 1: GenEval's own score by Mask2Former and CLIP."""

    score = "official"


class TinyGenEvalReward(GenEvalReward):
    """Reward in [0, 1]: the `soft` score by the bundled world's own detector."""

    judge_name = "tiny"

    def self_test(self) -> None:
        """Refuse a detector that misses a drawn scene, or sees objects where there are none."""
        import numpy as np

        from crd.tiny.scene_prompts import scene_prompts
        from crd.tiny.scenes import render_scene, scene_for

        super().self_test()
        wanted, rng = scene_prompts("test", 24), np.random.default_rng(0)
        pictures = [Image.fromarray(render_scene(scene_for(metadata, rng))) for metadata in wanted]
        mean = shared_judge(self.judge_name).scores(pictures, wanted).soft.mean()
        if mean < 0.9:
            raise CRDError(f"the {self.judge_name} detector scores drawn scenes {mean:.2f} on average, "
                           "at least 0.9 is expected; reinstall crd")  # fmt: skip


class TinyGenEvalOfficialReward(TinyGenEvalReward):
    """Reward 0 or 1: GenEval's own score by the bundled world's own detector."""

    score = "official"
