from __future__ import annotations

import numpy as np
import pytest

from crd.errors import CRDError
from crd.geneval.scoring import Scores
from crd.geneval.summary import Summary, TaskMean, summarise


def scores(official: list[float], strict: list[float], soft: list[float]) -> Scores:
    return Scores(np.array(official), np.array(strict), np.array(soft), ((),) * len(official))


def test_overall_is_the_mean_of_tasks_not_of_images() -> None:
    # counting: (1 + 0 + 0 + 0) / 4 and so on; colors has one image. The mean over images would be 2/5.
    summary = summarise(
        ["counting", "colors", "counting", "counting", "counting"],
        scores([1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0.5, 1, 0.5, 0, 1]),
    )
    assert summary == Summary(
        tasks=(TaskMean("counting", 4, 0.25, 0.0, 0.5), TaskMean("colors", 1, 1.0, 1.0, 1.0)),
        overall=TaskMean("overall", 5, 0.625, 0.5, 0.75),
    )
    assert summary.rows() == [
        ("counting", 4, 0.25, 0.0, 0.5),
        ("colors", 1, 1.0, 1.0, 1.0),
        ("overall", 5, 0.625, 0.5, 0.75),
    ]


def test_what_cannot_be_summarised_is_told() -> None:
    with pytest.raises(CRDError, match=r"single_object, .*, got 'colour'"):
        summarise(["colors", "colour"], scores([1, 1], [1, 1], [1, 1]))
    with pytest.raises(ValueError, match="got 1 tags and 2 scores"):
        summarise(["colors"], scores([1, 1], [1, 1], [1, 1]))
    with pytest.raises(ValueError, match="at least 1"):
        summarise([], scores([], [], []))
