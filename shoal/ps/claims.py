"""Which worker computes which unit: a queue in the arena from which workers take the next one, in order.

There is no counter that two could change: the next unit is the one after the last that anybody has claimed, and each worker
writes its claims into a row of its own, under a lock that the kernel takes back from a process that dies (``lockf`` on the
arena's descriptor). A worker that dies before its claim is counted has claimed nothing; one that dies afterwards has, and
whoever takes its place computes the unit. So what is written before the count must change nothing that counts already:
the unit goes to a place that no open claim and not the last one has, and into the unit's row, which nobody reads yet.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shoal.comm.arena import Arena, Note, Order
from shoal.ps.ledger import LINE, UNITS_KEPT, Ledger, UnitColumns
from shoal.ps.lock import locked


@dataclass(frozen=True)
class Claim:
    """A unit that is now a worker's; ``slowest``: the step of the oldest unit that was unfinished then."""

    unit: int
    slowest: int


@dataclass(frozen=True)
class Later:
    """No unit for now. ``worker``: whose unfinished unit is too old; None where the supervisor allows no more yet."""

    worker: int | None
    step: int


class Claims:
    """The claims in an arena.

    Args:
        staleness: how many steps ahead of the oldest unfinished unit a worker may begin one; None for any.
        per_step: units of a step; one a worker by default.
    """

    def __init__(self, arena: Arena, staleness: int | None, per_step: int | None = None) -> None:
        self._arena = arena
        self._workers = arena.world_size
        self._per_step = per_step or self._workers
        self._staleness = staleness
        self._ledger = Ledger(arena)
        self._start, size = arena.layout.regions["claims"]
        self._row_bytes = size // self._workers
        raw = arena.region("claims").numpy().view(np.int64).reshape(self._workers, -1)
        self._counts = raw[:, 0]
        # At least one more than a worker may have open.
        self._places = (self._row_bytes - 2 * LINE) // 8
        self._units = raw[:, 2 * LINE // 8 : 2 * LINE // 8 + self._places]

    # -- what is there -------------------------------------------------------------------------------------------

    @property
    def first(self) -> int:
        """The first unit of this session."""
        return int(self._arena.supervisor.note(Note.FIRST_STEP)) * self._per_step

    def claimed(self, worker: int) -> int:
        """How many units a worker has claimed."""
        return int(self._counts[worker])

    def finished(self, worker: int) -> int:
        """How many of them are finished: applied by all servers, or found to be nothing."""
        return int(ctypes.c_uint32.from_address(self._finished_at(worker)).value)

    def open(self, worker: int) -> list[int]:
        """The units that a worker has claimed and not finished."""
        return [
            int(self._units[worker, n % self._places]) for n in range(self.finished(worker), self.claimed(worker))
        ]

    def last(self) -> int:
        """The last unit that anybody has claimed; the one before the first where nobody has."""
        found = [
            int(self._units[worker, (self.claimed(worker) - 1) % self._places])
            for worker in range(self._workers)
            if self.claimed(worker)
        ]
        return max(found, default=self.first - 1)

    def all_finished(self) -> bool:
        return not any(self.open(worker) for worker in range(self._workers))

    # -- changing it ---------------------------------------------------------------------------------------------

    def claim(self, worker: int, beat: Callable[[], None] = lambda: None) -> Claim | Later:
        """Take the next unit, if it may be begun now."""
        with locked(self._arena, beat):
            unit = self.last() + 1
            while self._ledger.was_logged(unit):
                unit += 1
            step = unit // self._per_step
            open_units = {units[0]: other for other in range(self._workers) if (units := self.open(other))}
            oldest = min(open_units, default=unit)
            slowest = oldest // self._per_step
            supervisor = self._arena.supervisor
            if step >= supervisor.signal(Order.STEPS_ALLOWED) or unit >= supervisor.note(Note.UNITS_SEEN) + UNITS_KEPT:
                return Later(None, step)
            if self._staleness is not None and step - slowest > self._staleness:
                return Later(open_units[oldest], step)
            count = self.claimed(worker)
            row = self._ledger.row(unit)
            row[UnitColumns.RANK], row[UnitColumns.SLOWEST] = worker, slowest
            self._units[worker, count % self._places] = unit
            self._counts[worker] = count + 1
            return Claim(unit, slowest)

    def finish(self, worker: int) -> None:
        """All that a worker has claimed is finished."""
        self._arena.native.post(self._finished_at(worker), self.claimed(worker))

    def wait_finished(self, worker: int, spin_s: float, timeout_s: float) -> bool:
        """Wait until a worker has finished all that it has claimed by now."""
        target = self.claimed(worker)
        return self._arena.native.wait_all(self._finished_at(worker), LINE, 1, target, spin_s, timeout_s) < 0

    def _finished_at(self, worker: int) -> int:
        return self._arena.memory.address + self._start + worker * self._row_bytes + LINE
