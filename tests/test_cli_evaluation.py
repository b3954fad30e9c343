"""`crd eval` with held-out scorers, and `crd compare` of models, runs and files."""

from __future__ import annotations

import json
import shutil
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import PROMPTS
from test_cli import refused

from crd import cli, command_options
from crd.cli import main
from crd.comparison import differences, read_evaluations
from crd.config import BASE_DTYPES, CRDConfig
from crd.flow import SOLVERS
from crd.loading import LoadedModel
from crd.trainer import CRDTrainer

REWARD = ["--reward", "reward_functions:brightness"]


@pytest.fixture(autouse=True)
def _restore_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


@pytest.fixture(scope="module")
def scores(prompt_file: Path) -> list[str]:
    """Arguments of a small evaluation."""
    return [*REWARD, "--prompts", str(prompt_file), "--steps", "2", "--images", "2"]


def evaluated(target: str | Path, arguments: list[str], out: Path) -> Path:
    assert main(["eval", str(target), *arguments, "--out", str(out)]) == 0
    return out


def compared(arguments: list[str], out: Path) -> list[dict[str, Any]]:
    assert main(["compare", *arguments, "--out", str(out)]) == 0
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def test_eval_with_held_out_scorers(
    finished_run: Path, scores: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = ["--held-out", "reward_functions:darkness", "--held-out", "reward_functions:bright_but_for_cats"]
    first = evaluated(finished_run, [*scores, *held_out], tmp_path / "first.json")
    printed = capsys.readouterr().out
    names = ["reward", "reward_brightness", "held_out_darkness", "held_out_bright_but_for_cats"]
    for name in (*names, "stat_edge_density", "diversity", "kl_to_anchor"):
        assert name[:8] in printed  # a narrow terminal breaks names
    base, trained = read_evaluations(first)
    assert (base.title, trained.title) == ("base, CFG 1", f"{finished_run}, CFG 1")
    assert list(base.record.scores) == names
    assert (base.record.prompts, base.record.steps, len(base.record.prompt_id)) == (list(PROMPTS), 2, 6)
    change = differences(trained.record, base.record)
    assert change["held_out_darkness"].mean == pytest.approx(-change["reward"].mean, abs=1e-5)
    # The same seed: the same numbers.
    assert evaluated(finished_run, [*scores, *held_out], tmp_path / "again.json").read_text() == first.read_text()
    other = evaluated(finished_run, [*scores, *held_out, "--seed", "9"], tmp_path / "other.json")
    assert other.read_text() != first.read_text()


def test_eval_refuses_scorers_that_cannot_judge(
    model_folder: Path, scores: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = ["eval", str(model_folder), *scores, "--held-out"]
    line = refused([*evaluate, "reward_functions:needs_a_column"], capsys)
    assert "held_out needs_a_column can judge none of the evaluation prompts" in line
    assert "reward 'raising' raised RuntimeError" in refused([*evaluate, "reward_functions:raising"], capsys)
    assert "names no source after the =" in refused([*evaluate, "clipscore="], capsys)
    benchmark = ["eval", str(model_folder), "--benchmark", "geneval", "--held-out", "clipscore"]
    assert "--held-out is not for --benchmark, got clipscore" in refused(benchmark, capsys)


def test_compare_models(
    finished_run: Path, model_folder: Path, scores: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = ["--held-out", "reward_functions:darkness"]
    base, run = compared([str(model_folder), str(finished_run), *scores, *held_out], tmp_path / "new" / "compare.json")
    assert "paired difference" in capsys.readouterr().out
    assert (base["model"], run["model"]) == (str(model_folder), str(finished_run))
    assert base["differences"] == {}
    for name in ("reward", "held_out_darkness", "diversity"):
        means = [one["intervals"][name]["mean"] for one in (base, run)]
        assert run["differences"][name]["mean"] == pytest.approx(means[1] - means[0], abs=1e-9)
    assert run["differences"]["reward"]["low"] < run["differences"]["reward"]["high"]
    # One model at two scales is two evaluations.
    scales = compared([str(model_folder), *scores, "--guidance", "1", "--guidance", "4.5"], tmp_path / "scales.json")
    assert [one["guidance"] for one in scales] == [1.0, 4.5]
    assert scales[0]["evaluation"]["scores"] == {
        name: values for name, values in base["evaluation"]["scores"].items() if name != "held_out_darkness"
    }


def test_compare_files(finished_run: Path, model_folder: Path, scores: list[str], tmp_path: Path) -> None:
    """What was evaluated before is not evaluated again, and counts the same."""
    file = evaluated(finished_run, scores, tmp_path / "eval.json")
    base, run = compared([str(file)], tmp_path / "file.json")
    again = compared([str(file), str(finished_run), *scores], tmp_path / "mixed.json")
    assert [one["model"] for one in again] == ["base", str(finished_run), str(finished_run)]
    assert again[1]["differences"] == again[2]["differences"] == run["differences"]
    # A file that `crd compare` wrote is as good.
    assert compared([str(tmp_path / "file.json")], tmp_path / "copy.json") == [base, run]


def test_compare_runs_of_other_seeds_on_the_noise_of_the_first(
    finished_run: Path, config: CRDConfig, scores: list[str], tmp_path: Path
) -> None:
    CRDTrainer(args=replace(config, seed=5, updates=1)).train()
    found = compared([str(finished_run), config.output_dir, *scores], tmp_path / "a.json")
    assert [one["evaluation"]["seed"] for one in found] == [0, 0]
    found = compared([config.output_dir, str(finished_run), *scores], tmp_path / "b.json")
    assert [one["evaluation"]["seed"] for one in found] == [5, 5]


def test_compare_names_the_base_of_those_that_take_one(
    finished_run: Path, model_folder: Path, scores: list[str], tmp_path: Path
) -> None:
    """And has one model in memory at a time, whichever follows it."""
    assert main(["export", str(finished_run), "--out", str(tmp_path / "lora")]) == 0
    loaded: list[weakref.ref[Any]] = []
    load = command_options.load_model

    def watched_load(*arguments: Any, **options: Any) -> LoadedModel:
        assert all(earlier() is None for earlier in loaded)
        model = load(*arguments, **options)
        loaded.append(weakref.ref(model.backbone.denoiser))
        return model

    targets = [str(finished_run), str(tmp_path / "lora"), str(model_folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_options, "load_model", watched_load)
        found = compared([*targets, *scores, "--base", str(model_folder)], tmp_path / "bases.json")
    assert [one["model"] for one in found] == targets
    assert len(loaded) == 3
    assert found[1]["differences"]["reward"]["mean"] == pytest.approx(0, abs=1e-5)
    assert found[2]["differences"]["reward"]["mean"] != pytest.approx(0, abs=1e-3)


def test_compare_refuses(
    model_folder: Path, finished_run: Path, scores: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = evaluated(model_folder, scores, tmp_path / "eval.json")
    (tmp_path / "prompts.txt").write_text("one prompt\n")
    few = [*scores, "--prompts", str(tmp_path / "prompts.txt")]
    other = evaluated(model_folder, few, tmp_path / "other.json")
    seeded = evaluated(model_folder, [*scores, "--seed", "1"], tmp_path / "seeded.json")
    failing = ["--reward", "reward_functions:raising", *scores[2:]]
    broken, empty = tmp_path / "broken.json", tmp_path / "empty.json"
    broken.write_text(file.read_text()[:-20])
    empty.write_text("[]")
    old = tmp_path / "old.json"
    content = json.loads(file.read_text())
    del content[0]["evaluation"]["protocol"]
    old.write_text(json.dumps(content))
    for arguments, message in (
        ([file, other], "no pairs can be formed; use the same --prompts, --images and --seed"),
        ([file, seeded], "no pairs can be formed"),
        ([file, finished_run, *few], "no pairs can be formed"),
        ([file, finished_run, *scores, "--images", "1"], "no pairs can be formed"),
        ([file, finished_run, *scores, "--seed", "3"], "no pairs can be formed"),
        ([file], "nothing to compare: got one evaluation, base, CFG 1; name a second model"),
        ([model_folder, *scores], f"got one evaluation, {model_folder};"),
        ([broken, file], "broken.json is not valid JSON"),
        ([file, empty], "empty.json holds an empty list of evaluations"),
        ([tmp_path / "nowhere.json", file], "no file"),
        ([model_folder, file, *few], "no pairs can be formed"),  # a file is read before a model, wherever it stands
        ([model_folder, tmp_path / "nowhere", *failing], "no model at"),  # before any model is evaluated
        ([file, finished_run, *scores, "--height", "32"], "height x width are 16 x 16 and 32 x 16 px"),
        ([file, finished_run, "--reward", "reward_functions:darkness", *scores[2:]], "their rewards, by weight, are"),
        ([file, model_folder, *scores, "--base", "x"], "--base x is for LoRA folders and runs of a model object"),
        ([old, model_folder, *scores], "does not say how it was measured"),
        ([file, tmp_path / "nowhere"], "no model at"),
        ([], "the following arguments are required: target"),
    ):
        assert message in refused(["compare", *(str(argument) for argument in arguments)], capsys)


@pytest.fixture(scope="module")
def particular_run(base_config: CRDConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with settings of its own wherever an evaluation has some."""
    folder = tmp_path_factory.mktemp("particular") / "run"
    config = replace(
        base_config, output_dir=str(folder), updates=1, seed=7, solver="dpmsolver++", eval_steps=3, eval_images=2,
        rewards=("reward_functions:brightness", "reward_functions:darkness"), reward_weights=(1.0, 0.25),
        held_out=("reward_functions:bright_but_for_cats",), rollout_batch=4, vae_slicing=True,
        learning_rate=0.3, alarm="off",
    )  # fmt: skip
    CRDTrainer(args=config).train()
    return folder


def test_the_batch_of_a_run_must_be_a_number(particular_run: Path, tmp_path: Path, capsys: Any) -> None:
    """A run records the number that `auto` came to; only a person can have written the word."""
    folder = tmp_path / "changed"
    shutil.copytree(particular_run, folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("rollout_batch: 4", "rollout_batch: auto"))
    assert main(["eval", str(folder), "--batch", "3"]) == 0
    assert main(["eval", str(folder)]) == 2
    assert "rollout_batch=auto is for the start of a run" in " ".join(capsys.readouterr().err.split())


def test_eval_of_a_run_is_the_evaluation_of_the_run(
    particular_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All numbers, and the way the networks run; options take the place of the run's settings."""
    rows: list[int] = []
    loaded: list[LoadedModel] = []
    load = command_options.load_model

    def watched_load(*arguments: Any, **options: Any) -> LoadedModel:
        loaded.append(load(*arguments, **options))
        loaded[-1].backbone.denoiser.register_forward_pre_hook(
            lambda _module, _args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        return loaded[-1]

    monkeypatch.setattr(command_options, "load_model", watched_load)
    _, trained = json.loads(evaluated(particular_run, [], tmp_path / "own.json").read_text())
    kept = json.loads((particular_run / "evaluations" / "update-000001.json").read_text())
    assert trained["evaluation"] == {name: kept[name] for name in trained["evaluation"]}
    assert (trained["solver"], trained["steps"], trained["images"]) == ("dpmsolver++", 3, 6)
    assert rows[0] == 4
    assert loaded[0].backbone.pipeline.vae.use_slicing
    # Given options count.
    rows.clear()
    given = ["--solver", "euler", "--batch", "3", "--no-vae-slicing", *REWARD]
    _, other = json.loads(evaluated(particular_run, given, tmp_path / "given.json").read_text())
    assert (other["solver"], rows[0]) == ("euler", 3)
    assert not loaded[1].backbone.pipeline.vae.use_slicing
    assert list(other["evaluation"]["scores"]) == ["reward", "reward_brightness"]  # the run's judges are left out
    assert other["evaluation"]["scores"]["reward"] != trained["evaluation"]["scores"]["reward_brightness"]


def test_the_attention_backend_is_that_of_the_run(
    particular_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model without any refuses each; one that a run cannot have had shows that the run's is taken."""
    told = "SD3Transformer2DModel has no attention backends in diffusers, got attention_backend=native"
    assert told in refused(["eval", str(particular_run), "--attention-backend", "native"], capsys)
    run = tmp_path / "run"
    shutil.copytree(particular_run, run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("attention_backend: null", "attention_backend: native"))
    assert told in refused(["eval", str(run)], capsys)
    assert told in refused(["sample", str(run), "--prompt", "a", "--out", str(tmp_path / "a.png")], capsys)
    assert main(["export", str(run), "--out", str(tmp_path / "lora")]) == 0  # runs nothing


def test_compare_loads_a_model_that_is_no_run_in_the_type_of_the_first_run(
    finished_run: Path, model_folder: Path, scores: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = tmp_path / "half"
    shutil.copytree(finished_run, half)
    (half / "config.yaml").write_text(
        (half / "config.yaml").read_text().replace("base_dtype: float32", "base_dtype: bfloat16")
    )
    types: list[str] = []
    load = command_options.load_model

    def recorded(*arguments: Any, **options: Any) -> LoadedModel:
        model = load(*arguments, **options)
        types.append(str(model.backbone.dtype).removeprefix("torch."))
        return model

    monkeypatch.setattr(command_options, "load_model", recorded)
    targets = [str(model_folder), str(half), str(finished_run)]
    assert main(["compare", *targets, *scores]) == 0
    assert main(["compare", *targets[:2], *scores, "--base-dtype", "float32"]) == 0
    assert main(["eval", str(model_folder), *scores]) == 0
    assert types == ["bfloat16", "bfloat16", "float32", "float32", "float32", "float32"]


def test_compare_takes_solver_and_judges_of_the_first_run(
    particular_run: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compared([str(model_folder), str(particular_run)], tmp_path / "a.json")
    assert [(one["solver"], one["images"]) for one in found] == [("dpmsolver++", 6)] * 2
    assert list(found[0]["evaluation"]["protocol"]["weights"].values()) == [1.0, 0.25]
    # A file decides how the others are drawn, and a solver of another is remarked on.
    multistep = evaluated(particular_run, [], tmp_path / "multistep.json")
    plain = evaluated(particular_run, ["--solver", "euler"], tmp_path / "plain.json")
    mixed = compared([str(plain), str(particular_run)], tmp_path / "mixed.json")
    assert [one["solver"] for one in mixed] == ["euler"] * 3
    capsys.readouterr()
    compared([str(plain), str(multistep)], tmp_path / "both.json")
    assert "the differences are also those of the solver" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_does_not_say_how_to_evaluate(
    config: CRDConfig, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CRDTrainer(args=replace(config, eval_prompts=None, updates=1), reward_funcs=lambda images, prompts: [0.5, 0.25] * (
        len(images) // 2)).train()  # fmt: skip
    run = ["eval", config.output_dir]
    assert "it got an object in Python; give --reward" in refused(run, capsys)
    assert "the run was not evaluated, so it does not say on what; give --prompts" in refused([*run, *REWARD], capsys)
    wrong = [*run, *REWARD, "--prompts", str(prompt_file), "--attention-backend", "nonsense"]
    assert "got attention_backend=nonsense" in refused(wrong, capsys)
    assert "--solver: invalid choice: 'heun'" in refused([*run, "--solver", "heun"], capsys)


def test_choices_of_the_command_line_are_those_of_the_configuration() -> None:
    assert cli.SOLVERS == SOLVERS
    for name in cli.COMPILE:
        assert CRDConfig(compile=name).compile == name
    assert cli.BASE_DTYPES == BASE_DTYPES


def test_the_distance_to_renderings_of_the_bundled_world(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--steps", "1", *REWARD]
    file = evaluated(
        "tiny-sd3", [*few, "--prompts", "scenes:test:49", "--images", "2", "--frechet"], tmp_path / "f.json"
    )
    (found,) = json.loads(file.read_text())
    drift = found["evaluation"]["model"]
    assert drift["frechet_to_renderings"] > 2 * drift["frechet_floor"] > 0
    assert "frechet_to_renderings" in capsys.readouterr().out
    (line,) = read_evaluations(file)
    assert line.record.drift == drift
    for arguments, told in (
        (["tiny-sd3", "--prompts", "scenes:test:96"], "needs more images than that, got 96; evaluate more prompts or"),
        (["tiny-sd3", "--prompts", "geneval:test:120"], "--frechet: prompt"),
        ([str(model_folder), "--prompts", "scenes:test:97"], "pictures of 64 x 64 px, got 16 x 16; leave it out"),
        (["tiny-sd3", "--benchmark", "geneval"], "--frechet is not for --benchmark"),
    ):
        own = [] if "--benchmark" in arguments else few
        assert told in refused(["eval", *arguments, *own, "--frechet"], capsys), arguments
    assert "--frechet is for models to evaluate" in refused(["compare", str(file), str(file), "--frechet"], capsys)
