"""Several gloo processes on this machine that run one function, without a launcher to end the others when one dies."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Forked from a process that has imported everything and computed nothing: a rank starts in no time.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["crd.trainer", "crd.commands", "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"]
)


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    status: int  # -9 = killed
    out: str
    err: str
    seconds: float  # after the start of all


def run_gang(
    world_size: int, folder: Path, function: Callable[..., int | None], *arguments: Any, limit: float = 150.0
) -> list[Ended]:
    """Run `function(*arguments)` as each rank.

    Args:
        world_size: number of ranks.
        folder: for what they print; created.
        function: of a module; its result is the exit status.
        arguments: of the function.
        limit: s until all must have ended.
    """
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    ranks = [
        _CONTEXT.Process(target=_member, args=(rank, world_size, port, folder, function, arguments))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    seconds: dict[int, float] = {}
    try:
        while len(seconds) < world_size and time.monotonic() - started < limit:
            for number, rank in enumerate(ranks):
                if number not in seconds and rank.exitcode is not None:
                    seconds[number] = time.monotonic() - started
            time.sleep(0.02)
    finally:
        for rank in ranks:
            rank.kill()
    written = [[(folder / f"{end}-{number}").read_text() for end in ("out", "err")] for number in range(world_size)]
    assert len(seconds) == world_size, f"only {sorted(seconds)} ended within {limit} s: {written}"
    return [Ended(int(rank.exitcode or 0), *written[n], seconds[n]) for n, rank in enumerate(ranks)]


def _member(
    rank: int, world_size: int, port: int, folder: Path, function: Callable[..., int | None], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{stream}-{rank}", os.O_CREAT | os.O_WRONLY), number)
    sys.exit(function(*arguments))
