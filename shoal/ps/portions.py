"""Which worker computes which portion of a batch, and whose result counts: Sandblaster's coordinator (Dean et al. 2012, §4.2).

A batch is cut into portions, several for each worker. A worker that has done one takes the next; when all are handed out, those
that have been out for too long are handed out again, to whoever has nothing to do. The first result of a portion counts, and no
other. Which worker that is changes no bit: each result lies in a stripe of its own, and they are summed in the portions' order.

It is a table in the arena, changed under a lock that the kernel takes back from a process that dies. A result counts from one
store on (``DONE``), the last thing that is written of it. A portion whose worker has died is one that nobody is at.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shoal.comm.arena import Arena
from shoal.comm.store import RING_STEPS, VALUE_COLUMNS
from shoal.ps.lock import locked

PATIENCE = 1.5
"""A portion is handed out again when it has been out for so many times what one usually takes."""


class PortionColumns:
    """The fields of a portion's row, float64 each; the values that a job logs follow."""

    DONE = 0
    STRIPE = 1
    RANK = 2
    GIVEN = 3
    TOOK = 4
    LOSS = 5
    WEIGHT = 6
    SAMPLES = 7
    MEASURED = 8
    VALUES = 9
    COUNT = 9 + VALUE_COLUMNS


class _WorkerColumns:
    """The fields of a worker's row: the step and the portion that it is at, since when, and its stripe's number plus one."""

    STEP = 0
    PORTION = 1
    SINCE = 2
    STRIPE = 3
    COUNT = 4


_HEAD = 8


def portion_bytes(workers: int, portions: int) -> int:
    """Bytes of the arena's ``portions`` region."""
    return 8 * (_HEAD + portions * PortionColumns.COUNT + workers * _WorkerColumns.COUNT) + 4 * RING_STEPS * portions


def spare_stripes(portions: int) -> int:
    """How many stripes are needed beyond one a worker: every portion's result, and what all but one are at."""
    return portions - 1


@dataclass(frozen=True)
class Given:
    """A portion that is now a worker's, and the stripe for its gradient."""

    portion: int
    stripe: int


@dataclass(frozen=True)
class Later:
    """All portions are out, and none has been for long. ``wait_s``: until one will have been; None where nobody knows."""

    wait_s: float | None


def next_portion(held: Mapping[int, Sequence[float]], took: Sequence[float], now: float) -> int | Later:
    """The first portion that nobody is at; else the one that the fewest are at, of these the oldest, if it is late.

    Args:
        held: of each portion that is not done, since when others are at it; took: of each that is, how long it was out.
    """
    for portion, since in held.items():
        if not since:
            return portion
    if not took:
        return Later(None)
    oldest = min(held, key=lambda portion: (len(held[portion]), min(held[portion])))
    # Somebody may have begun again just now.
    left_s = max(held[oldest]) + PATIENCE * statistics.median(took) - now
    return oldest if left_s <= 0 else Later(left_s)


