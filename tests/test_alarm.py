"""The reward-hacking alarm on evaluations made by hand: when each rule speaks, and when it must not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from eval_records import DRIFT, PROMPTS, record, spread

from crd import alarm
from crd.alarm import LEVEL, NOTE, WARN, Evaluated, Event, check, fallen
from crd.eval_record import EvalRecord
from crd.metrics.bootstrap import Interval, bca_interval, paired_difference

HELD_OUT = "held_out_clip"
QUIET = spread(0.5)  # of a column that is not the subject


def heard(records: Sequence[EvalRecord], guided: EvalRecord | None = None) -> list[Event]:
    """Events of the last of some evaluations, of which the first is the base model's."""
    history = [Evaluated(25 * number, one) for number, one in enumerate(records)]
    return check(history, records[0] if guided is None else guided)


def told(records: Sequence[EvalRecord], guided: EvalRecord | None = None) -> list[tuple[str, str, str | None]]:
    return [(event.rule, event.level, event.column) for event in heard(records, guided)]


def scored(reward: float, held_out: float, seed: int = 0) -> EvalRecord:
    """Every prompt keeps its own place; what `seed` names is noise around it."""
    noise = [spread(0.0, 0.02, seed=seed + n) for n in (1000, 2000)]
    return record({"reward": spread(reward) + noise[0], HELD_OUT: spread(held_out, seed=1) + noise[1]})


BASE = scored(0.5, 0.3)


def test_the_base_model_itself_is_never_judged() -> None:
    assert heard([BASE], scored(9.0, -9.0)) == []


def test_held_out_falls() -> None:
    event, turned = heard([BASE, scored(0.6, 0.2, seed=1)])
    assert (turned.level, turned.rule, turned.numbers["since"]) == (NOTE, "held_out_turns", 0)  # the base was the best
    assert (event.update, event.level, event.rule, event.column) == (25, WARN, "held_out_falls", HELD_OUT)
    assert event.numbers["gain"] == pytest.approx(0.1)
    assert event.numbers["change"] == pytest.approx(-0.1)
    assert event.numbers["change"] < event.numbers["high"] < 0
    assert event.message == "since the base model the reward rose 0.100 but held_out_clip fell 0.100"


@pytest.mark.parametrize(
    "now",
    [
        scored(0.5, 0.3, seed=1),  # noise alone
        scored(0.6, 0.3, seed=1),  # a success
        scored(0.6, 0.4, seed=1),
        scored(0.4, 0.2, seed=1),  # worse in both: no hacking
        scored(0.5, 0.2, seed=1),  # the reward stands still
        scored(0.6, 0.299, seed=1),  # a fall within the noise
    ],
    ids=["noise", "reward rises", "both rise", "both fall", "held-out falls alone", "within noise"],
)
def test_held_out_stays_silent(now: EvalRecord) -> None:
    assert heard([BASE, now]) == []


def test_held_out_turns_is_noted_once_and_warned_of_twice() -> None:
    rising, turning, falling = scored(0.6, 0.5, seed=1), scored(0.7, 0.45, seed=2), scored(0.8, 0.4, seed=3)
    turned = ("held_out_turns", NOTE, HELD_OUT)
    assert told([BASE, rising]) == []
    assert told([BASE, rising, turning]) == [turned]
    assert told([BASE, rising, turning, falling]) == [("held_out_turns", WARN, HELD_OUT)]
    event = heard([BASE, rising, turning, falling])[0]
    assert event.numbers["since"] == 25
    assert event.numbers["change"] == pytest.approx(-0.1)
    # A recovery in between starts the count anew; a fall without a gain is no turn.
    assert told([BASE, rising, turning, scored(0.8, 0.5, seed=3), falling]) == [turned]
    assert told([BASE, rising, scored(0.6, 0.45, seed=2)]) == []


def test_changes_that_all_prompts_share_count_without_an_interval() -> None:
    """Equal changes have no noise to exceed; one prompt, or no change, says nothing."""
    base = record({"reward": QUIET, HELD_OUT: QUIET})
    same = record({"reward": QUIET + 0.25, HELD_OUT: QUIET})
    lower = record({"reward": QUIET + 0.25, HELD_OUT: QUIET - 0.25})
    assert heard([base, same]) == []
    assert heard([base, base]) == []
    change = fallen(lower, base, HELD_OUT)
    assert change is not None
    assert not change.known
    assert told([base, lower]) == [("held_out_falls", WARN, HELD_OUT), ("held_out_turns", NOTE, HELD_OUT)]
    one = [record({"reward": [reward], HELD_OUT: [score]}) for reward, score in ((0.0, 1.0), (1.0, 0.0))]
    assert heard(one) == []


