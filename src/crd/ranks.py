"""The processes of a run, and the little they tell each other: numbers, a few pictures, and that one has failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from crd.errors import CRDError, PeerFailedError, PeerLostError, StrandedError
from crd.shares import Share

T = TypeVar("T")

_TOLD = 500  # bytes of a failure that the other processes hear
_FAREWELL = 60.0  # s that a process which broke down waits for the others; they may be inside a call of the network
_SAME = 1e-5  # replicas are equal up to this, relative; processors of different kinds round differently


class Ranks:
    """Process `rank` of `world_size`. Messages travel over gloo on the CPU, whatever the gradients take.

    Every exchange begins with whether somebody has failed, and a process that fails says so in its last one. So a
    failure reaches all, at their next exchange, and none waits for a process that has gone.

    Args:
        rank: of this process.
        world_size: number of processes.
        timeout: s after which a process that does not come to an exchange counts as lost.
    """

    def __init__(self, rank: int, world_size: int, timeout: float) -> None:
        self.rank, self.world_size, self._timeout = rank, world_size, timeout
        several = world_size > 1
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if several else None
        self._told: Exception | None = None  # the failure of this process that the others know of

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def share(self, *parts: Tensor | int) -> Share:
        """Deal things out; a number n stands for the things 0 to n - 1. See `Share.deal`."""
        things = [torch.arange(part) if isinstance(part, int) else part for part in parts]
        return Share.deal(things, self.rank, self.world_size)

    def gather(self, share: Share, values: Tensor) -> Tensor:
        """Values of all things, on all processes.

        Args:
            share: of n things.
            values: (k, ...), one for each of this process's `share.places`.

        Returns:
            (n, ...) in the order of the things, without gradient, on the device of `values`.

        Raises:
            PeerFailedError, PeerLostError: another process is gone.
        """
        mine = self._fill(share, values.detach())
        if self.world_size == 1:
            return share.collect(mine[None])
        self.meet()
        return share.collect(self._everyone(mine.cpu())).to(values.device)

    def gather_to_main(self, share: Share, values: Tensor) -> Tensor | None:
        """As `gather`, but only for the first process, since only it shows things; None on the others."""
        mine = self._fill(share, values)
        if self.world_size == 1:
            return share.collect(mine[None])
        self.meet()
        parts = [torch.empty_like(mine) for _ in range(self.world_size)] if self.is_main else None
        with self.loss_told():
            dist.gather(mine, parts, group=self._group)
        return None if parts is None else share.collect(torch.stack(parts))

    def total(self, values: Tensor) -> Tensor:
        """The sum over processes of `values` (...), on the CPU."""
        if self.world_size == 1:
            return values
        self.meet()
        return self._everyone(values).sum(0)

    @torch.no_grad()
    def check_same(self, tensors: Iterable[Tensor], what: str) -> None:
        """Refuse to go on if `tensors` are not the same everywhere, by the sum of their absolute values.

        Raises:
            CRDError: on all processes; `what` names the tensors.
        """
        if self.world_size == 1:
            return
        self.meet()
        size = sum(float(tensor.double().abs().sum()) for tensor in tensors)
        values = self._everyone(torch.tensor([size], dtype=torch.float64))[:, 0]
        if not bool(((values - values[0]).abs() <= _SAME * values[0].abs()).all()):
            raise CRDError(f"{what} must be the same on all processes, got {values.tolist()}; start them alike")

    def meet(self) -> None:
        """Wait for all processes.

        Raises:
            PeerFailedError: one has failed.
            PeerLostError: one is gone without a word.
        """
        if self.world_size > 1:
            self._hear("", self._timeout)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is inside succeeds on all processes, or fails on all: the lowest rank that failed has the word."""
        if self.world_size == 1:
            yield
            return
        try:
            yield
        except (PeerFailedError, PeerLostError):
            raise
        except Exception as error:
            if error is not self._told:
                self._tell(error)
            raise
        self.meet()

    def on_main(self, action: Callable[[], T]) -> T | None:
        """Do something on the first process alone, its result; None on the others, which fail with it."""
        with self.together():
            return action() if self.is_main else None

    def _tell(self, error: Exception) -> None:
        """Let the others know of a failure; raises what takes its place where another process has told it."""
        self._told = error
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, CRDError):
            error.agreed = True
            with suppress(PeerLostError):
                self._hear(str(error) or text, _FAREWELL if isinstance(error, StrandedError) else self._timeout)
            return
        try:
            with suppress(PeerFailedError):  # a traceback is not to be lost
                self._hear(text, _FAREWELL)
        except PeerLostError as lost:
            # torch raises RuntimeError in a collective whose other side is gone.
            if isinstance(error, RuntimeError):
                raise lost from error

    def _hear(self, failure: str, timeout: float) -> None:
        """Exchange failures ("" = none); raises `PeerFailedError` for that of the lowest rank if it is another's."""
        mine = torch.zeros(_TOLD, dtype=torch.uint8)
        content = failure.encode()[:_TOLD]
        mine[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
        for rank, text in enumerate(self._everyone(mine, timeout)):
            if bool(text.any()):
                if rank == self.rank:
                    return
                told = bytes(text.tolist()).rstrip(b"\0").decode(errors="ignore")
                raise PeerFailedError(f"process {rank} failed: {told}")

    def _everyone(self, mine: Tensor, timeout: float | None = None) -> Tensor:
        """`mine` (...) of all processes, (W, ...)."""
        mine = mine.contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        with self.loss_told():
            work = dist.all_gather(parts, mine, group=self._group, async_op=True)
            work.wait(timedelta(seconds=timeout or self._timeout))
        return torch.stack(parts)

    @contextmanager
    def loss_told(self) -> Iterator[None]:
        """What torch raises when the other side of an exchange is gone, as `PeerLostError`."""
        try:
            yield
        except RuntimeError as error:
            raise PeerLostError(
                f"process {self.rank} of {self.world_size} lost another one ({_reason(error)}); see what the others "
                "said, and use --resume"
            ) from error

    def _fill(self, share: Share, values: Tensor) -> Tensor:
        """Values (k, ...) of the places that count -> (m, ...) of all places of this process."""
        filled = torch.zeros(len(share.index), *values.shape[1:], dtype=values.dtype, device=values.device)
        filled[share.places.to(values.device)] = values
        return filled


def _reason(error: RuntimeError) -> str:
    """What gloo says, without the place in its source and its advice."""
    return " ".join(str(error).split("] ", 1)[-1].split(". ")[0].split())[:200]
