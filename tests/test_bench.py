"""`crd bench` for real: small runs in their own processes, stopped and gone on with, and what is made of them."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from subprocesses import IMPORTED_FROM

from crd.bench.runner import alone
from crd.bench.schedule import plan_cells, to_do
from crd.bench.suite_file import read_suite
from crd.cli import main
from crd.config import CRDConfig
from crd.errors import CRDError
from crd.eval_record import read_record
from crd.report.read_run import read_run

UPDATES = 3


@pytest.fixture(scope="module")
def suite_file(base_config: CRDConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms, and one whose run fails: no module of the model is called `nowhere`."""
    folder = tmp_path_factory.mktemp("suite")
    recipe = replace(
        base_config, rewards=("reward_functions:slow_brightness",), held_out=("reward_functions:darkness",),
        updates=UPDATES, group_size=2, eval_images=2, eval_every=1, save_every=1, alarm="warn", anchor_guidance=2.0,
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    suite = {
        "name": "tiny", "reference": "plain", "seeds": [0], "about": "Seconds.",
        "tasks": {"bright": {"recipe": str(folder / "recipe.yaml")}},
        "arms": {"plain": {}, "strong": {"kl_max": 1.0}, "broken": {"lora_targets": ["nowhere"]}},
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench") / "out"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def attempts(out: Path, arm: str) -> list[dict[str, Any]]:
    return lines(out / f"bright/{arm}/seed-0/attempts.jsonl")


def terminate_when_trained(metrics: Path, updates: int, ended: threading.Event) -> None:
    """SIGTERM to this process once a run has made so many updates, unless it has ended before."""
    while not ended.is_set():
        if metrics.is_file() and metrics.read_text().count('"train"') >= updates:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(0.02)


def test_a_suite_is_run_stopped_gone_on_with_and_summarised(
    suite_file: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", IMPORTED_FROM)
    bench = ["bench", str(suite_file), "--output_dir", str(out)]
    assert main([*bench, "--dry-run"]) == 0
    assert (
        "0 of 3 runs are finished; how long the others take is known once one has finished here"
        in capsys.readouterr().out
    )
    assert not out.exists()

    first = out / "bright/plain/seed-0"
    ended = threading.Event()
    watcher = threading.Thread(target=terminate_when_trained, args=(first / "run/metrics.jsonl", 1, ended))
    watcher.start()
    try:
        assert main(bench) == 130
    finally:
        ended.set()
        watcher.join()
    assert "the same command goes on" in capsys.readouterr().err
    (stopped,) = attempts(out, "plain")
    assert (stopped["stopped"], stopped["status"]) == (True, -signal.SIGTERM)
    assert not (first / "run/summary.json").exists()
    with alone(out):  # no process was left behind
        pass

    with monkeypatch.context() as patched:  # as if it were killed before the end: numbers are there after each run
        patched.setattr("crd.bench.command.summarise", lambda suite, out, recorded: True)
        assert main([*bench, "--arms", "strong", "--keep-weights"]) == 0
    assert [one["update"] for one in lines(out / "results.jsonl") if one["arm"] == "strong"] == [0, 1, 2, 3]
    assert [one["state"] for one in lines(out / "cells.jsonl")] == ["started", "finished"]
    assert not (out / "report.md").exists()
    assert list((out / "bright/strong/seed-0/run/checkpoints").glob("update-*"))
    capsys.readouterr()

    assert main([*bench, "--jobs", "2"]) == 2
    assert not (first / "run/checkpoints").exists()
    told = capsys.readouterr()
    assert "1, 1 started" in told.out
    assert "start bright/plain/seed-0" in told.out
    assert "done bright/plain/seed-0" in told.out
    assert "the others take about" in told.out
    assert "failed bright/broken/seed-0 after" in told.out
    assert "nowhere" in told.out  # its last words
    assert told.err.startswith("crd: 1 of 3 runs failed, bright/broken/seed-0; see log.txt")
    assert [one["stopped"] for one in attempts(out, "plain")] == [True, False]
    assert f"update {UPDATES}/{UPDATES}" in (first / "log.txt").read_text()
    for one in attempts(out, "plain"):
        assert one["peak_bytes"] > 10**8
        assert one["cpu_seconds"] > 0
        assert sys.platform != "linux" or one["waited_seconds"] >= 0


def test_what_is_finished_or_has_failed_is_not_run_again(
    suite_file: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = (out / "results.jsonl").read_text()
    (out / "report.md").unlink()
    assert main(["bench", str(suite_file), "--output_dir", str(out)]) == 2
    told = capsys.readouterr().out
    assert "start bright" not in told
    assert "failed: bright/broken/seed-0: " in told
    assert "--retry tries again" in told
    assert [len(attempts(out, arm)) for arm in ("plain", "strong", "broken")] == [2, 1, 1]
    assert (out / "results.jsonl").read_text() == kept
    assert "## Failed runs" in (out / "report.md").read_text()
    suite = read_suite(str(suite_file))
    planned = plan_cells(suite, suite.cells(), out, {})
    assert [one.state for one in planned] == ["finished", "finished", "failed"]
    assert to_do(planned, retry=False) == []
    (again,) = to_do(planned, retry=True)
    assert again.folder.cell.arm == "broken"


def test_results_are_those_of_the_runs(out: Path) -> None:
    results, cells = lines(out / "results.jsonl"), lines(out / "cells.jsonl")
    assert len(results) == 2 * (UPDATES + 1)
    assert [(one["arm"], one["seed"]) for one in cells] == [("plain", 0), ("strong", 0)]
    for cell in cells:
        points = [one for one in results if one["arm"] == cell["arm"]]
        run = out / f"bright/{cell['arm']}/seed-0/run"
        kept = lines(run / "metrics.jsonl")
        evaluated = [one for one in kept if one["kind"] == "eval"]
        assert [one["reward"] for one in points] == [one["reward"] for one in evaluated]
        assert [one["update"] for one in points] == [0, 1, 2, 3]
        assert [one["images"] for one in points] == [0, 4, 8, 12]
        # An update: 4 images x 2 steps; 8 rows of `old`, of the policy, twice of backward and of the guided anchor.
        assert [one["transformer_evaluations"] for one in points] == [0, 56, 112, 168]
        seconds = [one["seconds"] for one in kept if one["kind"] == "train"]
        assert points[-1]["seconds"] == pytest.approx(sum(seconds)) == cell["training_seconds"]
        training = [one["kl"] for one in kept if one["kind"] == "train"]
        assert [one.get("train_kl") for one in points] == [None, *training]
        assert points[-1]["held_out_darkness"] + points[-1]["reward"] == pytest.approx(1.0, abs=1e-4)
        assert points[-1]["diversity"] > 0
        assert cell["state"] == "finished"
        guided = read_record(run / "evaluations/base-cfg-2.json").metrics()
        assert cell["guided_base"] == pytest.approx(guided)
        assert cell["settings"]["kl_max"] == (1.0 if cell["arm"] == "strong" else 0.1)
        assert cell["environment"]["packages"]["torch"]


def test_other_settings_and_a_folder_in_use_are_refused(
    suite_file: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(suite_file.read_text().replace("kl_max: 1.0", "kl_max: 2.0"))
    assert main(["bench", str(other), "--output_dir", str(out)]) == 2
    told = "was made with kl_max=1.0, the suite asks for 2.0; choose another --output_dir"
    assert told in capsys.readouterr().err
    # Before anything starts, also where that arm is not asked for: the end would tell of nothing.
    assert main(["bench", str(other), "--output_dir", str(out), "--arms", "plain", "--dry-run"]) == 2
    assert told in capsys.readouterr().err
    with alone(out):
        assert main(["bench", str(suite_file), "--output_dir", str(out)]) == 2
        assert "works in" in capsys.readouterr().err
        with pytest.raises(CRDError, match="wait for it"), alone(out):
            pass
    assert main(["bench", str(suite_file), "--output_dir", str(tmp_path / "none"), "--summary"]) == 2
    assert "has been evaluated yet" in capsys.readouterr().err
    chosen = ["bench", str(suite_file), "--output_dir", str(out), "--summary", "--arms", "plain", "--dry-run"]
    assert main(chosen) == 2
    assert "tells of all runs that there are, got --arms, --dry-run; leave them out" in capsys.readouterr().err


def test_the_sample_sheet_shows_the_base_model_and_the_arms_at_their_end(out: Path) -> None:
    """Rows: the base model without and with guidance, and the two arms that have finished."""
    cell, row = 112, 112 + 14 + 4
    with Image.open(out / "bright-arms-samples.png") as sheet:
        assert sheet.height > 4 * row
        for place, arm in enumerate(("plain", "strong")):
            after = read_run(out / f"bright/{arm}/seed-0/run", arm).after
            assert after is not None
            assert after.update == UPDATES
            assert after.sheet is not None
            first, second = after.sheet.pictures([0, 2])  # two images of each prompt
            for left, picture in ((130, first), (130 + cell + 4, second)):
                top = sheet.height - (2 - place) * row
                shown = sheet.crop((left, top, left + cell, top + cell))
                assert shown.tobytes() == picture.resize((cell, cell), Image.Resampling.NEAREST).tobytes()
    assert "![bright-arms-samples](bright-arms-samples.png)" in (out / "report.md").read_text()


def test_a_summary_is_made_from_the_run_folders_alone(suite_file: Path, out: Path) -> None:
    names = ("results.jsonl", "cells.jsonl", "report.md")
    before = {name: (out / name).read_text() for name in names}
    for name in names:
        (out / name).unlink()
    assert main(["bench", str(suite_file), "--output_dir", str(out), "--summary"]) == 0
    assert {name: (out / name).read_text() for name in names} == before


def test_nothing_but_numbers_in_results(out: Path) -> None:
    for line in lines(out / "results.jsonl"):
        for name, value in line.items():
            assert isinstance(value, str) == (name in ("task", "arm"))
            assert value is None or isinstance(value, str) or math.isfinite(value)


def test_recorded_runs_stand_in_for_run_folders(
    suite_file: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was kept of finished runs is neither made again nor told otherwise."""
    kept, again = tmp_path / "kept", tmp_path / "again"
    kept.mkdir()
    for name in ("results.jsonl", "cells.jsonl"):
        (kept / name).write_text((out / name).read_text())
    bench = ["bench", str(suite_file), "--output_dir", str(again), "--records", str(kept)]
    assert main([*bench, "--dry-run"]) == 0
    assert "2 of 3 runs are finished" in capsys.readouterr().out
    assert not again.exists()
    assert main([*bench, "--arms", "plain,strong"]) == 0
    assert "start " not in capsys.readouterr().out
    assert not list(again.rglob("seed-0"))
    for name in ("results.jsonl", "cells.jsonl"):
        assert (again / name).read_text() == (kept / name).read_text()

    def told(folder: Path) -> str:
        """The report without failed runs, of which there are no records, and pictures, which are not recorded."""
        lines = (folder / "report.md").read_text().split("## Failed runs")[0].splitlines()
        return "\n".join(line for line in lines if line and not line.startswith("!["))

    assert told(again) == told(out)
    # Whatever the order in which they were kept, and in a folder that is not there yet.
    for name in ("results.jsonl", "cells.jsonl"):
        strong = [line for line in (kept / name).read_text().splitlines() if '"strong"' in line]
        plain = [line for line in (kept / name).read_text().splitlines() if '"plain"' in line]
        (kept / name).write_text("\n".join([*strong, *plain]) + "\n")
    third = tmp_path / "third"
    assert main([*bench[:2], "--output_dir", str(third), "--records", str(kept), "--summary"]) == 0
    assert (third / "cells.jsonl").read_text() == (again / "cells.jsonl").read_text()


def test_a_run_that_failed_here_and_is_recorded_is_finished(
    suite_file: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is recorded of the arm that cannot run here is what `plain` did, with the settings of that arm."""
    content, targets = (out / "cells.jsonl").read_text().splitlines()[0], '"lora_targets": null'
    assert targets in content
    content = content.replace('"plain"', '"broken"').replace(targets, '"lora_targets": ["nowhere"]')
    (tmp_path / "cells.jsonl").write_text(content + "\n")
    points = [line for line in (out / "results.jsonl").read_text().splitlines() if '"plain"' in line]
    (tmp_path / "results.jsonl").write_text("\n".join(points).replace('"plain"', '"broken"') + "\n")
    before = len(attempts(out, "broken"))
    bench = ["bench", str(suite_file), "--output_dir", str(out), "--records", str(tmp_path), "--retry"]
    assert main(bench) == 0
    assert "3 of 3 runs are finished" in capsys.readouterr().out
    assert len(attempts(out, "broken")) == before
    assert "## Failed runs" not in (out / "report.md").read_text()
    assert [one["arm"] for one in lines(out / "cells.jsonl")] == ["plain", "strong", "broken"]
    # The numbers of `broken` are in no run folder, so without the records they would be lost.
    again = ["bench", str(suite_file), "--output_dir", str(out)]
    for more in ([], ["--summary"]):
        capsys.readouterr()
        assert main([*again, *more]) == 2
        assert "cells.jsonl holds bright/broken/seed-0 as finished, and neither a folder nor" in capsys.readouterr().err
    (out / "cells.jsonl").unlink()
    assert main([*again, "--summary"]) == 0  # as other tests expect it


def test_a_folder_without_records_is_refused(
    suite_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(suite_file), "--output_dir", str(tmp_path / "new"), "--records", str(tmp_path)]) == 2
    told = f"--records {tmp_path} has no results.jsonl; name a folder that holds what crd bench wrote"
    assert told in capsys.readouterr().err.replace("\n", "")


def test_a_run_of_this_machine_goes_before_its_record(suite_file: Path, out: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "cells.jsonl").write_text((out / "cells.jsonl").read_text())
    points = lines(out / "results.jsonl")
    (other / "results.jsonl").write_text("".join(json.dumps({**one, "reward": 0.5}) + "\n" for one in points))
    before = (out / "results.jsonl").read_text()
    assert main(["bench", str(suite_file), "--output_dir", str(out), "--records", str(other), "--summary"]) == 0
    assert (out / "results.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda cells, points: (cells, ""), "must hold bright/plain/seed-0 after updates [0, 1, 2, 3], got []"),
        (lambda cells, points: (cells, "".join(points.splitlines(keepends=True)[i] for i in (0, 3, 4, 5, 6, 7))),
         "must hold bright/plain/seed-0 after updates [0, 1, 2, 3], got [0, 3]"),
        (lambda cells, points: (cells, points + points), "after updates [0, 1, 2, 3], got [0, 1, 2, 3, 0, 1, 2, 3]"),
        (lambda cells, points: (cells, points[: points.rindex("{")]), "got [0, 1, 2]; restore the file"),
        (lambda cells, points: (cells + cells, points), "cells.jsonl line 1 too; leave one of the two out"),
        (lambda cells, points: (cells.replace('"plain"', '"gone"'), points.replace('"plain"', '"gone"')),
         "suite tiny has no run bright/gone/seed-0; leave these records out"),
        (lambda cells, points: (cells.replace('"kl_max": 1.0', '"kl_max": 2.0'), points),
         "bright/strong/seed-0 was made with kl_max=2.0, the suite asks for 1.0; leave these records out"),
        (lambda cells, points: (cells.replace('"kl_max"', '"kl_maximum"'), points),
         "as another version of crd may have it: unknown configuration key 'kl_maximum'"),
        (lambda cells, points: (cells.replace('"finished"', '"done"'), points), "state must be one of new, started"),
        (lambda cells, points: (cells.replace('"stopped": false', '"stopped": "no"'), points), "stopped must be true"),
        (lambda cells, points: (cells.replace('"attempts": [', '"attempts": [1, '), points), "attempts entry 1 must"),
        (lambda cells, points: (cells, points.replace('"reward"', '"prize"')), "has no 'reward'"),
        (lambda cells, points: (cells[:-20], points), "ends in the middle of a line"),
        (lambda cells, points: (cells, points.replace('"images": 0', '"images": "none"')), "images must be a number"),
        (lambda cells, points: (cells.replace('"peak_bytes": ', '"peak_bytes": -'), points), "peak_bytes must be"),
    ],
)  # fmt: skip
def test_records_that_do_not_hold_are_refused(
    suite_file: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, told: str
) -> None:
    cells, points = change((out / "cells.jsonl").read_text(), (out / "results.jsonl").read_text())
    (tmp_path / "cells.jsonl").write_text(cells)
    (tmp_path / "results.jsonl").write_text(points)
    new = tmp_path / "new"
    assert main(["bench", str(suite_file), "--output_dir", str(new), "--records", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not new.exists()
