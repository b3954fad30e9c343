"""`crd eval --benchmark geneval`: what it reports, what it refuses before any model is loaded; sizes of images."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

from crd import command_options, commands
from crd.cli import main
from crd.config import CRDConfig
from crd.errors import CRDError
from crd.export import LORA_FILE
from crd.geneval.judge import GenEvalJudge
from crd.geneval.metadata import TASKS
from crd.grid import GridRow
from crd.loading import base_name
from crd.run_folder import CONFIG_FILE

SCENE = ["--height", "64", "--width", "64"]  # what the tiny detectors are made for; the model's own size is 16


@pytest.fixture(autouse=True)
def _restore_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


@pytest.fixture
def judge_file(detector_folders: dict[str, Path], tmp_path: Path) -> str:
    path = tmp_path / "judge.yaml"
    models = {"model": str(detector_folders["mask2former"]), "color_model": str(detector_folders["clip"])}
    path.write_text(json.dumps({"detector": "mask2former", **models, "batch_size": 1}))
    return str(path)


def benchmark(model: Path | str, *arguments: str) -> list[str]:
    return ["eval", str(model), "--benchmark", "geneval", "--steps", "2", *arguments]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_scores_by_task(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "geneval.json"
    arguments = ["--judge", "tiny", *SCENE, "--prompts", "scenes:test:12", "--images", "2"]
    guided = ["--guidance", "1", "--guidance", "3", "--out", str(out)]
    assert main(benchmark(model_folder, *arguments, *guided)) == 0
    plain, guided = json.loads(out.read_text())
    assert (plain["guidance"], guided["guidance"]) == (1, 3)
    for result in (plain, guided):
        assert (result["judge"], result["prompts"]) == ("tiny", "scenes:test:12")
    assert [task["task"] for task in plain["tasks"]] == [*TASKS, "overall"]
    assert [task["images"] for task in plain["tasks"]] == [4] * 6 + [24]
    for name in ("official", "strict", "soft"):
        mean = np.mean([task[name] for task in plain["tasks"][:-1]])
        assert plain["tasks"][-1][name] == pytest.approx(mean)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("GenEval of scenes:test:12, judge tiny") == 2
    assert "official" in shown


def test_a_judge_from_a_file(judge_file: str, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "geneval.json"
    arguments = ["--judge", judge_file, "--prompts", "geneval:test:4", "--images", "1", "--out", str(out)]
    assert main(benchmark(model_folder, *arguments)) == 0
    (result,) = json.loads(out.read_text())
    assert (result["judge"], result["prompts"]) == (judge_file, "geneval:test:4")
    assert result["tasks"][-1]["images"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judge", "tine"], "unknown detector 'tine'"),
        (["--judge", "nowhere.yaml"], "no judge settings at nowhere.yaml"),
        (["--judge", "open-vocabulary"], "list them in the settings of the judge, a .yaml file"),
        (["--judge", "tiny", "--prompts", "world:test:4"], "need the column 'tag'"),
        (["--judge", "tiny", "--prompts", "geneval:test"], "which the detector does not know"),
        (["--judge", "tiny", "--prompts", "nowhere.txt"], "no prompt file"),
        (["--judge", "tiny", "--reward", "ocr"], "has its own scores"),
    ],
)
def test_what_is_cheap_to_check_is_checked_before_any_model_is_loaded(
    arguments: list[str],
    message: str,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def loaded(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(command_options, "load_model", loaded)
    monkeypatch.setattr("crd.geneval.shared.load_judge", loaded)
    assert message in refused(benchmark(model_folder, *arguments), capsys)


def test_the_judge_is_tested_before_the_model_is_loaded(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(self: GenEvalJudge) -> NoReturn:
        raise CRDError("the detector sees ghosts")

    monkeypatch.setattr(GenEvalJudge, "self_test", fails)
    monkeypatch.setattr(command_options, "load_model", lambda *_, **__: 1 / 0)
    assert "sees ghosts" in refused(benchmark(model_folder, "--judge", "tiny"), capsys)


@pytest.mark.parametrize("size", [[], ["--height", "64"], ["--height", "32", "--width", "64"]])
def test_the_tiny_judge_refuses_pictures_of_another_size(
    size: list[str], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(benchmark(model_folder, "--judge", "tiny", "--prompts", "scenes:test:6", *size), capsys)
    height, width = (size[size.index(side) + 1] if side in size else "16" for side in ("--height", "--width"))
    assert f"tiny is made for pictures of 64 x 64 px, these are {height} x {width}" in line


def test_a_judge_without_a_benchmark(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--judge belongs to --benchmark geneval" in refused(["eval", str(model_folder), "--judge", "tiny"], capsys)


def test_the_bundled_model_has_the_bundled_judge_and_scenes(tmp_path: Path) -> None:
    out = tmp_path / "geneval.json"
    assert main(benchmark("tiny-sd3", "--prompts", "scenes:test:6", "--images", "1", "--out", str(out))) == 0
    (result,) = json.loads(out.read_text())
    assert result["judge"] == "tiny"


def test_the_model_underneath_is_known_without_loading_it(tmp_path: Path) -> None:
    assert base_name("tiny-sd3") == "tiny-sd3"
    assert base_name("owner/model") == "owner/model"
    run, lora = tmp_path / "run", tmp_path / "lora"
    for folder in (run, lora):
        folder.mkdir()
    (run / CONFIG_FILE).write_text(CRDConfig(model="owner/model").to_yaml())
    (lora / LORA_FILE).touch()
    assert base_name(run) == "owner/model"
    assert base_name(lora) == CRDConfig.model
    assert base_name(lora, "owner/other") == "owner/other"


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_eval_and_sample_take_a_size(
    finished_run: Path, model_folder: Path, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, drawn = str(tmp_path / "result.json"), []

    def sheet(rows: list[GridRow], prompts: list[str]) -> Image.Image:
        drawn.append({image.size for row in rows for image in row.images})
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(commands, "draw_grid", sheet)
    for target, size, expected in [
        (model_folder, [], (16, 16)),
        (model_folder, ["--height", "32"], (16, 32)),
        (finished_run, ["--height", "24", "--width", "32"], (32, 24)),
    ]:
        assert main(["sample", str(target), "--prompt", "a", "--out", str(tmp_path / "a.png"), *size]) == 0
        assert drawn.pop() == {expected}
        reward = ["--reward", "reward_functions:size_code", "--prompts", str(prompt_file), "--out", out]
        assert main(["eval", str(target), *reward, *size]) == 0
        assert json.loads(Path(out).read_text())[-1]["intervals"]["reward"]["mean"] == expected[0] * 1000 + expected[1]


def test_sizes_of_a_run_are_its_own(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(finished_run / "checkpoints")
    text = (finished_run / CONFIG_FILE).read_text()
    assert "height: null" in text
    (run / CONFIG_FILE).write_text(text.replace("height: null", "height: 32"))
    sizes = []
    monkeypatch.setattr(commands, "draw_grid", lambda rows, prompts: sizes.append(rows[0].images[0].size) or 1 / 0)
    for size in ([], ["--height", "24"]):
        with pytest.raises(ZeroDivisionError):
            main(["sample", str(run), "--prompt", "a", "--out", str(tmp_path / "a.png"), *size])
    assert sizes == [(16, 32), (16, 24)]


def test_a_size_the_model_cannot_draw(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sample", str(model_folder), "--prompt", "a"]
    assert "height must be a positive multiple of 4" in refused([*arguments, "--height", "30"], capsys)
    assert "--width: must be an integer of 1 or more" in refused([*arguments, "--width", "0"], capsys)
