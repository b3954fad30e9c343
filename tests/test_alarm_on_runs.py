"""The alarm on real runs of the bundled model: it speaks when the anchor is off, and not in the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crd.alarm import NOTE, WARN
from crd.config_io import load_config
from crd.trainer import CRDTrainer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "warned"),
    [({}, False), ({"kl_max": 0.0, "learning_rate": 3e-4}, True)],
    ids=["recipe", "without its anchor"],
)
def test_a_run_is_told_from_one_without_its_anchor(settings: dict[str, Any], warned: bool, tmp_path: Path) -> None:
    """18 updates each, about six minutes on one core; docs/evaluation.md has the longer runs of several seeds."""
    out = tmp_path / "run"
    short = {"updates": 18, "eval_every": 6, "eval_base_guidance": (), "output_dir": str(out), "tensorboard": False}
    CRDTrainer(args=load_config("ocr-demo", {**short, "seed": 1, **settings})).train()
    kept = out / "events.jsonl"
    levels = [json.loads(line)["level"] for line in kept.read_text().splitlines()] if kept.exists() else []
    assert (WARN in levels) == warned
    assert warned or NOTE not in levels
