"""What a run came to: its rewards and held-out scores at the moments that matter, and how far it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Column, Table

from crd.eval_record import HELD_OUT, REWARD
from crd.training_state import Progress

Scores = Mapping[str, Mapping[str, float]]  # moment -> score -> mean


def moments(
    evaluations: Sequence[Mapping[str, Any]],
    best: int | None,
    anchor: Mapping[str, float] | None,
    base: Mapping[float, Mapping[str, float]],
) -> Scores:
    """Means of a run's evaluations by what they are of: `before`, `after`, `best`, `anchor`, `base_cfg`.

    Args:
        evaluations: of the policy, oldest first, each with its `update`.
        best: update of the best checkpoint.
        anchor: the base model at `anchor_guidance`.
        base: CFG scale -> the base model; the scale of the highest total goes in.
    """
    if not evaluations:
        return {}
    found = {"before": evaluations[0], "after": evaluations[-1]}
    chosen = [one for one in evaluations if one["update"] == best]
    if chosen:
        found["best"] = chosen[0]
    if anchor is not None:
        found["anchor"] = dict(anchor)
    if base:
        scale = max(base, key=lambda one: base[one]["reward"])
        found["base_cfg"] = {**base[scale], "base_cfg_scale": scale}
    return found


def summary(progress: Progress, found: Scores) -> dict[str, float]:
    """The content of summary.json: `SCORE_MOMENT` for every score and moment that has it, and what was done."""
    scores = {f"{name}_{moment}": means[name]
              for name in _names(found) for moment, means in found.items() if name in means}  # fmt: skip
    if "base_cfg" in found:
        scores["base_cfg_scale"] = found["base_cfg"]["base_cfg_scale"]
    if "best" in found:
        scores["best_update"] = found["best"]["update"]
    return {
        **scores,
        "steps": progress.optimizer_steps,
        "updates": progress.updates_done,
        "seconds": progress.seconds,
        "images": progress.images_drawn,
    }


def summary_table(progress: Progress, found: Scores, run: str) -> Table:
    """The same for people: a row for each score, a column for each moment."""
    done = (f"updates: {progress.updates_done}, optimizer steps: {progress.optimizer_steps}, "
            f"images: {progress.images_drawn}, seconds: {progress.seconds:.1f}")  # fmt: skip
    table = Table(
        Column(no_wrap=True), *(_title(moment, means) for moment, means in found.items()), title=run, caption=done
    )
    for name in _names(found):
        table.add_row(name, *(f"{means[name]:.3f}" if name in means else "-" for means in found.values()))
    return table


def _names(found: Scores) -> list[str]:
    """Scores of the first and the last evaluation: a score that applies to none of the images has no mean."""
    both = [name for name in found.get("before", {}) if name in found["after"]]
    rewards = [name for name in both if name == "reward" or name.startswith(REWARD)]
    # A total of one reward is that reward.
    return [*(rewards if len(rewards) > 2 else rewards[:1]), *(name for name in both if name.startswith(HELD_OUT))]


def _title(moment: str, means: Mapping[str, float]) -> str:
    if moment == "best":
        return f"best (update {means['update']})"
    if moment == "base_cfg":
        return f"base, CFG {means['base_cfg_scale']:g}"
    return {"anchor": "base as the anchor"}.get(moment, moment)
