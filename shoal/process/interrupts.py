"""What Ctrl-C and SIGTERM mean to a command that can stop cleanly."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupts:
    """Ctrl-C and SIGTERM: the first asks for a clean stop, the second leaves at once."""

    def __init__(self) -> None:
        self.wanted = False
        # Before the first step there is nothing to finish or save.
        self.armed = False

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Handle the signals inside; only the main thread may, elsewhere they keep their meaning."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a signal that comes inside wait for the end."""
        self.armed = True
        try:
            yield
        finally:
            self.armed = False
        if self.wanted:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.wanted or not self.armed:
            raise KeyboardInterrupt
        self.wanted = True
