from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from crd.config import RESUMABLE, CRDConfig
from crd.config_io import config_from, load_config, recipes
from crd.errors import CRDError
from crd.unread_settings import unread_settings


def test_defaults_are_the_published_settings() -> None:
    config = CRDConfig()
    published = {
        "group_size": 24, "prompts_per_update": 48, "optimizer_steps": 2, "beta": 1.0, "learning_rate": 3e-4,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 1e-4, "max_grad_norm": 1.0, "lora_rank": 32,
        "lora_alpha": 64.0, "rollout_steps": 10, "rollout_guidance": 1.0, "eval_steps": 40,
        "timestep_fraction": 0.99, "anchor_guidance": 4.5, "kl_min": 1e-4, "kl_max": 0.1, "residual": "per_draw",
    }  # fmt: skip
    assert {name: config.__dict__[name] for name in published} == published
    assert [config.old_schedule().decay(n) for n in (0, 10, 1000)] == [0.25, 0.3, 0.999]
    assert [config.sampler_schedule().decay(n) for n in (75, 175, 1000)] == [0.0, 0.75, 0.999]


@pytest.mark.parametrize("recipe", [None, *recipes()])
def test_resolved_yaml_gives_the_same_config(recipe: str | None, tmp_path: Path) -> None:
    config = load_config(recipe, {"eval_base_guidance": "1,4.5", "lora_targets": "to_q", "seed": 3})
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    assert config.eval_base_guidance == (1.0, 4.5)
    assert config.lora_targets == ("to_q",)


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("updates", "3", 3),
        ("learning_rate", "1e-4", 1e-4),
        ("beta", "2", 2.0),
        ("decouple_sampler", "false", False),
        ("rewards", "ocr,my.module:score", ("ocr", "my.module:score")),
        ("rewards", "ocr", ("ocr",)),
        ("rewards", "[ocr, a:b]", ("ocr", "a:b")),
        ("reward_weights", "1,0.5", (1.0, 0.5)),
        ("reward_weights", "2", (2.0,)),
        ("reward_weights", "none", None),
        ("kl_reward_range", "[0, 2]", (0.0, 2.0)),
        ("eval_prompts", "none", None),
        ("eval_prompts", "null", None),
        ("output_dir", "123", "123"),
        ("output_dir", "a: [b", "a: [b"),
        ("height", "64", 64),
        ("height", "none", None),
        ("group-size", "5", 5),
    ],
)
def test_command_line_text_becomes_the_type_of_the_field(field: str, text: str, value: Any) -> None:
    assert config_from({field: text}).__dict__[field.replace("-", "_")] == value


