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
from gang import Ended, run_gang
from PIL import Image
from reward_functions import brightness
from torch import Tensor, nn

from crd.checkpoint import CheckpointFolder
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

DOUBLE = torch.float64
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
        return DenoiserOutputs(
            self.x[index] @ self.weight, self.old[index], self.anchor[index], self.target[index], t
        )


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
    evaluation: dict[str, Any]  # record
    pictures: int


def one_update(config: CRDConfig) -> Did:
    trainer = CRDTrainer(args=config)
    score, seen = trainer.score, {}

    def remembered(plan: Any, rollout: Any) -> Any:
        seen["drawn"] = len(plan.share.places)
        seen["rewards"] = score(plan, rollout)
        return seen["rewards"]

    trainer.score = remembered  # type: ignore[method-assign]
    metrics = trainer.update()
    result = trainer.evaluate()
    weights = {
        f"{role}/{name}": tensor for role in ("policy", "old") for name, tensor in trainer.snapshots.state(role).items()
    }
    rewards = seen["rewards"].total.tolist()
    return Did(metrics, rewards, seen["drawn"], weights, result.record.to_dict(), len(result.images))


def do_all(folder: Path, configs: dict[str, CRDConfig]) -> None:
    """As one rank: gradients, then every configuration; results go into files."""
    rank = os.environ["RANK"]
    found: dict[str, Any] = {f"linear {n}": linear_gradient(n, 4) for n in (1, 7)}
    for name, config in configs.items():
        os.environ |= FSDP if name == "sharded" else {}
        found[name] = one_update(config)
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
        "full": replace(small, finetune="full", micro_batch=4),
        "bundled": replace(small, model="tiny-sd3", micro_batch=4, prompts_per_update=2),
        "sharded": small,
    }


@pytest.fixture(scope="module")
def alone(configs: dict[str, CRDConfig]) -> dict[str, Any]:
    """What one process finds."""
    found: dict[str, Any] = {f"linear {n}": linear_gradient(n, 4) for n in (1, 7)}
    return found | {name: one_update(config) for name, config in configs.items()}


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


@pytest.mark.parametrize("name", ["lora", "full", "bundled", "sharded"])
def test_an_update_is_the_same(gang: list[dict[str, Any]], alone: dict[str, Any], name: str) -> None:
    wanted: Did = alone[name]
    ranks: list[Did] = [rank[name] for rank in gang]
    assert sum(rank.drawn for rank in ranks) == wanted.drawn == len(wanted.rewards)
    for rank in ranks:
        assert rank.rewards == wanted.rewards
        assert rank.metrics["loss"] == pytest.approx(wanted.metrics["loss"], abs=1e-6)
        assert rank.metrics["optimizer_steps"] == wanted.metrics["optimizer_steps"] == 2
        assert rank.metrics["gradient_norm"] == pytest.approx(wanted.metrics["gradient_norm"], rel=1e-3)
        assert rank.metrics == ranks[0].metrics
        for key, tensor in wanted.weights.items():
            # Adam turns rounding of a gradient near zero into a step; none is larger than the learning rate.
            torch.testing.assert_close(rank.weights[key], tensor, rtol=1e-3, atol=1e-4)
            assert torch.equal(rank.weights[key], ranks[0].weights[key])


@pytest.mark.parametrize("name", ["lora", "sharded"])
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
