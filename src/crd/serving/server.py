"""`crd serve-reward`: rewards behind a port, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import socket
from contextlib import suppress

import torch

from crd.console import console
from crd.errors import CRDError
from crd.rewards import RewardSet
from crd.serving.announcement import Limits
from crd.serving.service import RewardService
from crd.serving.tokens import TOKEN_ENV, read_token

try:
    import uvicorn

    from crd.serving.app import build_app
except ImportError as error:
    raise CRDError('crd serve-reward needs FastAPI and uvicorn; pip install -e ".[serve]"') from error


def serve_reward(args: argparse.Namespace) -> None:
    """Serve the rewards that `args` names.

    Raises:
        CRDError: an unknown or broken reward, a port that is taken, or an open door: another host than this one's
            loopback without a token.
    """
    token = read_token(args.token_file)
    if token is None and not is_loopback(args.host):
        raise CRDError(f"{args.host} can be reached from other machines, which takes a token; set {TOKEN_ENV} or give "
                       "--token-file (`openssl rand -hex 32` makes one)")  # fmt: skip
    limits = Limits(args.max_images, args.max_body * 10**6, args.max_pixels)
    service = RewardService(RewardSet(args.rewards), limits, args.max_queue)
    device = _device(args.device)
    with listen(args.host, args.port) as listening:
        address = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{args.port}"
        for name in service.info.names:
            console.print(f"serving remote={address}#{name}", markup=False, highlight=False, soft_wrap=True)
        if token is None:
            console.print(f"no token: every program on this machine may ask; {TOKEN_ENV} sets one", style="yellow")
        # uvicorn ends by itself at Ctrl-C, and then raises it again, unless the shell has it ignored.
        with suppress(KeyboardInterrupt):
            asyncio.run(RewardServer(service, token).answer(listening, device))
        console.print("stopped")


class RewardServer(uvicorn.Server):
    """Answers while the rewards load, stops when they cannot be, and refuses waiting requests when told to stop.

    Args:
        service: answers the questions.
        token: that requests must carry; None = none.
    """

    def __init__(self, service: RewardService, token: str | None) -> None:
        app = build_app(service, token)
        # h11 whatever else is installed: what is read of refused bodies was tested with it.
        super().__init__(
            uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_level="warning", access_log=False)
        )
        self._service = service

    async def answer(self, listening: socket.socket, device: str) -> None:
        """Load the rewards onto `device`, and answer on a listening socket until told to stop.

        Raises:
            CRDError: a reward is broken.
        """
        loading = asyncio.create_task(self._service.load(device))
        loading.add_done_callback(self._loaded)
        await self.serve(sockets=[listening])
        if loading.done():
            loading.result()

    def _loaded(self, loading: asyncio.Task[None]) -> None:
        if loading.cancelled() or loading.exception() is not None:
            self.should_exit = True
        else:
            console.print("ready")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's own, which waits for requests inside; those that wait themselves need not."""
        self._service.close()
        await super().shutdown(sockets)


def _device(asked: str) -> str:
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise CRDError(f"--device {asked} but torch sees no GPU; use cpu, or install a CUDA build of torch")
    return asked


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        CRDError: the port is taken, or the host is not this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise CRDError(f"cannot listen on {host} port {port}: {error.strerror or error}; choose another") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may stand for any address
        return False
