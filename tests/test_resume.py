"""An interrupted run that goes on is the run that was never interrupted, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from reward_functions import brightness
from safetensors.torch import load
from subprocesses import IMPORTED_FROM

import crd.engine
from crd.checkpoint import CheckpointFolder
from crd.cli import main
from crd.config import CRDConfig
from crd.config_io import load_config
from crd.errors import CRDError
from crd.run_folder import CONFIG_FILE, RunFolder
from crd.trainer import CRDTrainer
from crd.watch import Verdict

ROLES = ("policy", "old", "sampler", "optimizer")


def weights(run: Path, update: int) -> dict[str, dict[str, torch.Tensor]]:
    folder = run / "checkpoints" / f"update-{update:06d}"
    # From bytes, not from the file: `load_file` gives views of a file that tests overwrite.
    return {path.stem: load(path.read_bytes()) for path in folder.glob("*.safetensors")}


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(got: Path, wanted: Path, update: int) -> None:
    assert records(got) == records(wanted)
    mine, theirs = weights(got, update), weights(wanted, update)
    assert mine.keys() == theirs.keys() == set(ROLES)
    for stem, tensors in theirs.items():
        assert mine[stem].keys() == tensors.keys()
        assert all(torch.equal(mine[stem][name], tensor) for name, tensor in tensors.items()), stem
    # Three roles that hold the same numbers would hide a role that was not restored.
    for a, b in (("policy", "old"), ("policy", "sampler"), ("old", "sampler")):
        assert any(not torch.equal(theirs[a][name], theirs[b][name]) for name in theirs[a])


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_three_and_three_updates_are_six(finetune: str, config: CRDConfig, tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    six = replace(
        config, finetune=finetune, updates=6, eval_every=3, save_every=3, warmup_steps=8, output_dir=str(straight)
    )
    CRDTrainer(args=six).train()
    parts = tmp_path / "parts"
    CRDTrainer(args=replace(six, updates=3, output_dir=str(parts))).train()
    resumed = CRDTrainer(args=replace(six, output_dir=str(parts)))
    summary = resumed.train(resume=True)
    assert_same_run(parts, straight, 6)
    wanted = json.loads((straight / "summary.json").read_text())
    assert {**summary, "seconds": 0} == {**wanted, "seconds": 0}
    assert (summary["updates"], summary["steps"], summary["images"]) == (6, 12, 48)


def test_one_snapshot_for_both_resumes_too(config: CRDConfig, tmp_path: Path) -> None:
    four = replace(
        config, decouple_sampler=False, updates=4, eval_prompts=None, save_every=2, output_dir=str(tmp_path / "a")
    )
    CRDTrainer(args=four).train()
    other = replace(four, output_dir=str(tmp_path / "b"))
    CRDTrainer(args=replace(other, updates=2)).train()
    CRDTrainer(args=other).train(resume=True)
    mine, theirs = weights(tmp_path / "b", 4), weights(tmp_path / "a", 4)
    assert mine.keys() == theirs.keys() == {"policy", "old", "optimizer"}
    assert all(torch.equal(mine[stem][name], t) for stem in theirs for name, t in theirs[stem].items())
    assert records(tmp_path / "a") == records(tmp_path / "b")


def test_killed_in_the_middle(config: CRDConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 in update 4 of a real `crd train`; the last checkpoint is that of update 2, its metrics run on to 3."""
    killed = replace(
        config,
        rewards=("reward_functions:killed",),
        updates=5,
        save_every=2,
        tensorboard=True,
        output_dir=str(tmp_path / "killed"),
    )
    (tmp_path / "run.yaml").write_text(killed.to_yaml())
    # Calls of the reward: evaluations of the model and of the guided base model, then one an update.
    environment = {**os.environ, "PYTHONPATH": IMPORTED_FROM, "DIE_AT_CALL": "6"}
    process = subprocess.run(
        [sys.executable, "-m", "crd", "train", str(tmp_path / "run.yaml")],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert process.stderr == ""
    assert [record["update"] for record in records(tmp_path / "killed")] == [0, 1, 2, 3]
    os.environ["DIE_AT_CALL"] = "0"
    try:
        assert main(["train", "--resume", str(tmp_path / "killed")]) == 0, capsys.readouterr().err
        straight = replace(killed, output_dir=str(tmp_path / "straight"))
        CRDTrainer(args=straight).train()
    finally:
        del os.environ["DIE_AT_CALL"]
    assert_same_run(tmp_path / "killed", tmp_path / "straight", 5)


def test_killed_before_the_first_checkpoint_starts_over(
    config: CRDConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CRDTrainer(args=config).train()
    interrupted = tmp_path / "interrupted"
    trainer = CRDTrainer(args=replace(config, output_dir=str(interrupted)))
    trainer.books.create()
    (interrupted / "metrics.jsonl").write_text('{"update": 0, "kind": "eval", "reward": 7.0}\n{"update": 1, "ki')
    capsys.readouterr()
    assert main(["train", "--resume", str(interrupted)]) == 0
    assert "no checkpoint yet: the run starts over" in capsys.readouterr().out
    assert_same_run(interrupted, Path(config.output_dir), 2)


def test_a_corrupt_checkpoint_and_the_way_back(config: CRDConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(config.output_dir)
    CRDTrainer(args=replace(config, updates=3, save_every=1, eval_prompts=None)).train()
    wanted_weights, wanted_records = weights(run, 3), records(run)
    broken = run / "checkpoints" / "update-000003"
    (broken / "old.safetensors").write_bytes(b"x")
    assert main(["train", "--resume", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    earlier = run / "checkpoints" / "update-000002"
    assert f"--resume {earlier}" in error
    assert records(run) == wanted_records  # a refused resume changes nothing
    assert main(["train", "--resume", str(earlier)]) == 0
    assert all(torch.equal(weights(run, 3)[s][n], t) for s in wanted_weights for n, t in wanted_weights[s].items())
    assert records(run) == wanted_records


def test_a_finished_run_resumes_to_its_summary(config: CRDConfig) -> None:
    first = CRDTrainer(args=config).train()
    again = CRDTrainer(args=config).train(resume=True)
    assert again == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beta", "2"], "beta cannot change in a resumed run"),
        (["--output-dir", "elsewhere"], "output_dir cannot change"),
        (["--betta", "2"], "did you mean 'beta'"),
        (["--updates", "0"], "updates must be above 0"),
        (["--config", "other.yaml"], "run's own configuration"),
    ],
)
def test_resume_refuses_another_run(
    finished_run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished_run / "metrics.jsonl").read_text()
    assert main(["train", "--resume", str(finished_run), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert (finished_run / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("change", [{"beta": 2.0}, {"model": "elsewhere"}, {"seed": 5}])
def test_the_python_api_refuses_another_run(finished_run: Path, model_folder: Path, change: dict[str, Any]) -> None:
    config = replace(load_config(finished_run / "config.yaml"), **change)
    model = f"{model_folder}/" if "model" in change else None  # the same model under another name
    trainer = CRDTrainer(model=model, args=config)
    with pytest.raises(CRDError, match=f"{next(iter(change))} cannot change in a resumed run"):
        trainer.train(resume=True)


def test_a_run_whose_record_lacks_a_setting_was_made_with_its_default(config: CRDConfig) -> None:
    folder = RunFolder(Path(config.output_dir))
    folder.create(config)
    record = folder.path / CONFIG_FILE
    kept = [
        line for line in record.read_text().splitlines() if not line.startswith(("share_noise", "centering_prompts"))
    ]
    assert len(kept) == len(record.read_text().splitlines()) - 2
    record.write_text("\n".join(kept))
    folder.check_same(config)
    with pytest.raises(CRDError, match="share_noise cannot change in a resumed run: it was False, got True"):
        folder.check_same(replace(config, share_noise=True))


def test_a_moved_run_goes_on_where_it_lies(config: CRDConfig, tmp_path: Path) -> None:
    CRDTrainer(args=config).train()
    moved = tmp_path / "moved"
    Path(config.output_dir).rename(moved)
    assert main(["train", "--resume", str(moved), "--updates", "3"]) == 0
    assert CheckpointFolder(moved / "checkpoints", keep=2).updates() == [2, 3]
    assert not Path(config.output_dir).exists()


def test_no_run_there(tmp_path: Path, config: CRDConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "needs a run folder" in capsys.readouterr().err
    with pytest.raises(CRDError, match="no run to resume"):
        CRDTrainer(args=config).train(resume=True)
    assert not Path(config.output_dir).exists()


def test_going_back_forgets_later_checkpoints_and_records_overrides(
    config: CRDConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(config.output_dir)
    wide = replace(config, updates=4, save_every=1, eval_every=1, keep_checkpoints=4)
    CRDTrainer(args=wide).train()
    checkpoints = CheckpointFolder(run / "checkpoints", keep=9)
    checkpoints.mark_best(4, 1.0)
    checkpoints.save(9, checkpoints.load(4))  # from a time when the run was longer
    (run / "checkpoints" / ".saving-abc").mkdir()
    wanted = weights(run, 3)
    # Of the checkpoints that are kept, only those before the one resumed may survive the first save.
    assert main(["train", "--resume", str(checkpoints.path(2)), "--updates", "3", "--keep-checkpoints", "1"]) == 0
    reward = {record["update"]: record["reward"] for record in records(run) if record["kind"] == "eval"}
    best = max((1, 2, 3), key=lambda update: reward[update])
    assert checkpoints.best() == (best, reward[best])
    assert checkpoints.updates() == sorted({best, 3})
    assert all(torch.equal(weights(run, 3)[s][n], t) for s in wanted for n, t in wanted[s].items())
    assert not (run / "checkpoints" / ".saving-abc").exists()
    assert load_config(run / "config.yaml") == replace(wide, updates=3, keep_checkpoints=1)
    assert max(record["update"] for record in records(run)) == 3
    assert sorted(path.name for path in (run / "samples").iterdir()) == [f"update-00000{n}.png" for n in range(4)]
    # The override of the first resume holds in the second.
    assert main(["train", "--resume", str(run)]) == 0
    assert checkpoints.updates()[-1] == 3
    before = [path.read_bytes() for path in (run / "config.yaml", run / "metrics.jsonl")]
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--updates", "2"]) == 2
    assert "updates=2 is below the 3 that are done" in capsys.readouterr().err
    assert [path.read_bytes() for path in (run / "config.yaml", run / "metrics.jsonl")] == before


def test_a_reward_that_fails_late_loses_no_update(config: CRDConfig, tmp_path: Path) -> None:
    calls = 0

    def fragile(images: list[Image.Image], prompts: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise ConnectionError("the server of rewards is gone")
        return brightness(images, prompts)

    four = replace(config, updates=4, eval_prompts=None, output_dir=str(tmp_path / "fragile"))
    with pytest.raises(CRDError, match="the server of rewards is gone"):
        CRDTrainer(reward_funcs=fragile, args=four).train()
    assert CheckpointFolder(tmp_path / "fragile" / "checkpoints", keep=2).updates() == [3]
    CRDTrainer(reward_funcs=fragile, args=four).train(resume=True)
    CRDTrainer(reward_funcs=fragile, args=replace(four, output_dir=str(tmp_path / "straight"))).train()
    assert_same_run(tmp_path / "fragile", tmp_path / "straight", 4)


def test_a_trainer_that_was_interrupted_goes_on_as_a_new_one_would(config: CRDConfig, tmp_path: Path) -> None:
    """What a half-done step has left in the gradients is none of the resumed run's."""
    three = replace(config, updates=3, save_every=1, output_dir=str(tmp_path / "interrupted"))
    trainer = CRDTrainer(args=three)
    step = trainer.engine.step

    def interrupt(*arguments: Any) -> float:
        if trainer.progress.optimizer_steps == 2:
            raise KeyboardInterrupt
        return step(*arguments)

    trainer.engine.step = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert any(parameter.grad is not None for parameter in trainer.snapshots.parameters())
    trainer.engine.step = step  # type: ignore[method-assign]
    trainer.train(resume=True)
    CRDTrainer(args=replace(three, output_dir=str(tmp_path / "straight"))).train()
    assert_same_run(tmp_path / "interrupted", tmp_path / "straight", 3)


def test_a_trainer_that_has_trained_cannot_start_over(config: CRDConfig) -> None:
    trainer = CRDTrainer(args=replace(config, save_every=0, eval_prompts=None, updates=2))
    finish = trainer._evaluate_and_save

    def interrupt() -> bool:
        raise KeyboardInterrupt

    trainer._evaluate_and_save = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer._evaluate_and_save = finish  # type: ignore[method-assign]
    with pytest.raises(CRDError, match="has trained already, so no run can begin with it"):
        trainer.train(resume=True)


@pytest.mark.parametrize("failing", [3, 6])
def test_an_evaluation_that_failed_is_made_up(failing: int, config: CRDConfig, tmp_path: Path) -> None:
    """In the middle and at the end, where the run would be finished without it."""
    six = replace(config, updates=6, eval_every=3, output_dir=str(tmp_path / "failed"))
    trainer = CRDTrainer(args=six)
    assert trainer.watch is not None
    evaluate = trainer.watch.evaluate

    def fail(update: int, **options: Any) -> Verdict:
        if update == failing:
            raise CRDError("the judge is down")
        return evaluate(update, **options)

    trainer.watch.evaluate = fail  # type: ignore[method-assign]
    with pytest.raises(CRDError, match="the judge is down"):
        trainer.train()
    assert CheckpointFolder.of_run(tmp_path / "failed").updates()[-1] == failing
    summary = CRDTrainer(args=six).train(resume=True)
    straight = CRDTrainer(args=replace(six, output_dir=str(tmp_path / "straight"))).train()
    assert_same_run(tmp_path / "failed", tmp_path / "straight", 6)
    assert {**summary, "seconds": 0} == {**straight, "seconds": 0}


def test_the_summary_of_a_run_that_goes_on_is_gone(config: CRDConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    CRDTrainer(args=config).train()
    summary = Path(config.output_dir) / "summary.json"
    assert summary.is_file()
    further = CRDTrainer(args=replace(config, updates=3))
    monkeypatch.setattr(further, "update", lambda: (_ for _ in ()).throw(CRDError("interrupted")))
    with pytest.raises(CRDError, match="interrupted"):
        further.train(resume=True)
    assert not summary.exists()


def test_other_prompts_under_the_same_name_are_another_run(config: CRDConfig, tmp_path: Path) -> None:
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a cat\na dog\n")
    once = replace(config, updates=1, eval_prompts=None, prompts=str(prompts))
    CRDTrainer(args=once).train()
    prompts.write_text("a dog\na cat\n")
    with pytest.raises(CRDError, match="training prompts are not those of the run"):
        CRDTrainer(args=replace(once, updates=2)).train(resume=True)
    assert load_config(Path(config.output_dir) / "config.yaml").updates == 1
    prompts.write_text("a cat\na dog\n")
    CRDTrainer(args=replace(once, updates=2)).train(resume=True)


def test_other_columns_of_the_same_prompts_are_another_run(config: CRDConfig, tmp_path: Path) -> None:
    prompts = tmp_path / "mine.jsonl"
    lines = [{"prompt": "a cat", "scale": 1.0}, {"prompt": "a dog", "scale": 2.0}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    once = replace(config, updates=1, eval_prompts=None, prompts=str(prompts))
    CRDTrainer(args=once).train()
    prompts.write_text("".join(json.dumps({**line, "scale": 3.0}) + "\n" for line in lines))
    with pytest.raises(CRDError, match="columns of the training prompts are not those of the run"):
        CRDTrainer(args=replace(once, updates=2)).train(resume=True)


def test_what_auto_precision_came_to_is_recorded(config: CRDConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crd.engine, "_fast_bf16", lambda cpu: False)  # a process has one precision
    auto = replace(config, mixed_precision="auto")
    CRDTrainer(args=replace(auto, updates=1)).train()
    assert load_config(Path(config.output_dir) / CONFIG_FILE).mixed_precision == "no"
    # "auto" is no other run than what it came to, and runs from before it was recorded say "auto".
    CRDTrainer(args=replace(auto, updates=2)).train(resume=True)
    RunFolder(Path(config.output_dir)).record(auto)
    CRDTrainer(args=replace(auto, updates=3)).train(resume=True)
    bf16 = (Path(config.output_dir) / CONFIG_FILE).read_text().replace("mixed_precision: 'no'", "mixed_precision: bf16")
    (Path(config.output_dir) / CONFIG_FILE).write_text(bf16)
    with pytest.raises(CRDError, match="mixed_precision cannot change in a resumed run: it was 'bf16', got 'no'"):
        CRDTrainer(args=replace(auto, updates=4)).train(resume=True)


def test_seconds_count_evaluations_and_all_resumes(config: CRDConfig) -> None:
    def slow(images: list[Image.Image], prompts: list[str]) -> list[float]:
        time.sleep(0.3)
        return brightness(images, prompts)

    once = replace(config, updates=1)
    first = CRDTrainer(reward_funcs=slow, args=once).train()["seconds"]
    assert first >= 0.9  # evaluation, update, evaluation
    second = CRDTrainer(reward_funcs=slow, args=replace(once, updates=2)).train(resume=True)["seconds"]
    assert second >= first + 0.6
