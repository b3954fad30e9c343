"""Out of memory: a run that had to lower its batches is the run that began with the lower ones, bit by bit."""

from __future__ import annotations

import json
import os
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gang import run_gang

from crd.batch_sizes import BatchSize, in_memory
from crd.config import CRDConfig
from crd.engine import Engine
from crd.errors import CRDError, ShortOfMemoryError, StrandedError
from crd.ranks import Ranks
from crd.snapshots import POLICY
from crd.tracker import read_metrics
from crd.trainer import CRDTrainer

ALONE = Ranks(0, 1, 1.0)
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


def run_out_above(trainer: CRDTrainer, rows: int) -> None:
    """The denoiser has memory for `rows` rows, in all roles."""

    def check(_: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if len(inputs["hidden_states"]) > rows:
            raise torch.OutOfMemoryError(FULL)

    trainer.backbone.denoiser.register_forward_pre_hook(check, with_kwargs=True)


def run_out_at(trainer: CRDTrainer, drawing: int, training: int) -> None:
    """Memory runs out once in each kind of call of the denoiser: without gradient, and with it; counted from 1."""
    calls = {False: 0, True: 0}

    def check(*_: Any) -> None:
        trained = torch.is_grad_enabled()
        calls[trained] += 1
        if calls[trained] == (training if trained else drawing):
            raise torch.OutOfMemoryError(FULL)

    trainer.backbone.denoiser.register_forward_pre_hook(check)


def state_after(trainer: CRDTrainer, updates: int = 2) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    metrics = [trainer.update() for _ in range(updates)]
    return metrics, {
        f"{role}/{name}": tensor
        for role in (POLICY, *trainer.snapshots.roles)
        for name, tensor in trainer.snapshots.state(role).items()
    }


def assert_equal(first: Any, second: Any) -> None:
    assert first[0] == second[0]
    assert all(torch.equal(tensor, second[1][name]) for name, tensor in first[1].items())


# One piece of work.


def test_rows_are_halved_until_they_fit_and_stay_so(capsys: pytest.CaptureFixture[str]) -> None:
    size, tried, freed = BatchSize("micro_batch", 32), [], []

    def work(rows: int) -> int:
        tried.append(rows)
        if rows > 3:
            raise ShortOfMemoryError
        return rows

    assert size.run(work, 12, lambda: freed.append(tried[-1])) == 3
    assert (tried, freed, size.rows) == ([32, 6, 3], [32, 6], 3)  # of 12 rows at most 12 were in a call
    assert size.run(work, 12) == 3
    out = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in out] == [
        "memory ran out: micro_batch is 6 in place of 32 for the rest of this run",
        "memory ran out: micro_batch is 3 in place of 6 for the rest of this run",
    ]


def test_not_even_one_row() -> None:
    def work(rows: int) -> None:
        raise ShortOfMemoryError

    with pytest.raises(CRDError, match="memory ran out at micro_batch=1, one row at a time; try lora"):
        BatchSize("micro_batch", 2, "try lora").run(work, 8)


def test_tensors_of_a_failed_attempt_are_gone_before_the_next() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def work(rows: int) -> bool:
        def local() -> bool:
            if kept:
                return kept[0]() is None
            weight = torch.ones(3, requires_grad=True)
            graph = (weight * 2).exp()
            kept.append(weakref.ref(graph))
            raise torch.OutOfMemoryError(FULL)

        return in_memory(local, ALONE, sharded=False)

    assert BatchSize("micro_batch", 8).run(work, 8)


