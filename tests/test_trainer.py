"""The whole loop on a small random SD3: any geometry, repeatable, and every drift control does something."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from reward_functions import bright_but_for_cats, brightness
from tiny_pipelines import tiny_pipeline

from crd.backbones import load_backbone
from crd.config import CRDConfig
from crd.config_io import load_config
from crd.errors import CRDError
from crd.eval_record import read_record
from crd.export import LORA_FILE
from crd.loading import load_model
from crd.run_parts import load_judged
from crd.snapshots import ANCHOR, SAMPLER
from crd.tracker import read_metrics
from crd.trainer import CRDTrainer


def policy_after(config: CRDConfig, updates: int = 2) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Policy weights and metrics, without a run folder."""
    trainer = CRDTrainer(args=config)
    metrics = [trainer.update() for _ in range(updates)]
    return trainer.snapshots.state("policy"), metrics


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("prompts", "images", "steps"), [(5, 3, 2), (1, 2, 1), (3, 5, 3), (7, 2, 4)], ids=lambda value: str(value)
)
def test_any_number_of_prompts_images_and_steps(config: CRDConfig, prompts: int, images: int, steps: int) -> None:
    """Three prompts in the file, micro-batches and rollout batches that divide nothing."""
    geometry = replace(
        config,
        prompts_per_update=prompts,
        group_size=images,
        optimizer_steps=steps,
        draws=3,
        micro_batch=4,
        rollout_batch=4,
        residual="leave_one_out",
        timesteps="rollout_grid_independent",
    )
    weights, (first, second) = policy_after(geometry)
    assert (first["images"], second["images"]) == (prompts * images, 2 * prompts * images)
    assert second["optimizer_steps"] == 2 * steps
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert second["gradient_norm"] > 0


def test_a_seed_repeats_a_run_exactly_and_another_differs(config: CRDConfig) -> None:
    first, metrics = policy_after(config)
    torch.manual_seed(123)  # the global state of the process plays no part
    again, repeated = policy_after(config)
    assert same(first, again)
    assert repeated == metrics
    other, changed = policy_after(replace(config, seed=1))
    assert not same(first, other)
    assert changed[0]["reward"] != metrics[0]["reward"]


@pytest.fixture(scope="module")
def strong_controls(base_config: CRDConfig) -> CRDConfig:
    # Of three rollout steps two are trained on: with one, all draws would have the same t.
    return replace(base_config, kl_max=10.0, old_start=0.25, sampler_start=0.5, rollout_steps=3)


