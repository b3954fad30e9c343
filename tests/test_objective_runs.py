"""Runs of each objective on the small random model: they learn something finite, and resume exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from crd.config import CRDConfig
from crd.objectives import OBJECTIVES
from crd.tracker import read_metrics
from crd.trainer import CRDTrainer

# What a run of each sets, and the roles it then has.
RUNS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "crd": ({}, {"old", "sampler"}),
    "nft": ({"beta": 0.1, "decouple_sampler": False}, {"old"}),
    "awm": ({"clip_range": 0.1, "decouple_sampler": False, "old_start": 0.0, "old_slope": 0.0}, {"old"}),
    "flow_grpo": ({"clip_range": 1e-3, "sampler_start": 0.0, "sampler_slope": 0.0, "draws": 1}, {"sampler"}),
    "raft": ({"best_of": 2}, {"sampler"}),
}


def weights(run: Path, update: int) -> dict[str, dict[str, torch.Tensor]]:
    folder = run / "checkpoints" / f"update-{update:06d}"
    return {path.stem: load(path.read_bytes()) for path in folder.glob("*.safetensors")}


def test_every_objective_is_run() -> None:
    assert RUNS.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("objective", [name for name in RUNS if name != "crd"])
def test_one_and_one_update_are_two(objective: str, config: CRDConfig, tmp_path: Path) -> None:
    change, roles = RUNS[objective]
    two = replace(config, objective=objective, eval_prompts=None, output_dir=str(tmp_path / "straight"), **change)
    CRDTrainer(args=two).train()
    parts = replace(two, output_dir=str(tmp_path / "parts"))
    CRDTrainer(args=replace(parts, updates=1)).train()
    CRDTrainer(args=parts).train(resume=True)
    mine, theirs = weights(tmp_path / "parts", 2), weights(tmp_path / "straight", 2)
    assert mine.keys() == theirs.keys() == {"policy", "optimizer", *roles}
    assert all(torch.equal(mine[stem][name], tensor) for stem in theirs for name, tensor in theirs[stem].items())
    records = read_metrics(tmp_path / "straight", "train")
    assert all(record["gradient_norm"] > 0 and record["signal_fraction"] == 1 for record in records)
    assert {f"{role}_decay" for role in roles} <= records[0].keys()
