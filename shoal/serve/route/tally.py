"""What became of a route's requests, whichever protocol they came by; each that was accepted has exactly one outcome."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from shoal.serve.refusals import Refusal
from shoal.serve.route.metrics import RouteMetrics

_BODIES_BYTES = 512 << 20
_LONG_BYTES = 64 << 10
# gRPC's clock and ours are not the same one.
_NEARLY_S = 0.01


class Outcome(Enum):
    """What became of a request. Those that are invalid are the client's doing."""

    ANSWERED = "answered"
    REFUSED = "refused"
    EXPIRED = "expired"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INVALID = "invalid"


def outcome_of(status: int) -> Outcome:
    """What an answer with some status makes of its request."""
    if status < 400:
        return Outcome.ANSWERED
    if status in (429, 503):
        return Outcome.REFUSED
    if status == 504:
        return Outcome.EXPIRED
    return Outcome.FAILED if status >= 500 else Outcome.INVALID


@dataclass
class Ending:
    """What becomes of one request. ``deadline_s``: whose client leaves then, or later, has not cancelled it."""

    outcome: Outcome = Outcome.FAILED
    deadline_s: float = float("inf")


class Tally:
    """Counts requests and the bytes of long bodies; ``draining``: nothing more is taken in."""

    def __init__(self, metrics: RouteMetrics) -> None:
        metrics.begin_with(outcome.value for outcome in Outcome)
        self.metrics = metrics
        self.draining = False
        self.counts = dict.fromkeys(Outcome, 0)
        self.accepted = self.open = 0
        self._bodies_bytes = 0

    @contextlib.contextmanager
    def request(self) -> Iterator[Ending]:
        """While a request is worked on, whose outcome is set, or said by what is raised."""
        began_s, ending = time.monotonic(), Ending()
        self.accepted += 1
        self.open += 1
        try:
            yield ending
        except Refusal as refusal:
            ending.outcome = outcome_of(refusal.status)
            raise
        except asyncio.CancelledError:
            ending.outcome = Outcome.EXPIRED if time.monotonic() >= ending.deadline_s - _NEARLY_S else Outcome.CANCELLED
            raise
        finally:
            self.open -= 1
            self.counts[ending.outcome] += 1
            self.metrics.ended(ending.outcome.value, time.monotonic() - began_s)

    def take_in(self) -> None:
        """Refusal where nothing more is taken in."""
        if self.draining:
            raise Refusal(503, "The route is shutting down; ask another one.", 1.0)

    @contextlib.contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Count the bytes of a body where it is long: all together are bounded."""
        held = size if size > _LONG_BYTES else 0
        if self._bodies_bytes + held > _BODIES_BYTES:
            raise Refusal(503, "Too many long bodies are being sent at once; try again.", 1.0)
        self._bodies_bytes += held
        try:
            yield
        finally:
            self._bodies_bytes -= held
