"""Writing one process's part of a checkpoint while it updates its part of the weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from shoal.axes.updating import Updates
from shoal.comm.arena import Note, Phase, Slot
from shoal.train import streams
from shoal.train.checkpoint import PartWriter
from shoal.train.faults import Faults
from shoal.train.settings import CheckpointTrouble
from shoal.train.update import Updater, WholeUpdater


class StepSaver:
    """Copies each chunk into the checkpoint just before its update: it is still that of the step's beginning.

    Args:
        axis: whose lane it is; ``updater``: what updates it.
        ranks: whose notes this process writes; nothing at all is written where there are none.
        marked: the slots in which it says that its part is written.
        where: the run's seed and this process's number among those who update, for an optimizer that draws.
    """

    def __init__(
        self, axis: Updates, updater: Updater | None, ranks: Sequence[int], marked: Sequence[Slot], directory: str,
        send: Callable[[Any], None], faults: Faults, where: tuple[int, int],
    ) -> None:  # fmt: skip
        self._axis = axis
        self._updater = updater
        self._ranks = ranks
        self._marked = marked
        self._directory = directory
        self._send = send
        self._faults = faults
        self._where = where
        self._writer: PartWriter | None = None
        # An optimizer of the user's own may add noise; torch's elementwise ones do not.
        self._may_draw = isinstance(getattr(updater, "inner", updater), WholeUpdater)

    def begin(self, step: int) -> None:
        """Begin to write, where a checkpoint is made of this step's beginning."""
        slot = self._axis.slot
        self._writer = None
        if self._ranks and self._wanted(step):
            slot.enter(Phase.CHECKPOINT, step)
            self._faults.reach("checkpoint", step)
            writer = PartWriter(self._axis.store, self._directory, step)
            self._attempt(writer, lambda: writer.write_rest(*self._ranks))

    def write_ahead(self, step: int) -> None:
        """Write the whole part, where a checkpoint is made of this step's beginning, before its update begins.

        For servers: until the update begins, readers of the run are given what there is, however long the disk takes.
        """
        self.begin(step)
        if self._writer is None:
            return
        for chunk in range(self._updater.count if self._updater is not None else 0):
            self._write_chunk(chunk)
        self.end(step)

    def _wanted(self, step: int) -> bool:
        slot = self._axis.slot
        settled = (slot.note(Note.CHECKPOINT_DONE), slot.note(Note.CHECKPOINT_FAILED))
        return int(self._axis.arena.leader.note(Note.CHECKPOINT_AT)) == step and step > 0 and step not in settled

    def before_chunk(self, chunk: int, step: int) -> None:
        """A chunk is about to be updated."""
        if self._may_draw:
            seed, part = self._where
            streams.reseed(streams.UPDATE, seed, step, part)
        self._write_chunk(chunk)

    def _write_chunk(self, chunk: int) -> None:
        writer, updater = self._writer, self._updater
        if writer is not None and updater is not None:
            # A slow disk is no stall.
            self._axis.slot.write(Note.PHASE_SINCE, time.monotonic())
            self._attempt(writer, lambda: writer.write(updater.saved(chunk)))

    def end(self, step: int) -> None:
        """All chunks are updated, and written."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            for slot in self._marked:
                slot.write(Note.CHECKPOINT_DONE, step)

    def _attempt(self, writer: PartWriter, action: Callable[[], None]) -> None:
        try:
            action()
            self._writer = writer
        except OSError as error:
            self._writer = None
            writer.close()
            # What is missing in the file now must not be taken for written by a replacement.
            self._axis.slot.write(Note.CHECKPOINT_FAILED, writer.step)
            self._send(CheckpointTrouble(writer.step, error.strerror or str(error)))


class PartsSaver(StepSaver):
    """Where parts lie in the memory of many processes: all bring theirs to rank 0's file before the update begins.

    ``collect`` does that, for a step's beginning; then StepSaver's arguments.
    """

    def __init__(self, collect: Callable[[int], None], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._collect = collect

    def begin(self, step: int) -> None:
        slot = self._axis.slot
        if not self._wanted(step):
            return
        slot.enter(Phase.CHECKPOINT, step)
        self._faults.reach("checkpoint", step)
        try:
            self._collect(step)
        except OSError as error:
            slot.write(Note.CHECKPOINT_FAILED, step)
            self._send(CheckpointTrouble(step, error.strerror or str(error)))
            return
        for own in self._marked or [slot]:
            own.write(Note.CHECKPOINT_DONE, step)


def decide(leader: Slot, supervisor: Slot, step: int) -> None:
    """The leader alone decides what happens after a step, before anybody can get past its barrier."""
    if supervisor.note(Note.STOP_WANTED):
        leader.write(Note.STOP_AFTER, step + 1)
    wanted = supervisor.note(Note.CHECKPOINT_WANTED)
    # The one that this very step is to write must not be put off again.
    if wanted > leader.note(Note.CHECKPOINT_SEEN) and leader.note(Note.CHECKPOINT_AT) != step:
        leader.write(Note.CHECKPOINT_AT, step + 1)
        leader.write(Note.CHECKPOINT_SEEN, wanted)
