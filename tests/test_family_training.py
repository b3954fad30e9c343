"""What training asks of a family: guidance of each role, the scale of the loss, and what is refused before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import PROMPTS
from tiny_families import FAMILIES, tiny_family
from torch import Tensor

from crd.advantages import group_advantages
from crd.backbones import guided_velocity, load_backbone
from crd.cli import main
from crd.comparison import read_evaluations
from crd.config import CRDConfig
from crd.errors import CRDError
from crd.flow import interpolate
from crd.objectives.base import DenoiserOutputs
from crd.optimizer_batch import build_rows
from crd.records import RewardOutput, Rollout
from crd.sampling import initial_noise
from crd.seeds import derive_seed
from crd.trainer import CRDTrainer


def trainer(name: str, folder: Path, **options: Any) -> CRDTrainer:
    settings: dict[str, Any] = {
        "prompts_per_update": 2, "group_size": 2, "rollout_steps": 2, "draws": 1, "lora_rank": 2, "height": 16,
        "width": 16, "output_dir": str(folder), "eval_prompts": None, "optimizer_steps": 1, "threads": 1,
    }  # fmt: skip
    config = CRDConfig(**{**settings, **options})
    backbone = load_backbone(tiny_family(name), max_sequence_length=FAMILIES[name].length)
    return CRDTrainer(backbone, ["reward_functions:brightness"], config, train_dataset=PROMPTS)


def one_batch(run: CRDTrainer, t: float) -> tuple[Rollout, DenoiserOutputs, Tensor, Tensor]:
    """A rollout, the velocities of all roles at noise of time `t`, and x_t and noise there."""
    rollout = run.rollout(run.plan(0))
    count = len(rollout.batch)
    total = torch.arange(count, dtype=torch.float64)
    advantages = group_advantages(total, rollout.batch.group_id, clip=5.0)
    rewards = RewardOutput(total, {"brightness": total})
    rows = build_rows(rewards, advantages, torch.ones(count), rollout.batch.group_id, torch.arange(count), 1)
    times = torch.full((count,), t)
    outputs = run.velocities(rollout, rows, times, 0, "test")(torch.arange(count))
    seeds = [derive_seed(0, "test", "noise", image, 0) for image in rows.image_id.tolist()]
    noise = initial_noise(seeds, tuple(rollout.x0.shape[1:]))
    return rollout, outputs, interpolate(rollout.x0, noise, times), noise


def test_an_embedded_scale_is_that_of_the_role(tmp_path: Path) -> None:
    run = trainer("FLUX.1-dev", tmp_path / "run", rollout_guidance=3.5, anchor_guidance=6.0)
    rollout, outputs, x_t, _ = one_batch(run, 0.6)
    cond, t = rollout.conditioning.gather(), torch.full((len(x_t),), 0.6)
    with torch.no_grad():
        for found, scale in ((outputs.policy, 3.5), (outputs.old, 3.5), (outputs.anchor, 6.0)):
            expected = guided_velocity(run.backbone, run.backbone.denoiser, x_t, t, cond, None, scale)
            torch.testing.assert_close(found, expected)
    assert (outputs.policy - outputs.anchor).abs().max() > 1e-3
    assert run.uncond == {}


@pytest.mark.parametrize(("name", "scale"), [("SD 1.5, epsilon", 0.4), ("SD, v, zero SNR", (0.36 + 0.16) ** 0.5)])
def test_the_loss_of_a_ddpm_model_is_on_its_own_prediction(name: str, scale: float, tmp_path: Path) -> None:
    run = trainer(name, tmp_path / "run")
    rollout, outputs, x_t, noise = one_batch(run, 0.6)
    torch.testing.assert_close(outputs.target, scale * (noise - rollout.x0))
    cond, t = rollout.conditioning.gather(), torch.full((len(x_t),), 0.6)
    with torch.no_grad():
        plain = guided_velocity(run.backbone, run.backbone.denoiser, x_t, t, cond, None, 1.0)
        anchor = guided_velocity(run.backbone, run.backbone.denoiser, x_t, t, cond, run.uncond, 4.5)
    for found, expected in ((outputs.policy, plain), (outputs.old, plain), (outputs.anchor, anchor)):
        torch.testing.assert_close(found, scale * expected)


def test_what_a_family_cannot_do_is_refused_before_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(CRDError, match=r"takes no guidance, got scale 4\.5"):
        trainer("FLUX.1-schnell", run)
    with pytest.raises(CRDError, match=r"the stock FluxPipeline lays out a grid .*use euler"):
        trainer("FLUX.1-schnell", run, anchor_guidance=1.0, solver="dpmsolver++")
    with pytest.raises(CRDError, match=r"the stock QwenImagePipeline lays out a grid .*use euler"):
        trainer("Qwen-Image", run, solver="dpmsolver++")
    with pytest.raises(CRDError, match="weighting=likelihood is for flow matching"):
        trainer("SD 1.5, epsilon", run, weighting="likelihood")
    with pytest.raises(CRDError, match="sd has no max_sequence_length, got 8"):
        load_backbone(tiny_family("SD 1.5, epsilon"), max_sequence_length=8)
    with pytest.raises(CRDError, match="height must be a positive multiple of 8 for this model, got 20"):
        trainer("SD 1.5, epsilon", run, height=20)
    assert not run.exists()


def test_a_distilled_base_model_is_evaluated_without_guidance(tmp_path: Path) -> None:
    tiny_family("FLUX.1-schnell").save_pretrained(tmp_path / "schnell")
    (tmp_path / "schnell" / "crd.json").write_text('{"max_sequence_length": 8}')
    out = tmp_path / "eval.json"
    side = str(FAMILIES["FLUX.1-schnell"].side)
    options = ["--prompts", "world:test:2", "--steps", "1", "--height", side, "--width", side, "--out", str(out)]
    assert main(["eval", str(tmp_path / "schnell"), "--reward", "jpeg-compressibility", *options]) == 0
    (line,) = read_evaluations(out)
    assert (line.record.guidance, line.record.protocol.anchor_guidance) == (1.0, 1.0)