def without(one: EvalRecord, rows: slice) -> EvalRecord:
    """The same with gaps in the held-out score."""
    gaps = one.scores[HELD_OUT].copy()
    gaps[rows] = np.nan
    return replace(one, scores={**one.scores, HELD_OUT: gaps})


def test_gaps_in_a_held_out_score() -> None:
    hacked, half = scored(0.7, 0.1, seed=1), PROMPTS  # images, of 2 * PROMPTS
    whole = slice(None)
    found = told([BASE, without(hacked, slice(half))])
    assert ("held_out_falls", WARN, HELD_OUT) in found  # by the prompts that are left
    for records in (
        [BASE, without(hacked, whole)],
        [without(BASE, whole), hacked],
        [without(BASE, whole), without(hacked, whole)],
        [without(BASE, slice(half)), without(hacked, slice(half, None))],  # no image has both scores
    ):
        assert heard(records) == []
    # An evaluation without the score is not the best one.
    assert told([BASE, scored(0.6, 0.5, seed=1), without(hacked, whole), scored(0.7, 0.4, seed=2)]) == [
        ("held_out_turns", NOTE, HELD_OUT)
    ]


def diverse(mean: float, seed: int = 0) -> EvalRecord:
    return record({"reward": QUIET}, diversity=spread(mean, 0.02, seed=seed))


def test_diversity_collapses() -> None:
    base, guided = diverse(0.3), diverse(0.2, seed=1)
    for now, level in ((0.19, None), (0.16, NOTE), (0.12, WARN)):
        events = heard([base, diverse(now, seed=2)], guided)
        assert [event.level for event in events] == ([] if level is None else [level]), now
    (event,) = heard([base, diverse(0.12, seed=2)], guided)
    assert event.numbers["share"] == pytest.approx(0.6)
    assert event.message == "images of one prompt differ 60% as much as the base model's"
    # Whichever of the two bases is the less diverse one is the measure.
    assert told([guided, diverse(0.16, seed=2)], base) == [("diversity_collapses", NOTE, "diversity")]
    assert heard([base, diverse(0.25, seed=2)], guided) == []
    # Two prompts, one up and one down: below the share, but within noise.
    pair = [record({"reward": [0.1, 0.2]}, diversity=np.array(values)) for values in ([0.3, 0.3], [0.0, 0.31])]
    assert heard(pair) == []


def test_diversity_of_single_images_and_of_equal_ones() -> None:
    alone = record({"reward": QUIET}, images=1)
    assert np.isnan(alone.diversity).all()
    assert heard([alone, alone]) == []
    equal = record({"reward": QUIET}, diversity=np.zeros(PROMPTS))
    assert heard([equal, equal]) == []
    assert heard([equal, diverse(0.1)]) == []
    assert told([diverse(0.1), equal]) == [("diversity_collapses", WARN, "diversity")]


def pixels(mean: float, deviation: float = 0.1) -> EvalRecord:
    return record({"reward": QUIET}, images=1, statistics={"edge_density": spread(mean, deviation)})


@pytest.mark.parametrize(
    ("now", "level"),
    [
        (0.5, None), (0.6, None), (0.44, None), (0.76, None),  # between the bases, and 0.6 deviations beyond
        (0.43, NOTE), (0.77, NOTE),
        (0.39, WARN), (0.81, WARN),
    ],
)  # fmt: skip
def test_a_statistic_leaves_the_range_of_both_bases(now: float, level: str | None) -> None:
    base, guided = pixels(0.5), pixels(0.7, 0.05)
    for first, second in ((base, guided), (guided, base)):
        expected = [] if level is None else [("statistic_leaves_range", level, "edge_density")]
        assert told([first, pixels(now)], second) == expected


def test_numbers_of_a_statistic() -> None:
    (event,) = heard([pixels(0.5), pixels(0.3)], pixels(0.7))
    assert event.numbers == pytest.approx({"value": 0.3, "low": 0.5, "high": 0.7, "deviations": 2.0})
    flat = pixels(0.5, 0.0)
    assert heard([flat, pixels(0.5)]) == []
    assert heard([flat, pixels(0.9)]) == []  # images that are all alike have no scale to judge by


