"""How many rows go through a network at a time: what the run begins with, and half of it whenever memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from crd.console import console
from crd.errors import CRDError, ShortOfMemoryError, StrandedError
from crd.ranks import Ranks

T = TypeVar("T")

# What torch says where it has no class of its own for it: on the CPU, in the CUDA runtime, and in cuBLAS.
_NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class BatchSize:
    """Rows of a call of a network; once lowered, it stays so.

    Args:
        name: the setting that a person knows it by.
        rows: what it begins with.
        advice: what helps where not even one row fits.
    """

    def __init__(self, name: str, rows: int, advice: str = "try a smaller height and width") -> None:
        self.name, self.rows, self._advice = name, rows, advice

    def run(self, work: Callable[[int], T], most: int, *free: Callable[[], object]) -> T:
        """`work(rows)`; as often as memory runs out in it, again from its beginning with half the rows.

        Args:
            work: raises `ShortOfMemoryError` on all processes or on none; see `in_memory`.
            most: rows that it has in all, equal on all processes.
            free: let go of what an attempt has left.

        Raises:
            CRDError: memory runs out at one row.
        """
        while True:
            try:
                return work(self.rows)
            except ShortOfMemoryError:
                pass  # what its traceback holds is gone only after this block
            for let_go in free:
                let_go()
            self._halve(most)
            # A graph of autograd or an iterator that broke off may be in a cycle.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _halve(self, most: int) -> None:
        used = min(self.rows, most)
        if used == 1:
            raise CRDError(f"memory ran out at {self.name}=1, one row at a time; {self._advice}")
        console.print(f"memory ran out: {self.name} is {used // 2} in place of {self.rows} for the rest of this run")
        self.rows = used // 2


def in_memory(work: Callable[[], T], ranks: Ranks, *, sharded: bool) -> T:
    """`work()`, or an error on all processes if memory runs out in one of them.

    Args:
        work: no exchange between processes is in it, but that of sharded weights.
        ranks: the processes; all call alike.
        sharded: `work` calls a network that is spread over the processes.

    Raises:
        ShortOfMemoryError: memory ran out somewhere; of replicas, and of one process.
        StrandedError: it ran out here, and the others wait inside of a collective call, which cannot be taken back.
        PeerFailedError, PeerLostError: another process is gone.
    """
    result: list[T] = []
    try:
        result.append(work())
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if sharded and ranks.world_size > 1:
            raise StrandedError(
                "memory ran out, and the other processes cannot repeat their part of a sharded call; lower micro_batch "
                "(in training) or rollout_batch, and use --resume"
            ) from error
    if not sharded or ranks.world_size == 1:
        short = torch.tensor([0.0 if result else 1.0])
        if bool(ranks.total(short) > 0):
            # Outside of the handler: an error that refers to the first one would keep its tensors.
            raise ShortOfMemoryError
    return result[0]


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch could not allocate, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _NO_MEMORY)
