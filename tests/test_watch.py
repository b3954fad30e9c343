"""Evaluation inside real runs: the record it keeps, what the alarm does, and all of it through a resume.

At this learning rate the policy leaves the anchor within an update or two, so `velocities_drift` warns: measured, the
distance is 6.8 to 12 times that of the base model in every run here.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crd.alarm import fallen
from crd.checkpoint import CheckpointFolder
from crd.cli import main
from crd.config import CRDConfig
from crd.config_io import load_config
from crd.errors import CRDError
from crd.eval_record import EvalRecord, read_record
from crd.evaluation import EvalResult, Evaluator
from crd.evaluation_files import EvaluationFiles
from crd.report import write_report
from crd.snapshots import ANCHOR
from crd.tracker import read_metrics
from crd.trainer import KL_SCALE_MAX, CRDTrainer
from crd.watch import Verdict

ANIMALS = ("cat", "dog", "bird", "fish", "cow", "hen", "fox", "ant")
HELD_OUT = "held_out_darkness"


@pytest.fixture(autouse=True)
def _restore_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


@pytest.fixture(scope="module")
def hacking(base_config: CRDConfig, tmp_path_factory: pytest.TempPathFactory) -> CRDConfig:
    """Five updates, each evaluated and saved; the held-out score is the opposite of the reward."""
    prompts = tmp_path_factory.mktemp("prompts") / "animals.txt"
    prompts.write_text("".join(f"the {animal}\n" for animal in ANIMALS))
    return replace(
        base_config, eval_prompts=str(prompts), eval_images=2, held_out=("reward_functions:darkness",), updates=5,
        eval_every=1, save_every=1, keep_checkpoints=9, learning_rate=0.3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def watched(hacking: CRDConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `hacking`, told of and not interfered with."""
    return trained(hacking, tmp_path_factory.mktemp("watched") / "run")


def trained(config: CRDConfig, folder: Path, resume: bool | int = False) -> Path:
    CRDTrainer(args=replace(config, output_dir=str(folder))).train(resume)
    return folder


def files(run: Path) -> dict[str, bytes]:
    """What a run keeps of its evaluations, by name."""
    paths = [run / "events.jsonl", *(run / "evaluations").iterdir(), *(run / "events").iterdir()]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def events(run: Path) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def evaluation(run: Path, update: int) -> EvalRecord:
    return read_record(run / "evaluations" / f"update-{update:06d}.json")


def kl_scales(run: Path) -> list[float]:
    """Of the checkpoints, by update."""
    states = sorted((run / "checkpoints").glob("update-*/state.json"))
    return [json.loads(path.read_text())["counters"]["kl_scale"] for path in states]


def test_a_run_keeps_its_evaluations(watched: Path) -> None:
    folder = watched / "evaluations"
    stems = ["base-cfg-4.5", *(f"update-{update:06d}" for update in range(6))]
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{stem}{end}" for stem in stems for end in (".json", ".webp")
    ]
    for logged in read_metrics(watched, "eval"):
        record = evaluation(watched, logged["update"])
        assert (record.role, record.guidance, record.steps, record.seed) == ("policy", 1.0, 2, 0)
        assert record.prompts == [f"the {animal}" for animal in ANIMALS]
        assert record.prompt_id.tolist() == np.repeat(np.arange(8), 2).tolist()
        assert list(record.scores) == ["reward", "reward_brightness", HELD_OUT]
        np.testing.assert_allclose(record.scores["reward"] + record.scores[HELD_OUT], 1.0, atol=1e-5)
        # The log and the file say the same, digit by digit.
        assert record.metrics() == {name: value for name, value in logged.items() if name not in ("update", "kind")}
        assert np.isfinite(record.diversity).all()
    base = read_record(folder / "base-cfg-4.5.json")
    assert (base.role, base.guidance) == ("anchor", 4.5)
    assert base.same_images(evaluation(watched, 5))
    assert evaluation(watched, 0).drift["kl_to_anchor"] > base.drift["kl_to_anchor"] == 0
    assert base.drift["kl_to_base"] > evaluation(watched, 0).drift["kl_to_base"] == 0