def moved(kl: float, norm: float = 1.0) -> EvalRecord:
    return record({"reward": QUIET}, drift={"kl_to_anchor": kl, "velocity_norm": norm})


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (moved(0.29), []),
        (moved(0.0), []),
        (moved(0.31), [("velocities_drift", NOTE, "kl_to_anchor")]),
        (moved(0.61), [("velocities_drift", WARN, "kl_to_anchor")]),
        (moved(0.1, 1.79), []),  # 20% beyond the guided base's 1.5
        (moved(0.1, 1.81), [("velocities_drift", NOTE, "velocity_norm")]),
        (moved(0.1, 0.79), [("velocities_drift", NOTE, "velocity_norm")]),
        (moved(9.9, 9.9), [("velocities_drift", WARN, "kl_to_anchor"), ("velocities_drift", NOTE, "velocity_norm")]),
        (moved(np.nan, np.nan), []),
    ],
)
def test_velocities_drift(now: EvalRecord, expected: list[tuple[str, str, str]]) -> None:
    assert told([moved(DRIFT["kl_to_anchor"]), now], moved(0.0, 1.5)) == expected


def test_an_anchor_without_guidance_has_no_distance_to_begin_with() -> None:
    assert heard([moved(0.0), moved(5.0)]) == []


def shuffled(one: EvalRecord, images: np.ndarray, prompts: np.ndarray) -> EvalRecord:
    """The same evaluation with its images in another order and its prompts under other numbers."""
    place = np.argsort(prompts)
    return replace(
        one,
        prompts=[one.prompts[index] for index in prompts],
        prompt_id=place[one.prompt_id][images],
        scores={name: values[images] for name, values in one.scores.items()},
        statistics={name: values[images] for name, values in one.statistics.items()},
        diversity=one.diversity[prompts],
    )


def test_the_order_of_images_and_prompts_changes_nothing() -> None:
    records = [
        record(
            {"reward": spread(0.5 + 0.1 * step, seed=step), HELD_OUT: spread(0.5 + value, 0.02, seed=10 + step)},
            statistics={"brightness": spread(0.5 - 0.2 * step, seed=20 + step)},
            diversity=spread(0.4 - 0.1 * step, 0.02, seed=30 + step),
        )
        for step, value in enumerate((0.0, 0.3, 0.1, -0.2))
    ]
    rng = np.random.default_rng(0)
    images, prompts = rng.permutation(2 * PROMPTS), rng.permutation(PROMPTS)
    wanted = heard(records)
    assert {event.rule for event in wanted} == {
        "held_out_falls", "held_out_turns", "diversity_collapses", "statistic_leaves_range"
    }  # fmt: skip
    got = heard([shuffled(one, images, prompts) for one in records])
    for mine, theirs in zip(got, wanted, strict=True):
        assert replace(mine, numbers={}) == replace(theirs, numbers={})
        assert mine.numbers == pytest.approx(theirs.numbers, rel=1e-9)


COLUMNS = ("reward", "held_out_a", "held_out_b", "held_out_c")


def null_run(seed: int, evaluations: int = 5, prompts: int = 128) -> list[EvalRecord]:
    """A run whose reward rises for certain, and whose held-out scores are noise around what a prompt is worth."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(4, prompts)) + rng.normal(size=(evaluations, 4, prompts))
    scores[:, 0] += np.arange(evaluations)[:, None]
    return [record(dict(zip(COLUMNS, rows, strict=True)), images=1) for rows in scores]


def test_false_alarms_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured: 3.0% of 200 null runs warn (6 of them), 3.6% of 1000; with two evaluations more, 6.7% of 1000.

    At LEVEL 0.99 it would be 3.5%, 5.2% and over 7%. Notes come in 8% of runs.
    """
    intervals: dict[bytes, Interval] = {}

    def known(a: np.ndarray, b: np.ndarray, prompt_id: np.ndarray, *, level: float) -> Interval:
        return intervals[(a - b).tobytes()]

    first = null_run(0)
    real = paired_difference(first[1].scores["reward"], first[0].scores["reward"], first[0].prompt_id, level=LEVEL)
    # The same intervals, those of one run at a time: one by one they would take half a minute.
    monkeypatch.setattr(alarm, "paired_difference", known)
    warned = 0
    for seed in range(200):
        records = null_run(seed)
        pairs = [(now, then) for index, then in enumerate(records) for now in records[index + 1 :]]
        differences = [now.scores[name] - then.scores[name] for now, then in pairs for name in COLUMNS]
        low, high = bca_interval(np.stack(differences, axis=1), level=LEVEL)
        for row, values in enumerate(differences):
            intervals[values.tobytes()] = Interval(float(values.mean()), low[row], high[row], LEVEL, len(values))
        events = [event for stop in range(2, len(records) + 1) for event in heard(records[:stop])]
        warned += any(event.level == WARN for event in events)
    assert warned <= 0.05 * 200
    batched = intervals[(first[1].scores["reward"] - first[0].scores["reward"]).tobytes()]
    assert (batched.low, batched.high) == pytest.approx((real.low, real.high))
