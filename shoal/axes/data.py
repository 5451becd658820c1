"""The data axis: every worker computes gradients on its share of the batch; together they make one update.

How a step travels on one machine (``ArenaData``)::

    worker 0            worker 1
    gradients -> stripe gradients -> stripe      1. each worker writes into a stripe of its own
    ---------- all GRADIENTS posted ----------   2. everybody waits until every stripe is complete
    slice 0:            slice 1:                 3. each worker sums its slice of all stripes, lets the
      sum, optimize       sum, optimize             optimizer update it, and writes the weights where all read them
    ----------- all UPDATED posted -----------   4. nobody reads weights or overwrites a stripe before that

So there is no all-gather, and weights and optimizer state exist once. What it moves in a step, for P bytes of trained
parameters and k workers: each writes P bytes of gradients, reads k · P/k of stripes, and reads and writes its P/k of
weights and of each optimizer state tensor (twice, for the undo log). What it holds: (1 + s) · P for weights and s state
tensors, once, and P of gradients for each worker.

Why a killed worker costs nothing: everything above lies in the arena, and a step has three places where a worker may be
when it dies. Before GRADIENTS: nobody has passed point 2, so the weights are those of the step's beginning and only
its share is computed again. Between GRADIENTS and UPDATED: nobody has passed point 4, so all stripes are intact and only
its slice is finished, from the chunk in its undo log. After UPDATED: it joins the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from shoal.axes.given import Given
from shoal.axes.updating import SliceUpdater, Totals, Updates
from shoal.axes.waiting import Waiting
from shoal.comm.arena import Signal
from shoal.comm.store import Store
from shoal.comm.table import chunks_of, slice_bounds
from shoal.comm.team import Team

# Two for each BatchNorm layer and microbatch.
COLLECTIVES_A_STEP = 1 << 16


class ArenaData(Updates):
    """The data axis on one machine, over the arena; see the module's docstring for the protocol."""

    def __init__(self, store: Store, rank: int, updater: SliceUpdater, waiting: Waiting, guard: bool = True) -> None:
        super().__init__(store, rank, updater, waiting, guard)
        self.rank = rank
        self.world_size = store.arena.world_size
        self._stripe = store.stripe_of(rank)
        self._along_data = store.grid.along_data(rank) if store.grid.world_size > 1 else range(self.world_size)
        owner = store.grid.owner(store.part_of(rank))
        # Of each trained parameter, whether this rank computes its gradient.
        self.own = np.array([spec.owner == owner for spec in store.table.trained], dtype=bool)
        self._given = Given(rank, self.world_size, store.collective_bytes, COLLECTIVES_A_STEP)
        self._step = 0
        # Asked while waiting for batch statistics: raises where this rank's team has to begin the step again.
        self.check: Callable[[], None] | None = None

    # -- where to go on ------------------------------------------------------------------------------------------

    def steps_done(self) -> int:
        """Steps whose update this rank has finished; also after it was replaced."""
        return self.slot.signal(Signal.UPDATED)

    def has_published(self, step: int) -> bool:
        """Whether this rank's gradients of the step are complete in its stripe."""
        return self.slot.signal(Signal.GRADIENTS) > step

    # -- the protocol of a step ----------------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """Start computing a step."""
        self._step = step
        self._given.begin()
        self.store.touched[self._stripe, self.own] = 0
        # Words wrap around, and one that nobody moved for long (layers that were frozen) would seem to be ahead.
        first = step * COLLECTIVES_A_STEP & 0xFFFFFFFF
        if 1 << 30 < (first - self.slot.signal(Signal.COLLECTIVE)) & 0xFFFFFFFF < 1 << 31:
            self.slot.post(Signal.COLLECTIVE, first)

    def has_computed(self, step: int) -> bool:
        """Whether this rank's part of the step's computation is complete: of what its team computes, where it has one."""
        return self.slot.signal(Signal.COMPUTED) > step or self.has_published(step)

    def post_computed(self, step: int) -> None:
        self.slot.post(Signal.COMPUTED, step + 1)

    def take_back_computed(self, step: int) -> None:
        """It is void; nobody has gone on because of it, since a member of the team had not posted."""
        self.slot.post(Signal.COMPUTED, step)

    def await_computed(self, step: int, team: Team) -> None:
        """Wait until the whole team has computed; StepAborted where one was lost before it had."""
        for rank in team.ranks:
            slot = self.arena.slots[rank]

            def attempt(times: tuple[float, float], slot: Any = slot, rank: int = rank) -> int:
                return -1 if slot.wait(Signal.COMPUTED, step + 1, times[1], times[0]) else rank

            self.wait_for(attempt, f"the computation of step {step + 1}", team.check)

    def publish(self, step: int) -> None:
        """Say that this worker's stripe and record are complete."""
        self.begin_update()
        self.slot.post(Signal.GRADIENTS, step + 1)

    def gather(self, step: int) -> Totals:
        """Wait for everybody's gradients; return the global loss and the factor of the gradients' sum."""
        self.wait(Signal.GRADIENTS, step + 1)
        return self.totals(step, range(self.world_size), self.rank if self.store.local else None)

    def commit(self, step: int) -> None:
        """Say that this worker's slice is updated."""
        self.slot.post(Signal.UPDATED, step + 1)

    def finish(self, step: int) -> None:
        """Wait until everybody's slice is."""
        self.wait(Signal.UPDATED, step + 1)

    def average(self, step: int, samples: Sequence[int]) -> None:
        """After ``step``, make every replica the average of all, weighted by the samples that each was trained on.

        Each worker averages a slice into the shared weights, then copies all of them into its replica. A replacement may
        do either again: the replicas do not change before all have posted AVERAGED, nor the averages before the next one.
        """
        store, table = self.store, self.store.table
        if self.slot.signal(Signal.AVERAGED) <= step:
            total = sum(samples)
            start, stop = slice_bounds(table.trained_bytes, self.world_size)[self.rank]
            for chunk in chunks_of(table, start, stop):
                dtype = table.parameters[chunk.pieces[0].parameter].dtype
                mean = store.weight_range(chunk.start, chunk.stop, dtype)
                mean.zero_()
                for rank, count in enumerate(samples):
                    if count:
                        mean.add_(store.weight_range(chunk.start, chunk.stop, dtype, rank), alpha=count / total)
            self.slot.post(Signal.AVERAGED, step + 1)
        self.wait(Signal.AVERAGED, step + 1)
        if table.trained_bytes:
            own = store.weight_range(0, table.trained_bytes, torch.uint8, self.rank)
            own.copy_(store.weight_range(0, table.trained_bytes, torch.uint8))

    @property
    def keeps(self) -> Sequence[int]:
        """The ranks whose notes this worker writes into a checkpoint; none where it writes nothing."""
        return (self.rank,)

    def next_step(self, step: int) -> int:
        """Where to go on after ``step``."""
        return step + 1

    def is_late(self, step: int) -> bool:
        """Whether what this worker computes of a step counts for nothing any more."""
        return False

    @property
    def meets_others(self) -> bool:
        """Whether all workers are always at the same step, so that one of them can speak for the buffers of all."""
        return True

    @property
    def tells_metrics(self) -> bool:
        """Whether another rank writes this one's notes into a checkpoint without being able to read them."""
        return False

    def carry_buffers(self, publisher: int, written: Sequence[int]) -> None:
        """Say which rank has written which buffers for the next step: here, all read them where they lie."""

    # -- small collectives inside a step -------------------------------------------------------------------------

    def sum_small(self, values: torch.Tensor, replicas: Sequence[int]) -> torch.Tensor:
        """Sum a small tensor over the replicas that take part, in order; every one of them gets the same bits.

        What a rank gave stays readable until the step is committed, so that a replacement can go through the same
        collectives again.
        """
        place = self._given.give(values, replicas)
        target = (self._step * COLLECTIVES_A_STEP + self._given.count) & 0xFFFFFFFF
        if (target - self.slot.signal(Signal.COLLECTIVE)) & 0xFFFFFFFF < 1 << 31:
            self.slot.post(Signal.COLLECTIVE, target)
        total: Any = None
        for rank in (self._along_data[replica] for replica in replicas):
            part = self._given.find(rank, place, values, self._await_parts)
            total = part.clone() if total is None else total + part
        return total.view(values.shape)  # type: ignore[no-any-return]

    def _await_parts(self, rank: int, count: int) -> None:
        """Wait until a rank has given so many parts of the step's small sums."""
        slot, target = self.arena.slots[rank], (self._step * COLLECTIVES_A_STEP + count) & 0xFFFFFFFF

        def attempt(times: tuple[float, float]) -> int:
            return -1 if slot.wait(Signal.COLLECTIVE, target, times[1], times[0]) else rank

        self.wait_for(attempt, f"batch statistics of step {self._step + 1}", self.check)
