"""Saying that a message was none, and counting them."""

from __future__ import annotations

import logging
import time

# A complaint for every message of somebody who sends many would fill the disk.
_EVERY_S = 1.0


class Complaints:
    """What one socket complains of; ``dropped``: how many messages were none."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._at = float("-inf")
        self.dropped = 0

    def add(self, reason: str) -> None:
        """A message was none and is dropped: say so in the log."""
        self.dropped += 1
        now = time.monotonic()
        if now - self._at > _EVERY_S:
            self._at = now
            self._logger.warning("A message was dropped: %s (%d so far).", reason[:500], self.dropped)
