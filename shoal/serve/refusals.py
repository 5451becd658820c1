"""What a client gets instead of an answer."""

from __future__ import annotations

import time
import traceback

_SAID_EVERY_S = 1.0


class Refusal(Exception):
    """An HTTP status of 4xx or 5xx with one sentence for the client; no paths, no tracebacks.

    ``retry_after_s``: after how many seconds it may be worth trying again; None where trying again is of no use.
    """

    def __init__(self, status: int, sentence: str, retry_after_s: float | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.retry_after_s = retry_after_s


def too_late() -> Refusal:
    """What a request gets that was taken in and has expired."""
    return Refusal(504, "The deadline passed before the request could be computed.")


class Mishaps:
    """What to do with an exception that nobody foresaw: whoever runs the service gets the traceback, the client one sentence."""

    def __init__(self) -> None:
        self._said_s = float("-inf")

    def refusal(self) -> Refusal:
        """Print the traceback of the exception that is handled now, though not as often as clients may please."""
        now = time.monotonic()
        if now - self._said_s > _SAID_EVERY_S:
            self._said_s = now
            traceback.print_exc()
        return Refusal(500, "The service made a mistake; its own messages say more.")
