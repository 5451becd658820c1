"""Doing something aside: in a forked child, whose memory and torch state go with it."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
from collections.abc import Callable
from typing import Any, TypeVar

from shoal.errors import JobFailed
from shoal.process.failure import Failure

T = TypeVar("T")


def aside(work: Callable[[], T], what: str, limit_s: float | None = None) -> T:
    """Return what ``work`` returns in a forked child of this (single-threaded) process; it must be picklable.

    What it raises is raised here. ``what`` names it where the child dies instead: JobFailed. Where it takes longer than
    ``limit_s``, it is ended with all that it has started: TimeoutError.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(reading)
            if limit_s is not None:
                os.setpgid(0, 0)
            with os.fdopen(writing, "wb") as pipe:
                try:
                    answer: tuple[bool, Any] = (True, work())
                    data = pickle.dumps(answer)
                except BaseException as error:
                    data = pickle.dumps((False, Failure.of(error)))
                pipe.write(data)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    if limit_s is not None:
        # The child does the same: whoever comes first, there is such a group when it has to be ended.
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
    with os.fdopen(reading, "rb") as pipe:
        # It writes all of its answer at the end.
        if limit_s is not None and not select.select([pipe], [], [], limit_s)[0]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"It took longer than {limit_s:.0f} s to {what}.")
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    if not data:
        raise JobFailed(f"The process that was to {what} died (status {status}); see whether the machine ran out of memory.")
    done, value = pickle.loads(data)
    if not done:
        raise value.error()
    result: T = value
    return result
