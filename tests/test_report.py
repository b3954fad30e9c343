"""The report of made-up runs in the real layout: what it says, what it leaves out, and that it is one safe file."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crd.config import CRDConfig
from crd.errors import CRDError
from crd.report import write_report
from crd.report.estimates import band, change, curve, guided_base, prompt_changes
from crd.report.page_file import render
from crd.report.pictures import spread
from crd.report.read_run import read_run, read_runs
from crd.report.tables import alarm_state
from crd.report.words import duration, number, signed, title

TILE, IMAGES = 32, 2  # px; images a prompt
PROMPTS = ('a sign "open"', 'a mug "tea"', 'a door "exit"')
SECTIONS = {"summary", "curves", "plane", "pictures", "prompts", "events", "configuration"}
VOID = {"meta", "input", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """A page taken apart; every element must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.blocks: dict[str, str] = {}
        self.words = ""
        self._open: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.words += " "
        self.attributes += [(tag, name, value) for name, value in found.items()]
        if "id" in found:
            assert found["id"] not in self.ids
            self.ids.add(found["id"])
        if tag not in VOID:
            self._open.append((tag, found.get("id", tag)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, name = self._open[-1] if self._open else ("", "")
        if tag in ("script", "style"):
            self.blocks[name] = data
        else:
            self.words += data

    @property
    def data(self) -> dict[str, Any]:
        def refuse(constant: str) -> None:
            raise AssertionError(constant)

        loaded: dict[str, Any] = json.loads(self.blocks["data"], parse_constant=refuse)
        return loaded

    def says(self, text: str) -> bool:
        return " ".join(text.split()) in " ".join(self.words.split())


def save_evaluation(folder: Path, name: str, update: int | None, reward: list[float | None], **changes: Any) -> None:
    """An evaluation of `PROMPTS`, `IMAGES` each, and its sheet of all images."""
    folder.mkdir(exist_ok=True)
    images = len(reward)
    rough = np.random.default_rng(update).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    sheet = Image.fromarray(rough).resize((4 * TILE, -(-images // 4) * TILE))
    sheet.save(folder / f"{name}.webp")
    record = {
        "update": update, "role": "anchor" if update is None else "policy", "guidance": 4.5 if update is None else 1.0,
        "steps": 10, "seed": 0, "prompts": list(PROMPTS),
        "prompt_index": [place // IMAGES for place in range(images)],
        "scores": {"reward": reward, "reward_ocr": reward,
                   "held_out_clipscore": [0.2 + 0.01 * place for place in range(images - 1)] + [None]},
        "protocol": None,
        "statistics": {"brightness": [0.5, 0.7] * (images // 2)}, "diversity": [0.2, 0.3, None],
        "model": {"kl_to_anchor": 0.01 * (update or 0), "velocity_norm": None},
        "pictures": {"file": f"{name}.webp", "indices": list(range(images)), "tile": TILE, "columns": 4},
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(record | changes))


def save_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def event(update: int, rule: str, message: str, **changes: Any) -> dict[str, Any]:
    """A line of events.jsonl: a warning that was told."""
    plain = {"level": "warn", "column": None, "numbers": {}, "action": "warn", "pictures": []}
    return {**plain, "update": update, "rule": rule, "message": message, **changes}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A whole run of 24 updates with every part; its mean reward goes from 0.25 over 0.5 to 0.75."""
    folder = tmp_path / "runs" / "ocr"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CRDConfig(updates=24, learning_rate=1e-3).to_yaml())
    train = [
        {"update": n, "kind": "train", "reward": 0.3 + 0.01 * n, "kl": 1 / n, "images": 192.0 * n, "seconds": 10.0,
         "gradient_norm": float("nan")} for n in range(1, 25)
    ]  # fmt: skip
    held_out = [{"update": n, "kind": "eval", "reward": 0.25 + n / 48} for n in (0, 12, 24)]
    save_lines(folder / "metrics.jsonl", [*held_out[:1], *train, *held_out[1:]])
    save_evaluation(folder / "evaluations", "update-000000", 0, [0.0, 0.5, 0.25, 0.25, 0.0, 0.5])
    save_evaluation(folder / "evaluations", "update-000012", 12, [0.5] * 6)
    save_evaluation(folder / "evaluations", "update-000024", 24, [1.0, 1.0, 0.75, 1.0, 0.25, 0.5])
    save_evaluation(folder / "evaluations", "base-cfg-4.5", None, [0.5, 0.75, 0.5, 0.75, 0.5, 0.75])
    (folder / "events").mkdir()
    Image.new("RGB", (64, 32), "red").save(folder / "events" / "a-before.png")
    save_lines(
        folder / "events.jsonl",
        [
            event(12, "held_out_falls", "clipscore fell", numbers={"clip": 0.21}, pictures=["events/a-before.png"]),
            event(24, "diversity", "all images are alike", action="stop"),
        ],
    )
    (folder / "environment.json").write_text(
        json.dumps({"python": "3.11.7", "gpu": None, "packages": {"torch": "2.13"}})
    )
    (folder / "summary.json").write_text(json.dumps({"reward_before": 0.25, "updates": 24}))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "best.json").write_text(json.dumps({"update": 24, "reward": 0.75}))
    return folder


def page_of(*runs: Path) -> Page:
    return Page(write_report(runs, runs[0].parent / "report.html").read_text(encoding="utf-8"))


def test_a_whole_run_has_every_section(run: Path) -> None:
    page = page_of(run)
    assert page.ids >= SECTIONS
    assert not page.says("Left out")
    assert page.says("Stopped At update 24 by diversity: all images are alike")
    assert page.says("update 24, reward 0.750")
    assert page.says("4,608")
    assert page.says("4 min 0 s")
    assert page.says("learning_rate 0.001 0.0003")
    assert page.says("torch 2.13")
    assert page.says("gpu none")
    assert page.says("clipscore fell")
    assert page.says("clip 0.210")
    # Before, after, and the guided base model: the mean over prompts of hand-written scores.
    scores = page.words[page.words.index("after against it") :]
    assert " ".join(scores.split()).startswith("after against it Reward 0.250 0.750 +0.500")
    assert page.says("0.625 +0.125")
    assert [panel["metric"] for panel in page.data["panels"]] == [
        "reward", "held_out_clipscore", "kl_to_anchor", "kl", "diversity", "stat_brightness"
    ]  # fmt: skip
    assert not page.says("To keep this file small")
    assert page.data["runs"][0]["axes"]["seconds"][-1] == 240
    assert page.data["runs"][0]["axes"]["images"][:2] == [0, 192]
    assert [step["label"] for step in page.data["grids"][0]["steps"]] == [
        "base",
        "base, CFG 4.5",
        "update 12",
        "update 24",
    ]


def test_the_state_of_the_alarm_is_what_was_done(run: Path) -> None:
    def state(*events: dict[str, Any]) -> tuple[str, str]:
        save_lines(run / "events.jsonl", list(events))
        return alarm_state(read_run(run, "r"))

    assert state() == ("none", "No alarm: no rule spoke.")
    assert state(event(12, "a", "b", level="note", action="none"))[1] == "No alarm: no rule spoke beyond a note."
    # Two rules warn of one update, which raises the strengths once; at their limit a warning is told only.
    raising = [event(update, "a", "b", action="raise_kl") for update in (6, 6, 12)]
    level, words = state(*raising, event(18, "drift", "far"))
    assert (level, words) == ("raise_kl", "4 warnings; KL raised 2 times; the last warning at update 18 by drift: far")
    level, words = state(event(12, "a", "b", action="stop"), event(18, "drift", "far"))
    assert (level, words) == (
        "warn", "2 warnings; stopped at update 12, resumed; the last warning at update 18 by drift: far"
    )  # fmt: skip
    assert page_of(run).says("Stopped, resumed update 12 a b")
    assert state(event(12, "a", "b", action="stop"), event(24, "drift", "far", action="stop")) == (
        "stop", "At update 24 by drift: far"
    )  # fmt: skip


def test_the_best_guidance_of_the_base_model_is_shown(run: Path) -> None:
    assert [one.label for one in guided_base(read_run(run, "r"), "reward")] == ["base, CFG 4.5"]
    summary = {"reward_before": 0.25, "reward_base_cfg": 0.7, "base_cfg_scale": 6.0}
    (run / "summary.json").write_text(json.dumps(summary))
    page = page_of(run)
    panels = {panel["metric"]: panel["runs"][0] for panel in page.data["panels"]}
    assert panels["reward"]["guided"] == [[4.5, 0.625, "base, CFG 4.5"], [6.0, 0.7, "base, best CFG (6)"]]
    assert panels["diversity"]["guided"] == [[4.5, 0.25, "base, CFG 4.5"]]
    assert page.says("base, best CFG (6) after against it Reward 0.250 0.750 +0.500")
    assert page.says("0.700 +0.050")
    # The anchor's scale may be the best.
    (run / "summary.json").write_text(json.dumps({**summary, "base_cfg_scale": 4.5}))
    found = guided_base(read_run(run, "r"), "reward")
    assert [(one.label, one.value.mean) for one in found] == [("base, best CFG (4.5)", 0.625)]


def test_missing_parts_are_told(run: Path) -> None:
    bare = run.parent / "bare"
    bare.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (bare / name).write_bytes((run / name).read_bytes())
    page = page_of(bare)
    assert page.ids >= SECTIONS
    for name in ("evaluations/ in the run", "events.jsonl", "environment.json", "summary.json", "scores by prompt"):
        assert page.says(f"no {name}"), name
    assert page.says("kept pictures")
    assert page.says("neither KL to the anchor")
    assert page.says("No event log in this run.")
    assert page.says("Reward 0.250 0.750 +0.500")  # of metrics.jsonl, without an interval
    assert page.data["grids"] == [None]


def test_a_missing_sheet_leaves_out_its_pictures(run: Path) -> None:
    (run / "evaluations" / "update-000012.webp").unlink()
    page = page_of(run)
    assert page.says("the pictures of update 12 (update-000012.webp)")
    assert [step["label"] for step in page.data["grids"][0]["steps"]] == ["base", "base, CFG 4.5", "update 24"]


def test_text_of_a_run_is_never_markup(run: Path) -> None:
    evil = '</script><img src=x onerror=alert(1)> & "quoted" <!--'
    for path in (run / "evaluations").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"prompts": [evil, *PROMPTS[1:]]}))
    save_lines(run / "events.jsonl", [event(1, evil, evil)])
    (run / "config.yaml").write_text(CRDConfig(model=evil).to_yaml())
    page = page_of(run)
    assert page.says(evil)
    assert page.data["grids"][0]["prompts"][0] == evil
    assert not [one for one in page.attributes if one[1].startswith("on")]
    assert all(value.startswith("data:") for tag, name, value in page.attributes if (tag, name) == ("img", "src"))


def test_one_file_that_loads_nothing_else(run: Path) -> None:
    page = page_of(run)
    links = [
        value for _, name, value in page.attributes if name in ("src", "href", "action", "srcset", "data", "poster")
    ]
    assert links
    assert all(value.startswith(("#", "data:")) for value in links)
    assert not [one for one in page.attributes if one[1] == "style" or one[1].startswith("on")]
    everything = (run.parent / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", everything)
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for block in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.blocks[block].encode()).digest()).decode()
        assert f"{block}-src 'sha256-{digest}'" in policy


def test_several_runs_keep_names_of_their_own(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "more" / "ocr"
    other.mkdir(parents=True)
    (other / "config.yaml").write_text(CRDConfig(updates=9, beta=2.0).to_yaml())
    save_lines(other / "metrics.jsonl", [{"update": 0, "kind": "eval", "reward": 0.1}])
    page = page_of(run, other)
    assert [one["name"] for one in page.data["runs"]] == ["runs/ocr", "more/ocr"]
    assert page.says("2 runs compared")
    assert page.says("beta 1.0 2.0 1.0")
    assert [bool(grid) for grid in page.data["grids"]] == [True, False]
    with pytest.raises(CRDError, match="is given twice"):
        write_report([run, run / "." / "evaluations" / ".."], tmp_path / "r.html")
    with pytest.raises(CRDError, match="at least one run"):
        write_report([], tmp_path / "r.html")


def test_null_and_nan_are_gaps(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"update": 25, "kind": "train", "reward": NaN, "kl": null, "images": 1e999}\n')
    page = page_of(run)
    panels = {panel["metric"]: panel["runs"][0] for panel in page.data["panels"]}
    assert panels["kl"]["train"][-1] == [25, None]
    assert "gradient_norm" not in panels
    assert [update for update, *_ in panels["diversity"]["eval"]] == [0, 12, 24]
    assert panels["held_out_clipscore"]["eval"][0][1] == 0.22333  # mean of prompts (0.205, 0.225, 0.24): null left out
    save_evaluation(run / "evaluations", "update-000036", 36, [None] * 6)
    assert [point.update for point in curve(read_run(run, "r"), "reward")] == [0, 12, 24]
    assert "NaN" not in page_of(run).blocks["data"]


def test_estimates_by_hand(run: Path) -> None:
    record = read_run(run, "r")
    assert [point.value.mean for point in curve(record, "reward")] == [0.25, 0.5, 0.75]
    moved = change(record.during[0], record.during[-1], "reward")
    assert moved is not None
    assert moved.mean == 0.5
    assert moved.low < 0.5 < moved.high
    assert [(one.prompt, one.change) for one in prompt_changes(record, "reward")] == [
        (PROMPTS[0], 0.75), (PROMPTS[1], 0.625), (PROMPTS[2], 0.125)
    ]  # fmt: skip
    # Base images of brightness 0.5 and 0.7: mean 0.6, standard deviation 0.1, with and without guidance.
    assert band(record, "stat_brightness") == pytest.approx((0.5, 0.7))


def test_numbers_in_words() -> None:
    values = (0.0, 0.84720, 22.3412, 6912.0, -0.5, 0.00312, 3.14e-5, float("nan"), 481.26)
    assert [number(value) for value in values] == [
        "0", "0.847", "22.34", "6,912", "\u22120.500", "0.0031", "3.1e-05", "–", "481.3"
    ]  # fmt: skip
    assert (signed(0.5), signed(-0.5), duration(41.2), duration(582), duration(8000)) == (
        "+0.500", "\u22120.500", "41 s", "9 min 42 s", "2 h 13 min"
    )  # fmt: skip
    assert (title("held_out_clipscore"), title("implicit_reward_correlation"), title("stat_edge_density")) == (
        "Held out: clipscore", "Implicit reward correlation", "Edge density"
    )  # fmt: skip


def damage_middle(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines[:2], '{"update": 2, \n', *lines[2:]]))


def edit(name: str, **changes: Any) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | changes))


FIRST = "evaluations/update-000000.json"
OTHER = {"file": "update-000000.webp", "indices": [1], "tile": 32, "columns": 1}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "is not a run folder"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has no metrics.jsonl"),
        (damage_middle, r"metrics.jsonl line 3 is not valid JSON"),
        (lambda run: (run / "events.jsonl").write_text("[1]\n"), r"events.jsonl line 1 must hold a JSON object"),
        (lambda run: save_lines(run / "metrics.jsonl", [{"update": 1, "kind": "a", "kl": "x"}]), "kl must be a number"),
        (lambda run: save_lines(run / "events.jsonl", [event(1, "a", "b", level="alas")]), "line 1: level must be"),
        (lambda run: save_lines(run / "events.jsonl", [event(1, "a", "b", action="alas")]), "line 1: action must be"),
        (edit(FIRST, prompt_index=[0, 1, 2, 3, 0, 0]), "prompt_index must be a list of integers from 0 to 2, got 3"),
        (edit(FIRST, scores={"reward": [1.0]}), "scores: reward must hold 6 numbers, got 1"),
        (edit(FIRST, pictures=OTHER), "must show the same images"),
        (lambda run: (run / "evaluations" / "update-000012.webp").write_bytes(b"no"), "cannot read the picture"),
        (lambda run: Image.new("RGB", (9, 9)).save(run / "evaluations" / "update-000012.webp"), "at least 128 x 64"),
        (lambda run: (run / "environment.json").write_bytes(b"\xff"), "is not UTF-8"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(run: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(run)
    with pytest.raises(CRDError, match=message):
        write_report([run], run.parent / "report.html")
    assert not list(run.parent.glob("*report*"))


def test_a_line_cut_off_by_an_interruption_is_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"update": 25, "ki')
    assert page_of(run).says("the last line of metrics.jsonl, which was cut off")


def test_the_file_is_replaced_whole_or_not_at_all(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "report.html"
    assert write_report([run], out) == out
    first = out.read_bytes()
    write_report([run], out)
    assert out.read_bytes() == first
    damage_middle(run)
    with pytest.raises(CRDError):
        write_report([run], out)
    assert out.read_bytes() == first
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("out", ["a_file/report.html", "a_folder"])
def test_an_out_that_cannot_be_written(run: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "a_file").write_text("")
    (tmp_path / "a_folder" / "inner").mkdir(parents=True)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CRDError, match=r"cannot write .*; choose another --out"):
        write_report([run], tmp_path / out)
    assert sorted(tmp_path.iterdir()) == before


def test_a_thousand_images_stay_below_ten_megabytes(run: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 255, (16 * 24, 8 * 24, 3), dtype=np.uint8))
    sheet = rough.resize((8 * 96, 16 * 96), Image.Resampling.BICUBIC)
    for place in range(8):
        name = f"update-{12 * place:06d}"
        pictures = {"file": f"{name}.png", "indices": list(range(128)), "tile": 96, "columns": 8}
        index = [image % 3 for image in range(128)]
        save_evaluation(run / "evaluations", name, 12 * place, [0.5] * 128, prompt_index=index, pictures=pictures)
        sheet.save(run / "evaluations" / f"{name}.png")
    (run / "evaluations" / "base-cfg-4.5.json").unlink()
    assert sum(path.stat().st_size for path in (run / "evaluations").glob("*.png")) > 10_000_000
    out = write_report([run], tmp_path / "report.html")
    assert out.stat().st_size < 10_000_000
    page = Page(out.read_text(encoding="utf-8"))
    assert page.says("in WebP of quality 80")
    assert sum(len(step["scores"]["reward"]) for step in page.data["grids"][0]["steps"]) == 1024


def test_too_many_pictures_shrink_then_are_refused(run: Path) -> None:
    runs = read_runs([run])
    whole = len(render(runs))
    assert "To keep this file small" not in render(runs, whole + 3_000)
    bare = whole - sum(4 * path.stat().st_size // 3 for path in run.rglob("*") if path.suffix in (".webp", ".png"))
    tiles = []
    with pytest.raises(CRDError, match="report fewer runs at once"):  # noqa: PT012
        for part in range(1, 100):
            page = Page(render(runs, bare + 2_000 + int((whole - bare) * 0.75**part)))
            assert page.says("in WebP of quality")
            tiles.append(page.data["grids"][0]["steps"][0]["tile"])
            assert page.says("at half size") == (tiles[-1] == TILE // 2)
    assert set(tiles) == {TILE, TILE // 2}
    assert tiles == sorted(tiles, reverse=True)


def test_evenly_spread_with_first_last_and_one_more() -> None:
    items = list(range(101))
    assert spread(items, None) == spread(items, 101) == items
    assert spread(items, 3) == [0, 50, 100]
    assert spread(items, 5) == [0, 25, 50, 75, 100]
    assert spread(items, 5, 50) == [0, 25, 50, 75, 100]
    assert spread(items, 5, 1) == [0, 1, 50, 75, 100]
    assert spread(items, 3, 99) == [0, 99, 100]
    assert spread([], 3) == []


def test_a_very_long_run_stays_below_ten_megabytes(run: Path, tmp_path: Path) -> None:
    """200 evaluations of 1,000 images of 1,024 px, and warnings at half of them."""
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 255, (8 * 40, 8 * 40, 3), dtype=np.uint8))
    tiles = io.BytesIO()
    rough.resize((8 * 160, 8 * 160), Image.Resampling.BICUBIC).save(tiles, "WEBP", quality=90, method=0)
    picture = io.BytesIO()
    rough.resize((1024, 1024)).save(picture, "PNG", compress_level=1)
    index = [image % 3 for image in range(1000)]
    scores = {name: rng.random(1000).round(6).tolist() for name in ("reward", "held_out_clipscore")}
    for update in range(0, 5001, 25):
        name = f"update-{update:06d}"
        pictures = {"file": f"{name}.webp", "indices": list(range(64)), "tile": 160, "columns": 8}
        save_evaluation(run / "evaluations", name, update, [0.5] * 8, prompt_index=index, scores=scores,
                        statistics={}, pictures=pictures)  # fmt: skip
        (run / "evaluations" / f"{name}.webp").write_bytes(tiles.getvalue())
    for path in run.glob("evaluations/*"):
        if path.stem in ("base-cfg-4.5", "update-000012", "update-000024"):
            path.unlink()
    train = [{"update": n, "kind": "train", **{f"metric_{m}": float(x) for m, x in enumerate(rng.random(8))}}
             for n in range(1, 5001)]  # fmt: skip
    save_lines(run / "metrics.jsonl", train)
    (run / "events" / "big.png").write_bytes(picture.getvalue())
    for update in range(50, 5001, 50):
        os.link(run / "events" / "big.png", run / "events" / f"{update}.png")
    save_lines(run / "events.jsonl", [
        event(update, "drift", "far", pictures=[f"events/{update}.png"]) for update in range(50, 5001, 50)
    ])  # fmt: skip
    (run / "checkpoints" / "best.json").write_text(json.dumps({"update": 1325, "reward": 0.75}))
    assert 201 * len(tiles.getvalue()) > 30_000_000
    out = write_report([run], tmp_path / "report.html")
    assert out.stat().st_size < 10_000_000
    page = Page(out.read_text(encoding="utf-8"))
    updates = [step["update"] for step in page.data["grids"][0]["steps"]]
    assert {0, 1325, 5000} <= set(updates)
    assert len(updates) >= 12
    assert max(np.diff(updates)) < 3 * 5000 / len(updates)
    assert page.says(f"at most {len(updates)} evaluations of a run are pictured")
    assert len(page.data["panels"][0]["runs"][0]["eval"]) == 201  # numbers are all there