class Portions:
    """The table in an arena; ``count``: portions of a batch."""

    def __init__(self, arena: Arena, count: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._arena, self._clock = arena, clock
        self.count, self._workers = count, arena.world_size
        raw = arena.region("portions").numpy()
        at = 8 * (_HEAD + count * PortionColumns.COUNT + self._workers * _WorkerColumns.COUNT)
        numbers = raw[:at].view(np.float64)
        self._head, rest = numbers[:_HEAD], numbers[_HEAD:]
        self.rows: np.ndarray = rest[: count * PortionColumns.COUNT].reshape(count, PortionColumns.COUNT)
        self._at: np.ndarray = rest[count * PortionColumns.COUNT :].reshape(self._workers, _WorkerColumns.COUNT)
        # Of each of the last steps, for each portion: whose result counted, and how often it was handed out.
        self._told: np.ndarray = raw[at : at + 4 * RING_STEPS * count].view(np.int16).reshape(RING_STEPS, count, 2)

    # -- what is there -------------------------------------------------------------------------------------------

    def is_done(self, step: int, portion: int) -> bool:
        """Whether what anybody computes of a portion counts for nothing any more."""
        return bool(self._head[0] != step + 1 or self.rows[portion, PortionColumns.DONE] == step + 1)

    def missing(self, step: int) -> int:
        """The worker that is at the first portion that is not done yet; -1 where all are."""
        with locked(self._arena):
            if self._head[0] > step + 1:
                return -1
            if self._head[0] != step + 1:
                return 0
            undone = self._undone(step)
            return -1 if not len(undone) else next(iter(self._holders(step, int(undone[0]), None)), 0)

    def stripes(self) -> list[int]:
        """The stripes of all results, in the portions' order."""
        return [int(stripe) for stripe in self.rows[:, PortionColumns.STRIPE]]

    def told(self, step: int) -> list[tuple[int, int]]:
        """Of each portion of one of the last steps, whose result counted (-1: it had no samples), and how often it was given."""
        return [(int(rank), int(given)) for rank, given in self._told[step % RING_STEPS]]

    def _undone(self, step: int) -> np.ndarray:
        return np.flatnonzero(self.rows[:, PortionColumns.DONE] != step + 1)

    def _holders(self, step: int, portion: int, but: int | None) -> list[int]:
        rows = self._at
        at = (rows[:, _WorkerColumns.STEP] == step + 1) & (rows[:, _WorkerColumns.PORTION] == portion)
        return [int(worker) for worker in np.flatnonzero(at) if worker != but]

    # -- changing it ---------------------------------------------------------------------------------------------

    def take(self, worker: int, step: int, beat: Callable[[], None] = lambda: None) -> Given | Later | None:
        """Take a portion; None where nothing is left of the step. What the worker was at before is given up."""
        with locked(self._arena, beat):
            own = self._at[worker]
            own[_WorkerColumns.STEP] = 0
            if self._head[0] > step + 1:
                return None
            if self._head[0] < step + 1:
                self.rows[:] = 0.0
                self._head[0] = step + 1
            undone = self._undone(step)
            if not len(undone):
                return None
            found = self._choose(worker, step, undone)
            if isinstance(found, Later):
                return found
            stripe = self._free_stripe(worker, step)
            own[_WorkerColumns.STRIPE], own[_WorkerColumns.PORTION] = stripe + 1, found
            own[_WorkerColumns.SINCE] = self._clock()
            self.rows[found, PortionColumns.GIVEN] += 1
            own[_WorkerColumns.STEP] = step + 1
            return Given(found, stripe)

    def _choose(self, worker: int, step: int, undone: np.ndarray) -> int | Later:
        held = {int(p): [float(self._at[w, _WorkerColumns.SINCE]) for w in self._holders(step, int(p), worker)] for p in undone}
        done = self.rows[self.rows[:, PortionColumns.DONE] == step + 1]
        return next_portion(held, done[:, PortionColumns.TOOK].tolist(), self._clock())

    def _free_stripe(self, worker: int, step: int) -> int:
        done = self.rows[self.rows[:, PortionColumns.DONE] == step + 1]
        used = {int(stripe) for stripe in done[:, PortionColumns.STRIPE]}
        used |= {int(self._at[w, _WorkerColumns.STRIPE]) - 1 for w in range(self._workers) if w != worker}
        return next(stripe for stripe in range(self._workers + self.count - 1) if stripe not in used)

    def finish(
        self, worker: int, step: int, given: Given, found: Sequence[float], settle: Callable[[], None] = lambda: None
    ) -> bool:
        """Hand in the result of a portion, whose gradient is in its stripe; whether it is the one that counts.

        Args:
            found: the fields of the portion's row from ``LOSS`` on.
            settle: called before it counts, if it is to.
        """
        with locked(self._arena):
            row, own = self.rows[given.portion], self._at[worker]
            counts = not self.is_done(step, given.portion)
            if counts:
                settle()
                row[PortionColumns.STRIPE], row[PortionColumns.RANK] = given.stripe, worker
                row[PortionColumns.TOOK] = self._clock() - own[_WorkerColumns.SINCE]
                row[PortionColumns.LOSS :] = found
                rank = worker if row[PortionColumns.SAMPLES] else -1
                self._told[step % RING_STEPS, given.portion] = rank, row[PortionColumns.GIVEN]
                row[PortionColumns.DONE] = step + 1
                own[_WorkerColumns.STRIPE] = 0
            own[_WorkerColumns.STEP] = 0
            return counts
