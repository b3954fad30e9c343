"""Plans of runs: memory against real tensors, forwards against a real update, every recipe without its weights."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, tiny_family
from torch import nn

from crd.backbones import load_backbone
from crd.cli import main
from crd.config import CRDConfig
from crd.config_io import load_config, recipes
from crd.errors import CRDError
from crd.loading import build_snapshots
from crd.planning.footprint import measure, peak_bytes, reserve_gradients
from crd.planning.model_files import known_models, read_model
from crd.planning.plan import MARGIN, plan_run
from crd.planning.skeleton import build_network, build_skeleton
from crd.planning.workload import geometry
from crd.trainer import CRDTrainer

REAL = sorted(name for name in recipes() if load_config(name).model != "tiny-sd3")


def test_the_peak_is_that_of_tensors_alive_at_once() -> None:
    def run() -> None:
        kept = torch.empty(1000)  # 4000 bytes
        for _ in range(3):
            kept.exp().view(10, 100)  # 4000 more, let go each time; a view takes nothing
        kept.add_(1)

    assert peak_bytes(run) == 8000


def test_memory_grows_by_the_row() -> None:
    weight = torch.empty(100, 50)
    found = measure(lambda rows: torch.empty(rows, 100, device="meta") @ weight.to("meta"))
    assert (found.fixed, found.per_row) == (4 * 100 * 50, 4 * 150)


def test_activations_are_those_of_a_real_backward_pass_on_the_bundled_model() -> None:
    config = CRDConfig(lora_rank=4)
    backbone = load_backbone("tiny-sd3")
    build_snapshots(backbone, config, ("old", "sampler"))
    reserve_gradients(backbone.denoiser)
    text = backbone.encode(['a "cat"'])

    def train(rows: int) -> None:
        x_t, t = torch.zeros(rows, *backbone.latent_shape()), torch.full((rows,), 0.5)
        given = {name: tensor.expand(rows, *tensor.shape[1:]).clone() for name, tensor in text.items()}
        backbone.velocity(backbone.denoiser, x_t, t, given).square().sum().backward()

    real = peak_bytes(lambda: train(3))
    planned = plan_run(replace(config, micro_batch=3, kl_max=0.0)).memory.training
    assert planned == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("name", ["SANA", "Z-Image", "Lumina 2", "FLUX.2 klein base", "FLUX.2 klein"])
def test_a_family_is_planned_as_it_runs(name: str, tmp_path: Path) -> None:
    """Conditioning of texts of full length, and activations, against the tiny model with its weights."""
    family, pipeline = FAMILIES[name], tiny_family(name)
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "crd.json").write_text(json.dumps({"max_sequence_length": family.length}))
    size, scale = (family.side, family.side), family.scale or 1.0
    config = CRDConfig(
        model=str(tmp_path), lora_rank=4, micro_batch=3, height=family.side, width=family.side, rollout_guidance=scale,
        anchor_guidance=scale, kl_max=0.0,
    )  # fmt: skip
    planned = plan_run(config).memory
    backbone = load_backbone(pipeline, max_sequence_length=family.length)
    text = backbone.encode(["word " * 100, "word " * 200], *size)
    skeleton = build_skeleton(read_model(str(tmp_path)), torch.float32)
    blank = skeleton.backbone.blank(2, backbone.latent_shape(*size), skeleton.clip_tokens)
    described = [{key: (tensor.shape, tensor.dtype) for key, tensor in one.items()} for one in (blank, text)]
    assert described[0] == described[1]
    build_snapshots(backbone, config, ("old", "sampler"))
    reserve_gradients(backbone.denoiser)
    x_t, t = torch.zeros(3, *backbone.latent_shape(*size)), torch.full((3,), 0.5)

    def train() -> None:
        given = {key: tensor[[0, 1, 1]] for key, tensor in text.items()}
        backbone.velocity(backbone.denoiser, x_t, t, given).square().sum().backward()

    assert planned.training == pytest.approx(peak_bytes(train), rel=0.05)


def test_sizes_of_networks_are_those_of_the_loaded_model() -> None:
    skeleton, backbone = build_skeleton(read_model("tiny-sd3"), torch.float32), load_backbone("tiny-sd3")

    def size(module: nn.Module) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))

    parts = backbone.pipeline.components
    encoders = sum(size(parts[name]) for name in parts if name.startswith("text_encoder") and parts[name] is not None)
    assert (skeleton.vae_bytes, size(skeleton.backbone.denoiser)) == (size(parts["vae"]), size(backbone.denoiser))
    assert skeleton.encoder_bytes == pytest.approx(encoders, rel=1e-3)  # position ids are buffers in some versions
    planned = skeleton.backbone.blank(2, backbone.latent_shape(), skeleton.clip_tokens)
    assert {name: tensor.shape for name, tensor in planned.items()} == {
        name: tensor.shape for name, tensor in backbone.encode(["a", "b"]).items()
    }


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch": 100},
        {"micro_batch": 3},
        {"micro_batch": 3, "cache_references": False},
        {"micro_batch": 3, "kl_max": 0.0, "rollout_guidance": 3.0, "optimizer_steps": 2},
        {"micro_batch": 3, "objective": "raft"},
        {"micro_batch": 3, "objective": "flow_grpo", "draws": 1, "sampler_start": 0.0, "sampler_slope": 0.0},
    ],
    ids=str,
)
def test_forwards_are_those_of_a_real_update(config: CRDConfig, change: dict[str, Any]) -> None:
    config = replace(config, group_size=3, optimizer_steps=1)
    config = replace(config, **change)
    trainer = CRDTrainer(args=config)
    rows: list[int] = []
    trainer.backbone.denoiser.register_forward_hook(  # after the call: encoding only comes as far as before it
        lambda module, args, inputs, output: rows.append(len(inputs["hidden_states"])), with_kwargs=True
    )
    trainer.update()
    planned = plan_run(config).forwards
    assert sum(rows) == planned.rollout + planned.old + planned.anchor + planned.policy


def test_processes_share_the_images() -> None:
    size = geometry(CRDConfig(), 8)
    assert (size.images, size.own_images, size.own_rows) == (1152, 144, (648, 648))


def test_micro_batches_fit_and_are_the_largest_that_do(config: CRDConfig) -> None:
    config = replace(config, prompts_per_update=8, draws=8)
    # Room for 20 rows: for 16, but not for 32.
    available = plan_run(replace(config, micro_batch=20, rollout_batch=1)).memory.total * 10 // 9
    automatic = replace(config, micro_batch="auto", rollout_batch="auto")
    plan = plan_run(automatic, available=available)
    assert plan.micro_batch == 16
    assert plan.memory.total <= available * (1 - MARGIN)
    with pytest.raises(CRDError, match=r"micro_batch=1, got 0.0 GB .* try .*gradient_checkpointing=true"):
        plan_run(automatic, available=10**5)


def test_automatic_batches_without_a_gpu(config: CRDConfig, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = CRDTrainer(args=replace(config, device="cpu", micro_batch="auto", rollout_batch=3, updates=1))
    assert (trainer.micro_batch.rows, trainer.rollout_batch.rows) == (32, 3)
    assert "auto: micro_batch is 32 and rollout_batch is 3" in " ".join(capsys.readouterr().out.split())
    trainer.books.create()
    assert load_config(f"{config.output_dir}/config.yaml") == trainer.args == replace(trainer.args, micro_batch=32)


def test_drawing_is_that_of_the_guided_evaluation(config: CRDConfig) -> None:
    alone = replace(config, rollout_guidance=1.0, rollout_batch=4, vae_slicing=True)
    guided, plain = plan_run(alone).memory.rollout, plan_run(replace(alone, eval_prompts=None)).memory.rollout
    assert guided > plain
    assert guided == plan_run(replace(alone, eval_prompts=None, rollout_guidance=3.0)).memory.rollout
    many = replace(alone, rollout_batch=200)  # more than images of an update, but not than those of an evaluation
    assert plan_run(many).memory.rollout > 10 * plan_run(replace(many, eval_prompts=None)).memory.rollout


def test_the_model_is_loaded_whole_before_its_parts_leave(config: CRDConfig) -> None:
    kept = plan_run(replace(config, model="tiny-sd3")).memory
    cached = plan_run(replace(config, model="tiny-sd3", cache_prompts=True), 4, "fsdp2").memory
    assert cached.loading == kept.loading == kept.weights + kept.text_encoders + kept.vae
    assert (cached.text_encoders, cached.weights) == (0, kept.weights // 4)
    assert dataclasses.replace(cached, loading=10**9).total == 10**9


def test_checkpointing_and_sharding_take_less(config: CRDConfig) -> None:
    plain, light = plan_run(config), plan_run(replace(config, gradient_checkpointing=True), 4, "fsdp2")
    assert light.memory.training < 0.7 * plain.memory.training
    assert light.memory.optimizer == plain.memory.optimizer // 4
    with pytest.raises(CRDError, match="cannot be sharded"):
        plan_run(replace(config, finetune="full"), 4, "fsdp2")


def test_the_command_prints_numbers(config: CRDConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "run.yaml")
    Path(path).write_text(config.to_yaml())
    assert main(["plan", path, "--gpus", "2", "--memory", "24GB", "--json", "--group-size", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpus"], found["geometry"]["images"], found["available"]) == (2, 6, 24 * 10**9)
    assert set(found["memory"]) > {"weights", "adapters", "optimizer", "training", "references", "total"}
    assert main(["plan", "--memory", "24"]) == 2
    assert "24GB" in capsys.readouterr().err


def test_a_dry_run_checks_and_leaves_nothing(
    config: CRDConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    assert main(["train", str(path), "--dry-run"]) == 0
    assert "3 training and 3 evaluation prompts" in " ".join(capsys.readouterr().out.split())
    assert not Path(config.output_dir).exists()
    trained = (
        "--objective flow_grpo --sampler_start 0 --sampler_slope 0 --rollout_steps 4 --timestep_fraction 0.5 --draws 3"
    )
    for options, message in (
        (["--rewards", "geneval-tiny"], "tag"),
        (["--height", "15"], "multiple"),
        (["--solver", "dpmsolver++", "--timestep_fraction", "1e-5"], "keeps no rollout step"),
        ([*trained.split(), "--draws", "4"], "got draws=4 of 3 steps with timestep_fraction=0.5; set draws=3"),
        (["--output_dir", str(tmp_path)], "is not empty"),
        (["--output_dir", str(path / "run")], "run.yaml is a file"),
    ):
        assert main(["train", str(path), "--dry-run", *options]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert os.listdir(tmp_path) == ["run.yaml"]


def test_a_solver_that_the_stock_pipeline_refuses_is_refused_without_weights() -> None:
    with pytest.raises(CRDError, match=r"solver=dpmsolver\+\+: the stock QwenImagePipeline lays .*; use euler"):
        plan_run(CRDConfig(model="Qwen/Qwen-Image", solver="dpmsolver++"))


def test_every_model_of_a_recipe_is_known_without_the_hub() -> None:
    assert {load_config(name).model for name in REAL} == set(known_models())


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_recipe_passes_its_dry_run_without_weights_or_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["train", name, "--dry-run"]) == 0
    assert "memory of a device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("stabilityai/stable-diffusion-3.5-medium", 2470),
        ("black-forest-labs/FLUX.1-dev", 11901),
        ("stabilityai/stable-diffusion-xl-base-1.0", 2567),
        ("Qwen/Qwen-Image", 20430),
    ],
)
def test_known_models_have_as_many_parameters_as_published(name: str, millions: int) -> None:
    part = next(one for part, one in read_model(name).components.items() if part in ("transformer", "unet"))
    saved = build_network(part, torch.bfloat16).state_dict()  # SD3's table of positions among them
    assert round(sum(tensor.numel() for tensor in saved.values()) / 1e6) == millions
