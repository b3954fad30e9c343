"""Numbers and names as a person reads them; `page/format.js` writes numbers the same way."""

from __future__ import annotations

import math
from collections.abc import Iterable

from crd.eval_record import HELD_OUT, REWARD, STATISTIC

MINUS = "\u2212"

_TITLES = {
    "reward": "Reward",
    "kl_to_anchor": "KL to the anchor",
    "kl_to_base": "KL to the base model",
    "kl": "KL in training",
    "diversity": "Diversity within a prompt",
    "velocity_norm": "Norm of the velocity",
    "stat_dark_pixel_fraction": "Dark pixels",
    "stat_edge_density": "Edge density",
    "stat_color_entropy": "Color entropy",
    "stat_saturation": "Saturation",
    "stat_brightness": "Brightness",
}


def number(value: float) -> str:
    """Digits that tell something: 0.847, 22.34, 6,912, 3.1e-05; a dash for NaN."""
    if math.isnan(value):
        return "–"
    size = abs(value)
    if size == 0:
        text = "0"
    elif size < 1e-4:
        text = f"{size:.1e}"
    elif size < 0.01:
        text = f"{size:.2g}"
    elif value == int(value):
        text = f"{size:,.0f}"
    else:
        text = f"{size:,.{3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0}f}"
    return f"{MINUS}{text}" if value < 0 else text


def signed(value: float) -> str:
    """A difference, its sign always told."""
    return number(value) if math.isnan(value) or value <= 0 else f"+{number(value)}"


def duration(seconds: float) -> str:
    """Two units at most: 41 s, 9 min 42 s, 2 h 13 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def title(metric: str) -> str:
    """A metric of metrics.jsonl in words: `held_out_clipscore` is "Held out: clipscore"."""
    if is_reward(metric):
        return "Reward: " + metric.removeprefix(REWARD).replace("_", " ")
    if metric.startswith(HELD_OUT):
        return "Held out: " + metric.removeprefix(HELD_OUT).replace("_", " ")
    plain = metric.removeprefix(STATISTIC).replace("_", " ")
    return _TITLES.get(metric, plain[:1].upper() + plain[1:])


def is_reward(metric: str) -> bool:
    """Whether it is one of the rewards that the total is made of."""
    return metric.startswith(REWARD) and metric != "reward_correlation"  # a metric of crd in runs of earlier versions


def distinct(metrics: Iterable[str]) -> list[str]:
    """The metrics without what would be told twice: a total of one reward is that reward."""
    found = list(metrics)
    parts = [metric for metric in found if is_reward(metric)]
    return [metric for metric in found if metric not in parts] if len(parts) == 1 and "reward" in found else found


def count(number_of: int, noun: str) -> str:
    """1 image, 2 images, 6,912 images."""
    return f"{number_of:,} {noun}" if number_of == 1 else f"{number_of:,} {noun}s"
