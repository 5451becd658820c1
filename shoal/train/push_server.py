"""A parameter server's life where workers wait for nobody: each push is an update of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shoal.axes.server_async import Pushed, PushServer
from shoal.axes.updating import Hooks, Totals
from shoal.comm.arena import Note, Order, Phase
from shoal.job import Job
from shoal.process.failure import user_code
from shoal.train import streams
from shoal.train.faults import Faults
from shoal.train.row_tables import TableUpdater
from shoal.train.schedule import Schedule
from shoal.train.server import logging
from shoal.train.update import Updater, WholeUpdater
from shoal.train.update_log import Commit, UpdateLog


@dataclass(frozen=True, kw_only=True)
class PushServerParts:
    """What a server works with, put together by its host.

    ``factor_of``: staleness -> what learning rates are multiplied by; None: nothing.
    """

    job: Job
    axis: PushServer
    updater: Updater
    schedule: Schedule
    faults: Faults
    factor_of: Callable[[int], float] | None = None
    log: UpdateLog | None = None


class PushServerLoop:
    """Applies pushes until the run is over."""

    def __init__(self, parts: PushServerParts) -> None:
        self.parts = parts
        # Scales learning rates once more, while a push is applied for which they are scaled.
        self._rescale: Callable[[], None] | None = None
        self._hooks = Hooks(
            reach=parts.faults.reach, before_chunk=self._before_chunk,
            after_chunk=parts.log.after_chunk if parts.log is not None else None,
        )  # fmt: skip

    def run(self) -> None:
        """Serve until the supervisor says that no push will come any more."""
        axis = self.parts.axis
        self.parts.schedule.recall(axis.updates)
        step = 0
        while True:
            axis.slot.enter(Phase.WAITING, step)
            with logging(self.parts.log, axis):
                pushed = axis.next_push(self._over)
            if pushed is None:
                break
            step = pushed.unit // axis.arena.world_size
            self._apply(pushed, step)
        if self.parts.log is not None:
            self.parts.log.close()
        axis.slot.enter(Phase.DONE, step)

    def _over(self) -> bool:
        if self.parts.log is not None:
            self.parts.log.check()
        return self.parts.axis.over()

    def _apply(self, pushed: Pushed, step: int) -> None:
        parts, axis = self.parts, self.parts.axis
        updates, supervisor = axis.updates, axis.arena.supervisor
        parts.faults.reach("taken", step)
        axis.take(pushed)
        parts.faults.reach("reduce", step)
        axis.slot.enter(Phase.UPDATE, step)
        with user_code("scheduler"):
            while parts.schedule.epochs < supervisor.signal(Order.EPOCH_DONE):
                parts.schedule.after_epoch(supervisor.note(Note.EVAL_LOSS))
            # The schedule goes by batches, in whatever order their shards come.
            parts.schedule.reach(step)
        parts.updater.take_sources((axis.store.stripe_of(pushed.worker),))
        with logging(parts.log, axis):
            if parts.log is not None:
                parts.log.begin(updates)
            with user_code("optimizer"), self._corrected(pushed):
                axis.update(step, Totals(0.0, pushed.factor), None, self._hooks)
            parts.faults.reach("updated", step)
            parts.schedule.keep(updates + 1)
            if parts.log is not None:
                parts.log.commit(step, Commit(axis.unit_rows(pushed), parts.schedule.page(updates + 1)))
                parts.faults.reach("logged", step)
        axis.commit(pushed)
        parts.faults.reach("committed", step)

    @contextlib.contextmanager
    def _corrected(self, pushed: Pushed) -> Iterator[None]:
        """Learning rates for a push that comes as late as this one."""
        if self.parts.factor_of is None:
            yield
            return
        factor = float(self.parts.factor_of(self.parts.axis.staleness(pushed)))
        if isinstance(self.parts.updater, TableUpdater):
            self.parts.updater.scale_lr(factor)
        with self.parts.schedule.scaled(factor) as self._rescale:
            yield
        self._rescale = None

    def _before_chunk(self, chunk: int, step: int) -> None:
        if self._rescale is not None:
            self._rescale()
        updater = self.parts.updater
        if isinstance(updater.inner if isinstance(updater, TableUpdater) else updater, WholeUpdater):
            streams.reseed(streams.UPDATE, self.parts.job.seed, self.parts.axis.updates, self.parts.axis.number)
