"""Suite files: what they mean, what is refused, and that the bundled ones hold."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_families import FAMILIES, tiny_family

from crd.bench.cells import Attempt, CellFolder
from crd.bench.checks import check_runs, rows_per_update
from crd.bench.schedule import plan_cells, remaining_seconds
from crd.bench.suite import Cell
from crd.bench.suite_file import parse_suite, read_suite, suites
from crd.cli import main
from crd.config_io import load_config
from crd.errors import CRDError
from crd.run_folder import CONFIG_FILE

OUT = Path("out")


def written(**changes: Any) -> dict[str, Any]:
    """A suite as YAML holds it."""
    content = {
        "name": "small",
        "reference": "crd",
        "seeds": [0, 1],
        "settings": {"updates": 5, "kl_max": 0.5},
        "tasks": {
            "ocr": {"recipe": "ocr-demo"},
            "geneval": {"recipe": "geneval-tiny", "settings": {"updates": 7, "cooldown-updates": 0},
                        "arms": {"loose": {"kl_max": 0.25}}},
        },
        "arms": {"crd": None, "loose": {"kl_max": 0.125}},
    }  # fmt: skip
    return {**content, **changes}


def test_seeds_come_first_to_last_and_each_has_all_arms() -> None:
    suite = parse_suite(written())
    assert [str(cell) for cell in suite.cells()] == [
        f"{task}/{arm}/seed-{seed}" for seed in (0, 1) for task in ("ocr", "geneval") for arm in ("crd", "loose")
    ]
    assert suite.cells(["ocr"], ["loose"], [1]) == [Cell("ocr", "loose", 1)]


def test_settings_of_an_arm_go_over_those_of_the_task_and_these_over_the_suites() -> None:
    suite = parse_suite(written())
    found = {str(cell): suite.config(cell, OUT, {"threads": 3}) for cell in suite.cells(seeds=[1])}
    assert found["ocr/crd/seed-1"] == replace(
        load_config("ocr-demo"), updates=5, kl_max=0.5, seed=1, output_dir="out", threads=3
    )
    assert {name: (one.updates, one.kl_max) for name, one in found.items()} == {
        "ocr/crd/seed-1": (5, 0.5), "ocr/loose/seed-1": (5, 0.125),
        "geneval/crd/seed-1": (7, 0.5), "geneval/loose/seed-1": (7, 0.25),
    }  # fmt: skip


def test_the_reference_is_in_every_table() -> None:
    arms = {name: {} for name in ("crd", "a", "b")}
    content = written(arms=arms, tasks={"ocr": {"recipe": "ocr-demo"}}, groups={"one": ["a"], "two": ["b", "crd"]})
    suite = parse_suite(content)
    assert suite.tables() == {"one": ("crd", "a"), "two": ("crd", "b")}
    assert replace(suite, groups={}).tables() == {"": ("crd", "a", "b")}


def test_an_arm_has_all_settings_of_the_arm_that_it_extends_wherever_it_gives_none() -> None:
    """Also those on one task, which its own settings on all tasks go over."""
    suite = parse_suite(written(arms={
        "crd": None, "loose": {"kl-max": 0.125, "beta": 2.0},
        "heavy": {"extends": "loose", "beta": 3.0}, "heaviest": {"extends": "heavy", "kl_max": 1.0},
    }))  # fmt: skip
    found = {str(cell): suite.config(cell, OUT, {}) for cell in suite.cells(seeds=[0])}
    assert {name: (one.kl_max, one.beta) for name, one in found.items() if "crd" not in name} == {
        "ocr/loose/seed-0": (0.125, 2.0), "geneval/loose/seed-0": (0.25, 2.0),
        "ocr/heavy/seed-0": (0.125, 3.0), "geneval/heavy/seed-0": (0.25, 3.0),
        "ocr/heaviest/seed-0": (1.0, 3.0), "geneval/heaviest/seed-0": (1.0, 3.0),
    }  # fmt: skip


def test_a_suite_takes_what_it_leaves_out_from_the_one_that_it_extends(tmp_path: Path) -> None:
    base, middle, last = (tmp_path / f"{name}.yaml" for name in ("base", "middle", "last"))
    base.write_text(yaml.safe_dump(written(about="Long.", groups={"one": ["loose"]}), sort_keys=False))
    middle.write_text(yaml.safe_dump({"name": "middle", "extends": str(base), "arms": {"none": {"kl_max": 0.0}}}))
    last.write_text(yaml.safe_dump({
        "name": "last", "extends": str(middle), "seeds": [4], "settings": {"beta": 2.0},
        "tasks": {"geneval": {"settings": {"updates": 9}, "arms": {"none": {"beta": 0.5}}}},
        "arms": {"loose": {"beta": 3.0}, "looser": {"extends": "loose", "kl_max": 0.75}},
    }))  # fmt: skip
    assert replace(read_suite(str(middle)), about="Long.", name="small") == parse_suite(
        written(about="Long.", groups={"one": ["loose"]}, arms={**written()["arms"], "none": {"kl_max": 0.0}})
    )
    suite = read_suite(str(last))
    assert suite == parse_suite({
        "name": "last", "reference": "crd", "seeds": [4], "settings": {"beta": 2.0}, "groups": {"one": ["loose"]},
        "tasks": {
            "ocr": {"recipe": "ocr-demo"},
            "geneval": {"recipe": "geneval-tiny", "settings": {"updates": 9},
                        "arms": {"loose": {"kl_max": 0.25}, "none": {"beta": 0.5}}},
        },
        "arms": {"crd": {}, "loose": {"kl_max": 0.125, "beta": 3.0}, "none": {"kl_max": 0.0},
                 "looser": {"extends": "loose", "kl_max": 0.75}},
    })  # fmt: skip
    assert list(suite.arms) == ["crd", "loose", "none", "looser"]  # those of the base come first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extends": "nowhere"}, "suite .*last.yaml: no suite at nowhere; give a YAML file or one of"),
        ({"extends": ["quick"]}, r"extends in .*last.yaml must name a suite or a file, got \['quick'\]"),
        ({"extends": "{last}"}, "extends leads in a circle: .*last.yaml -> .*last.yaml; take it out"),
        ({"extends": "quick", "arms": ["crd"]}, r"arms must be `key: value` lines, got \['crd'\]"),
        ({"extends": "quick", "tasks": {"ocr": "x"}}, "tasks.ocr must be `key: value` lines, got 'x'"),
        ({"extends": "quick", "arm": {}}, "unknown key of a suite 'arm'; did you mean 'arms'"),
        ({"extends": "quick", "name": None}, "name of a suite must be text"),
    ],
    ids=str,
)
def test_suites_that_extend_nothing_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    last = tmp_path / "last.yaml"
    last.write_text(yaml.safe_dump({"name": "last", **change}).replace("{last}", str(last)))
    with pytest.raises(CRDError, match=message):
        read_suite(str(last))


def test_the_name_of_a_suite_is_its_own(tmp_path: Path) -> None:
    path = tmp_path / "nameless.yaml"
    path.write_text("extends: quick\n")
    with pytest.raises(CRDError, match="name is missing"):
        read_suite(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": {}}, "unknown key of a suite 'arm'; did you mean 'arms'"),
        ({"seeds": []}, "at least one task and one seed"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"seeds": [-1]}, "a whole number of at least 0"),
        ({"seeds": "0"}, "must be a list of integers"),
        ({"reference": "old"}, "reference names the arm 'old'; known: crd, loose"),
        ({"name": "Größe"}, "names are also names of files"),
        ({"arms": {"crd": {}, "../up": {}}}, "names are also names of files"),
        ({"arms": {"crd": {}, "loose": ["kl_max"]}}, "loose of arms must be `key: value` lines"),
        ({"tasks": {"ocr": {}}}, "recipe of task ocr must be text"),
        ({"tasks": {"ocr": {"recipe": "ocr-demo", "arm": {}}}}, "unknown key of a task 'arm'"),
        ({"tasks": {"ocr": {"recipe": "ocr-demo", "arms": {"x": {}}}}}, "tasks.ocr.arms names the arm 'x'"),
        ({"arms": {"crd": {}, "loose": {"extends": "x"}}}, "arm loose: extends names the arm 'x'; known: crd, loose"),
        ({"arms": {"crd": {}, "loose": {"extends": {}}}}, "arm loose: extends in loose must name an arm, got {}"),
        ({"arms": {"crd": {}, "loose": {"extends": "a"}, "a": {"extends": "loose"}}},
         "arm loose: extends leads in a circle: loose -> a -> loose"),
        ({"tasks": {"ocr": {"recipe": "ocr-demo", "arms": {"loose": {"extends": "crd"}}}}},
         "loose of arms of task ocr has extends, which is of all tasks"),
        ({"groups": {"one": ["x"]}}, "one names the arm 'x'"),
        ({"groups": {"one": "crd"}}, "one must be a list of names"),
        ({"sweeps": {"s": {"field": "kl", "arms": ["crd"]}}}, "field of sweep s must be a field of the configuration"),
        ({"sweeps": {"s": {"field": "kl_gate", "arms": ["crd"]}}}, "field of sweep s .* so a number, got 'kl_gate'"),
        ({"sweeps": {"s": {"field": "share_noise", "arms": ["crd"]}}}, "so a number, got 'share_noise'"),
        ({"arms": {"crd": {}, "loose": {}, **{f"a{n}": {} for n in range(7)}}}, "has 9 arms"),
        ({"tasks": None}, "at least one task"),
        ({"groups": {"x": ["crd"], "x-samples": ["loose"]}}, "two figures would be called ocr-x-samples"),
        ({"groups": {"sweep-s": ["loose"]}, "sweeps": {"s": {"field": "kl_max", "arms": ["crd", "loose"]}}},
         "two figures would be called ocr-sweep-s"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_suite_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CRDError, match=message.replace("(", r"\(")):
        parse_suite(written(**change))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "reference": "crd"}))
    with pytest.raises(CRDError, match="seeds is missing"):
        read_suite(str(path))
    with pytest.raises(CRDError, match="no suite at nowhere; give a YAML file or one of ablations, head-to-head"):
        read_suite("nowhere")


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"kl_maks": 1}, "arm loose: unknown configuration key 'kl_maks'; did you mean 'kl_max'"),
        ({"compile": "regional"}, "arm loose: compile follows from"),
        ({"seed": 3}, "arm loose: seed follows from the suite's seeds"),
        ({"output-dir": "x"}, "arm loose: output_dir follows from"),
        ({"eval_prompts": None}, "eval_prompts must name prompts"),
        ({"alarm": "stop"}, "alarm must not be stop"),
        ({"rollout_batch": "auto"}, "must be numbers, got 144 and auto"),
        ({"timestep_fraction": 1e-5, "solver": "dpmsolver++"}, "arm loose: .*keeps no rollout step"),
        ({"objective": "flow_grpo", "sampler_slope": 0, "draws": 9}, "arm loose: .*got draws=9 of 5 steps"),
        ({"objective": "nothing"}, "arm loose: unknown objective 'nothing'"),
        ({"rewards": "nothing"}, "unknown reward 'nothing'"),
        ({"height": 17}, "arm loose: .*17"),
        ({"eval_steps": 3}, "task ocr: arms crd and loose cannot be compared: eval_steps is 10 and 3"),
        ({"eval_every": 3}, "task ocr: arms crd and loose cannot be compared: eval_every is 12 and 3"),
        ({"mixed_precision": "no"}, "task ocr: arms crd and loose cannot be compared: mixed_precision is"),
    ],
    ids=str,
)
def test_runs_that_cannot_be_made_or_compared_are_refused(arm: dict[str, Any], message: str) -> None:
    suite = parse_suite(written(tasks={"ocr": {"recipe": "ocr-demo"}}, arms={"crd": {}, "loose": arm}))
    with pytest.raises(CRDError, match=f"suite small, .*{message}"):
        check_runs(suite, suite.cells())


def test_guidance_that_is_an_input_of_the_network_is_that_of_evaluations_too(tmp_path: Path) -> None:
    tiny_family("FLUX.1-dev").save_pretrained(tmp_path)
    side, told = (
        FAMILIES["FLUX.1-dev"].side,
        "arms crd and loose cannot be compared: they are evaluated at guidance 3.5 and 2",
    )
    model = {"model": str(tmp_path), "height": side, "width": side, "finetune": "lora", "rollout_guidance": 3.5}
    tasks = {"ocr": {"recipe": "ocr-demo", "settings": model}}
    suite = parse_suite(written(tasks=tasks, arms={"crd": {}, "loose": {"rollout_guidance": 2.0}}))
    for arms in (["crd"], ["loose"]):  # whichever comes first: the other may be there already
        with pytest.raises(CRDError, match=re.escape(told)):
            check_runs(suite, suite.cells(arms=arms))


def test_an_arm_that_is_not_asked_for_now_is_measured_like_the_others_too() -> None:
    """Its runs may be there already; but what it could not even start with is no matter."""
    tasks = {"ocr": {"recipe": "ocr-demo"}}
    suite = parse_suite(written(tasks=tasks, arms={"crd": {}, "fine": {"eval_steps": 3}}))
    for arms in (["crd"], ["fine"]):
        with pytest.raises(CRDError, match="arms crd and fine cannot be compared: eval_steps is 10 and 3"):
            check_runs(suite, suite.cells(arms=arms))
    suite = parse_suite(written(tasks=tasks, arms={"crd": {}, "broken": {"kl_maks": 1}}))
    check_runs(suite, suite.cells(arms=["crd"]))


def test_unknown_choices_are_refused() -> None:
    suite = parse_suite(written())
    with pytest.raises(CRDError, match="no arm 'x'; it has crd, loose"):
        suite.cells(arms=["x"])
    with pytest.raises(CRDError, match="no seed 7; it has 0, 1"):
        suite.cells(seeds=[7])


def test_transformer_evaluations_of_an_update_by_hand() -> None:
    """144 images x 10 steps, 288 rows each of `old`, policy and (twice, for guidance) the anchor, 288 backward."""
    demo = load_config("ocr-demo")
    assert rows_per_update(demo) == 1440 + 288 + 288 + 2 * 288 + 2 * 288
    assert rows_per_update(replace(demo, kl_max=0.0)) == 1440 + 288 + 288 + 2 * 288


@pytest.mark.parametrize("name", suites())
def test_bundled_suites_hold(name: str) -> None:
    suite = read_suite(name)
    check_runs(suite, suite.cells())
    assert suite.name == name
    assert suite.about


def test_bundled_suites_are_told_of() -> None:
    page = (Path(__file__).parent.parent / "docs" / "benchmarks.md").read_text()
    table = page.split("| suite |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE)) == suites()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as told:
        main(["bench", "--help"])
    for name in suites():
        assert name in told.getvalue()


def test_the_ablations_change_something_and_ask_as_much_of_the_denoiser_for_an_image() -> None:
    suite = read_suite("ablations")
    configs = {cell.arm: suite.config(cell, OUT, {}) for cell in suite.cells(seeds=[0])}
    for arm, config in configs.items():
        images = config.prompts_per_update * config.group_size
        assert images == (72 if arm == "group-24" else 64), arm  # 24 does not divide 64
        assert (config != configs["crd"]) == (arm != "crd")
        # No step needs a second pass.
        assert rows_per_update(config) / images <= rows_per_update(configs["crd"]) / 64, arm
    told = {arm for arms in suite.tables().values() for arm in arms}
    assert told == set(suite.arms)


def test_a_run_is_gone_on_with_as_the_harness_executes_it(tmp_path: Path) -> None:
    """How a run is executed may change on the way: the number of threads, and whether blocks are compiled."""
    suite = parse_suite(written())
    folder = CellFolder(tmp_path, suite.cells()[0])
    begun = suite.config(folder.cell, folder.run, {"threads": 1, "compile": "no"})
    folder.run.mkdir(parents=True)
    (folder.run / CONFIG_FILE).write_text(begun.to_yaml())
    config = suite.config(folder.cell, folder.run, {"threads": 2, "compile": "regional"})
    folder.check_same(config)
    assert folder.command(config)[-4:] == ["--threads", "2", "--compile", "regional"]


@pytest.mark.parametrize("unknown", [{}, {"commit": None, "waited_seconds": None}])
def test_an_attempt_is_read_as_it_was_written(unknown: dict[str, None], tmp_path: Path) -> None:
    attempt = Attempt(
        began="2026-01-01T00:00:00+00:00", seconds=60.0, cpu_seconds=50.0, peak_bytes=2 * 10**9, status=-15,
        stopped=True, threads=2, jobs=3, processor="a processor", cores=4, commit="abc+", compile="regional",
        waited_seconds=7.5,
    )  # fmt: skip
    attempt = replace(attempt, **unknown)  # type: ignore[arg-type]
    folder = CellFolder(tmp_path, Cell("ocr", "crd", 0))
    folder.path.mkdir(parents=True)
    folder.add(attempt)
    assert folder.attempts() == [attempt]


ATTEMPT = Attempt("2026-01-01T00:00:00+00:00", 60.0, 50.0, 2 * 10**9, 0, False, 1, 2, "a processor", 2, "abc+")


def test_a_run_that_was_killed_before_it_had_a_configuration_begins_anew(tmp_path: Path) -> None:
    suite = parse_suite(written())
    folder = CellFolder(tmp_path, suite.cells()[0])
    folder.drop_checkpoints()  # there are none
    folder.run.mkdir(parents=True)
    (folder.run / ".tmp-config.yaml").write_text("upd")
    command = folder.command(suite.config(folder.cell, folder.run, {}))
    assert command[-1] == str(folder.path / "settings.yaml")
    assert list(folder.run.iterdir()) == []  # crd train takes no other


def test_an_attempt_behind_a_line_that_was_cut_off_is_kept(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path, Cell("ocr", "crd", 0))
    folder.path.mkdir(parents=True)
    folder.add(ATTEMPT)
    path = folder.path / "attempts.jsonl"
    path.write_text(path.read_text() + path.read_text()[:30])
    second = replace(ATTEMPT, seconds=7.0)
    folder.add(second)
    assert folder.attempts() == [ATTEMPT, second]


@pytest.mark.parametrize(("left", "jobs", "seconds"), [(1, 2, 600), (3, 2, 1200), (5, 16, 600), (4, 2, 1200)])
def test_the_time_that_is_left_is_that_of_whole_runs(left: int, jobs: int, seconds: float, tmp_path: Path) -> None:
    """One run took 600 s; that of another seed, which was made elsewhere, is no measure."""
    suite = parse_suite(written(seeds=list(range(9)), tasks={"ocr": {"recipe": "ocr-demo"}}, arms={"crd": {}}))
    found = plan_cells(suite, suite.cells(), tmp_path, {})
    done, other = (replace(one, state="finished") for one in found[:2])
    planned = [replace(done, seconds=600.0), other, *found[2 : 2 + left]]
    assert remaining_seconds(planned, jobs) == pytest.approx(seconds)
    assert remaining_seconds([other, *found[2:]], jobs) is None
