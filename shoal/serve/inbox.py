"""Requests that were read and taken in, and wait for the event loop to work on them.

Working on a request takes several times what refusing one does. Done as they are read, a burst of them would keep everybody
waiting who is to be refused. So the loop works for a *slice* of time, then looks at its sockets again; who is refused is told
there and then, and what is taken in beyond a slice waits here, in order, for as long as its deadline can bear.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

_SLICE_S = 0.001
# The share of a request's time that it may wait here.
_SHARE = 0.3
_LEARN = 0.05
# Work that takes so many times longer than usual is put down to something else on the machine.
_OUTLIER = 4.0


class Inbox:
    """Of one event loop. Work is called once, in the order it came, and raises nothing."""

    def __init__(self, slo_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget_s = _SHARE * slo_s
        self._clock = clock
        self._queue: deque[Callable[[], None]] = deque()
        # Seconds from one piece of work to the next, with all that the loop does in between.
        self._each_s = 0.0
        self._turning = False
        self._spent_s = 0.0
        self._began_s, self._done = 0.0, 0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def wait_s(self) -> float:
        """How long what is put in now will wait."""
        return len(self._queue) * self._each_s

    def full(self) -> bool:
        """Whether what is put in now would wait too long."""
        return self.wait_s > self._budget_s

    def put(self, work: Callable[[], None]) -> None:
        """Have something done: at once, where nothing waits and there is time in this turn of the loop."""
        if not self._turning:
            self._begin(self._clock())
        if self._queue or self._spent_s > _SLICE_S:
            self._queue.append(work)
            return
        began_s = self._clock()
        work()
        self._done += 1
        self._spent_s += self._clock() - began_s

    def _begin(self, now_s: float) -> None:
        self._turning, self._began_s, self._done, self._spent_s = True, now_s, 0, 0.0
        # Runs when all sockets that are ready now were read.
        asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        """Some of what waits; what is read in this turn then waits for the rest, or has a slice of its own."""
        now_s = self._clock()
        if not self._queue:
            self._turning = False
            return
        if self._done:
            each_s = (now_s - self._began_s) / self._done
            self._each_s += _LEARN * (min(each_s, _OUTLIER * self._each_s) - self._each_s) if self._each_s else each_s
        self._begin(now_s)
        until_s = now_s + _SLICE_S
        while self._queue and now_s < until_s:
            self._queue.popleft()()
            self._done += 1
            now_s = self._clock()