def raising(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(ShortOfMemoryError):
        in_memory(lambda: torch.empty(2**60, dtype=torch.uint8), ALONE, sharded=False)  # what the CPU says
    for words in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"):
        with pytest.raises(ShortOfMemoryError):
            in_memory(raising(RuntimeError(words)), ALONE, sharded=False)
    with pytest.raises(RuntimeError, match="shapes"):
        in_memory(lambda: torch.ones(2, 3) @ torch.ones(2, 3), ALONE, sharded=False)
    assert in_memory(lambda: None, ALONE, sharded=True) is None
    with pytest.raises(ShortOfMemoryError):  # nobody is stranded by one process
        in_memory(raising(torch.OutOfMemoryError("none left")), ALONE, sharded=True)


# Runs.


@pytest.mark.parametrize("cache", [True, False])
def test_an_update_that_lowered_its_batches_is_that_of_lower_ones(config: CRDConfig, cache: bool) -> None:
    # The anchor has two rows for one: 6 rows hold 4 images of a rollout, and 2 of the rows of a micro-batch.
    config = replace(config, cache_references=cache)
    trainer = CRDTrainer(args=config)
    run_out_above(trainer, 6)
    found = state_after(trainer)
    assert (trainer.rollout_batch.rows, trainer.micro_batch.rows) == (4, 2)
    assert_equal(found, state_after(CRDTrainer(args=replace(config, rollout_batch=4, micro_batch=2))))


@pytest.mark.parametrize("overlap", [False, True])
def test_trajectories_are_kept_and_trained_again(config: CRDConfig, overlap: bool) -> None:
    """Memory runs out once all images have left something behind, and once a part of the gradient is there."""
    config = replace(
        config, objective="flow_grpo", sampler_start=0.0, sampler_slope=0.0, clip_range=1e-3, rollout_batch=4,
        micro_batch=4, timestep_fraction=1.0, eval_prompts=None,
    )  # fmt: skip
    trainer = CRDTrainer(args=replace(config, overlap_rewards=overlap))
    run_out_at(trainer, drawing=4, training=2)
    found = state_after(trainer)
    assert (trainer.rollout_batch.rows, trainer.micro_batch.rows) == (2, 2)
    assert_equal(found, state_after(CRDTrainer(args=replace(config, rollout_batch=2, micro_batch=2))))


def test_a_whole_run_likewise(config: CRDConfig, tmp_path: Path) -> None:
    config = replace(config, updates=1, group_size=2)
    trainer = CRDTrainer(args=config)
    run_out_above(trainer, 2)
    trainer.train()
    small = replace(config, micro_batch=1, rollout_batch=1, output_dir=str(tmp_path / "small"))
    CRDTrainer(args=small).train()
    for kind in ("train", "eval"):
        found, wanted = ([
            {name: value for name, value in line.items() if "seconds" not in name and name != "time"}
            for line in read_metrics(Path(run.output_dir), kind)
        ] for run in (config, small))  # fmt: skip
        assert found == wanted


def test_too_little_for_one_row_ends_the_run(config: CRDConfig) -> None:
    trainer = CRDTrainer(args=config)
    run_out_above(trainer, 0)
    with pytest.raises(CRDError, match=r"rollout_batch=1.*; try base_dtype=bfloat16, .*gradient_checkpointing=true"):
        trainer.update()


# Several processes, of which one runs out.


def as_rank(folder: Path, config: CRDConfig, small: CRDConfig) -> None:
    rank = int(os.environ["RANK"])
    trainers = [CRDTrainer(args=replace(config, overlap_rewards=True)), CRDTrainer(args=small)]
    if rank == 1:
        run_out_above(trainers[0], 4)
    found = [state_after(trainer, 1) for trainer in trainers]
    rows = [(trainer.rollout_batch.rows, trainer.micro_batch.rows) for trainer in trainers]
    if rank == 1:
        run_out_above(trainers[0], 0)
    try:
        trainers[0].update()
        end = ""
    except CRDError as error:
        end = str(error)
    (folder / f"found-{rank}").write_bytes(pickle.dumps((found, rows, end)))


def test_processes_lower_together_when_one_runs_out(config: CRDConfig, tmp_path: Path) -> None:
    config = replace(config, prompts_per_update=3, group_size=3, draws=1, learning_rate=1e-3)
    small = replace(config, rollout_batch=2, micro_batch=1)
    ended = run_gang(2, tmp_path / "printed", as_rank, tmp_path, config, small)
    assert [rank.status for rank in ended] == [0, 0], ended
    for rank in (0, 1):
        (first, second), rows, end = pickle.loads((tmp_path / f"found-{rank}").read_bytes())
        assert rows == [(2, 1), (2, 1)]
        assert_equal(first, second)
        assert "memory ran out at rollout_batch=1" in end
    assert ended[0].out.count("memory ran out: micro_batch is 1") == 1
    assert ended[1].out == ""


def strand(folder: Path) -> None:
    ranks = Engine(device="cpu", peer_timeout=60).ranks

    def work() -> None:
        if ranks.rank == 1:
            raise torch.OutOfMemoryError(FULL)

    try:
        with ranks.together():
            in_memory(work, ranks, sharded=True)
            ranks.meet()
    except CRDError as error:
        (folder / f"heard-{ranks.rank}").write_text(json.dumps([type(error).__name__, str(error)]))


def test_sharded_processes_end_together(tmp_path: Path) -> None:
    ended = run_gang(2, tmp_path / "printed", strand, tmp_path)
    assert [rank.status for rank in ended] == [0, 0], ended
    heard = [json.loads((tmp_path / f"heard-{rank}").read_text()) for rank in (0, 1)]
    assert [name for name, _ in heard] == ["PeerFailedError", StrandedError.__name__]
    assert all("cannot repeat their part of a sharded call; lower micro_batch" in text for _, text in heard)