def test_the_kept_pictures_are_the_images(hacking: CRDConfig, watched: Path, tmp_path: Path) -> None:
    kept = EvaluationFiles(watched)
    content = json.loads((watched / "evaluations" / "update-000000.json").read_text())
    assert content["pictures"] == {
        "file": "update-000000.webp", "indices": list(range(16)), "tile": 16, "columns": 8
    }  # fmt: skip
    with Image.open(watched / "evaluations" / "update-000000.webp") as sheet:
        assert sheet.size == (128, 32)
    images = CRDTrainer(args=replace(hacking, output_dir=str(tmp_path / "new"))).evaluate().images

    def distance(index: int, image: Image.Image) -> float:
        tile = np.asarray(kept.tile(0, index), np.float64)
        return float(np.abs(tile - np.asarray(image, np.float64)).mean())

    for index in (0, 7, 8, 15):  # WebP is lossy; another image is farther off
        others = [distance(index, image) for place, image in enumerate(images) if place != index]
        assert distance(index, images[index]) < min(others)


def test_the_alarm_tells_and_keeps_evidence(watched: Path) -> None:
    found = events(watched)
    drift = [event for event in found if event["column"] == "kl_to_anchor" and event["level"] == "warn"]
    assert {event["update"] for event in drift} >= {2, 3, 4, 5}
    for event in found:
        assert event["action"] == ("warn" if event["level"] == "warn" else "none")
        assert len(event["pictures"]) == 2
        before, after = (Image.open(watched / name) for name in event["pictures"])
        assert before.size == after.size == (16, 16)
        assert before.tobytes() != after.tobytes()
    assert {name for event in found for name in event["pictures"]} == {
        f"events/{path.name}" for path in (watched / "events").iterdir()
    }


def test_the_report_reads_what_a_run_wrote(watched: Path, tmp_path: Path) -> None:
    page = write_report([watched], tmp_path / "report.html").read_text()
    assert "the distance to the anchor is" in page


