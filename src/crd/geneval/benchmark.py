"""GenEval of drawn images: prompts checked before any is drawn, scores by task."""

from __future__ import annotations

from crd.data import PromptDataset
from crd.geneval.metadata import parse_columns
from crd.geneval.shared import shared_judge
from crd.geneval.summary import Summary, summarise
from crd.records import Rollout


class GenEvalSuite:
    """The judge of a set of prompts.

    Args:
        dataset: prompts with the benchmark's columns.
        judge: name of a detector.

    Raises:
        CRDError: a prompt without metadata or one the detector cannot judge, an unknown judge, a model not found.
    """

    def __init__(self, dataset: PromptDataset, judge: str) -> None:
        wanted = parse_columns(dataset.prompts, dataset.columns)
        self._judge = shared_judge(judge)
        self._judge.judge.check_prompts(wanted)

    def judge(self, rollout: Rollout) -> Summary:
        """Scores of finished images, by task."""
        wanted = parse_columns(rollout.batch.prompts, rollout.batch.columns)
        return summarise([metadata.tag for metadata in wanted], self._judge.scores(rollout.images, wanted))
