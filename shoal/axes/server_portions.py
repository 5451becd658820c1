"""The server axis where a batch is handed out in portions, for batch optimisation: Sandblaster (Dean et al. 2012, §4.2).

How a step travels::

    worker 0              worker 1              server 0              server 1
    portion 0 -> stripe   portion 1 -> stripe                         each takes the next one, and again
    portion 2 -> stripe
    portion 3 -> stripe
    portion 1 -> stripe                                               nothing is left, and 1 is late
    ------------------------- a result of every portion is there ---------------------
                          (drops its 1)         slice 0 of all        slice 1 of all    sum in the portions' order, update

So a slow worker computes less, and a step is never later for it than by one portion. With N portions of a batch and W workers
there is room for N + W - 1 gradients, and servers read N: that is what it costs beyond ``sync``. Which portion is whose changes
no bit: results lie in stripes of their own and are summed in the portions' order, with what was found of the loss.

A worker that is killed loses what it was at, which another worker takes when it has been out for too long, or its successor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from shoal.axes.server_led import LedServer, LedWorker, is_decided
from shoal.axes.updating import SliceUpdater, Totals
from shoal.axes.waiting import Waiting
from shoal.comm.arena import Note, Signal
from shoal.comm.store import Columns, Store, carry_sums
from shoal.ps.portions import Given, Later, PortionColumns, Portions

_FIELDS = (
    (PortionColumns.LOSS, Columns.LOSS), (PortionColumns.WEIGHT, Columns.WEIGHT), (PortionColumns.SAMPLES, Columns.SAMPLES),
)  # fmt: skip


class PortionWorker(LedWorker):
    """A worker that takes portions; ``count``: of a batch."""

    def __init__(self, store: Store, rank: int, waiting: Waiting, bells: Sequence[int], count: int) -> None:
        super().__init__(store, rank, waiting, bells)
        self.portions = Portions(store.arena, count)

    def take(self, step: int) -> Given | None:
        """The next portion to compute, waited for where all are out; None where a step needs no more."""
        leader, found = self.arena.servers[0], None

        def attempt(times: tuple[float, float]) -> int:
            nonlocal found
            found = self.portions.take(self.rank, step, self._beat)
            if isinstance(found, Later):
                wait_s = times[1] if found.wait_s is None else min(times[1], found.wait_s)
                leader.wait(Signal.CHOSEN, step + 1, wait_s, times[0])
                return self.world_size
            return -1

        self.wait_for(attempt, f"a portion of step {step + 1}")
        assert not isinstance(found, Later)
        return found

    def _beat(self) -> None:
        self.slot.write(Note.PHASE_SINCE, time.monotonic())

    def begin_portion(self, given: Given) -> None:
        """No gradient has come yet."""
        self.store.touched[given.stripe, self.own] = 0

    def finish_portion(self, step: int, given: Given, found: Sequence[float], settle: Callable[[], None]) -> None:
        """Hand in a portion's result: see ``Portions.finish``."""
        if self.portions.finish(self.rank, step, given, found, settle) and self.portions.missing(step) < 0:
            self.ring()

    def is_late(self, step: int) -> bool:
        return is_decided(self.arena, step)

    def gather(self, step: int) -> Totals:
        self.await_decision(step)
        return self.totals(step, range(self.world_size))


class PortionServer(LedServer):
    """A server of such workers; ``per_epoch``: steps of an epoch."""

    def __init__(
        self, store: Store, number: int, updater: SliceUpdater, waiting: Waiting, bell: int, count: int, per_epoch: int
    ) -> None:
        super().__init__(store, number, updater, waiting, bell)
        self.portions = Portions(store.arena, count)
        self._per_epoch = per_epoch

    def missing(self, step: int) -> int:
        return self.portions.missing(step)

    def decide(self, step: int) -> None:
        """Write for each worker what its share of the batch has come to, whoever has computed that."""
        now, workers = time.monotonic(), self.arena.world_size
        for rank in range(workers):
            record, rows = self.store.record(rank, step), self.portions.rows[rank::workers]
            record[:] = 0.0
            for source, target in _FIELDS:
                record[target] = sum(rows[:, source].tolist())
            record[Columns.MEASURED] = rows[:, PortionColumns.MEASURED].max()
            for row in rows:
                record[Columns.VALUES : Columns.VALUE_SUMS] += row[PortionColumns.VALUES :]
            record[Columns.BEGAN] = record[Columns.ENDED] = now
            carry_sums(record, self.store.record(rank, step - 1) if step % self._per_epoch else None)
            record[Columns.STEP] = step + 1

    def stripes(self, step: int) -> list[int] | None:
        return self.portions.stripes()
