"""One judge for all that ask: loaded once, when it is first needed, and its last answer kept."""

from __future__ import annotations

import weakref
from functools import cached_property, lru_cache

from PIL import Image

from crd.console import progress_steps
from crd.geneval.detectors import judge_scope, judge_settings, load_judge
from crd.geneval.judge import GenEvalJudge
from crd.geneval.metadata import Metadata
from crd.geneval.scoring import Scores


class SharedJudge:
    """A judge that remembers the scores of the images it saw last: `soft` and `official` of them cost one detection.

    Args:
        name: of a detector, or a .yaml file of settings.
        device: where its models go, unless the settings say; "auto" is a GPU if there is one.

    Raises:
        CRDError: settings that do not fit.
    """

    def __init__(self, name: str, device: str) -> None:
        self.settings, self._device = judge_settings(name), device
        self.scope = judge_scope(self.settings)
        # Weak, so that no rollout outlives its update here.
        self._last: tuple[list[weakref.ref[Image.Image]], list[Metadata], Scores] | None = None

    @cached_property
    def judge(self) -> GenEvalJudge:
        """The judge itself; its models are loaded at the first use."""
        return load_judge(self.settings, self._device)

    def scores(self, images: list[Image.Image], wanted: list[Metadata]) -> Scores:
        """Scores of B images, one prompt each."""
        if self._last is not None:
            seen, asked, scores = self._last
            same = len(seen) == len(images) and all(a() is b for a, b in zip(seen, images, strict=True))
            if same and asked == wanted:
                return scores
        with progress_steps("GenEval") as progress:
            scores = self.judge.judge(images, wanted, progress)[1]
        self._last = ([weakref.ref(image) for image in images], wanted, scores)
        return scores


@lru_cache(maxsize=8)
def shared_judge(name: str, device: str) -> SharedJudge:
    """The one `SharedJudge` of this name or file on this device."""
    return SharedJudge(name, device)