def test_a_quiet_run_raises_no_alarm(hacking: CRDConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(replace(hacking, learning_rate=1e-4, updates=1), tmp_path / "run")
    assert not (run / "events.jsonl").exists()
    assert "warn:" not in capsys.readouterr().out


def test_the_best_checkpoint_is_none_whose_held_out_score_fell(hacking: CRDConfig, tmp_path: Path) -> None:
    """A run that does get brighter, so that its held-out darkness falls: see test_trainer for the settings."""
    learning = replace(
        hacking, finetune="full", learning_rate=1e-2, updates=6, group_size=16, rollout_steps=4, eval_steps=4, draws=4,
        micro_batch=256, beta=0.1, kl_max=0.0, sampler_start=0.0, warmup_steps=12,
    )  # fmt: skip
    run = trained(learning, tmp_path / "run")
    records = [evaluation(run, update) for update in range(7)]
    fell = [update for update in range(1, 7) if fallen(records[update], records[0], HELD_OUT)]
    rewards = {update: records[update].metrics()["reward"] for update in range(1, 7)}
    assert max(rewards, key=rewards.__getitem__) in fell  # the rule costs this run its highest reward
    allowed = {update: reward for update, reward in rewards.items() if update not in fell}
    best = max(allowed, key=allowed.__getitem__) if allowed else None
    found = CheckpointFolder(run / "checkpoints", keep=9).best()
    assert found == (None if best is None else (best, rewards[best]))


def test_without_held_out_scores_the_highest_reward_is_the_best(hacking: CRDConfig, tmp_path: Path) -> None:
    run = trained(replace(hacking, held_out=(), alarm="off"), tmp_path / "run")
    rewards = {record["update"]: record["reward"] for record in read_metrics(run, "eval") if record["update"]}
    best = max(rewards, key=rewards.__getitem__)
    assert CheckpointFolder(run / "checkpoints", keep=9).best() == (best, rewards[best])
    # Nothing is compared with the base model.
    assert not list((run / "evaluations").glob("base-*"))
    assert events(run) == []


def test_an_interrupted_run_leads_to_the_same_files(hacking: CRDConfig, watched: Path, tmp_path: Path) -> None:
    run = trained(replace(hacking, updates=3), tmp_path / "run")
    with (run / "events.jsonl").open("a") as handle:
        handle.write('{"update": 3, "lev')  # cut off by a crash
    trained(hacking, run, resume=True)
    assert files(run) == files(watched)
    best = [CheckpointFolder(folder / "checkpoints", keep=9).best() for folder in (run, watched)]
    assert best[0] == best[1]


def test_going_back_drops_later_evaluations_and_events(hacking: CRDConfig, watched: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(watched, run)
    trained(replace(hacking, updates=3), run, resume=2)
    wanted = files(watched)
    lines = wanted.pop("events.jsonl").splitlines(keepends=True)
    early = {name: content for name, content in wanted.items() if not any(f"-00000{late}" in name for late in (4, 5))}
    assert files(run) == {**early, "events.jsonl": b"".join(line for line in lines if json.loads(line)["update"] < 4)}
    best = CheckpointFolder(run / "checkpoints", keep=9).best()
    assert best is None or best[0] <= 3


def test_the_alarm_may_be_switched_off_in_a_resumed_run(hacking: CRDConfig, watched: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(watched, run)
    trained(replace(hacking, alarm="off"), run, resume=3)
    assert [event["update"] for event in events(run)] == [e["update"] for e in events(watched) if e["update"] <= 3]
    assert (run / "evaluations" / "update-000005.json").read_bytes() == files(watched)["evaluations/update-000005.json"]


def test_a_run_without_evaluation_prompts_has_no_alarm(hacking: CRDConfig, tmp_path: Path) -> None:
    blind = replace(hacking, eval_prompts=None, held_out=(), updates=1)
    run = trained(blind, tmp_path / "run")
    trainer = CRDTrainer(args=replace(blind, output_dir=str(run)))
    assert trainer.watch is None
    assert not {"evaluations", "events", "events.jsonl"} & {path.name for path in run.iterdir()}
    for change, message in (
        ({"alarm": "stop"}, "alarm=stop needs evaluation prompts, got none"),
        ({"alarm": "raise_kl"}, "alarm=raise_kl needs evaluation prompts, got none"),
        ({"held_out": ("reward_functions:darkness",)}, "held_out scorers need evaluation prompts"),
    ):
        with pytest.raises(CRDError, match=message):
            CRDTrainer(args=replace(blind, output_dir=str(tmp_path / "other"), **change))


def test_lost_pictures_are_told_as_such(hacking: CRDConfig, watched: Path, tmp_path: Path) -> None:
    """While a run goes on, too, and not as a full disk; its updates are saved."""
    run = tmp_path / "run"
    shutil.copytree(watched, run)
    trainer = CRDTrainer(args=replace(hacking, updates=6, output_dir=str(run)))
    assert trainer.watch is not None
    tell = trainer.watch._tell

    def lose(*arguments: Any) -> None:
        (run / "evaluations" / "update-000000.webp").unlink(missing_ok=True)
        tell(*arguments)

    trainer.watch._tell = lose  # type: ignore[method-assign]
    with pytest.raises(CRDError, match=r"update-000000.webp, whose pictures .*, is missing; restore it, or go on with"):
        trainer.train(resume=True)
    assert CheckpointFolder(run / "checkpoints", keep=9).updates()[-1] == 6
    # Restored, the evaluation is made up: its numbers had been kept, and were told nowhere.
    shutil.copy(watched / "evaluations" / "update-000000.webp", run / "evaluations")
    summary = CRDTrainer(args=replace(hacking, updates=6, output_dir=str(run))).train(resume=True)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["kind"], last["update"], last["reward"]) == ("eval", 6, summary["reward_after"])


def test_settings_of_the_alarm_are_checked(hacking: CRDConfig) -> None:
    with pytest.raises(CRDError, match="alarm must be one of off, warn, stop, raise_kl, got 'loud'"):
        replace(hacking, alarm="loud")
    with pytest.raises(CRDError, match="alarm=raise_kl needs an anchor to strengthen, got kl_max=0"):
        replace(hacking, alarm="raise_kl", kl_max=0.0)


def test_evaluating_twice_gives_the_same_numbers(hacking: CRDConfig, tmp_path: Path) -> None:
    trainer = CRDTrainer(args=replace(hacking, output_dir=str(tmp_path / "run")))
    trainer.update()
    first, second = (json.dumps(trainer.evaluate().record.to_dict()) for _ in range(2))
    assert first == second
    assert json.dumps(trainer.evaluate(ANCHOR).record.to_dict()) != first


def test_stop_ends_the_run_with_a_checkpoint(
    hacking: CRDConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    stopping = replace(hacking, alarm="stop", updates=6, save_every=0, keep_checkpoints=1, output_dir=str(run))
    (tmp_path / "run.yaml").write_text(stopping.to_yaml())
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    (update,) = {event["update"] for event in events(run) if event["action"] == "stop"}
    assert update in (1, 2)
    page = tmp_path / "report.html"
    assert f">Stopped</span> At update {update} by" in write_report([run], page).read_text()
    assert f"the alarm stops the run after update {update}" in capsys.readouterr().out.replace("\n", " ")
    checkpoints = CheckpointFolder(run / "checkpoints", keep=1)
    assert checkpoints.updates()[-1] == update
    assert json.loads((run / "summary.json").read_text())["updates"] == update
    # It goes on when told to: to the next warning, or to its end.
    assert main(["train", "--resume", str(run)]) == 0
    assert checkpoints.updates()[-1] == update + 1
    assert main(["train", "--resume", str(run), "--alarm", "warn", "--updates", str(update + 3)]) == 0
    assert checkpoints.updates()[-1] == update + 3
    assert load_config(run / "config.yaml").alarm == "warn"
    assert [record["update"] for record in read_metrics(run, "eval")] == list(range(update + 4))
    text = write_report([run], page).read_text()
    assert f"stopped at update {update}, resumed; stopped at update {update + 1}, resumed; the last warning" in text


def test_the_last_evaluation_stops_nothing(
    hacking: CRDConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(replace(hacking, alarm="stop", updates=2, eval_every=2), tmp_path / "run")
    assert {event["action"] for event in events(run) if event["level"] == "warn"} == {"warn"}
    assert "stops the run" not in capsys.readouterr().out


def test_raise_kl_doubles_the_strengths_up_to_eight(hacking: CRDConfig, tmp_path: Path) -> None:
    # Other rules may warn in the first update already; from the second on there is a warning in each.
    raising = replace(hacking, alarm="raise_kl", kl_gate="constant", updates=6)
    straight = trained(raising, tmp_path / "straight")
    scales = kl_scales(straight)
    warned = [any(e["update"] == n and e["level"] == "warn" for e in events(straight)) for n in range(1, 7)]
    expected = [min(KL_SCALE_MAX, 2.0 ** sum(warned[:count])) for count in range(1, 7)]
    assert scales == expected
    assert KL_SCALE_MAX == 8
    assert sum(warned) > 3  # so that the limit was reached
    # What an event records is what was done: at the limit a warning is told only.
    raised = {e["update"] for e in events(straight) if e["action"] == "raise_kl"}
    assert raised == {
        n for n, before, after in zip(range(1, 7), [1.0, *scales], scales, strict=False) if after > before
    }
    assert {e["action"] for e in events(straight) if e["level"] == "warn"} == {"raise_kl", "warn"}
    assert f"KL raised {len(raised)} times" in write_report([straight], tmp_path / "report.html").read_text()
    # An update is trained at the strength that the evaluation before it left.
    trained_at = [record["kl_strength_mean"] for record in read_metrics(straight, "train")]
    assert trained_at == pytest.approx([raising.kl_max * scale for scale in (1.0, *scales[:-1])])
    parts = trained(replace(raising, updates=3), tmp_path / "parts")
    trained(raising, parts, resume=True)
    assert kl_scales(parts) == scales
    assert files(parts) == files(straight)
    # A ramp of the strengths goes on beneath, and where the run was resumed.
    ramped = replace(raising, kl_start_scale=4.0, kl_ramp_updates=4)
    ramp = trained(replace(ramped, updates=3), tmp_path / "ramp")
    trained(ramped, ramp, resume=True)
    raised_to = [1.0, *kl_scales(ramp)[:-1]]
    assert max(raised_to) > 1
    factors = [raised * 4 ** max(0.0, 1 - done / 4) for done, raised in enumerate(raised_to)]
    trained_at = [record["kl_strength_mean"] for record in read_metrics(ramp, "train")]
    assert trained_at == pytest.approx([raising.kl_max * factor for factor in factors])
    resumed = CRDTrainer(args=replace(raising, output_dir=str(parts)))
    resumed.train(resume=True)
    assert resumed.progress.kl_scale == KL_SCALE_MAX
    assert resumed.objective.config.kl_max == KL_SCALE_MAX * raising.kl_max  # type: ignore[attr-defined]
    assert resumed.objective.config.kl_min == KL_SCALE_MAX * raising.kl_min  # type: ignore[attr-defined]


def test_what_a_made_up_evaluation_raises_is_kept(
    hacking: CRDConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that was saved when the judge was down knows nothing of it."""
    raising = replace(hacking, alarm="raise_kl", updates=6, save_every=0, output_dir=str(tmp_path / "run"))
    trainer = CRDTrainer(args=raising)
    assert trainer.watch is not None
    evaluate = trainer.watch.evaluate

    def fail(update: int, **options: Any) -> Verdict:
        if update == 3:
            raise CRDError("the judge is down")
        return evaluate(update, **options)

    monkeypatch.setattr(trainer.watch, "evaluate", fail)
    with pytest.raises(CRDError, match="the judge is down"):
        trainer.train()
    checkpoints = CheckpointFolder.of_run(tmp_path / "run")
    before = checkpoints.load(3).counters["kl_scale"]
    further = CRDTrainer(args=raising)
    monkeypatch.setattr(further, "update", lambda: (_ for _ in ()).throw(CRDError("interrupted")))
    with pytest.raises(CRDError, match="interrupted"):
        further.train(resume=True)
    assert any(event["update"] == 3 and event["action"] == "raise_kl" for event in events(tmp_path / "run"))
    assert checkpoints.load(3).counters["kl_scale"] == 2 * before


def test_evaluations_drawn_otherwise_are_not_gone_on_from(hacking: CRDConfig, watched: Path, tmp_path: Path) -> None:
    for change in ({"solver": "dpmsolver++"}, {"steps": 3}):
        run = tmp_path / "-".join(change)
        shutil.copytree(watched, run)
        path = run / "evaluations" / "update-000001.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(CRDError, match=r"drawn in \d steps of \S+, this run draws in 2 of euler; set it back"):
            CRDTrainer(args=replace(hacking, output_dir=str(run))).train(resume=True)


def test_the_base_model_is_drawn_once_where_policy_and_anchor_have_one_scale(
    hacking: CRDConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    evaluate = Evaluator.__call__

    def counted(self: Evaluator, role: str, guidance: float | None = None) -> EvalResult:
        drawn.append(role)
        return evaluate(self, role, guidance)

    monkeypatch.setattr(Evaluator, "__call__", counted)
    unguided = replace(hacking, anchor_guidance=1.0, eval_base_guidance=(1.0,), updates=1, output_dir=str(tmp_path))
    trainer = CRDTrainer(args=unguided)
    trainer.train()
    assert drawn == ["policy", "policy"]
    base = read_record(tmp_path / "evaluations" / "base-cfg-1.json")
    assert base.to_dict() == trainer.evaluate(ANCHOR, 1.0).record.to_dict()
    pictures = [tmp_path / "evaluations" / f"{name}.webp" for name in ("base-cfg-1", "update-000000")]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_a_checkpoint_without_a_scale_is_of_unraised_strengths(hacking: CRDConfig, tmp_path: Path) -> None:
    run = trained(replace(hacking, eval_prompts=None, held_out=(), updates=1), tmp_path / "run")
    path = run / "checkpoints" / "update-000001" / "state.json"
    state = json.loads(path.read_text())
    del state["counters"]["kl_scale"]
    path.write_text(json.dumps(state))
    trained(replace(hacking, eval_prompts=None, held_out=(), updates=2), run, resume=True)
    assert [record["update"] for record in read_metrics(run, "train")] == [1, 2]
    assert CheckpointFolder(run / "checkpoints", keep=9).load(2).counters["kl_scale"] == 1.0


def other_prompts(run: Path, prompts: Path) -> None:
    prompts.write_text(prompts.read_text().replace("cat", "gnu"))


def no_beginning(run: Path, prompts: Path) -> None:
    (run / "evaluations" / "update-000000.json").unlink()


def damaged(run: Path, prompts: Path) -> None:
    (run / "evaluations" / "update-000001.json").write_text('{"role": "policy"')


def damaged_base(run: Path, prompts: Path) -> None:
    (run / "evaluations" / "base-cfg-4.5.json").write_text("[]")


def no_pictures(run: Path, prompts: Path) -> None:
    (run / "evaluations" / "update-000000.webp").unlink()


def cut_pictures(run: Path, prompts: Path) -> None:
    path = run / "evaluations" / "update-000000.webp"
    path.write_bytes(path.read_bytes()[:40])


def other_scorer(run: Path, prompts: Path) -> None:
    path = run / "evaluations" / "update-000001.json"
    path.write_text(path.read_text().replace("reward_functions:darkness", "gone:darkness"))


def foreign(run: Path, prompts: Path) -> None:
    (run / "evaluations" / "update-notes.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_prompts, "the evaluation prompts are not those of the run"),
        (no_beginning, "lacks the evaluation of update 0"),
        (damaged, r"update-000001.json is not valid JSON"),
        (damaged_base, r"base-cfg-4.5.json must hold a JSON object"),
        (no_pictures, r"update-000000.webp, whose pictures the alarm shows .*, is missing; restore it, or go on"),
        (cut_pictures, r"update-000000.webp, whose .* is damaged .*; restore it, or go on with --alarm off"),
        (
            other_scorer,
            r"were measured otherwise than this run would: their held_out_darkness are by gone:darkness and",
        ),
        (foreign, "update-notes.json is not named after an update"),
    ],
)
def test_a_refused_resume_changes_nothing(
    hacking: CRDConfig, watched: Path, tmp_path: Path, damage: Callable[[Path, Path], None], message: str
) -> None:
    run, prompts = tmp_path / "run", tmp_path / "animals.txt"
    shutil.copytree(watched, run)
    prompts.write_text("".join(f"the {animal}\n" for animal in ANIMALS))
    own = replace(hacking, eval_prompts=str(prompts), output_dir=str(run))
    (run / "config.yaml").write_text(own.to_yaml())
    damage(run, prompts)
    before = files(run), sorted(path.name for path in (run / "checkpoints").iterdir())
    with pytest.raises(CRDError, match=message):
        CRDTrainer(args=own).train(resume=2)
    assert (files(run), sorted(path.name for path in (run / "checkpoints").iterdir())) == before
