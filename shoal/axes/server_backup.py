"""The server axis with backup workers: ``sync,backup=b`` takes the first W - b pushes of a step (Chen et al. 2016).

Server 0 chooses: as soon as all but b workers have pushed, it writes down whose pushes count, and posts CHOSEN; every server
sums these alone, scaled to the mean over their samples. A push that comes later is dropped. Its worker may have computed it
from weights that were half updated, which is why nothing of it counts, neither gradient nor loss; it goes on with the step
that the servers are at. What moves and what is held is as under ``sync``, but for a byte for each worker and step.

Which pushes count is in the arena before the first server begins its update, so whoever replaces a server takes the same.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable, Sequence

import numpy as np

from shoal.axes.server import ServedWorker, Server
from shoal.axes.updating import SliceUpdater, Totals
from shoal.axes.waiting import Waiting
from shoal.comm.arena import Arena, Signal
from shoal.comm.store import RING_STEPS, Columns, Store


def chosen_bytes(workers: int) -> int:
    """Bytes of the arena's ``chosen`` region."""
    return RING_STEPS * workers


class Chosen:
    """Whose pushes of a step count."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._marks: np.ndarray = arena.region("chosen").numpy().reshape(RING_STEPS, -1)

    def known(self, step: int) -> bool:
        """Whether it is decided."""
        return self._arena.servers[0].signal(Signal.CHOSEN) > step

    def ranks(self, step: int) -> list[int]:
        return [int(rank) for rank in np.flatnonzero(self._marks[step % RING_STEPS])]

    def write(self, step: int, ranks: Sequence[int]) -> None:
        """Decide. For server 0."""
        row = self._marks[step % RING_STEPS]
        row[:] = 0
        row[list(ranks)] = 1
        self._arena.servers[0].post(Signal.CHOSEN, step + 1)


class BackedWorker(ServedWorker):
    """A worker whose push may come too late."""

    def __init__(self, store: Store, rank: int, waiting: Waiting, bells: Sequence[int]) -> None:
        super().__init__(store, rank, waiting)
        self.chosen = Chosen(store.arena)
        self._bells = bells

    @property
    def meets_others(self) -> bool:
        return False

    def is_late(self, step: int) -> bool:
        """Whether a push of the step would be dropped, or was."""
        return self.chosen.known(step) and self.rank not in self.chosen.ranks(step)

    def publish(self, step: int) -> None:
        super().publish(step)
        os.eventfd_write(self._bells[0], 1)

    def gather(self, step: int) -> Totals:
        leader = self.arena.servers[0]

        def attempt(times: tuple[float, float]) -> int:
            return -1 if leader.wait(Signal.CHOSEN, step + 1, times[1], times[0]) else self.world_size

        self.wait_for(attempt, f"the choice of pushes of step {step + 1}")
        ranks = self.chosen.ranks(step)
        return self.totals(step, ranks) if self.rank in ranks else Totals(0.0, 1.0)

    def next_step(self, step: int) -> int:
        ahead = max(step + 1, *(slot.signal(Signal.UPDATED) for slot in self.arena.servers))
        self.wait_updaters(Signal.UPDATED, ahead)
        self.slot.post(Signal.UPDATED, ahead)
        return ahead


class BackedServer(Server):
    """A server that does not wait for the last ``backup`` workers; ``batch``: step -> samples of its batch."""

    def __init__(
        self, store: Store, number: int, updater: SliceUpdater, waiting: Waiting, backup: int, bell: int,
        batch: Callable[[int], int],
    ) -> None:  # fmt: skip
        super().__init__(store, number, updater, waiting)
        self.chosen = Chosen(store.arena)
        self._needed = store.arena.world_size - backup
        self._bell = bell
        self._batch = batch

    def await_pushes(self, step: int, check: Callable[[], None]) -> None:
        if self.number:
            leader, place = self.arena.servers[0], self.arena.world_size

            def attempt(times: tuple[float, float]) -> int:
                return -1 if leader.wait(Signal.CHOSEN, step + 1, times[1], times[0]) else place

            self.wait_for(attempt, f"the choice of pushes of step {step + 1}", check)
        elif not self.chosen.known(step):
            ranks: list[int] = []

            def gather(times: tuple[float, float]) -> int:
                ranks[:] = self._pushed(step)
                if len(ranks) < self._needed:
                    select.select([self._bell], [], [], times[1])
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._bell)
                    ranks[:] = self._pushed(step)
                missing = next((r for r in range(self.arena.world_size) if r not in ranks), 0)
                return -1 if len(ranks) >= self._needed else missing

            self.wait_for(gather, f"the push of step {step + 1}", check)
            self.chosen.write(step, ranks)

    def _pushed(self, step: int) -> list[int]:
        return [rank for rank, slot in enumerate(self.arena.slots) if slot.signal(Signal.GRADIENTS) > step]

    def sources(self, step: int) -> list[int] | None:
        return self.chosen.ranks(step)

    def sum_up(self, step: int) -> Totals:
        ranks = self.chosen.ranks(step)
        found, records = self.totals(step, ranks), [self.store.record(rank, step) for rank in ranks]
        if any(record[Columns.MEASURED] for record in records):
            return found
        samples = sum(float(record[Columns.SAMPLES]) for record in records)
        # Shares were weighted by the whole batch.
        return Totals(found.loss, self._batch(step) / samples if samples else 1.0)
