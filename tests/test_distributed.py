"""Runs of several gloo processes against a run of one: the same rewards, loss, steps and weights, and ends together."""

from __future__ import annotations

import json
import os
import pickle
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from gang import Ended, run_gang
from torch import Tensor, nn

import crd
from crd.checkpoint import Checkpoint, CheckpointFolder
from crd.cli import main
from crd.config import CRDConfig
from crd.engine import Engine
from crd.errors import CRDError
from crd.eval_record import read_record
from crd.objectives.base import DenoiserOutputs, Rows
from crd.objectives.crd import CRD, CRDObjectiveConfig
from crd.shares import Share
from crd.tracker import read_metrics
from crd.trainer import CRDTrainer
from crd.training_state import pack, restore

DOUBLE = torch.float64
LAUNCH = Path(crd.__file__).parent / "launch"
EVALUATED = ("lora", "sharded")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


# Who works on what.


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("sizes", [(1,), (7,), (16, 8), (3, 1, 5)], ids=str)
def test_everything_is_dealt_once_and_evenly(world_size: int, sizes: tuple[int, ...]) -> None:
    things = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(0))
    parts = things.split(list(sizes))
    shares = [Share.deal(parts, rank, world_size) for rank in range(world_size)]
    assert sorted(int(thing) for share in shares for thing in share.index[share.places]) == list(range(sum(sizes)))
    assert {len(share.index) for share in shares} == {sum(-(-size // world_size) for size in sizes)}
    for part in parts:
        counts = [int(torch.isin(share.index[share.places], part).sum()) for share in shares]
        assert max(counts) - min(counts) <= 1
    for share in shares:
        assert len(set(share.index.tolist())) == len(share.index)  # a rank never does a thing twice
        assert share.index.tolist() == sorted(share.index.tolist())
    values = 10.0 * shares[0].table
    values[~shares[0].counted] = -1.0
    assert shares[0].collect(values[..., None])[:, 0].tolist() == [10.0 * thing for thing in range(sum(sizes))]


def test_a_share_by_hand() -> None:
    share = Share.deal([torch.arange(5)], 1, 2)
    assert share.table.tolist() == [[0, 2, 4], [1, 3, 4]]
    assert share.places.tolist() == [0, 1]
    rows = share.rows(2)
    assert rows.table.tolist() == [[0, 2, 4, 5, 7, 9], [1, 3, 4, 6, 8, 9]]
    assert rows.index[rows.places].tolist() == [1, 3, 6, 8]
    assert share.first(3).table.tolist() == [[0, 2], [1, 3]]
    assert share.first(3).counted.tolist() == [[True, True], [True, False]]
    assert share.first(9).table.tolist() == share.table.tolist()


# The gradient, in float64.


class Linear(nn.Module):
    """A forward whose policy is `W x` of the row's own numbers."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.x, self.old, self.anchor, self.target = torch.randn(4, rows, 6, generator=g, dtype=DOUBLE)
        self.weight = nn.Parameter(torch.randn(6, 6, generator=g, dtype=DOUBLE))

    def forward(self, index: Tensor) -> DenoiserOutputs:
        t = torch.full((len(index),), 0.5, dtype=DOUBLE)
        return DenoiserOutputs(self.x[index] @ self.weight, self.old[index], self.anchor[index], self.target[index], t)


def linear_gradient(images: int, micro_batch: int) -> tuple[dict[str, float], Tensor]:
    """Metrics and gradient of one optimizer step of groups of about three images, two draws each."""
    g = torch.Generator().manual_seed(2)
    image = torch.arange(images).repeat(2)
    advantage, gate = torch.rand(2, images, generator=g, dtype=DOUBLE)
    rows = Rows(
        group_id=image // 3, image_id=image, draw=torch.arange(2).repeat_interleave(images),
        advantage=advantage[image], reward=advantage[image], kl_gate=gate[image], has_signal=image // 3 != 1,
    )  # fmt: skip
    engine, forward = Engine(device="cpu"), Linear(2 * images)
    objective = CRD(CRDObjectiveConfig(residual="leave_one_out"))
    metrics = engine.backward(objective, forward, rows, micro_batch, engine.ranks.share(images).rows(2))
    engine.sum_gradients(forward.parameters())
    assert forward.weight.grad is not None
    return metrics, forward.weight.grad


# Whole updates.


@dataclass(frozen=True)
class Did:
    """What a process did in one update, and what it then measured."""

    metrics: dict[str, float]
    rewards: list[float]  # of all images, in their order
    drawn: int  # by this process
    weights: dict[str, Tensor]
    evaluation: dict[str, Any]  # record; {} if not asked for
    pictures: int
    goes_back: bool  # to a checkpoint, exactly


def one_update(config: CRDConfig, evaluate: bool) -> Did:
    trainer = CRDTrainer(args=config)
    score, seen = trainer.score, {}

    def remembered(plan: Any, rollout: Any) -> Any:
        seen["drawn"] = len(plan.share.places)
        seen["rewards"] = score(plan, rollout)
        return seen["rewards"]

    trainer.score = remembered  # type: ignore[method-assign]
    metrics = trainer.update()
    result = trainer.evaluate() if evaluate else None
    weights = {
        f"{role}/{name}": tensor for role in ("policy", "old") for name, tensor in trainer.snapshots.state(role).items()
    }
    rewards = seen["rewards"].total.tolist()
    back = not trainer.engine.sharded or goes_back(trainer)
    record, pictures = ({}, 0) if result is None else (result.record.to_dict(), len(result.images))
    return Did(metrics, rewards, seen["drawn"], weights, record, pictures, back)


def goes_back(trainer: CRDTrainer) -> bool:
    """Whether a checkpoint, taken before another update, brings everything back after it."""
    parts = trainer.snapshots, trainer.optimizer
    kept = pack(*parts, trainer.progress, trainer.train_data)
    trainer.update()
    moved = pack(*parts, trainer.progress, trainer.train_data)
    restore(kept, *parts, trainer.train_data)
    again = pack(*parts, trainer.progress, trainer.train_data)
    return same_tensors(again, kept) and not same_tensors(moved, kept)


def same_tensors(first: Checkpoint, second: Checkpoint) -> bool:
    return all(
        torch.equal(tensor, second.tensors[stem][name])
        for stem, tensors in first.tensors.items()
        for name, tensor in tensors.items()
    )


def do_all(folder: Path, configs: dict[str, CRDConfig]) -> None:
    """As one rank: gradients, then every configuration; results go into files."""
    rank = os.environ["RANK"]
    found: dict[str, Any] = {f"linear {n}": linear_gradient(n, 4) for n in (1, 7)}
    for name, config in configs.items():
        os.environ |= FSDP if name == "sharded" else {}
        found[name] = one_update(config, name in EVALUATED)
    (folder / f"found-{rank}").write_bytes(pickle.dumps(found))


@pytest.fixture(scope="module")
def configs(base_config: CRDConfig) -> dict[str, CRDConfig]:
    # Images drawn one by one and rows in small batches: the network rounds alike, whoever calls it.
    small = replace(
        base_config, prompts_per_update=3, group_size=3, rollout_batch=1, micro_batch=2, eval_images=3, draws=1,
        learning_rate=1e-3,
    )  # fmt: skip
    return {
        "lora": small,
        "full": replace(small, finetune="full", micro_batch=4, share_noise=True, centering_prompts=2),
        # Two images in each optimizer step: of three processes, one has none of its own.
        "bundled": replace(small, model="tiny-sd3", micro_batch=4, prompts_per_update=2, group_size=2),
        "flow_grpo": replace(
            small, objective="flow_grpo", decouple_sampler=False, old_start=0.0, old_slope=0.0, clip_range=0.1
        ),
        "sharded": small,
    }


@pytest.fixture(scope="module")
def alone(configs: dict[str, CRDConfig]) -> dict[str, Any]:
    """What one process finds."""
    found: dict[str, Any] = {f"linear {n}": linear_gradient(n, 4) for n in (1, 7)}
    found |= {name: one_update(config, name in EVALUATED) for name, config in configs.items() if name != "sharded"}
    return found | {"sharded": found["lora"]}


@pytest.fixture(scope="module", params=[2, 3], ids=lambda n: f"{n} processes")
def gang(
    request: pytest.FixtureRequest, configs: dict[str, CRDConfig], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of several processes finds."""
    folder = tmp_path_factory.mktemp("gang")
    ended = run_gang(request.param, folder / "printed", do_all, folder, configs)
    assert [rank.status for rank in ended] == [0] * request.param, ended
    return [pickle.loads((folder / f"found-{rank}").read_bytes()) for rank in range(request.param)]


@pytest.mark.parametrize("images", [1, 7])
def test_the_gradient_of_a_step_is_the_same(gang: list[dict[str, Any]], alone: dict[str, Any], images: int) -> None:
    metrics, wanted = alone[f"linear {images}"]
    for rank in gang:
        got_metrics, gradient = rank[f"linear {images}"]
        assert got_metrics == pytest.approx(metrics, rel=1e-12, abs=1e-14)
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)
    assert images == 1 or float(wanted.abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["lora", "full", "bundled", "flow_grpo", "sharded"])
def test_an_update_is_the_same(gang: list[dict[str, Any]], alone: dict[str, Any], name: str) -> None:
    wanted: Did = alone[name]
    ranks: list[Did] = [rank[name] for rank in gang]
    assert sum(rank.drawn for rank in ranks) == wanted.drawn == len(wanted.rewards)
    for rank in ranks:
        assert rank.goes_back
        assert rank.rewards == wanted.rewards
        assert rank.metrics["loss"] == pytest.approx(wanted.metrics["loss"], abs=1e-6)
        assert rank.metrics["optimizer_steps"] == wanted.metrics["optimizer_steps"] == 2
        assert rank.metrics["gradient_norm"] == pytest.approx(wanted.metrics["gradient_norm"], rel=1e-3)
        assert rank.metrics == ranks[0].metrics
        for key, tensor in wanted.weights.items():
            # Adam turns rounding of a gradient near zero into a step; none is larger than the learning rate.
            torch.testing.assert_close(rank.weights[key], tensor, rtol=1e-3, atol=1e-4)
            assert torch.equal(rank.weights[key], ranks[0].weights[key])


@pytest.mark.parametrize("name", EVALUATED)
def test_an_evaluation_is_the_same(gang: list[dict[str, Any]], alone: dict[str, Any], name: str) -> None:
    wanted: Did = alone[name]
    for number, rank in enumerate(gang):
        got: Did = rank[name]
        assert got.evaluation.keys() == wanted.evaluation.keys()
        for part in ("prompts", "prompt_index", "seed"):
            assert got.evaluation[part] == wanted.evaluation[part]
        for part in ("scores", "statistics"):
            for column, values in wanted.evaluation[part].items():
                assert got.evaluation[part][column] == pytest.approx(values, abs=2e-3), column
        assert got.evaluation["diversity"] == pytest.approx(wanted.evaluation["diversity"], abs=2e-3)
        assert got.evaluation["model"] == pytest.approx(wanted.evaluation["model"], rel=1e-3)
        assert got.pictures == (wanted.pictures if number == 0 else 0)


# How a run ends when one process does.

AT_UPDATE_2 = "4"  # calls of the reward: evaluations of the model and of the guided base model, then one an update


def train(argv: list[str], environment: dict[str, str]) -> int:
    """As one rank: the command line."""
    os.environ |= environment
    return main(["train", *argv])


def assert_ended_by(end: str, config: CRDConfig, folder: Path) -> list[Ended]:
    """A run of two processes whose second ends in update 2; update 1 must have been saved."""
    run = replace(config, rewards=("reward_functions:ends_rank_1",), updates=3, output_dir=str(folder / "run"))
    (folder / "run.yaml").write_text(run.to_yaml())
    environment = {"DIE_AT_CALL": AT_UPDATE_2, "END": end}
    ended = run_gang(2, folder / end, train, [str(folder / "run.yaml")], environment)
    assert CheckpointFolder(folder / "run" / "checkpoints", keep=1).updates() == [1]
    assert [record["update"] for record in read_metrics(folder / "run", "train")] == [1]
    return ended


def told(ended: Ended) -> list[str]:
    """What a process says as `crd`."""
    return [line for line in ended.err.splitlines() if line.startswith("crd: ")]


def test_one_failing_process_ends_all_with_one_line_and_the_run_goes_on_with_three(
    config: CRDConfig, tmp_path: Path
) -> None:
    small = replace(config, rollout_batch=1, micro_batch=2, prompts_per_update=3, group_size=3)
    first, second = assert_ended_by("raise", small, tmp_path)
    assert (first.status, second.status) == (2, 2)
    assert told(first) == []
    assert told(second) == ["crd: reward 'ends_rank_1' raised RuntimeError: the judge is down; fix the reward"]
    run = tmp_path / "run"
    ended = run_gang(3, tmp_path / "again", train, ["--resume", str(run)], {"DIE_AT_CALL": "0", "END": "no"})
    assert [rank.status for rank in ended] == [0, 0, 0], ended
    assert [rank.out for rank in ended[1:]] == ["", ""]
    straight = replace(small, updates=3, output_dir=str(tmp_path / "straight"))
    CRDTrainer(args=straight).train()
    for kind, names in (("train", ("update", "reward", "optimizer_steps", "images")), ("eval", ("update", "reward"))):
        for got, wanted in zip(read_metrics(run, kind), read_metrics(tmp_path / "straight", kind), strict=True):
            for name in names:
                assert got[name] == pytest.approx(wanted[name], abs=1e-3), (kind, name)
    pages = [read_record(folder / "evaluations" / "update-000003.json") for folder in (run, tmp_path / "straight")]
    assert pages[0].same_images(pages[1])
    assert (run / "evaluations" / "update-000003.webp").is_file()
    assert json.loads((run / "summary.json").read_text())["images"] == 27


def test_a_killed_process_ends_the_other_within_a_minute(config: CRDConfig, tmp_path: Path) -> None:
    first, second = assert_ended_by("kill", config, tmp_path)
    assert second.status == -signal.SIGKILL
    assert first.status == 2
    (line,) = told(first)
    assert line.startswith("crd: process 0 of 2 lost another one (")
    assert line.endswith("); see what the others said, and use --resume")
    assert first.seconds - second.seconds < 60


def test_what_is_wrong_everywhere_is_told_once(config: CRDConfig, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    longer = ["--rewards", "remote=http://127.0.0.1:1#color_code", "--peer_timeout", "200"]
    for name, argv, message in (
        ("before", ["nowhere.yaml"], "crd: no configuration at nowhere.yaml"),
        ("after", [str(tmp_path / "run.yaml"), "--model", "/nowhere"], "crd: no model at"),
        ("waits", [str(tmp_path / "run.yaml"), *longer], "crd: reward 'color_code' may wait 300 s for its server, and"),
    ):
        first, second = run_gang(2, tmp_path / name, train, argv, {})
        assert (first.status, second.status) == (2, 2)
        assert [line[: len(message)] for line in told(first)] == [message]
        assert told(second) == []


def talk(folder: Path) -> int:
    """As one of two ranks: what `Ranks` says when things go wrong on one of them, or on both."""
    ranks = Engine(device="cpu", peer_timeout=20).ranks
    heard = []

    def fails_on(*failing: int) -> None:
        if ranks.rank in failing:
            raise CRDError(f"{ranks.rank} cannot")

    for failing in ((0,), (1,), (0, 1)):
        try:
            with ranks.together():
                fails_on(*failing)
                if len(failing) == 1:
                    ranks.meet()  # the other waits at quite another place
        except CRDError as error:
            heard.append([type(error).__name__, str(error)])
    try:
        ranks.check_same([torch.tensor(1.0 + ranks.rank)], "the number")
    except CRDError as error:
        heard.append([type(error).__name__, str(error)])
    heard.append([str(ranks.on_main(lambda: "done")), str(ranks.total(torch.tensor([1.0 + ranks.rank])).tolist())])
    (folder / f"heard-{ranks.rank}").write_text(json.dumps(heard))
    with ranks.together():
        if ranks.rank == 1:
            raise TypeError("a bug")
    return 0


def test_failures_are_heard_by_the_other(tmp_path: Path) -> None:
    first, second = run_gang(2, tmp_path / "printed", talk, tmp_path)
    heard = [json.loads((tmp_path / f"heard-{rank}").read_text()) for rank in (0, 1)]
    differ = ["CRDError", "the number must be the same on all processes, got [1.0, 2.0]; start them alike"]
    assert heard[0] == [
        ["CRDError", "0 cannot"], ["PeerFailedError", "process 1 failed: 1 cannot"], ["CRDError", "0 cannot"],
        differ, ["done", "[3.0]"],
    ]  # fmt: skip
    assert heard[1] == [
        ["PeerFailedError", "process 0 failed: 0 cannot"], ["CRDError", "1 cannot"],
        ["PeerFailedError", "process 0 failed: 0 cannot"], differ, ["None", "[3.0]"],
    ]  # fmt: skip
    assert (first.status, second.status) == (1, 1)
    assert "PeerFailedError: process 1 failed: TypeError: a bug" in first.err
    assert "TypeError: a bug" in second.err


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported; zero2.yaml"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "configured for mixed_precision=bf16 and the run for no"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps=4"),
        (FSDP, "started one process alone"),
        ({**FSDP, "FSDP_VERSION": "1"}, "fsdp_version of the launcher's configuration is not supported"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing"),
    ],
    ids=str,
)
def test_what_a_launcher_may_not_ask(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CRDError, match=message):
        Engine(device="cpu")


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configurations_are_accelerates(path: Path) -> None:
    config = ClusterConfig.from_yaml_file(str(path))
    sharded = path.stem != "ddp"
    assert config.distributed_type == ("FSDP" if sharded else "MULTI_GPU")
    assert config.mixed_precision == "no"
    if sharded:
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_reshard_after_forward"] is (path.stem == "fsdp2")
    assert path.name in (LAUNCH.parents[2] / "docs" / "distributed.md").read_text()
