"""The data axis where workers share no memory: over a process group, also between machines.

Each worker has weights, optimizer state and one stripe of gradients in memory of its own, in the arena's layout, and a
step travels so (``GroupData``)::

    worker 0            worker 1
    gradients           gradients              1. each computes its share into its stripe
    ------- what everybody found -------       2. one small exchange: losses, weights, touched parameters
    ------- gradients are summed -------       3. the stripes are summed in place, in flat buckets of one dtype
    optimize all        optimize all           4. each lets the user's optimizer update all of its weights, alike

A gradient is weighted before it is summed, as in the arena, so that the update is the exact mean over the global batch.
What moves in a step, for P bytes of trained parameters: about 2 P in and 2 P out of each worker, whatever their number.
What it holds: (2 + s) · P in every worker, for s state tensors.

Rank 0 does what a supervisor does for an arena: it decides when an epoch or the run is over, keeps the records, and
writes the checkpoints. What it decides goes to the others with the next exchange. A worker that dies ends the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from shoal.axes.data import ArenaData
from shoal.axes.updating import Hooks, SliceUpdater, Totals
from shoal.axes.waiting import Waiting
from shoal.comm.arena import Note, Order, Signal
from shoal.comm.group import Group
from shoal.comm.store import Columns, Store
from shoal.errors import ShoalError

# What a worker says beside its record: where rank 0 ends the run, a wish to end it, whether there is mail, how long
# the step before took to update and to wait, and where rank 0 writes a checkpoint.
_STOP_AFTER, _STOP_WISHED, _MAIL, _REDUCE, _WAIT, _CHECKPOINT_AT, _EXTRA = range(7)
_ORDERS = (Order.EPOCH_DONE, Order.STEP_SEEN)
_SUPERVISOR_NOTES = (Note.STOP_EPOCH, Note.STOP_AT, Note.EVAL_LOSS)


class Manager(Protocol):
    """What rank 0 does for all: the supervisor's part, between steps."""

    def take(self, message: Any) -> None: ...
    def attend(self) -> None: ...
    def wish_to_stop(self) -> None: ...


class Outbox:
    """Messages of one worker to rank 0's manager, until the next exchange takes them along."""

    def __init__(self) -> None:
        self._letters: list[Any] = []

    def send(self, message: Any) -> None:
        self._letters.append(message)

    def take(self) -> list[Any]:
        """All that is there; it is empty afterwards."""
        letters, self._letters = self._letters, []
        return letters

    def __len__(self) -> int:
        return len(self._letters)


@dataclass(frozen=True, kw_only=True)
class Course:
    """What all workers know of the run: after which steps rank 0 has to have heard everything at once."""

    total_steps: int
    steps_per_epoch: int
    every_step: bool


