"""A lock on an arena that the kernel takes back from a process that dies: ``lockf`` on its descriptor."""

from __future__ import annotations

import contextlib
import fcntl
import math
import time
from collections.abc import Callable, Iterator

from shoal.comm.arena import Arena
from shoal.comm.rest import Rests


@contextlib.contextmanager
def locked(arena: Arena, beat: Callable[[], None] = lambda: None, within_s: float = math.inf) -> Iterator[bool]:
    """Hold the arena's lock; ``beat`` is called while another process has it. False where it was not free in time."""
    fd = arena.memory.fd
    if fd < 0:
        # Memory of one process alone.
        yield True
        return
    deadline, rests = time.monotonic() + within_s, Rests()
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if time.monotonic() >= deadline:
                yield False
                return
            beat()
            rests.rest()
    try:
        yield True
    finally:
        fcntl.lockf(fd, fcntl.LOCK_UN)
