"""The command line: what works end to end, and one line with exit status 2 for what cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROMPTS, TOKENS
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from subprocesses import IMPORTED_FROM
from test_checkpoint import file_size_limit

from crd.batch_sizes import BatchSize
from crd.checkpoint import CheckpointFolder
from crd.cli import _thread_excepthook, main
from crd.config import CRDConfig
from crd.config_io import load_config
from crd.data import load_prompts, prompt_batch
from crd.engine import Engine
from crd.errors import CRDError
from crd.evaluation import SamplingSettings, draw
from crd.loading import load_model
from crd.sampling import initial_noise
from crd.snapshots import ANCHOR
from crd.trainer import CRDTrainer


@pytest.fixture(autouse=True)
def _restore_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` sets up its process; the process of the tests goes on."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


@pytest.fixture
def run_file(config: CRDConfig, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    return path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refused command."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("crd: ")
    return lines[0]


def in_subprocess(arguments: list[str], folder: Path, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m crd ...` as a person runs it, files no longer than `limit` bytes."""
    script = "import resource, runpy, sys; sys.argv[0] = 'crd'; "
    if limit is not None:
        script += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
    script += "runpy.run_module('crd', run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": IMPORTED_FROM},
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "no configuration at nowhere.yaml"),
        (["train", "{run}", "--prompts", "nowhere.txt"], "no prompt file at nowhere.txt"),
        (["train", "{run}", "--model", "/nowhere"], "no model at /nowhere"),
        (["train", "{run}", "--learnig-rate", "1"], "did you mean 'learning_rate'"),
        (["train", "{run}", "--updates", "none"], "updates must be int"),
        (["train", "{run}", "--updates"], "--updates needs a value"),
        (["train", "{run}", "--updates", "3", "4"], "expected --field value, got '4'"),
        (["train", "{run}", "--config", "{run}"], "given twice"),
        (["train", "{run}", "--rewards", "reward_functions:nothing"], "has no attribute 'nothing'"),
        (["train", "{run}", "--rewards", "ocrr"], "did you mean 'ocr'"),
        (["train", "{run}", "--rewards", "reward_functions:needs_a_column"], "needs the dataset column 'target'"),
        (["train", "{run}", "--rewards", "reward_functions:too_short"], "one score per image (3), got 2"),
        (["train", "{run}", "--rewards", "reward_functions:not_a_number"], "is nan; return a finite number"),
        (["train", "{run}", "--rewards", "reward_functions:raising"], "RuntimeError: the scorer has no weights"),
        (["train", "{run}", "--resume", "nowhere"], "run's own configuration"),
        (["train", "--resume", "nowhere"], "needs a run folder"),
        (["sample", "{model}"], "give prompts as --prompt TEXT"),
        (["sample", "{model}", "--prompt", "a", "--out", "grid"], "--out must be a picture"),
        (["sample", "{model}", "--prompt", "a", "--out", "grid.psd"], "--out must be a picture"),
        (["sample", "{model}", "--prompts", "world:test:256", "--out", "grid.webp"], "WEBP holds 16383; give an --out"),
        (["sample", "{model}", "--prompt", "a", "--images", "0"], "argument --images: must be an integer of 1 or more"),
        (["sample", "{model}", "--prompt", "a", "--steps", "0"], "argument --steps"),
        (["sample", "{model}", "--prompt", "a", "--image", "2"], "unknown argument '--image'"),
        (["sample", "{model}", "--prompt", "a", "--base", "x"], "--base is for LoRA folders"),
        (["sample", "{model}", "--prompt", "a", "--checkpoint", "best"], "--checkpoint best is for runs"),
        (["sample", "/nowhere", "--prompt", "a"], "no model at /nowhere"),
        (["eval", "{model}", "--prompts", "nowhere.txt"], "no prompt file"),
        (
            ["eval", "{model}", "--reward", "reward_functions:brightness", "--device", "tpu"],
            "device must be auto, cpu or cuda",
        ),
        (["export", "{model}", "--out", "lora"], "is a base model and has no LoRA"),
        (["export", "{model}"], "--out"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str],
    message: str,
    run_file: Path,
    config: CRDConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [word.format(run=run_file, model=config.model) for word in arguments]
    assert message in refused(filled, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_ocr_needs_quoted_text(run_file: Path, config: CRDConfig, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rapidocr")
    prompts = run_file.parent / "prompts.jsonl"
    prompts.write_text('{"prompt": "a \\"CAT\\""}\n{"prompt": "a dog without quotes"}\n')
    line = refused(["train", str(run_file), "--rewards", "ocr", "--prompts", str(prompts)], capsys)
    assert "'a dog without quotes' has no text between double quotes" in line
    assert not Path(config.output_dir).exists()


def test_a_used_output_folder_is_left_as_it_is(
    run_file: Path, config: CRDConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(config.output_dir)
    run.mkdir()
    (run / "thesis.txt").write_text("years of work")
    assert f"--resume {run}" in refused(["train", str(run_file)], capsys)
    assert (run / "thesis.txt").read_text() == "years of work"
    assert len(list(run.iterdir())) == 1
    (run / "thesis.txt").unlink()
    assert main(["train", str(run_file)]) == 0  # an empty folder is not a used one


def test_the_output_folder_is_a_file(run_file: Path, config: CRDConfig, capsys: pytest.CaptureFixture[str]) -> None:
    Path(config.output_dir).write_text("a file")
    assert "cannot make the run folder" in refused(["train", str(run_file)], capsys)


def test_a_damaged_model_folder(
    run_file: Path, config: CRDConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{")
    assert "model_index.json" in refused(["train", str(run_file), "--model", str(tmp_path / "model")], capsys)
    assert not Path(config.output_dir).exists()


def test_a_reward_that_fails_in_a_real_process(run_file: Path, config: CRDConfig) -> None:
    got = in_subprocess(["train", str(run_file), "--rewards", "reward_functions:raising"], run_file.parent)
    assert got.returncode == 2
    assert got.stderr == "crd: reward 'raising' raised RuntimeError: the scorer has no weights; fix the reward\n"
    assert not Path(config.output_dir).exists()


def test_a_full_disk_in_a_real_process(run_file: Path, config: CRDConfig) -> None:
    """The checkpoint of update 2 lacks one byte of room; that of update 1 was written before."""
    run = Path(config.output_dir)
    assert main(["train", str(run_file), "--save-every", "1", "--updates", "1"]) == 0
    largest = max(path.stat().st_size for path in run.rglob("*.safetensors"))
    got = in_subprocess(["train", "--resume", str(run), "--updates", "2", "--tensorboard", "true"], run, largest - 1)
    assert got.returncode == 2, got.stderr
    assert len(got.stderr.splitlines()) == 1
    assert "cannot save the checkpoint of update 2" in got.stderr
    assert "free space and use --resume" in got.stderr
    checkpoints = CheckpointFolder(run / "checkpoints", keep=2)
    assert [path.name for path in checkpoints.folder.glob("*") if path.is_dir()] == ["update-000001"]
    assert main(["train", "--resume", str(run), "--updates", "2"]) == 0
    assert checkpoints.updates() == [1, 2]


def test_a_disk_that_is_full_from_the_start(
    run_file: Path, config: CRDConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with file_size_limit(100):
        assert "cannot write the run folder" in refused(["train", str(run_file)], capsys)
    assert not Path(config.output_dir).exists()


def test_a_disk_that_fills_while_logging(run_file: Path, config: CRDConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Small files fit, the sheet of samples does not."""
    with file_size_limit(4000):
        assert "free space" in refused(["train", str(run_file)], capsys)
    assert not Path(config.output_dir).exists()
    with file_size_limit(4000):
        long = ["--eval-prompts", "none", "--updates", "30", "--tensorboard", "true"]
        line = refused(["train", str(run_file), *long], capsys)
    assert "free space and use --resume" in line
    # Updates were made, so this folder stays, and the run starts over or goes on.
    first = json.loads((Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()[0])
    assert first["update"] == 1
    assert main(["train", "--resume", config.output_dir, "--updates", "2", "--tensorboard", "false"]) == 0


def test_debug_shows_the_traceback(run_file: Path) -> None:
    for arguments in (["--debug", "train", str(run_file)], ["train", str(run_file), "--debug"]):
        with pytest.raises(CRDError, match="no prompt file"):
            main([*arguments, "--prompts", "nowhere.txt"])


@pytest.mark.parametrize("form", ["positional", "option"])
def test_train_takes_fields_in_both_spellings(run_file: Path, config: CRDConfig, form: str, tmp_path: Path) -> None:
    source = [str(run_file)] if form == "positional" else ["--config", str(run_file)]
    assert main(["train", *source, "--learning-rate=2e-3", "--beta", "2", "--kl_reward_range", "0,2"]) == 0
    recorded = load_config(Path(config.output_dir) / "config.yaml")
    assert recorded == replace(config, learning_rate=2e-3, beta=2.0, kl_reward_range=(0.0, 2.0))


def test_train_without_a_configuration_file(capsys: pytest.CaptureFixture[str]) -> None:
    """The value of the first field is not the name of a configuration."""
    assert "prompt file at nowhere.txt" in refused(["train", "--prompts", "nowhere.txt"], capsys)


def test_sample_draws_base_and_trained_rows(finished_run: Path, tmp_path: Path) -> None:
    prompts = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    one, two = tmp_path / "new" / "one.png", tmp_path / "two.png"
    assert main(["sample", str(finished_run), *prompts, "--out", str(one), "--images", "2"]) == 0
    assert main(["sample", str(finished_run), *prompts, "--out", str(two), "--images", "2"]) == 0
    sheet = np.asarray(Image.open(one))
    assert np.array_equal(sheet, np.asarray(Image.open(two)))  # same seeds, same pictures
    base, trained = sheet[18:130, 130:], sheet[148:260, 130:]
    assert base.shape == trained.shape
    assert not np.array_equal(base, trained)
    more = ["--guidance", "1", "--guidance", "3", "--base-guidance", "4.5", "--seed", "5"]
    assert main(["sample", str(finished_run), *prompts, "--out", str(two), *more]) == 0
    assert Image.open(two).height > 2 * sheet.shape[0]  # five rows: base at 1, 3 and 4.5, trained at 1 and 3


def test_eval_scores_base_and_trained(finished_run: Path, prompt_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores" / "result.json"
    reward = ["--reward", "reward_functions:brightness", "--reward", "reward_functions:darkness"]
    arguments = ["--prompts", str(prompt_file), "--images", "2", "--guidance", "1", "--guidance", "2"]
    assert main(["eval", str(finished_run), *reward, *arguments, "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert [(r["model"] == "base", r["guidance"], r["images"]) for r in results] == [
        (True, 1.0, 6), (True, 2.0, 6), (False, 1.0, 6), (False, 2.0, 6),
    ]  # fmt: skip
    means = [{name: found["mean"] for name, found in result["intervals"].items()} for result in results]
    for found in means:
        assert found["reward_brightness"] + found["reward_darkness"] == pytest.approx(1.0, abs=1e-5)
        assert found["reward"] == pytest.approx(1.0)
    assert means[0]["reward_brightness"] != means[2]["reward_brightness"]
    # The same prompts, noise and steps as the run's own last evaluation.
    last = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()][-1]
    once = [*reward[:2], "--prompts", str(prompt_file), "--out", str(out)]
    assert main(["eval", str(finished_run), *once]) == 0
    assert json.loads(out.read_text())[1]["intervals"]["reward"]["mean"] == pytest.approx(last["reward"], abs=1e-6)


def test_eval_takes_seed_and_precision_of_the_run(
    config: CRDConfig, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = CRDTrainer(args=replace(config, seed=5, updates=1)).train()
    run, out = config.output_dir, tmp_path / "result.json"
    evaluate = ["eval", run, "--reward", "reward_functions:brightness", "--prompts", str(prompt_file)]
    rewards = []
    for seed in ([], ["--seed", "5"], ["--seed", "0"]):
        assert main([*evaluate, *seed, "--out", str(out)]) == 0
        rewards.append(json.loads(out.read_text())[1]["intervals"]["reward"]["mean"])
    assert rewards[0] == rewards[1] == pytest.approx(summary["reward_after"], abs=1e-6)
    assert rewards[2] != rewards[0]
    sheets = []
    for seed in ([], ["--seed", "5"], ["--seed", "0"]):
        assert main(["sample", run, "--prompt", "a", "--out", str(tmp_path / "sheet.png"), *seed]) == 0
        sheets.append((tmp_path / "sheet.png").read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]
    # This process runs without autocast, so an engine of the run's precision is refused.
    record = Path(run) / "config.yaml"
    record.write_text(record.read_text().replace("mixed_precision: 'no'", "mixed_precision: bf16"))
    assert "already runs at mixed_precision=no" in refused(evaluate, capsys)


def test_a_run_of_a_pipeline_object_needs_its_base(
    config: CRDConfig, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(config.model)
    CRDTrainer(pipeline, args=replace(config, updates=1, eval_prompts=None)).train()
    export = ["export", config.output_dir, "--out", str(tmp_path / "lora")]
    assert "name its model with --base MODEL" in refused(export, capsys)
    assert main([*export, "--base", config.model]) == 0
    assert (tmp_path / "lora").is_dir()
    sample = ["sample", config.output_dir, "--prompt", "a", "--out", str(tmp_path / "sheet.png")]
    assert main([*sample, "--base", config.model]) == 0
    line = refused(["export", str(finished_run), "--out", str(tmp_path / "other"), "--base", config.model], capsys)
    assert "names its own base model" in line


def test_threads_of_others_may_fail_aloud(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(threading, "excepthook", _thread_excepthook)
    for error in (ValueError("a bug"), OSError("a lost connection")):

        def fail(error: Exception = error) -> None:
            raise error

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        assert str(error) in capsys.readouterr().err


def our_images(target: Path, role: str = "policy", base: str | None = None) -> list[Image.Image]:
    model = load_model(target, base=base)
    batch = prompt_batch(load_prompts(list(PROMPTS)), range(3), 1, 0)
    with model.snapshots.use(role) as denoiser:
        settings = SamplingSettings(4, 1.0, BatchSize("batch", 8), None, None)
        rollout = draw(model.backbone, denoiser, Engine(device="cpu"), batch, settings, model.backbone.encode([""]), "")
    return rollout.images


def stock_images(pipeline: StableDiffusion3Pipeline) -> list[Image.Image]:
    pipeline.set_progress_bar_config(disable=True)
    seeds = prompt_batch(load_prompts(list(PROMPTS)), range(3), 1, 0).image_seed
    images: list[Image.Image] = pipeline(
        list(PROMPTS),
        latents=initial_noise(seeds, (4, 8, 8)),
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=TOKENS,
    ).images
    return images


def distance(first: list[Image.Image], second: list[Image.Image]) -> int:
    """Largest difference of a channel, in 1/255."""
    pairs = zip(first, second, strict=True)
    return max(int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max()) for a, b in pairs)


def test_export_loads_in_stock_diffusers(finished_run: Path, model_folder: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    assert main(["export", str(finished_run), "--out", str(lora)]) == 0
    stock = StableDiffusion3Pipeline.from_pretrained(model_folder)
    base = stock_images(stock)
    assert distance(our_images(finished_run, role=ANCHOR), base) <= 1
    stock.load_lora_weights(lora)
    ours = our_images(finished_run)
    assert distance(ours, stock_images(stock)) <= 1
    assert distance(ours, base) > 8
    assert distance(our_images(lora, base=str(model_folder)), ours) <= 1  # and back into crd


def test_export_of_a_merged_pipeline(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = tmp_path / "merged"
    assert main(["export", str(finished_run), "--merge", "--out", str(merged)]) == 0
    ours = our_images(finished_run)
    assert distance(stock_images(StableDiffusion3Pipeline.from_pretrained(merged)), ours) <= 1
    assert distance(our_images(merged, role=ANCHOR), ours) <= 1
    assert "not empty" in refused(["export", str(finished_run), "--out", str(merged)], capsys)
    assert main(["export", str(finished_run), "--merge", "--out", str(merged), "--overwrite"]) == 0


def test_export_of_a_full_run(config: CRDConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full.yaml").write_text(replace(config, finetune="full", updates=1).to_yaml())
    assert main(["train", str(tmp_path / "full.yaml")]) == 0
    run, out = Path(config.output_dir), tmp_path / "model"
    assert "full fine-tuning has no LoRA" in refused(["export", str(run), "--out", str(out)], capsys)
    assert not out.exists()
    assert main(["export", str(run), "--merge", "--out", str(out)]) == 0
    stock = StableDiffusion3Pipeline.from_pretrained(out)
    assert distance(stock_images(stock), our_images(run)) <= 1
    trained = load_file(run / "checkpoints" / "update-000001" / "policy.safetensors")
    assert all(torch.equal(trained[name], tensor) for name, tensor in stock.transformer.named_parameters())


def test_corrupt_files_of_a_run(config: CRDConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(replace(config, save_every=1, eval_prompts=None).to_yaml())
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    run, out = Path(config.output_dir), str(tmp_path / "lora")
    policy = run / "checkpoints" / "update-000002" / "policy.safetensors"
    policy.write_bytes(policy.read_bytes()[:100])
    for arguments in (["export", str(run), "--out", out], ["sample", str(run), "--prompt", "a"]):
        assert "is corrupt" in refused(arguments, capsys)
    assert "records no best checkpoint" in refused(["export", str(run), "--out", out, "--checkpoint", "best"], capsys)
    assert not Path(out).exists()
    assert main(["export", str(run), "--out", out, "--checkpoint", "1"]) == 0  # the earlier one still loads
    lora = Path(out) / "pytorch_lora_weights.safetensors"
    save_file({"nonsense": torch.zeros(1)}, lora)
    assert refused(["sample", out, "--base", config.model, "--prompt", "a"], capsys)
    (run / "config.yaml").write_text("bettta: 1\n")
    assert "unknown configuration key 'bettta'" in refused(["train", "--resume", str(run)], capsys)
