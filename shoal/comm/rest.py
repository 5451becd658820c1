"""Rests between looks at what another process holds for a moment."""

from __future__ import annotations

import os
import time

_YIELD_S = 200e-6
_NAP_S = 50e-6


class Rests:
    """Rest between looks: the core is given up at first, and slept when that has taken long.

    A nap of 50 µs takes 70 to 130, several times as long as most of what is waited for so.
    """

    def __init__(self) -> None:
        self._until = 0.0

    def rest(self) -> None:
        """Let others work for a moment."""
        now = time.monotonic()
        if not self._until:
            self._until = now + _YIELD_S
        if now < self._until:
            os.sched_yield()
        else:
            time.sleep(_NAP_S)
