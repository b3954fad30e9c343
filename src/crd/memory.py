"""Keep freed memory in the process: on a CPU, handing large buffers back to the kernel can cost more than the maths."""

from __future__ import annotations

import ctypes
import sys

# Numbers of mallopt(3); 32 MiB is the largest threshold that glibc takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
_NEVER_TRIM = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed buffers of up to 32 MiB instead of unmapping them.

    Every step of training allocates and frees the same activations. By default glibc maps large ones afresh and the
    kernel zeroes each page again; on virtual machines that took most of the time (`benchmarks/malloc.py`).

    Returns:
        Whether the C library took the settings; False (and no change) where it is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM))
