"""Documentation that cannot go stale unseen: settings, links, code blocks and the example are checked or run."""

from __future__ import annotations

import dataclasses
import re
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tiny_pipelines import tiny_pipeline

from crd.backbones import FAMILIES
from crd.bench.checks import check_runs
from crd.bench.suite_file import read_suite
from crd.cli import _parser
from crd.config import RESUMABLE, CRDConfig
from crd.config_io import config_from
from crd.geneval.detectors import judge_settings
from crd.objectives import OBJECTIVES
from crd.rewards import RewardSet
from crd.rewards.registry import REGISTRY
from crd.serving.remote_config import RemoteConfig, remote_config
from crd.trainer import CRDTrainer

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md")])
EXAMPLE = ROOT / "examples" / "custom_reward.py"
FIELDS = {field.name: field.default for field in dataclasses.fields(CRDConfig)}

# Code blocks hold no links and no headings.
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def run_blocks(page: Path) -> dict[str, Any]:
    """The names that the python blocks of a page define, run in order as one module."""
    name = f"blocks_of_{page.stem}"
    namespace: dict[str, Any] = {"__name__": name}
    # `@dataclass` looks its module up.
    sys.modules[name] = type(sys)(name)
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)
    return namespace


def documented_fields() -> dict[str, list[str]]:
    """Cells of every table row of configuration.md that begins with a field name."""
    rows = re.findall(r"^\| `(\w+)` \| `([^|]*)` \| ([^|]*) \| (.*) \|$", (DOCS / "configuration.md").read_text(), re.M)
    names = [row[0] for row in rows]
    assert len(names) == len(set(names)), "a field has two rows"
    return {name: cells for name, *cells in rows}


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_configuration_field_has_its_row_and_its_true_default() -> None:
    documented = documented_fields()
    assert list(documented) == list(FIELDS)  # in the order of the code, too
    for name, (default, source, meaning) in documented.items():
        assert config_from({name: yaml.safe_load(default)}).__dict__[name] == FIELDS[name], name
        assert source in ("paper", "ours", "-"), name
        assert len(meaning) > 3, name


def test_the_fields_a_resumed_run_may_change_are_listed() -> None:
    section = (DOCS / "configuration.md").read_text().split("## What a resumed run may change")[1]
    assert set(re.findall(r"`(\w+)`", section)) == RESUMABLE


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_yaml_blocks_are_valid_configurations(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        values = yaml.safe_load(block)
        if "arms" in values:
            (tmp_path / "suite.yaml").write_text(block)
            suite = read_suite(str(tmp_path / "suite.yaml"))
            check_runs(suite, suite.cells())
            continue
        if "servers" in values:
            (tmp_path / "servers.yaml").write_text(block)
            remote_config(str(tmp_path / "servers.yaml"))
            continue
        read = judge_settings if "detector" in values else config_from
        read(values)


def test_every_setting_of_reward_servers_has_its_row_and_its_true_default() -> None:
    text = (DOCS / "reward-server.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^|]*)` \|", text, re.MULTILINE))
    defaults = {field.name: field.default for field in dataclasses.fields(RemoteConfig)}
    assert list(rows) == list(defaults)
    assert {name: yaml.safe_load(rows[name]) for name in rows if name != "servers"} == {
        name: default for name, default in defaults.items() if name != "servers"
    }


def test_every_option_of_the_reward_server_is_named_with_its_default() -> None:
    text = (DOCS / "reward-server.md").read_text()
    given = _parser().parse_args(["serve-reward", "ocr"]).__dict__
    rows = re.findall(r"^\| `--([a-z-]+)` \| ([^|]*) \|", text, re.MULTILINE)
    assert [name.replace("-", "_") for name, _ in rows] == [
        n for n in given if n not in ("debug", "command", "rewards")
    ]
    for name, default in rows:
        value = given[name.replace("-", "_")]
        assert default.strip("`") == ("-" if value is None else str(value)), name


def test_the_server_of_the_page_can_be_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CRD_REWARD_TOKEN", raising=False)
    server = run_blocks(DOCS / "reward-server.md")["server"]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        rewards = RewardSet(f"remote=http://127.0.0.1:{server.server_port}#redness")
        rewards.check_prompts(["a", "b"], {})
        rewards.self_test()
        images = [Image.new("RGB", (3, 2), color) for color in ("red", "blue", "#330000")]
        assert rewards.score(images, ["", "", ""], {}).total.tolist() == [1.0, 0.0, 0.2]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_every_bundled_reward_is_in_its_table() -> None:
    section = (DOCS / "rewards.md").read_text().split("## Bundled")[1].split("\n## ")[0]
    table = re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE)
    assert table == list(REGISTRY)