@pytest.mark.parametrize(
    ("key", "nearest"), [("learnig_rate", "learning_rate"), ("groupsize", "group_size"), ("kl-maxx", "kl_max")]
)
def test_unknown_key_names_the_nearest(key: str, nearest: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{key}: 1\n")
    with pytest.raises(CRDError, match=f"unknown configuration key '{key}'; did you mean '{nearest}'"):
        load_config(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("updates", 0), ("updates", 1.5), ("updates", "many"), ("updates", True), ("updates", None),
        ("beta", 0), ("beta", "nan"), ("beta", [1]), ("group_size", 1), ("optimizer_steps", 49),
        ("decouple_sampler", "maybe"), ("decouple_sampler", 1), ("kl_gate", "sometimes"), ("timesteps", "all"),
        ("finetune", "qlora"), ("mixed_precision", "int8"), ("residual", "twice"), ("weighting", "none"),
        ("kl_reward_range", [1, 0]), ("kl_reward_range", [0]), ("kl_min", 0.2), ("kl_max", -1), ("old_start", 1.5),
        ("sampler_slope", -0.1), ("adam_beta1", 1.0), ("adam_beta2", -0.1), ("weight_decay", -1), ("threads", 0),
        ("height", 0), ("lora_alpha", 0), ("advantage_clip", 0), ("advantage_clip", math.inf), ("warmup_steps", -1),
        ("reward_weights", "1,two"),
        ("updates", "[1"), ("objective", "crdd"), ("timestep_fraction", 0), ("timestep_fraction", 1.5),
        ("timestep_fraction", "nan"), ("beta", "inf"), ("loss_scale", "inf"), ("learning_rate", "inf"),
        ("learning_rate", "nan"), ("kl_max", "inf"), ("anchor_guidance", "nan"), ("eval_base_guidance", ["nan"]),
        ("base_dtype", "float16"), ("mixed_precision", "fp16"), ("lora_targets", 3),
        ("kl_start_scale", 0), ("kl_start_scale", "inf"), ("kl_start_scale", "nan"), ("kl_ramp_updates", -1),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(CRDError) as error:
        config_from({field: value})
    name = field.removeprefix("old_").removeprefix("sampler_") if field in ("old_start", "sampler_slope") else field
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, []),
        ({"tau": 0.2}, ["tau=0.2 changes nothing with centering=uniform"]),
        ({"tau": 0.2, "centering": "tempered"}, []),
        ({"kl_max": 0.0, "kl_gate": "constant", "kl_min": 0.01},
         ["kl_gate=constant changes nothing with kl_max=0", "kl_min=0.01 changes nothing with kl_max=0"]),
        ({"kl_gate": "constant", "kl_min": 0.01}, ["kl_min=0.01 changes nothing with kl_gate=constant"]),
        ({"kl_start_scale": 6.0}, ["kl_start_scale=6.0 changes nothing with kl_ramp_updates=0"]),
        ({"kl_ramp_updates": 9}, ["kl_ramp_updates=9 changes nothing with kl_start_scale=1"]),
        ({"kl_max": 0.0, "kl_start_scale": 6.0, "kl_ramp_updates": 9},
         ["kl_start_scale=6.0 changes nothing with kl_max=0", "kl_ramp_updates=9 changes nothing with kl_max=0"]),
        ({"kl_gate": "advantage", "kl_reward_range": (0.0, 2.0), "kl_min": 0.01},
         ["kl_reward_range=(0.0, 2.0) changes nothing with kl_gate=advantage"]),
        ({"decouple_sampler": False, "sampler_end": 0.9},
         ["sampler_end=0.9 changes nothing with decouple_sampler=false"]),
        ({"objective": "raft", "old_slope": 0.1}, ["old_slope=0.1 changes nothing with objective=raft"]),
        ({"objective": "raft", "old_slope": 0.1, "decouple_sampler": False}, []),
        ({"finetune": "full", "lora_rank": 8}, ["lora_rank=8 changes nothing with finetune=full"]),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_change_nothing_are_told(values: dict[str, Any], told: list[str]) -> None:
    assert unread_settings(CRDConfig(**values)) == told


@pytest.mark.parametrize("recipe", recipes())
def test_bundled_recipes_set_nothing_that_they_do_not_read(recipe: str) -> None:
    assert unread_settings(load_config(recipe, {})) == []


def test_leave_one_out_needs_two_independent_draws() -> None:
    with pytest.raises(CRDError, match="draws"):
        CRDConfig(residual="leave_one_out", timesteps="uniform", draws=1)
    for timesteps in ("rollout_grid", "stratified"):
        with pytest.raises(CRDError, match=f"independent of each other, got timesteps={timesteps}; set timesteps to"):
            CRDConfig(residual="leave_one_out", timesteps=timesteps)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share_noise": True, "share_timesteps": False}, "share_noise=true needs share_timesteps=true"),
        (
            {"share_noise": True, "objective": "flow_grpo", "decouple_sampler": False, "old_start": 0, "old_slope": 0},
            "trajectories on the euler grid, got share_noise=True; set share_noise=False",
        ),
        ({"centering_prompts": 2, "objective": "nft"}, "centering_prompts=2 is not read by objective nft"),
        ({"centering_prompts": 25}, "centering_prompts=25 exceeds the 24 prompts of an optimizer step"),
        ({"centering_prompts": 4, "prompts_per_update": 7}, None),
        ({"centering_prompts": 5, "prompts_per_update": 7}, "exceeds the 4 prompts"),
    ],
)
def test_what_is_shared_and_centered_together_fits_the_update(values: dict[str, Any], message: str | None) -> None:
    if message is None:
        config_from(values)
        return
    with pytest.raises(CRDError, match=message):
        config_from(values)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "just words", "a: [1\n", "1: 2\n"])
