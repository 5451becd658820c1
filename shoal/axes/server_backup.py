"""The server axis with backup workers: ``sync,backup=b`` takes the first W - b pushes of a step (Chen et al. 2016).

Server 0 chooses: as soon as all but b workers have pushed, it writes down whose pushes count; every server sums these alone,
scaled to the mean over their samples. A push that comes later is dropped: nothing of it counts, neither gradient nor loss (see
``shoal.axes.server_led``). What moves and what is held is as under ``sync``, but for a byte for each worker and step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from shoal.axes.server_led import LedServer, LedWorker, is_decided
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
        self._marks: np.ndarray = arena.region("chosen").numpy().reshape(RING_STEPS, -1)

    def ranks(self, step: int) -> list[int]:
        return [int(rank) for rank in np.flatnonzero(self._marks[step % RING_STEPS])]

    def write(self, step: int, ranks: Sequence[int]) -> None:
        """Decide. For server 0."""
        row = self._marks[step % RING_STEPS]
        row[:] = 0
        row[list(ranks)] = 1


class BackedWorker(LedWorker):
    """A worker whose push may come too late."""

    def __init__(self, store: Store, rank: int, waiting: Waiting, bells: Sequence[int]) -> None:
        super().__init__(store, rank, waiting, bells)
        self.chosen = Chosen(store.arena)

    def is_late(self, step: int) -> bool:
        """Whether a push of the step would be dropped, or was."""
        return is_decided(self.arena, step) and self.rank not in self.chosen.ranks(step)

    def gather(self, step: int) -> Totals:
        self.await_decision(step)
        ranks = self.chosen.ranks(step)
        return self.totals(step, ranks) if self.rank in ranks else Totals(0.0, 1.0)


class BackedServer(LedServer):
    """A server that does not wait for the last ``backup`` workers; ``batch``: step -> samples of its batch."""

    def __init__(
        self, store: Store, number: int, updater: SliceUpdater, waiting: Waiting, backup: int, bell: int,
        batch: Callable[[int], int],
    ) -> None:  # fmt: skip
        super().__init__(store, number, updater, waiting, bell)
        self.chosen = Chosen(store.arena)
        self._needed = store.arena.world_size - backup
        self._batch = batch
        self._pushed: list[int] = []

    def missing(self, step: int) -> int:
        slots = self.arena.slots
        self._pushed = [rank for rank, slot in enumerate(slots) if slot.signal(Signal.GRADIENTS) > step]
        missing = next((rank for rank in range(len(slots)) if rank not in self._pushed), 0)
        return -1 if len(self._pushed) >= self._needed else missing

    def decide(self, step: int) -> None:
        self.chosen.write(step, self._pushed)

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
