"""`benchmarks/draw_variance.py` runs, from a configuration and from a run, and its numbers are of what it says."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crd.config import CRDConfig

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("draw_variance")


def test_agreement_by_hand(script: Any) -> None:
    vectors = [torch.tensor(numbers) for numbers in ((1.0, 0.0), (1.0, 2.0), (1.0, -2.0))]
    # Squared norms 1, 5, 5; inner products 1, 1, -3.
    assert script.agreement(vectors) == pytest.approx((11 / 3, -1 / 3))


def test_a_line_by_hand(script: Any) -> None:
    redraws = [script.Redraw(torch.tensor([-a, a], dtype=torch.float64), torch.tensor([1.0, a])) for a in (1.0, 3.0)]
    # Per image: expectation squared 1 x 3, and deviation sqrt(2) about the mean 2. Gradients (1, 1) and (1, 3).
    line = script.table_row("way", redraws)
    assert line == "| way | 1.73e+00 | 1.41e+00 | 6.00e+00 | 4.00e+00 | 0.667 | 2.00e+00 |"


def test_three_ways_of_a_configuration(
    script: Any, base_config: CRDConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(replace(base_config, rollout_steps=4, timesteps="stratified").to_yaml())
    script.main(["--config", str(path), "--updates", "1", "--redraws", "2", "--draws", "3", "--group-size", "3"])
    heading, *table = capsys.readouterr().out.strip().splitlines()
    assert "2 x 3 images after 1 updates, 2 redraws of 3 draws, stratified" in heading
    rows = [line.split(" | ") for line in table[3:]]
    assert [row[0].removeprefix("| ") for row in rows] == list(script.WAYS)
    noise = [float(row[2]) for row in rows]
    assert len({*noise}) == 3
    assert min(noise) > 0


def test_redraws_of_a_run(script: Any, finished_run: Path) -> None:
    parts = dict.fromkeys(("config", "updates", "prompts", "group_size"))
    arguments = argparse.Namespace(**parts, run=str(finished_run), draws=2)
    images = script.FixedImages.of(script.moved_trainer(arguments))
    assert images.trainer.progress.updates_done == 3
    first, again, other, noisier = (
        images.redraw(number, True, noise) for number, noise in ((0, True), (0, True), (1, True), (0, False))
    )
    assert torch.equal(first.implicit_reward, again.implicit_reward)
    assert torch.equal(first.gradient, again.gradient)
    assert first.gradient.norm() > 0
    torch.testing.assert_close(first.implicit_reward.view(2, -1).sum(1), torch.zeros(2, dtype=torch.float64))
    for changed in (other, noisier):
        assert not torch.equal(first.implicit_reward, changed.implicit_reward)
        assert not torch.equal(first.gradient, changed.gradient)
