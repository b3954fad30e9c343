"""Which reward servers a run asks, how, and how long it waits for them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from crd.errors import CRDError
from crd.serving.tokens import TOKEN_ENV, read_token
from crd.serving.wire_images import ENCODINGS, Encoding
from crd.setting_checks import check_count, check_number, check_text, http_url
from crd.text_files import known_fields, read_settings

WAIT_ENV = "CRD_REWARD_WAIT"
OF = "the reward servers"
_EXAMPLE = "http://host:port"


@dataclass(frozen=True)
class RemoteConfig:
    """One or several servers of the same rewards; `servers` has no default.

    Raises:
        CRDError: a value of another type, or outside its range.
    """

    servers: tuple[str, ...]  # such as http://gpu1:8000
    token_env: str | None = TOKEN_ENV  # the environment variable that holds the token; not set = there is none
    token_file: str | None = None  # a file that holds it, in place of the variable
    timeout_s: float = 300.0  # seconds that a server may take for a batch, and that a full queue is waited for
    max_retries: int = 3  # of a batch that a server got and did not answer, or answered with an error of the reward
    wait_s: float = 300.0  # seconds that no server may be there before the run stops; 0 = at once
    batch: int = 32  # images of one request
    concurrency: int = 2  # requests under way at each server: one is scored while the next is sent
    encoding: Encoding = "raw"  # png takes less of a slow network and more of both processors

    def __post_init__(self) -> None:
        for url in self.servers:
            _check_server(url)
        if not self.servers or len(set(self.servers)) < len(self.servers):
            raise CRDError(f"servers must be one or several different addresses, got {list(self.servers)}")
        for name in ("token_env", "token_file"):
            if self.__dict__[name] is not None:
                check_text(name, self.__dict__[name], OF)
        check_number("timeout_s", self.timeout_s, OF, positive=True)
        check_number("wait_s", self.wait_s, OF, positive=False)
        for name, least in (("max_retries", 0), ("batch", 1), ("concurrency", 1)):
            check_count(name, self.__dict__[name], OF, least)
        if self.encoding not in get_args(Encoding):
            raise CRDError(f"encoding of {OF} must be one of {', '.join(ENCODINGS)}, got {self.encoding!r}")

    def token(self) -> str | None:
        """The token, read anew; None if there is none."""
        return read_token(self.token_file, self.token_env)


def remote_config(source: str) -> RemoteConfig:
    """The settings of a source.

    Args:
        source: addresses joined by +, with defaults for all else; or a YAML file of `RemoteConfig` fields. The default
            of `wait_s` is what `CRD_REWARD_WAIT` holds, if it is set.

    Raises:
        CRDError: no such file, an unknown key (the nearest is named), or a wrong value.
    """
    if source.startswith(("http://", "https://")):
        return _from_fields({"servers": source.split("+")})
    path = Path(source)
    missing = f"no reward servers at {path}; give {_EXAMPLE}, several joined by +, or a .yaml file with `servers`"
    return read_settings(path, "settings of reward servers", missing, _from_fields)


def _from_fields(values: Mapping[Any, Any]) -> RemoteConfig:
    given = known_fields(values, RemoteConfig, "setting of reward servers")
    servers = given.get("servers")
    if not isinstance(servers, list) or not all(isinstance(url, str) for url in servers):
        raise CRDError(f"servers must be a list of addresses such as [{_EXAMPLE}], got {servers!r:.80}")
    given["servers"] = tuple(url.rstrip("/") for url in servers)
    return RemoteConfig(**{"wait_s": _wait_s(), **given})


def _wait_s() -> float:
    text = os.environ.get(WAIT_ENV, "")
    try:
        return float(text) if text else RemoteConfig.wait_s
    except ValueError as error:
        raise CRDError(f"{WAIT_ENV} must be a number of seconds, got {text!r}") from error


def _check_server(url: str) -> None:
    parts = http_url(url)
    if parts is None or parts.query or parts.fragment:
        raise CRDError(f"a reward server must be of the form {_EXAMPLE}, got {url!r}")
    if parts.username is not None or parts.password is not None:
        # Addresses are written into the run folder.
        raise CRDError(f"an address holds no password, that of {parts.hostname} does; set {TOKEN_ENV} instead")