@pytest.fixture(scope="module")
def unchanged(strong_controls: CRDConfig) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Three updates: from the second on the policy, `old` and `sampler` are three networks."""
    return policy_after(strong_controls, updates=3)


@pytest.mark.parametrize(
    "change",
    [
        {"decouple_sampler": False},
        {"kl_max": 0.0},
        {"anchor_guidance": 1.0},
        {"kl_gate": "advantage"},
        {"kl_gate": "constant"},
        {"old_start": 0.9},
        {"sampler_start": 0.0},
        {"residual": "leave_one_out", "timesteps": "uniform"},
        {"timesteps": "rollout_grid_independent"},
        {"centering": "tempered", "tau": 0.01},  # of rewards this close, 1 differs from uniform by rounding
        {"centering_prompts": 0},
        {"form": "cross_entropy"},
        {"weighting": "unit"},
        {"share_timesteps": False},
        {"share_noise": True},
        {"timesteps": "uniform"},
        {"rollout_guidance": 3.0},
        {"warmup_steps": 3},
        {"weight_decay": 0.1},
        {"max_grad_norm": 1e-9},
        {"finetune": "full"},
    ],
    ids=str,
)
def test_every_control_changes_the_run(
    strong_controls: CRDConfig,
    unchanged: tuple[dict[str, torch.Tensor], list[dict[str, float]]],
    change: dict[str, Any],
) -> None:
    weights, metrics = unchanged
    other, changed = policy_after(replace(strong_controls, **change), updates=3)
    assert weights.keys() != other.keys() or not same(weights, other)
    assert changed != metrics


def test_drift_controls_have_their_own_effect(config: CRDConfig) -> None:
    trainer = CRDTrainer(args=replace(config, decouple_sampler=False))
    assert SAMPLER not in trainer.snapshots.roles
    _, (without,) = policy_after(replace(config, kl_max=0.0), 1)
    assert "kl" not in without
    assert "kl_strength_mean" not in without
    _, (constant,) = policy_after(replace(config, kl_gate="constant"), 1)
    assert constant["kl_strength_mean"] == pytest.approx(config.kl_max)
    _, (reward,) = policy_after(replace(config, optimizer_steps=1), 1)
    expected = config.kl_min + (config.kl_max - config.kl_min) * reward["reward"]
    assert reward["kl_strength_mean"] == pytest.approx(expected)
    # Guidance moves the anchor away from an untrained policy, whose unguided twin it otherwise is.
    _, (plain,) = policy_after(replace(config, anchor_guidance=1.0, optimizer_steps=1), 1)
    assert plain["kl"] == pytest.approx(0.0, abs=1e-12)
    assert reward["kl"] > 1e-4


@pytest.mark.parametrize("objective", [{}, {"objective": "raft"}], ids=str)
def test_the_first_updates_can_distil_the_anchor_alone(config: CRDConfig, objective: dict[str, Any]) -> None:
    """Rewards that contradict each other lead to the same weights, until the first update that reads them."""
    distilled = replace(config, kl_gate="constant", distill_updates=2, **objective)
    contrary = replace(distilled, rewards=("reward_functions:darkness",))
    weights, metrics = policy_after(distilled)
    others, _ = policy_after(contrary)
    assert same(weights, others)
    assert [one["signal_fraction"] for one in metrics] == [0.0, 0.0]
    assert all(one["loss"] == pytest.approx(one["loss_kl"]) and one["gradient_norm"] > 0 for one in metrics)
    weights, metrics = policy_after(distilled, updates=3)
    others, _ = policy_after(contrary, updates=3)
    assert not same(weights, others)
    assert metrics[2]["signal_fraction"] == 1.0


def test_the_kl_can_start_stronger_and_fall(config: CRDConfig) -> None:
    falling = replace(config, kl_gate="constant", kl_start_scale=4.0, kl_ramp_updates=2)
    weights, metrics = policy_after(falling, updates=3)
    assert [one["kl_strength_mean"] for one in metrics] == pytest.approx([config.kl_max * x for x in (4.0, 2.0, 1.0)])
    constant, _ = policy_after(replace(config, kl_gate="constant"), updates=3)
    assert not same(weights, constant)


def test_without_an_anchor_there_is_nothing_to_distil(config: CRDConfig) -> None:
    with pytest.raises(CRDError, match="distill_updates=1 trains the KL to the anchor alone, got kl_max=0; set kl_max"):
        replace(config, kl_max=0.0, distill_updates=1)


@pytest.mark.parametrize("reward", ["brightness", "darkness"])
def test_training_raises_the_reward(config: CRDConfig, reward: str) -> None:
    """Both directions, so that a drift of the model by itself cannot pass."""
    learning = replace(
        config,
        rewards=(f"reward_functions:{reward}",),
        finetune="full",
        updates=15,
        group_size=16,
        rollout_steps=4,
        eval_steps=4,
        eval_images=8,
        draws=4,
        micro_batch=256,
        beta=0.1,
        kl_max=0.0,
        sampler_start=0.0,
    )
    summary = CRDTrainer(args=learning).train()
    # Measured: 0.14 brighter, 0.07 darker.
    assert summary["reward_after"] > summary["reward_before"] + 0.03


def test_groups_without_variance_are_counted_and_carry_no_signal(config: CRDConfig) -> None:
    cats = replace(config, prompts_per_update=3, optimizer_steps=1)  # one of the three prompts is about a cat
    trainer = CRDTrainer(reward_funcs=bright_but_for_cats, args=cats)
    metrics = trainer.update()
    assert metrics["zero_variance_groups"] == 1
    assert metrics["signal_fraction"] == pytest.approx(2 / 3)

    def constant(images: list[Image.Image], prompts: list[str]) -> list[float]:
        return [0.5] * len(images)

    silent = CRDTrainer(reward_funcs=constant, args=replace(cats, kl_max=0.0, weight_decay=0.0))
    before = silent.snapshots.state("policy")
    metrics = silent.update()
    assert (metrics["zero_variance_groups"], metrics["gradient_norm"]) == (3, 0)
    assert same(before, silent.snapshots.state("policy"))


def test_records_reach_the_reward_by_name(config: CRDConfig) -> None:
    seen: list[tuple[str, int]] = []

    def reward(images: list[Image.Image], prompts: list[str], number: list[int]) -> list[float]:
        assert len(images) == len(prompts) == len(number)
        seen.extend(zip(prompts, number, strict=True))
        return brightness(images, prompts)

    data = [{"prompt": "a", "number": 1, "unused": "x"}, {"prompt": "b", "number": 2, "unused": "y"}]
    CRDTrainer(reward_funcs=[reward], args=replace(config, eval_prompts=None), train_dataset=data).update()
    assert set(seen) == {("a", 1), ("b", 2)}
    with pytest.raises(CRDError, match="needs the dataset column 'number'"):
        CRDTrainer(reward_funcs=[reward], args=config, train_dataset=data)  # the evaluation prompts have no columns


def test_two_rewards_each_on_its_own_prompts(config: CRDConfig, tmp_path: Path) -> None:
    for name, text in {"light": "a\nb\n", "dark": "c\nd\n"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    joined = f"{tmp_path}/light.txt@brightness+{tmp_path}/dark.txt@darkness"
    two = replace(
        config,
        rewards=("reward_functions:brightness", "reward_functions:darkness"),
        reward_normalization="group",
        prompts=joined,
        eval_prompts=joined,
        prompts_per_update=4,
    )
    names = ("reward", "reward_brightness", "reward_darkness")
    summary = CRDTrainer(args=two).train()
    run = Path(config.output_dir)
    for record in (*read_metrics(run, "train"), *read_metrics(run, "eval")):
        # Half of the images each.
        assert record["reward"] == pytest.approx((record["reward_brightness"] + record["reward_darkness"]) / 2)
    assert {f"{name}_{when}" for name in names for when in ("before", "after")} <= set(summary)
    assert json.loads((run / "summary.json").read_text()) == summary
    # The plain sum would be another run: the groups of one reward do not vary as those of the other.
    weights, (metrics,) = policy_after(two, 1)
    plain, (other,) = policy_after(replace(two, reward_normalization="none"), 1)
    assert [metrics[name] for name in names] == [other[name] for name in names]
    assert not same(weights, plain)


def test_what_is_wrong_with_prompts_names_their_setting(config: CRDConfig) -> None:
    wrong = [{"prompt": "a", "rewards": []}]
    with pytest.raises(CRDError, match=r"^prompts: column 'rewards' of prompt 'a'"):
        CRDTrainer(args=config, train_dataset=wrong)
    with pytest.raises(CRDError, match=r"^eval_prompts: column 'rewards' of prompt 'a'"):
        CRDTrainer(args=config, eval_dataset=wrong)
    with pytest.raises(CRDError, match=r"^eval_prompts: no prompt file at nowhere.txt"):
        CRDTrainer(args=config, eval_dataset="nowhere.txt")


@pytest.mark.parametrize(("held_out", "told"), [(["a", "x", "b"], "2 of 3 evaluation prompts are also"), (["x"], "")])
def test_evaluation_prompts_that_are_trained_on_are_told(
    config: CRDConfig, capsys: pytest.CaptureFixture[str], held_out: list[str], told: str
) -> None:
    CRDTrainer(args=replace(config, updates=1), train_dataset=["a", "b"], eval_dataset=held_out).train()
    printed = capsys.readouterr().out
    assert told in printed
    assert printed.count("training prompts") == bool(told)


def test_rewards_outside_the_range_matter_only_with_an_anchor(config: CRDConfig) -> None:
    def large(images: list[Image.Image], prompts: list[str]) -> list[float]:
        return [100.0 * score for score in brightness(images, prompts)]

    with pytest.raises(CRDError, match="kl_reward_range"):
        CRDTrainer(reward_funcs=large, args=config).train()
    assert not Path(config.output_dir).exists()
    CRDTrainer(reward_funcs=large, args=replace(config, kl_max=0.0)).update()
    CRDTrainer(reward_funcs=large, args=replace(config, kl_reward_range=(0.0, 100.0))).update()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "may lie outside of kl_reward_range (-0.5 to 1.5, kl_reward_range is 0 to 1)"),
        ({"kl_reward_range": (-0.5, 1.5)}, None),
        ({"kl_gate": "constant"}, None),
        ({"kl_max": 0.0}, None),
    ],
)
def test_a_total_that_may_leave_the_range_is_warned_of(
    change: dict[str, Any], told: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    load_judged(replace(CRDConfig(rewards=("ocr", "tiny-image-text"), reward_weights=(1.0, 0.5)), **change))
    printed = capsys.readouterr().out
    assert told in printed if told else "kl_reward_range" not in printed


def test_the_run_folder_holds_all_there_is_to_know(config: CRDConfig) -> None:
    run = Path(config.output_dir)
    CRDTrainer(args=replace(config, updates=3, eval_every=1, tensorboard=True, eval_base_guidance=(1.0, 3.0))).train()
    assert load_config(run / "config.yaml").eval_base_guidance == (1.0, 3.0)
    environment = json.loads((run / "environment.json").read_text())
    assert {"python", "packages", "cpu_threads"} <= set(environment)
    assert [record["update"] for record in read_metrics(run, "train")] == [1, 2, 3]
    held_out = read_metrics(run, "eval")
    assert [record["update"] for record in held_out] == [0, 1, 2, 3]
    assert held_out[0]["reward_brightness"] == pytest.approx(held_out[0]["reward"])
    assert len(list((run / "samples").glob("*.png"))) == 4
    assert list((run / "tensorboard").glob("events.*"))
    summary = json.loads((run / "summary.json").read_text())
    assert {"reward_before", "reward_after", "reward_base_cfg", "steps", "seconds", "images"} <= set(summary)
    assert summary["reward_before"] == held_out[0]["reward"]
    assert summary["reward_after"] == held_out[-1]["reward"]
    assert summary["reward_anchor"] == read_record(run / "evaluations" / "base-cfg-4.5.json").metrics()["reward"]
    assert not list(run.rglob(".tmp-*"))
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert best["reward"] == max(record["reward"] for record in held_out[1:])
    assert (run / "checkpoints" / f"update-{best['update']:06d}" / "state.json").is_file()
    assert (summary["best_update"], summary["reward_best"]) == (best["update"], best["reward"])


def test_the_summary_has_the_held_out_scores(config: CRDConfig, capsys: pytest.CaptureFixture[str]) -> None:
    watched = replace(config, held_out=("reward_functions:darkness",), eval_base_guidance=(3.0,), updates=1)
    summary = CRDTrainer(args=watched).train()
    before, after = read_metrics(Path(config.output_dir), "eval")
    assert summary["held_out_darkness_before"] == before["held_out_darkness"]
    assert summary["held_out_darkness_after"] == after["held_out_darkness"]
    for moment in ("before", "after", "anchor", "base_cfg"):
        total = summary[f"reward_{moment}"] + summary[f"held_out_darkness_{moment}"]
        assert total == pytest.approx(1.0, abs=1e-5)  # darkness is what brightness leaves
    # The best is an evaluation in which no held-out score fell, so there may be none.
    assert ("held_out_darkness_best" in summary) == ("best_update" in summary)
    printed = capsys.readouterr().out
    assert "held_out_darkness" in printed
    assert "base, CFG 3" in printed


def test_before_training_policy_and_anchor_are_one_model(config: CRDConfig) -> None:
    trainer = CRDTrainer(args=replace(config, learning_rate=0.3))
    policy, anchor = trainer.evaluate(), trainer.evaluate(ANCHOR)
    assert policy.mean == anchor.mean  # the same noise for every model
    trainer.update()
    assert trainer.evaluate().mean != anchor.mean
    assert trainer.evaluate(ANCHOR).mean == anchor.mean


def test_no_evaluation_prompts(config: CRDConfig) -> None:
    trainer = CRDTrainer(args=replace(config, eval_prompts=None, updates=1))
    assert "reward_before" not in trainer.train()
    with pytest.raises(CRDError, match="no evaluation prompts"):
        trainer.evaluate()


def test_a_tracker_that_is_not_installed(config: CRDConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(CRDError, match="pip install"):
        CRDTrainer(args=replace(config, wandb=True)).train()
    assert not Path(config.output_dir).exists()


def test_a_tracker_that_does_not_start(config: CRDConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("api_key not configured (no-tty)")

    stand_in: Any = types.ModuleType("wandb")
    stand_in.init = init
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    with pytest.raises(CRDError, match=r"wandb.init raised RuntimeError: api_key not configured.*wandb login"):
        CRDTrainer(args=replace(config, wandb=True)).train()
    assert not Path(config.output_dir).exists()


def test_a_resumed_run_goes_on_in_the_same_wandb_run(config: CRDConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service itself cannot be run here: this records what it is told."""
    told: list[dict[str, Any]] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None: ...

        def finish(self) -> None: ...

    def init(**arguments: Any) -> Run:
        told.append(arguments)
        return Run()

    stand_in: Any = types.ModuleType("wandb")
    stand_in.init = init
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    logged = replace(config, wandb=True, eval_prompts=None, updates=1)
    CRDTrainer(args=logged).train()
    CRDTrainer(args=replace(logged, updates=2)).train(resume=True)
    CRDTrainer(args=replace(logged, output_dir=f"{config.output_dir}-2")).train()
    first, resumed, other = told
    assert first["id"] == resumed["id"] == (Path(config.output_dir) / "wandb_id.txt").read_text().strip()
    assert first["resume"] == resumed["resume"] == "allow"
    assert other["id"] != first["id"]


