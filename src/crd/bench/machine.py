"""What seconds and memory were measured on: the processor and who else wanted it, and the state of the code."""

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


def waited_seconds(pid: int) -> float | None:
    """Time that the main thread of a process, alive or ended and not yet reaped, was kept from a processor.

    None where the system does not count it: elsewhere than on Linux.
    """
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return None


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
