"""What the kernel says of a process, whoever's child it is."""

from __future__ import annotations

import os
from pathlib import Path


def kernel_state(pid: int) -> str:
    """Its state in the kernel's words, which begin with a letter: "S (sleeping)", "Z (zombie)"; "gone", or "unknown"."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("State:"):
                return line.split(None, 1)[1]
    except OSError:
        return "gone"
    return "unknown"


def is_gone(pid: int) -> bool:
    """Whether it has ended, buried or not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return kernel_state(pid).startswith("Z")
