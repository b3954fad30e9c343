from __future__ import annotations

import pytest

from crd.errors import CRDError
from crd.schedules import KLRamp, LearningRate, RampDecay


def test_published_old_schedule() -> None:
    old = RampDecay(0.25, 0.005, 0, 0.999)
    assert old.decay(0) == 0.25
    assert old.decay(1) == pytest.approx(0.255)
    assert old.decay(100) == pytest.approx(0.75)
    assert old.decay(149) == pytest.approx(0.995)
    assert old.decay(150) == 0.999


def test_published_sampler_schedule() -> None:
    sampler = RampDecay(0.0, 0.0075, 75, 0.999)
    assert [sampler.decay(n) for n in (0, 74, 75)] == [0.0, 0.0, 0.0]
    assert sampler.decay(76) == pytest.approx(0.0075)
    assert sampler.decay(175) == pytest.approx(0.75)
    assert sampler.decay(1000) == 0.999


def test_zero_slope_is_constant() -> None:
    assert {RampDecay(0.5, 0.0, 3, 0.9).decay(n) for n in range(10)} == {0.5}


@pytest.mark.parametrize(
    ("start", "slope", "start_step", "end", "message"),
    [
        (-0.1, 0.1, 0, 0.9, "start <= end"),
        (0.5, 0.1, 0, 0.4, "start <= end"),
        (0.5, 0.1, 0, 1.1, "start <= end"),
        (float("nan"), 0.1, 0, 0.9, "start <= end"),
        (0.5, -0.1, 0, 0.9, "slope"),
        (0.5, 0.1, -1, 0.9, "start_step"),
    ],
)
def test_values_out_of_range_are_told(start: float, slope: float, start_step: int, end: float, message: str) -> None:
    with pytest.raises(CRDError, match=message):
        RampDecay(start, slope, start_step, end)


def test_a_negative_step_is_told() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        RampDecay(0.0, 0.1, 0, 0.9).decay(-1)


def test_learning_rate_rises_stays_and_falls() -> None:
    schedule = LearningRate(peak=0.8, warmup_steps=3, cooldown_updates=4, updates=10)
    assert [schedule.rate(step, 0) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert [schedule.rate(100, update) for update in range(5, 10)] == pytest.approx([0.8, 0.8, 0.6, 0.4, 0.2])


def test_learning_rate_without_ramps_is_constant() -> None:
    schedule = LearningRate(peak=0.8, warmup_steps=0, cooldown_updates=0, updates=10)
    assert {schedule.rate(step, update) for step in (0, 7) for update in (0, 9)} == {0.8}


def test_a_fall_longer_than_the_run_is_refused() -> None:
    with pytest.raises(CRDError, match=r"cooldown_updates must lie in 0\.\.updates=10, got 11"):
        LearningRate(0.8, 0, 11, 10)


@pytest.mark.parametrize(("start", "updates", "wanted"), [
    (8.0, 3, [8.0, 4.0, 2.0, 1.0, 1.0]), (0.25, 2, [0.25, 0.5, 1.0, 1.0]), (8.0, 0, [1.0, 1.0]), (1.0, 3, [1.0] * 5),
])  # fmt: skip
def test_the_factor_of_the_kl_goes_to_one_by_equal_ratios(start: float, updates: int, wanted: list[float]) -> None:
    assert [KLRamp(start, updates).scale(done) for done in range(len(wanted))] == pytest.approx(wanted, abs=1e-15)
