"""The life of a worker that takes portions of a batch: see ``shoal.axes.server_portions``.

Like every loop it can be entered at any point: which portions are done is read from the arena.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from shoal.axes.server_portions import PortionWorker
from shoal.comm.arena import Phase
from shoal.comm.store import Columns, Store
from shoal.plan import Plan
from shoal.process.failure import user_code
from shoal.ps.portions import Given, Portions
from shoal.train.gradients import GivenUp
from shoal.train.loop import Loop, Parts, Sums
from shoal.train.passes import Surroundings
from shoal.train.recorder import Emit, Recorder
from shoal.train.settings import JobFacts, portions_of

PIECES = 4
_LEAST = 32


def with_portions(plan: Plan, facts: JobFacts) -> Plan:
    """A plan that says into how many portions a worker's share is cut (``accumulate``), where one may be and it does not.

    Four, as long as they have 32 samples: with them a worker that is ten times as slow costs two workers a tenth of their time.
    """
    if plan.accumulate is not None or not portions_of(plan, facts):
        return plan
    return plan.replace(accumulate=max(1, min(PIECES, facts.batch_size // (_LEAST * plan.data_ways))))


class PortionLoop(Loop):
    """Computes portions of each step until all are done."""

    def __init__(self, parts: Parts, around: Surroundings) -> None:
        super().__init__(parts)
        assert isinstance(parts.axis, PortionWorker)
        self._axis: PortionWorker = parts.axis
        self._around = around

    def _compute_together(self, step: int, record: np.ndarray, began: float) -> None:
        axis, times = self._axis, {Columns.DATA: 0.0, Columns.COMPUTE: 0.0}
        axis.waited_s = 0.0
        while True:
            self.slot.enter(Phase.WAITING, step)
            given = axis.take(step)
            if given is None:
                break
            try:
                self._portion(step, given, times)
            except GivenUp:
                for parameter in self.parts.model.parameters():
                    parameter.grad = None
        # From there on the record is this worker's: server 0 has written what was found.
        axis.await_decision(step)
        record[Columns.BEGAN] = began
        record[Columns.DATA], record[Columns.COMPUTE] = times[Columns.DATA], times[Columns.COMPUTE]

    def _portion(self, step: int, given: Given, times: dict[int, float]) -> None:
        parts, axis, slot = self.parts, self._axis, self.slot
        began = time.monotonic()
        slot.enter(Phase.DATA, step)
        parts.faults.reach("data", step)
        piece, replica = divmod(given.portion, axis.world_size)
        with user_code("train_data", self.rank):
            batches = parts.feed.portion(step, piece, replica)
        computing = time.monotonic()
        times[Columns.DATA] += computing - began

        def is_void() -> bool:
            return axis.portions.is_done(step, given.portion)

        parts.gradients.move_to(given.stripe)
        parts.gradients.begin()
        parts.gradients.is_void = is_void
        axis.begin_portion(given)
        self._buffers.load(step)
        # What is drawn depends on the portion, not on who computes it.
        self._around.replica = given.portion
        sums = self._go_through(step, batches, len(parts.feed.batch(step)))
        parts.gradients.collect()
        parts.faults.drag(step, time.monotonic() - computing, is_void)
        times[Columns.COMPUTE] += time.monotonic() - computing
        if not self._is_good(step, given.stripe, sums.loss, replica, [share for share, _ in batches]):
            sums = Sums()
        speaks = given.portion == self._first_of(step)

        def settle() -> None:
            if speaks:
                self._buffers.publish(step)

        found = [sums.loss, sums.weight, sums.samples, float(sums.measured), *self.named_values(sums)]
        axis.finish_portion(step, given, found, settle)

    def _first_of(self, step: int) -> int:
        """The first portion that has samples: the buffers that it leaves are the next step's."""
        division, size, world = self.parts.feed.division, len(self.parts.feed.batch(step)), self._axis.world_size
        for portion in range(self._axis.portions.count):
            piece, replica = divmod(portion, world)
            if any(stop > start for start, stop, _ in division.piece_cuts(size, piece, replica)):
                return portion
        return 0

    def _examine(self, step: int, record: np.ndarray) -> None:
        """Each portion was, before it was handed in."""

    def _look_ahead(self, step: int) -> None:
        """Nobody knows yet which portions will be this worker's."""


class PortionRecorder(Recorder):
    """Tells whose portions counted, and which were handed out again; ``count``: of a batch."""

    def __init__(self, store: Store, emit: Emit, steps_per_epoch: int, first_step: int, count: int) -> None:
        super().__init__(store, emit, steps_per_epoch, first_step)
        self._portions = Portions(store.arena, count)
        self._rerun = 0

    def go_on_from(self, before: Recorder) -> None:
        super().go_on_from(before)
        if isinstance(before, PortionRecorder):
            self._rerun = before._rerun

    def _tell_pushes(self, step: int, rows: Mapping[int, np.ndarray]) -> None:
        epoch, batch = divmod(step, self._steps_per_epoch)
        for rank in rows:
            self._emit("clock", rank=rank, clock=step + 1, slowest=step + 1)
        for portion, (rank, given) in enumerate(self._portions.told(step)):
            push = {"rank": rank, "epoch": epoch + 1, "batch": batch + 1, "shard": portion}
            if rank < 0:
                # Nothing was in it, or nothing that counts.
                continue
            if given > 1:
                self._rerun += given - 1
                self._emit("portion_rerun", **push, times=given)
            self._emit("push_ack", **push, versions=[step + 1] * self._store.grid.servers, staleness=0)

    def told(self) -> dict[str, Any]:
        return {"portions_rerun": self._rerun}