def test_base_weights_in_bfloat16(config: CRDConfig) -> None:
    half = replace(config, base_dtype="bfloat16", updates=1)
    trainer = CRDTrainer(args=half)
    adapters = {id(parameter) for parameter in trainer.snapshots.parameters()}
    base = [p for name, p in trainer.backbone.denoiser.named_parameters() if ".lora_" not in name]
    assert {parameter.dtype for parameter in base} == {torch.bfloat16}
    assert {p.dtype for p in trainer.backbone.denoiser.parameters() if id(p) in adapters} == {torch.float32}
    # "" is encoded as the other prompts are.
    assert {value.dtype for value in trainer.uncond.values()} == {torch.float32}
    trainer.train()
    loaded = load_model(config.output_dir)
    assert {p.dtype for n, p in loaded.backbone.denoiser.named_parameters() if ".lora_" not in n} == {torch.bfloat16}


def test_objects_are_taken_as_they_are_or_refused(config: CRDConfig) -> None:
    pipeline: Any = tiny_pipeline(t5=False).to(torch.bfloat16)
    assert CRDTrainer(pipeline, args=config).backbone.pipeline.vae.dtype == torch.bfloat16
    backbone = load_backbone(tiny_pipeline(t5=False), max_sequence_length=0)
    with pytest.raises(CRDError, match="finetune=full needs pretrained weights in float32, got a model in bfloat16"):
        CRDTrainer(pipeline, args=replace(config, finetune="full"))
    with pytest.raises(CRDError, match=r"finetune=lora needs .* in float32 or bfloat16, got a model in float16"):
        CRDTrainer(load_backbone(tiny_pipeline(t5=False).to(torch.float16)), args=config)
    with pytest.raises(CRDError, match="base_dtype=bfloat16 is for models that crd loads"):
        CRDTrainer(backbone, args=replace(config, base_dtype="bfloat16"))
    backbone.device = torch.device("meta")
    with pytest.raises(CRDError, match=r"the backbone lies on meta but the run is on (cpu|cuda)"):
        CRDTrainer(backbone, args=config)