class GroupData(ArenaData):
    """The data axis over a process group; see the module's docstring.

    The signals of all ranks in this worker's own memory say what the exchanges have told of them, so that the protocol
    of a step is the arena's.
    """

    def __init__(
        self, store: Store, updater: SliceUpdater, group: Group, outbox: Outbox, course: Course,
        stop_wanted: Callable[[], bool], manager: Manager | None = None,
    ) -> None:  # fmt: skip
        super().__init__(store, group.rank, updater, Waiting(spin_s=0.0), guard=False)
        self._group = group
        self._outbox = outbox
        self._course = course
        self._stop_wanted = stop_wanted
        self._manager = manager
        self._written: Sequence[int] = ()
        self._told = self.steps_done()

    @property
    def keeps(self) -> Sequence[int]:
        return range(self.world_size) if self.rank == 0 else ()

    @property
    def tells_metrics(self) -> bool:
        return self.rank != 0

    def carry_buffers(self, publisher: int, written: Sequence[int]) -> None:
        self._written = written

    # -- the protocol of a step ----------------------------------------------------------------------------------

    def gather(self, step: int) -> Totals:
        began = time.monotonic()
        rows = self._group.gather_rows(self._say(step), f"the share of step {step + 1}").numpy()
        self.waited_s += time.monotonic() - began
        self._hear(step, rows)
        self._exchange_buffers(step, rows)
        if rows[:, Columns.COUNT + _MAIL].any():
            self._deliver(f"the messages of step {step + 1}")
        return super().gather(step)

    def _say(self, step: int) -> torch.Tensor:
        """This worker's row of the exchange."""
        record = self.store.record(self.rank, step)
        before = self.store.record(self.rank, step - 1)
        extra = np.zeros(_EXTRA)
        extra[_STOP_AFTER] = self.slot.note(Note.STOP_AFTER)
        extra[_STOP_WISHED] = self._stop_wanted()
        extra[_MAIL] = len(self._outbox)
        extra[_CHECKPOINT_AT] = self.slot.note(Note.CHECKPOINT_AT)
        extra[_REDUCE], extra[_WAIT] = before[Columns.REDUCE], before[Columns.WAIT]
        written = np.zeros(len(self.store.table.buffers))
        written[list(self._written)] = 1
        return torch.from_numpy(np.concatenate([record, extra, self._marks(), written]))

    def _marks(self) -> np.ndarray:
        """Which parameters have got a gradient here, in an order that all workers have in common."""
        marks: np.ndarray = self.store.touched[0]
        return marks

    def _take_marks(self, marks: np.ndarray) -> None:
        """Take up which parameters have got a gradient anywhere."""
        self._drop_untouched()
        self.store.touched[0] = marks

    def _drop_untouched(self, among: np.ndarray | None = None) -> None:
        """What is left from another step where no gradient came must not be added; ``among``: marks of those to look at."""
        stale = self.store.touched[0] == 0
        for index in np.flatnonzero(stale if among is None else stale & among):
            self.store.gradient(0, int(index)).zero_()

    def _hear(self, step: int, rows: np.ndarray) -> None:
        """Take up what everybody said, so that the records and signals here are those of all."""
        first = Columns.COUNT + _EXTRA
        self._take_marks(rows[:, first : first + len(self._marks())].max(axis=0, initial=0))
        for rank in self._others():
            record = self.store.record(rank, step)
            # Clocks of other machines tell nothing here: everybody's step begins when ours does.
            own_began = self.store.record(self.rank, step)[Columns.BEGAN]
            record[:] = rows[rank, : Columns.COUNT]
            record[Columns.BEGAN], record[Columns.REDUCE], record[Columns.WAIT] = own_began, 0.0, 0.0
            self.arena.slots[rank].post(Signal.GRADIENTS, step + 1)
        if self._told < step:
            self._hear_times(step - 1, rows[:, Columns.COUNT + _REDUCE : Columns.COUNT + _WAIT + 1])
        if self.rank:
            self.arena.slots[0].write(Note.STOP_AFTER, rows[0, Columns.COUNT + _STOP_AFTER])
            self.arena.slots[0].write(Note.CHECKPOINT_AT, rows[0, Columns.COUNT + _CHECKPOINT_AT])
        elif self._manager is not None and rows[:, Columns.COUNT + _STOP_WISHED].any():
            self._manager.wish_to_stop()

    def _hear_times(self, step: int, times: np.ndarray) -> None:
        """Complete the others' records of a step; with that it is done as far as this worker can see."""
        for rank in self._others():
            record = self.store.record(rank, step)
            record[Columns.REDUCE], record[Columns.WAIT] = times[rank]
            record[Columns.ENDED] = self.store.record(self.rank, step)[Columns.ENDED]
            record[Columns.STEP] = step + 1
            self.arena.slots[rank].post(Signal.UPDATED, step + 1)
        self._told = step + 1

    def _exchange_buffers(self, step: int, rows: np.ndarray) -> None:
        """Give everybody the buffers that some workers, each its own ones, have written for the next step."""
        store, self._written = self.store, ()
        first = Columns.COUNT + _EXTRA + len(self._marks())
        for publisher in np.flatnonzero(rows[:, first:].any(axis=1)).tolist() if self.world_size > 1 else ():
            written = np.flatnonzero(rows[publisher, first:])
            places = [store.buffer((step + 1) % 2, int(index)).reshape(-1).view(torch.uint8) for index in written]
            flat = [place.cpu() for place in places]
            flat.append(torch.from_numpy(store.buffer_steps[written]).view(torch.uint8))
            page = torch.cat(flat)
            self._group.broadcast(page, publisher, f"the buffers of step {step + 1}")
            *pieces, steps = page.split([len(f) for f in flat])
            for place, piece in zip(places, pieces, strict=True):
                place.copy_(piece)
            store.buffer_steps[written] = steps.clone().view(torch.float64).numpy()

    def update(self, step: int, totals: Totals, grad_clip: float | None, hooks: Hooks) -> None:
        self._group.sum_in_place(self._stripes(), f"the gradients of step {step + 1}")
        super().update(step, totals, grad_clip, hooks)

    def _stripes(self) -> list[torch.Tensor]:
        """This worker's gradients, flat, one tensor for each run of one dtype."""
        runs: list[tuple[int, int, torch.dtype]] = []
        for spec in self.store.table.trained:
            stop = spec.offset + spec.nbytes
            if runs and runs[-1][2] == spec.dtype:
                runs[-1] = (runs[-1][0], stop, spec.dtype)
            elif spec.numel:
                runs.append((spec.offset, stop, spec.dtype))
        return [self.store.gradient_range(0, *run) for run in runs]

    def _clip_scale(self, step: int, totals: Totals, grad_clip: float) -> float:
        squared = 0.0
        for chunk in range(self.updater.count):
            self.updater.sum_gradients(chunk, totals.factor)
            squared += self.updater.norm_squared()
        return min(1.0, grad_clip / (math.sqrt(squared) + 1e-6))

    def finish(self, step: int) -> None:
        course, done = self._course, step + 1
        last = done == course.total_steps or int(self.arena.slots[0].note(Note.STOP_AFTER)) == done
        if self._told < done and (course.every_step or last or done % course.steps_per_epoch == 0):
            own = self.store.record(self.rank, step)
            row = torch.tensor([own[Columns.REDUCE], own[Columns.WAIT]], dtype=torch.float64)
            self._hear_times(step, self._group.gather_rows(row, f"the end of step {done}").numpy())
        if self._manager is not None:
            self._manager.attend()
        if course.every_step:
            self._announce(f"the observer of step {done}")

    def _others(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank != self.rank]

    # -- the supervisor's part -----------------------------------------------------------------------------------

    def await_supervisor(self, order: Order, target: int, what: str, check: Callable[[], None] | None = None) -> None:
        if self.arena.supervisor.signal(order) < target:
            self._council(what)
        if self.arena.supervisor.signal(order) < target:
            raise ShoalError(f"Rank 0 has not decided on {what}.")

    def await_end(self) -> None:
        # Rank 0 raises here, and the others hear of it.
        self._council("the end of the run")
        raise ShoalError("Rank 0 has not ended the run.")

    def _deliver(self, what: str) -> None:
        letters = self._group.gather_objects(self._outbox.take(), what)
        if self._manager is not None:
            for message in [message for own in letters for message in own]:
                self._manager.take(message)

    def _council(self, what: str) -> None:
        """Everybody reports to rank 0, which decides and tells all."""
        self._deliver(what)
        if self._manager is not None:
            self._manager.attend()
        self._announce(what)

    def _announce(self, what: str) -> None:
        """Give everybody the supervisor's words."""
        supervisor = self.arena.supervisor
        said = (
            {order: supervisor.signal(order) for order in _ORDERS},
            {note: supervisor.note(note) for note in _SUPERVISOR_NOTES},
        )
        orders, notes = self._group.broadcast_object(said, 0, what)
        if self.rank:
            for note, value in notes.items():
                supervisor.write(note, value)
            for order, value in orders.items():
                supervisor.post(order, value)

    # -- small collectives inside a step -------------------------------------------------------------------------

    def sum_small(self, values: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
        began = time.monotonic()
        total = self._group.sum_small(values.cpu(), ranks, f"batch statistics of step {self._step + 1}")
        self.waited_s += time.monotonic() - began
        return total.to(values.device)
