"""Replacing a file whole or not at all, and letting others read what was made."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def share(folder: Path) -> None:
    """Ordinary permissions for a folder and all in it: mkdtemp and safetensors make things only their owner can read.

    Where a file system has none to change, they stay as they are. Raises OSError if nothing can be written.
    """
    probe = folder / ".permissions"
    probe.touch()  # as the umask has it
    mode = probe.stat().st_mode & 0o666
    probe.unlink()
    with suppress(PermissionError):
        for path in (folder, *folder.rglob("*")):
            path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)


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
