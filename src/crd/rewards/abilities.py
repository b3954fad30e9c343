"""What a reward may carry beside being callable; `crd.rewards.base` says what each is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class SelfTesting(Protocol):
    def self_test(self) -> Sequence[float] | None: ...


@runtime_checkable
class PromptChecking(Protocol):
    def check_prompts(self, prompts: Sequence[str]) -> None: ...


@runtime_checkable
class ColumnChecking(Protocol):
    def check_columns(self, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None: ...


@runtime_checkable
class DeviceUsing(Protocol):
    def use_device(self, device: str) -> None: ...


@runtime_checkable
class Ranged(Protocol):
    score_range: tuple[float, float]


@runtime_checkable
class Judging(Protocol):
    judge_name: str


@runtime_checkable
class Named(Protocol):
    reward_name: str


@runtime_checkable
class GapLeaving(Protocol):
    leaves_gaps: bool


@runtime_checkable
class Waiting(Protocol):
    @property
    def wait_s(self) -> float: ...