def test_files_that_are_no_settings(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(CRDError, match=r"run\.yaml") as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_missing_file_names_the_recipes() -> None:
    with pytest.raises(CRDError, match=r"no configuration at nowhere\.yaml"):
        load_config("nowhere.yaml")
    assert recipes()  # so that the message above has something to name


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("beta: 3\nupdates: 7\n")
    config = load_config(path, {"updates": "9"})
    assert (config.beta, config.updates) == (3.0, 9)


def test_frozen_and_resumable_fields_exist() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CRDConfig().beta = 2.0  # type: ignore[misc]
    assert {field.name for field in dataclasses.fields(CRDConfig)} >= RESUMABLE


def test_lists_and_paths_given_in_python_are_what_a_file_would_hold(tmp_path: Path) -> None:
    given = CRDConfig(rewards=["ocr"], lora_targets=["to_q"], output_dir=tmp_path / "run", prompts=tmp_path / "p.txt")  # type: ignore[arg-type]
    assert (given.rewards, given.lora_targets, given.output_dir) == (("ocr",), ("to_q",), str(tmp_path / "run"))
    (tmp_path / "run.yaml").write_text(given.to_yaml())
    assert load_config(tmp_path / "run.yaml") == given


def test_fp16_is_refused_with_the_way_out() -> None:
    with pytest.raises(CRDError, match=r"not resumable exactly yet.*use bf16"):
        CRDConfig(mixed_precision="fp16")


def test_bfloat16_weights_are_not_trained_themselves() -> None:
    assert CRDConfig(base_dtype="bfloat16").base_dtype == "bfloat16"
    with pytest.raises(CRDError, match=r"base_dtype=bfloat16 .* finetune=full"):
        CRDConfig(base_dtype="bfloat16", finetune="full")


def test_one_key_in_two_spellings(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("group-size: 4\ngroup_size: 6\n")
    for source in (lambda: load_config(path), lambda: config_from({"group_size": 4, "group-size": 4})):
        with pytest.raises(CRDError, match="group_size is given in two spellings"):
            source()
    path.write_text("group-size: 4\n")
    assert load_config(path, {"group_size": "6"}).group_size == 6  # an override is no second spelling


def test_a_name_too_long_for_a_file() -> None:
    with pytest.raises(CRDError, match="cannot read the configuration"):
        load_config("x" * 5000)


def test_a_file_may_extend_a_recipe_or_another_file(tmp_path: Path) -> None:
    middle, last = tmp_path / "middle.yaml", tmp_path / "last.yaml"
    middle.write_text("extends: ocr-demo\ngroup-size: 5\nbeta: 2\n")
    last.write_text(f"extends: {middle}\nbeta: 3\ngroup_size: 6\n")
    base, found = load_config("ocr-demo"), load_config(last, {"seed": "4"})
    assert (found.beta, found.group_size, found.seed, found.finetune) == (3, 6, 4, base.finetune)
    assert load_config("ocr-tiny").learning_rate == base.learning_rate
    middle.write_text(f"extends: {last}\n")
    with pytest.raises(CRDError, match=r"extends leads in a circle: .*last.yaml -> .*middle.yaml -> .*last.yaml"):
        load_config(last)
    for text, message in (("extends: nowhere", "no configuration at nowhere"), ("extends: [a]", "must name a recipe")):
        middle.write_text(text)
        with pytest.raises(CRDError, match=message):
            load_config(middle)


@pytest.mark.parametrize(("given", "value"), [("auto", "auto"), ("16", 16), (16, 16)])
def test_a_batch_size_is_a_number_or_auto(given: object, value: object) -> None:
    config = config_from({"micro_batch": given, "rollout_batch": given})
    assert (config.micro_batch, config.rollout_batch) == (value, value)
    assert config.automatic == (value == "auto")
    assert config_from(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize("given", ["many", True, 1.5, None, 0, "-3"])
def test_a_batch_size_that_is_neither(given: object) -> None:
    with pytest.raises(CRDError, match=r"rollout_batch must be (a number or auto|above 0), got"):
        config_from({"rollout_batch": given})
