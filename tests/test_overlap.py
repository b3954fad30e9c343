"""Rewards beside rollouts: the same run bit by bit, really beside each other, and no thread is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image
from reward_functions import brightness, raising
from test_batch_sizes import assert_equal, run_out_above, state_after

from crd.config import CRDConfig
from crd.errors import CRDError
from crd.trainer import CRDTrainer

IMAGES = 8  # of an update of `config`


@pytest.fixture
def overlapping(config: CRDConfig) -> CRDConfig:
    return replace(config, overlap_rewards=True, rollout_batch=3, micro_batch=3)


def on_call(trainer: CRDTrainer, action: Callable[[int], None]) -> None:
    """`action(rows)` at every call of the denoiser."""
    trainer.backbone.denoiser.register_forward_pre_hook(
        lambda module, args, inputs: action(len(inputs["hidden_states"])), with_kwargs=True
    )


def left_behind() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("rewards")]


@pytest.mark.parametrize("cache", [True, False])
def test_an_update_is_the_same_and_no_longer(overlapping: CRDConfig, cache: bool) -> None:
    overlapping = replace(overlapping, cache_references=cache)
    found, rows = [], []
    for config in (overlapping, replace(overlapping, overlap_rewards=False)):
        trainer, calls = CRDTrainer(args=config), []
        on_call(trainer, calls.append)
        found.append(state_after(trainer))
        rows.append(sorted(calls))
    assert_equal(*found)
    assert rows[0] == rows[1]


def test_memory_may_run_out_meanwhile(overlapping: CRDConfig) -> None:
    trainer = CRDTrainer(args=replace(overlapping, rollout_batch=32, micro_batch=32))
    run_out_above(trainer, 6)
    small = replace(overlapping, overlap_rewards=False, rollout_batch=4, micro_batch=2)
    assert_equal(state_after(trainer), state_after(CRDTrainer(args=small)))


def test_images_are_drawn_and_references_computed_while_rewards_are_pending(overlapping: CRDConfig) -> None:
    """A reward that waits for the network would wait forever if they took turns."""
    calls: list[int] = []
    judged: list[int] = []

    def waiting(images: list[Image.Image], prompts: list[str]) -> list[float]:
        before, deadline = len(calls), time.monotonic() + 60
        judged.append(len(images))
        while len(calls) == before:
            assert time.monotonic() < deadline, "the network does nothing meanwhile"
            time.sleep(0.001)
        return brightness(images, prompts)

    trainer = CRDTrainer(reward_funcs=waiting, args=overlapping)
    on_call(trainer, calls.append)
    metrics = trainer.update()
    assert judged == [3, 3, 2]
    assert metrics["images"] == IMAGES
    assert left_behind() == []


def test_a_reward_that_fails_is_told_as_without_a_thread(overlapping: CRDConfig) -> None:
    messages = []
    for overlap in (True, False):
        trainer = CRDTrainer(reward_funcs=raising, args=replace(overlapping, overlap_rewards=overlap))
        with pytest.raises(CRDError) as caught:
            trainer.update()
        messages.append(str(caught.value))
        assert trainer.progress.optimizer_steps == 0
    assert messages[0] == messages[1] == (
        "reward 'raising' raised RuntimeError: the scorer has no weights; fix the reward"
    )  # fmt: skip
    assert left_behind() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_no_thread_is_left_when_drawing_breaks_off(overlapping: CRDConfig, error: type[BaseException]) -> None:
    judged, broken = [], threading.Event()

    def slow(images: list[Image.Image], prompts: list[str]) -> list[float]:
        broken.wait(60)
        time.sleep(0.5)  # for the one who broke off to say so
        judged.append(len(images))
        return brightness(images, prompts)

    trainer = CRDTrainer(reward_funcs=slow, args=overlapping)
    calls: list[Any] = []

    def breaks(rows: int) -> None:
        calls.append(rows)
        if len(calls) == 5:  # in the third of three micro-batches of two steps each
            broken.set()
            raise error

    on_call(trainer, breaks)
    with pytest.raises(error):
        trainer.update()
    assert left_behind() == []
    assert judged == [3]  # what was at work is finished, what waited is dropped