@pytest.mark.parametrize(("finetune", "file"), [("lora", LORA_FILE), ("full", "model_index.json")])
def test_save_model_writes_what_stock_diffusers_loads(
    config: CRDConfig, tmp_path: Path, finetune: str, file: str
) -> None:
    trainer = CRDTrainer(args=replace(config, finetune=finetune))
    folder = trainer.save_model(tmp_path / "model")
    assert (folder / file).is_file()
    with pytest.raises(CRDError, match="not empty"):
        trainer.save_model(folder)
    trainer.save_model(folder, overwrite=True)


def test_objects_given_in_python_are_recorded_as_such(config: CRDConfig) -> None:
    """A later `crd train --resume` must not go on with the defaults instead."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # that of `device: auto`
    backbone = load_backbone(tiny_pipeline(t5=False), device=device, max_sequence_length=0)
    arguments: dict[str, Any] = {"reward_funcs": brightness, "train_dataset": ["a"], "eval_dataset": ["b"]}
    once = replace(config, updates=1)
    CRDTrainer(model=backbone, args=once, **arguments).train()
    recorded = load_config(Path(config.output_dir) / "config.yaml")
    name = "(given in Python)"
    assert (recorded.model, recorded.rewards) == (name, (name,))
    assert (recorded.prompts, recorded.eval_prompts) == (name, name)
    with pytest.raises(CRDError, match="given in Python"):
        CRDTrainer(args=recorded)
    # From Python the same objects may be given again.
    again = load_backbone(tiny_pipeline(t5=False), device=device, max_sequence_length=0)
    CRDTrainer(model=again, args=replace(config, updates=2), **arguments).train(resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 17}, "height must be"),
        ({"eval_prompts": None, "eval_base_guidance": (1.0,)}, "eval_base_guidance needs evaluation prompts"),
        ({"lora_targets": ("nothing",)}, "LoRA targets"),
        ({"model": "/nowhere/model"}, "no model at"),
        ({"reward_weights": (1.0, 2.0)}, "reward weights"),
    ],
    ids=str,
)
def test_refused_before_a_run_folder_exists(config: CRDConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CRDError, match=message):
        CRDTrainer(args=replace(config, **change)).train()
    assert not Path(config.output_dir).exists()
