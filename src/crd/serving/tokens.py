"""The secret that a reward server and its clients share: from a file or the environment, never from a configuration."""

from __future__ import annotations

import os
from pathlib import Path

from crd.errors import CRDError
from crd.setting_checks import check_secret
from crd.text_files import read_text

TOKEN_ENV = "CRD_REWARD_TOKEN"


def read_token(file: str | None, variable: str | None = TOKEN_ENV) -> str | None:
    """The token of `file` if one is given, else that of the environment variable; None if neither has one.

    Raises:
        CRDError: no such file, or nothing in it, or characters that no HTTP header may hold.
    """
    if file is not None:
        token = read_text(Path(file), "token file", f"no token file at {file}; `openssl rand -hex 32` makes a token")
        place = f"the token file {file}"
    else:
        token = os.environ.get(variable, "") if variable is not None else ""
        if not token:
            return None
        place = str(variable)
    token = token.strip()
    if not token:
        raise CRDError(f"{place} is empty; `openssl rand -hex 32` makes a token")
    check_secret(token, place)
    return token
