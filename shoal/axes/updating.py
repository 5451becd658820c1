"""Updating a lane of the weights chunk by chunk, so that whoever takes over goes on from the chunk in work.

What workers do with their slices on the data axis, and servers with theirs on the server axis, is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from shoal.axes.waiting import Waiter, Waiting
from shoal.comm.arena import Note, Signal
from shoal.comm.store import Columns, Store


@dataclass(frozen=True)
class Totals:
    """What all workers found in a step: the loss over the global batch, and what the gradients' sum is multiplied by."""

    loss: float
    factor: float


class SliceUpdater(Protocol):
    """What updates a slice: see ``shoal.train.update``."""

    @property
    def count(self) -> int: ...
    @property
    def starts_over(self) -> bool: ...
    def sum_gradients(self, chunk: int, factor: float) -> None: ...
    def norm_squared(self) -> float: ...
    def apply(self, chunk: int, scale: float) -> None: ...
    def save(self, chunk: int) -> None: ...
    def restore(self, chunk: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What happens at certain points of an update: a fault on purpose, a chunk for a checkpoint, one for the log."""

    reach: Callable[[str, int], None]
    before_chunk: Callable[[int, int], None]
    after_chunk: Callable[[int, float], None] | None = None


class Updates(Waiter):
    """The part of a process that updates a lane of the weights."""

    def __init__(self, store: Store, place: int, updater: SliceUpdater, waiting: Waiting, guard: bool = True) -> None:
        super().__init__(store.arena, place, waiting)
        self.store = store
        self.updater = updater
        self._guard = guard

    def totals(self, step: int, ranks: Sequence[int], own: int | None = None) -> Totals:
        """Add up what these ranks have found in a step; ``own``: the one whose weight alone counts for the factor."""
        loss = weight = 0.0
        measured = False
        for rank in ranks:
            record = self.store.record(rank, step)
            loss += record[Columns.LOSS]
            weight += record[Columns.WEIGHT]
            measured = measured or record[Columns.MEASURED] > 0
        mean = float(loss / weight) if weight else 0.0
        if own is not None:
            weight = self.store.record(own, step)[Columns.WEIGHT]
        return Totals(mean, float(1.0 / weight) if measured and weight else 1.0)

    def begin_update(self) -> None:
        """No chunk is finished: an update is about to begin."""
        self.slot.write(Note.CHUNK_DONE, -1)
        self.slot.write(Note.CHUNK_SAVED, -1)

    def begin_writing(self) -> None:
        """What comes next changes the lane; called before each chunk of an update."""

    def update(self, step: int, totals: Totals, grad_clip: float | None, hooks: Hooks) -> None:
        """Update this process's lane, or what is left of it."""
        scale = self._clip_scale(step, totals, grad_clip) if grad_clip is not None else 1.0
        updater, slot = self.updater, self.slot
        first, saved = int(slot.note(Note.CHUNK_DONE)) + 1, int(slot.note(Note.CHUNK_SAVED))
        if updater.starts_over and saved >= 0:
            # Its chunk of tensors is the first, and those of tables that may follow write nothing to the undo log.
            first = saved = 0
        if first < updater.count and saved == first:
            self.begin_writing()
            updater.restore(first)
            if not updater.starts_over:
                # It may be saved in another form this time, and until that is whole the log says nothing of this chunk.
                slot.write(Note.CHUNK_SAVED, first - 1)
        if hooks.after_chunk is not None:
            for chunk in range(first):
                # What a predecessor has finished and not seen committed goes to the log once more.
                updater.sum_gradients(chunk, totals.factor)
                hooks.after_chunk(chunk, scale)
        for chunk in range(first, updater.count):
            hooks.before_chunk(chunk, step)
            updater.sum_gradients(chunk, totals.factor)
            if self._guard:
                updater.save(chunk)
                slot.write(Note.CHUNK_SAVED, chunk)
            self.begin_writing()
            updater.apply(chunk, scale)
            if hooks.after_chunk is not None:
                hooks.after_chunk(chunk, scale)
            hooks.reach("update", step)
            slot.write(Note.CHUNK_DONE, chunk)

    def _clip_scale(self, step: int, totals: Totals, grad_clip: float) -> float:
        """Clip by the global norm, as torch.nn.utils.clip_grad_norm_ does."""
        if self.slot.signal(Signal.NORM) <= step or self.store.local:
            squared = 0.0
            for chunk in range(self.updater.count):
                self.updater.sum_gradients(chunk, totals.factor)
                squared += self.updater.norm_squared()
            self.slot.write(Note.GRADIENT_NORM_SQUARED, squared)
            if self.store.local:
                return min(1.0, grad_clip / (math.sqrt(squared) + 1e-6))
            self.slot.post(Signal.NORM, step + 1)
        self.wait_updaters(Signal.NORM, step + 1)
        norm = math.sqrt(sum(slot.note(Note.GRADIENT_NORM_SQUARED) for slot in self.arena.updaters))
        return min(1.0, grad_clip / (norm + 1e-6))
