"""Replacing a file whole or not at all, and letting others read what was made."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def share(folder: Path) -> None:
    """Ordinary permissions for a folder and all in it: mkdtemp and safetensors make things only their owner can read.

    Raises OSError.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, of its suffix, and put it in its place.

    Raises OSError, or what `write` raises; all is then as before.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
