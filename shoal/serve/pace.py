"""How far behind the event loop is: what it has no time for is refused while refusing is still cheap.

A request waits in its socket while the loop is busy with others, and nobody sees that. The loop works in *turns*: it reads
whatever sockets have something, then runs what that has woken. How long the turn before took is how long the requests of this
one may have waited already; and what a turn cannot begin within its budget is refused, so that the next turn comes in time.
"""

from __future__ import annotations

import asyncio
import time

# The share of a request's time that one turn may take: it waits for at most two of them, and is computed after that.
_SHARE = 0.1
_LEARN = 0.05
# A turn that takes so many times longer for each request than usual is put down to something else on the machine.
_OUTLIER = 4.0
# So few never fill a turn, whatever was learned.
_FEW = 8


class Pace:
    """The turns of one event loop. Times are seconds of its monotonic clock."""

    def __init__(self, slo_s: float) -> None:
        self._budget_s = _SHARE * slo_s
        self._began_s: float | None = None
        self._last_s = 0.0
        self._waiting = self._seen = 0
        self._each_s = 0.0

    def full(self) -> bool:
        """Whether what was read already fills a turn; to be asked for a request that was just read, before it is handed on."""
        return self._waiting > _FEW and self._waiting * self._each_s > self._budget_s

    def waiting_since(self, now_s: float) -> float:
        """When a request that is read now may have arrived."""
        return now_s - self._last_s

    def handed_on(self) -> None:
        """A request was read, and will arrive in the next turn."""
        self._waiting += 1

    def arrive(self, now_s: float) -> float:
        """When a request that is seen now may have arrived; to be called for each as soon as it is seen."""
        self._waiting = max(0, self._waiting - 1)
        self._seen += 1
        if self._began_s is None:
            self._began_s = now_s
            # Runs when everything that is ready now has run, and sockets were read once more.
            asyncio.get_running_loop().call_soon(self._end)
        return now_s - self._last_s

    def behind(self, now_s: float) -> bool:
        """Whether this turn has taken its time already."""
        return self._began_s is not None and now_s - self._began_s > self._budget_s

    def _end(self) -> None:
        assert self._began_s is not None
        self._last_s = time.monotonic() - self._began_s
        each_s = self._last_s / self._seen
        self._each_s += _LEARN * (min(each_s, _OUTLIER * self._each_s) - self._each_s) if self._each_s else each_s
        self._began_s, self._seen = None, 0
