"""Keeping freed memory: glibc hands large blocks back to the kernel at every step unless it is told not to."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MOST_MMAP_THRESHOLD = 32 << 20


def keep_freed_memory() -> None:
    """Let malloc serve blocks up to 32 MiB (glibc's limit) from its heap and keep what is freed.

    Each step allocates the same activations again; without this every one of them is mapped, zeroed page by page, and
    unmapped. Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _MOST_MMAP_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, 512 << 20)
    mallopt(_M_TOP_PAD, 16 << 20)
