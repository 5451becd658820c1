"""Work that must not slow others down."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")
_LOWEST = 19


def gently(work: Callable[[], _T]) -> _T:
    """Do some work at the lowest priority, and wait for it; returns what it returns, raises what it raises.

    In a thread of its own: on Linux each thread has its priority, and without privileges one can give it up but never take it
    back. What is forked later, from the thread that waits here, has the usual one.
    """
    found: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
        try:
            found.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="shoal-gently")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]
