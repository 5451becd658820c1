"""Servers that apply pushes in one order: that in which server 0 takes them.

Each server by itself applies pushes as they come, and two of them may take the same two in different orders. Where a write-ahead
log is kept they must not: a crash may leave a push in the log of one server and not of another, and as the log holds what
pushes have made of the weights, it can only be cut off where no push behind it counts. With one order the logs of all servers
hold the same pushes up to where the shortest ends.

Server 0 writes whose push it takes into a ring, then counts it. Its workers wait until every server has applied their push, so
a server is never further behind than there are workers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from shoal.axes.server_async import Pushed, PushServer
from shoal.comm.arena import Arena
from shoal.ps.ledger import LINE, ORDER_KEPT


class Order:
    """The ring in an arena: whose push was taken as the n-th."""

    def __init__(self, arena: Arena) -> None:
        start, _ = arena.layout.regions["order"]
        self._native, self._count_at = arena.native, arena.memory.address + start
        self._workers: np.ndarray = arena.region("order")[LINE:].numpy().view(np.int64)

    @property
    def count(self) -> int:
        """How many pushes were taken."""
        return int(ctypes.c_uint32.from_address(self._count_at).value)

    def write(self, number: int, worker: int) -> None:
        """The push of a worker is the one of this number."""
        self._workers[number % ORDER_KEPT] = worker
        self._native.post(self._count_at, number + 1)

    def read(self, number: int, spin_s: float, timeout_s: float) -> int | None:
        """Whose push it is; None where nobody has said so in time."""
        if self._native.wait_all(self._count_at, LINE, 1, number + 1, spin_s, timeout_s) >= 0:
            return None
        return int(self._workers[number % ORDER_KEPT])


class OrderedPushServer(PushServer):
    """A server that takes pushes in the order of server 0."""

    @property
    def order(self) -> Order:
        return Order(self.arena)

    def next_push(self, over: Callable[[], bool]) -> Pushed | None:
        if self.number == 0 or self._resumed is not None:
            return super().next_push(over)
        found: list[int] = []

        def attempt(times: tuple[float, float]) -> int:
            worker = self.order.read(self.updates, *times)
            found[:] = [] if worker is None else [worker]
            return -1 if found or over() else self.arena.world_size

        self.wait_for(attempt, "the order of pushes")
        return self._pushed(found[0]) if found else None

    def take(self, pushed: Pushed) -> None:
        super().take(pushed)
        if self.number == 0:
            # Not before it is noted as in work: a successor takes the same one then.
            self.order.write(self.updates, pushed.worker)
