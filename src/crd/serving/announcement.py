"""What a reward server says of its rewards and of itself, so that a run can be checked before it asks for scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from crd.errors import CRDError
from crd.rewards import RewardSet
from crd.rewards.signature import ColumnUse
from crd.serving.wire import PROTOCOL
from crd.serving.wire_images import ENCODINGS
from crd.setting_checks import check_count

LARGEST_PIXELS = Image.MAX_IMAGE_PIXELS or 0  # beyond it Pillow itself speaks of a bomb


@dataclass(frozen=True)
class Limits:
    """The largest request that a server takes."""

    max_images: int = 64
    max_body: int = 64_000_000  # bytes
    max_pixels: int = 2**24  # of all images of a request together: 64 of 512 x 512

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            check_count(name, value, "a reward server", 1)
        if self.max_pixels > LARGEST_PIXELS:
            raise CRDError(f"max_pixels of a reward server must be at most {LARGEST_PIXELS}, got {self.max_pixels}")


@dataclass(frozen=True)
class RewardCard:
    """One reward that a server offers."""

    name: str
    required: tuple[str, ...]  # dataset columns
    optional: tuple[str, ...]
    everything: bool  # it takes all columns
    range: tuple[float, float] | None
    judge: str | None  # what it judges by, if it says so

    @property
    def columns(self) -> ColumnUse:
        return ColumnUse(self.name, self.required, self.optional, self.everything, ("images", "prompts"))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ServerInfo:
    """The answer to `GET /v1/info`."""

    rewards: tuple[RewardCard, ...]
    limits: Limits

    @classmethod
    def of(cls, rewards: RewardSet, limits: Limits) -> ServerInfo:
        """Of a server of these rewards."""
        cards = [
            RewardCard(reward.name, use.required, use.optional, use.everything, reward.range, reward.judge)
            for reward, use in zip(rewards.rewards, rewards.uses, strict=True)
        ]
        return cls(tuple(cards), limits)

    @property
    def names(self) -> list[str]:
        return [card.name for card in self.rewards]

    def to_dict(self) -> dict[str, Any]:
        return {
            "protocol": PROTOCOL,
            "rewards": [card.to_dict() for card in self.rewards],
            "limits": dataclasses.asdict(self.limits),
            "encodings": list(ENCODINGS),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ServerInfo:
        """What a server's answer says.

        Raises:
            CRDError: another protocol, or values that do not fit.
        """
        if values.get("protocol") != PROTOCOL:
            raise CRDError(f"protocol must be {PROTOCOL}, got {values.get('protocol')!r:.40}; run the same version")
        _check_keys(values, {"protocol", "rewards", "limits", "encodings"}, "the answer")
        if values["encodings"] != list(ENCODINGS):
            raise CRDError(f"encodings must be {list(ENCODINGS)}, got {values['encodings']!r:.60}")
        rewards, limits = values["rewards"], values["limits"]
        if not isinstance(rewards, list) or not isinstance(limits, dict):
            raise CRDError("rewards must be a list, and limits an object")
        _check_keys(limits, {field.name for field in dataclasses.fields(Limits)}, "limits")
        return cls(tuple(_card(card) for card in rewards), Limits(**limits))


def _card(values: Any) -> RewardCard:
    if not isinstance(values, dict):
        raise CRDError(f"a reward must be an object, got {values!r:.60}")
    _check_keys(values, {field.name for field in dataclasses.fields(RewardCard)}, "a reward")
    name, everything, judge, span = (values[key] for key in ("name", "everything", "judge", "range"))
    columns = [values["required"], values["optional"]]
    typed = isinstance(name, str) and isinstance(everything, bool) and (judge is None or isinstance(judge, str))
    listed = all(isinstance(names, list) and all(isinstance(one, str) for one in names) for names in columns)
    if not typed or not listed or not (span is None or _is_range(span)):
        raise CRDError(f"a reward has values of wrong types: {values!r:.100}")
    required, optional = (tuple(names) for names in columns)
    return RewardCard(name, required, optional, everything, None if span is None else (span[0], span[1]), judge)


def _is_range(span: Any) -> bool:
    numbers = isinstance(span, list) and len(span) == 2 and all(type(end) in (int, float) for end in span)
    return numbers and span[0] <= span[1]


def _check_keys(values: Mapping[str, Any], keys: set[str], what: str) -> None:
    if set(values) != keys:
        raise CRDError(f"{what} needs the keys {', '.join(sorted(keys))}, got {sorted(values)!r:.150}")
