"""GenEval of drawn images: all that can be refused is refused before any is drawn; scores by task."""

from __future__ import annotations

from crd.data import PromptDataset
from crd.errors import CRDError
from crd.geneval.metadata import parse_columns
from crd.geneval.shared import shared_judge
from crd.geneval.summary import Summary, summarise
from crd.records import Rollout


class GenEvalSuite:
    """The judge of a set of prompts; it is loaded by `load`.

    Args:
        dataset: prompts with the benchmark's columns.
        judge: name of a detector, or a .yaml file of a judge's settings.
        device: where the judge's models go.

    Raises:
        CRDError: a prompt without metadata or one the detector cannot judge, or settings of the judge that do not fit.
    """

    def __init__(self, dataset: PromptDataset, judge: str, device: str) -> None:
        self._name, self._judge = judge, shared_judge(judge, device)
        self._judge.scope.check(parse_columns(dataset.prompts, dataset.columns))

    def load(self) -> None:
        """Load the judge and test it.

        Raises:
            CRDError: a model that cannot be loaded, or a judge that fails its self-test.
        """
        self._judge.judge.self_test()

    def check_size(self, height: int, width: int) -> None:
        """Refuse pictures of a size that the detector would squeeze into another.

        Raises:
            CRDError: it was made for one size, and this is not it.
        """
        side = self._judge.judge.detector.picture_side
        if side is not None and (height, width) != (side, side):
            raise CRDError(f"the judge {self._name} is made for pictures of {side} x {side} px, these are "
                           f"{height} x {width}; take --judge mask2former, or set --height and --width")  # fmt: skip

    def judge(self, rollout: Rollout) -> Summary:
        """Scores of finished images, by task."""
        wanted = parse_columns(rollout.batch.prompts, rollout.batch.columns)
        return summarise([metadata.tag for metadata in wanted], self._judge.scores(rollout.images, wanted))
