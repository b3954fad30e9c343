"""One judge for all that ask: loaded once, and its last answer kept."""

from __future__ import annotations

from functools import lru_cache

from PIL import Image

from crd.geneval.detectors import load_judge
from crd.geneval.metadata import Metadata
from crd.geneval.scoring import Scores


class SharedJudge:
    """A judge that remembers the images it saw last: `soft` and `official` of them cost one detection."""

    def __init__(self, name: str) -> None:
        self.judge = load_judge(name)
        self._last: tuple[list[Image.Image], list[Metadata], Scores] | None = None

    def scores(self, images: list[Image.Image], wanted: list[Metadata]) -> Scores:
        """Scores of B images, one prompt each."""
        if self._last is not None:
            seen, asked, scores = self._last
            if asked == wanted and len(seen) == len(images) and all(a is b for a, b in zip(seen, images, strict=True)):
                return scores
        scores = self.judge.judge(images, wanted)[1]
        self._last = (images, wanted, scores)
        return scores


shared_judge = lru_cache(maxsize=4)(SharedJudge)
