"""From records to events where some workers may come too late (``backup``)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shoal.axes.server_backup import Chosen
from shoal.comm.arena import Note, Signal
from shoal.comm.store import Columns, Store
from shoal.train.recorder import Emit, Recorder


class BackedRecorder(Recorder):
    """Reads the records of those whose pushes counted, and keeps the running sums itself: a late worker skips steps."""

    def __init__(self, store: Store, emit: Emit, steps_per_epoch: int, first_step: int) -> None:
        super().__init__(store, emit, steps_per_epoch, first_step)
        self._chosen = Chosen(store.arena)
        self._total = np.zeros(Columns.COUNT)
        if first_step % steps_per_epoch:
            self._total[:] = np.sum(list(super()._rows(first_step - 1).values()), axis=0)

    def committed(self) -> int:
        arena, step = self._store.arena, self.step
        done = min(slot.signal(Signal.UPDATED) for slot in arena.servers)
        done = done if self.logged is None else min(done, self.logged())
        while step < done and all(arena.slots[r].signal(Signal.UPDATED) > step for r in self._chosen.ranks(step)):
            step += 1
        return step

    def _rows(self, step: int) -> Mapping[int, np.ndarray]:
        return {rank: self._store.record(rank, step) for rank in self._chosen.ranks(step)}

    def _sums(self, step: int, rows: Mapping[int, np.ndarray]) -> np.ndarray:
        found = super()._sums(step, rows)
        if step % self._steps_per_epoch == 0:
            self._total[:] = 0.0
        for now, total in (
            (Columns.LOSS, Columns.LOSS_SUM), (Columns.WEIGHT, Columns.WEIGHT_SUM), (Columns.SAMPLES, Columns.SAMPLES_SUM),
        ):  # fmt: skip
            self._total[total] += found[now]
        self._total[Columns.VALUE_SUMS :] += found[Columns.VALUES : Columns.VALUE_SUMS]
        for part in (slice(Columns.LOSS_SUM, Columns.SAMPLES_SUM + 1), slice(Columns.VALUE_SUMS, Columns.COUNT)):
            found[part] = self._total[part]
        return found

    def _epoch_sums(self) -> np.ndarray:
        return self._total

    def _tell_pushes(self, step: int, rows: Mapping[int, np.ndarray]) -> None:
        arena, servers = self._store.arena, self._store.grid.servers
        slowest = min(int(slot.note(Note.STEP)) for slot in arena.slots)
        epoch, batch = divmod(step, self._steps_per_epoch)
        for rank in range(arena.world_size):
            push = {"rank": rank, "epoch": epoch + 1, "batch": batch + 1, "shard": rank}
            if rank not in rows:
                self._emit("push_dropped", **push)
                continue
            self._emit("clock", rank=rank, clock=step + 1, slowest=min(step, slowest) + 1)
            if rows[rank][Columns.SAMPLES]:
                self._emit("push_ack", **push, versions=[step + 1] * servers, staleness=0)
