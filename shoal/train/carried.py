"""What a run carries from one set of processes to the next: from a checkpoint, or in memory where its plan changes.

In memory it is what a checkpoint is on disk: whole tensors under the model's own names, in a file that has no name and takes no
disk, and the notes of all places. So any plan can take up what any other has left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from shoal.axes.data import COLLECTIVES_A_STEP
from shoal.comm.arena import Note, Order, Signal
from shoal.comm.journal import Journal
from shoal.comm.store import Columns, Store
from shoal.train import notes
from shoal.train.checkpoint import PartWriter, Restored, bring_together, restore_tensors
from shoal.train.metric_state import deal_pieces, write_pieces


class Carried(PartWriter):
    """The state of a run after a step, in memory; nobody may be at work while it is taken.

    ``marks``: for each place under which number its notes are kept, where that is not the step. OSError where there is no memory
    for it.
    """

    def __init__(self, store: Store, step: int, marks: Mapping[int, int] | None = None) -> None:
        super().__init__(store, "", step, marks=marks)
        self._pages: list[memoryview] = []
        try:
            self.write_all()
        except BaseException:
            self.release()
            raise
        # The arena that it was taken from may go.
        del self._store

    def _open(self) -> int:
        fd = os.memfd_create("shoal-carried", os.MFD_CLOEXEC)
        try:
            # What is not there is to come to light now.
            os.posix_fallocate(fd, 0, max(1, self._layout.size))
        except OSError:
            os.close(fd)
            raise
        return fd

    def _write_page(self, rank: int, page: memoryview) -> None:
        self._pages.append(page)

    def close(self) -> None:
        """Nothing: it is read yet."""

    def release(self) -> None:
        """Give the memory back."""
        super().close()

    def restore(self, store: Store) -> Restored:
        """Fill the arena of another plan."""
        restore_tensors(store, Path(f"/proc/self/fd/{self._fd}"))
        return bring_together(notes.from_bytes(page) for page in self._pages)


class _Notes(PartWriter):
    """The notes of all places after a step."""

    def __init__(self, store: Store, step: int) -> None:
        super().__init__(store, "", step)
        self.pages: list[memoryview] = []
        for place in range(store.arena.layout.places):
            self._write_notes(place)

    def _write_page(self, rank: int, page: memoryview) -> None:
        self.pages.append(page)


def carry_all_but_state(before: Store, after: Store, step: int) -> Restored:
    """Fill the store of another plan with the weights and buffers of one, not with the optimizer's state; what it notes beside.

    For whoever keeps no optimizer's state: the lead of a run whose servers share no memory with it.
    """
    for ours, theirs in zip(after.weights, before.weights, strict=True):
        ours.copy_(theirs)
    for parity in (0, 1):
        for index in range(len(before.table.buffers)):
            after.buffer(parity, index).copy_(before.buffer(parity, index))
    return bring_together(notes.from_bytes(page) for page in _Notes(before, step).pages)


def begin_at(store: Store, restored: Restored, step: int, epochs_done: int, eval_loss: float) -> None:
    """Let everybody in an arena begin behind a step; its tensors are those of that moment already."""
    arena = store.arena
    for place, slot in enumerate(arena.places):
        for signal in (Signal.COMPUTED, Signal.GRADIENTS, Signal.NORM, Signal.UPDATED):
            slot.post(signal, step)
        slot.post(Signal.EVALUATED, epochs_done)
        slot.post(Signal.COLLECTIVE, step * COLLECTIVES_A_STEP)
        # Workers that update nothing would keep it for ever, and hand it on.
        if restored.notebook is not None and (place >= arena.world_size or not arena.servers):
            store.write_notebook(place, step, restored.notebook)
    for rank, pieces in enumerate(deal_pieces(restored.metrics, arena.world_size)):
        write_pieces(Journal(arena, rank), step, pieces)
    row = store.record(0, step - 1)
    row[Columns.STEP] = step
    count = Columns.SAMPLES_SUM + 1 - Columns.LOSS_SUM
    row[Columns.LOSS_SUM : Columns.SAMPLES_SUM + 1] = restored.sums[:count]
    row[Columns.VALUE_SUMS :] = restored.sums[count:]
    for slot in arena.slots:
        # Metrics were taken up as they were in the midst of an epoch.
        slot.write(Note.METRICS_EPOCH, epochs_done)
    arena.supervisor.write(Note.EVAL_LOSS, eval_loss)
    arena.supervisor.post(Order.EPOCH_DONE, epochs_done)