def test_every_family_is_in_its_table_with_its_true_length() -> None:
    text = (DOCS / "backbones.md").read_text()
    assert re.findall(r"^\| `(\w+Pipeline)` \|", text, re.MULTILINE) == list(FAMILIES)
    for target, lines in re.findall(r"\]\((\.\./src/crd/backbones/\w+\.py)\), (\d+)", text):
        assert len((DOCS / target).read_text().splitlines()) == int(lines), target


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), f"{page_name(page)} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page_name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_make_targets_named_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^    |`)make ([a-z][a-z-]*)", page.read_text(), re.M)) <= set(targets)


def test_the_rewards_of_the_page_score_as_it_says() -> None:
    named = run_blocks(DOCS / "rewards.md")
    images = [Image.new("RGB", (8, 8), color) for color in ("white", "black")]
    rewards = RewardSet([named["brightness"], named["brightness_near"], named["DarkBackground"]])
    rewards.self_test()
    columns = rewards.score(images, ["", ""], {"level": [0.25, None]}).columns
    assert columns["brightness"].tolist() == [1.0, 0.0]
    assert columns["brightness_near"][0] == 0.25
    assert columns["brightness_near"][1].isnan()
    assert columns["DarkBackground"].tolist() == [0.0, 1.0]


def test_the_objective_of_the_page_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = run_blocks(DOCS / "extending.md")["RewardWeightedConfig"]
    monkeypatch.setitem(OBJECTIVES, "weighted", settings)
    config = CRDConfig(
        objective="weighted", output_dir=str(tmp_path), prompts_per_update=2, group_size=3, draws=2, rollout_steps=2
    )
    pipeline: Any = tiny_pipeline(t5=False)
    trainer = CRDTrainer(pipeline, red, config, train_dataset=["a", "b"], eval_dataset=["c"])
    before = [parameter.clone() for parameter in trainer.snapshots.parameters()]
    assert trainer.update()["gradient_norm"] > 0
    after = trainer.snapshots.parameters()
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def red(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [image.convert("RGB").resize((1, 1)).tobytes()[0] / 255 for image in images]


def test_the_lines_to_add_a_part_to_are_where_the_page_says() -> None:
    text = (DOCS / "extending.md").read_text()
    places = {"REGISTRY": REGISTRY, "FAMILIES": FAMILIES, "OBJECTIVES": OBJECTIVES}
    for name in places:
        (path,) = re.findall(rf"in `{name}` of \[[^\]]*\]\(([^)]*)\)", text)
        assert re.search(rf"^{name}: .* = \{{", (DOCS / path).read_text(), re.MULTILINE), f"{name} is not in {path}"


def run_example(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    main: Callable[[], None] = runpy.run_path(str(EXAMPLE))["main"]
    main()


def check_example(output: Path, printed: str) -> None:
    before, after = map(float, re.search(r"reward: (\d\.\d+) before, (\d\.\d+) after", printed).groups())  # type: ignore[union-attr]
    assert 0 < before < 1
    assert 0 < after < 1
    assert (output / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_the_script_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (script,) = blocks(ROOT / "README.md", "python")
    monkeypatch.chdir(tmp_path)
    for long, short in (("updates=10,", "updates=1,"), ("group_size=8,", "group_size=2,")):
        assert long in script
        script = script.replace(long, short)
    exec(compile(script, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "bright-lora" / "pytorch_lora_weights.safetensors").is_file()


def test_the_example_runs_on_a_model_of_random_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60
    pipeline: Any = tiny_pipeline(t5=False)
    pipeline.save_pretrained(tmp_path / "model")
    output = tmp_path / "run"
    run_example(monkeypatch, "--updates", "1", "--output", str(output), "--model", str(tmp_path / "model"))
    check_example(output, capsys.readouterr().out)


def test_the_example_runs_on_the_bundled_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example(monkeypatch, "--updates", "1", "--output", str(tmp_path / "run"))
    check_example(tmp_path / "run", capsys.readouterr().out)
