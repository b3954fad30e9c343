"""Who works on what: n things dealt out to the processes of a run, each of which gets the same number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """What each of W processes works on, of n things that are numbered 0 to n - 1.

    Every process has m places. Where n does not divide, the last thing is dealt again to fill a process up, and does
    not count there: with equal shares all processes call the network equally often, which sharded weights demand
    (every call is a collective), and none is slower than the one that has most to do anyway.
    """

    table: Tensor  # (W, m) int64, the thing at each place; ascending within a process
    counted: Tensor  # (W, m) bool; every thing counts at exactly one place
    rank: int

    @staticmethod
    def deal(parts: Sequence[Tensor], rank: int, world_size: int) -> Share:
        """Deal the things of each part in turn, like cards, so that no process has more of any part than another.

        Args:
            parts: number of things (n_p,) int64, no thing twice.
            rank: of this process.
            world_size: W.

        Returns:
            m = Σ_p ceil(n_p / W) places; with one process simply all things in ascending order.
        """
        tables, counted = [], []
        for part in parts:
            places = -(-len(part) // world_size)
            position = torch.arange(places * world_size).view(places, world_size).T
            tables.append(part[position.clamp(max=len(part) - 1)])
            counted.append(position < len(part))
        table, order = torch.cat(tables, 1).sort(dim=1)
        return Share(table, torch.cat(counted, 1).gather(1, order), rank)

    @property
    def index(self) -> Tensor:
        """The things of this process, (m,) int64."""
        return self.table[self.rank]

    @property
    def places(self) -> Tensor:
        """The places of this process whose things count, (k,) int64, k <= m."""
        return self.counted[self.rank].nonzero()[:, 0]

    def rows(self, draws: int) -> Share:
        """The share of rows when each thing has `draws` of them: thing i at draw d is row d n + i."""
        total = int(self.counted.sum())
        return Share(
            torch.cat([self.table + draw * total for draw in range(draws)], 1), self.counted.repeat(1, draws), self.rank
        )

    def first(self, limit: int) -> Share:
        """The share of the things below `limit` if all are one part; its places are the first of this one's."""
        limit = min(limit, int(self.counted.sum()))
        places = -(-limit // len(self.table))
        table = self.table[:, :places]
        return Share(table, self.counted[:, :places] & (table < limit), self.rank)

    def collect(self, values: Tensor) -> Tensor:
        """Values (W, m, ...) of all places -> (n, ...) in the order of the things."""
        counted = self.counted.to(values.device)
        things = self.table.to(values.device)[counted]
        found = torch.empty(len(things), *values.shape[2:], dtype=values.dtype, device=values.device)
        found[things] = values[counted]
        return found
