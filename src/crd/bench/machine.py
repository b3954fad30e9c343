"""What seconds and memory were measured on: the processor, and the state of the code."""

from __future__ import annotations

import functools
import platform
import subprocess
from pathlib import Path

import crd

_CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def processor() -> str:
    """The processor's name, as far as the system tells it."""
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


@functools.cache
def commit() -> str | None:
    """The git commit of this package, with a + if files that git knows have changed since; None = not in git."""
    folder = Path(crd.__file__).parent
    # An installed copy may lie inside of someone else's repository.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    found = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ".")
    return None if found is None else found + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        told = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return None
    return told.stdout.strip() if told.returncode == 0 else None
