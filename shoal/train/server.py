"""A parameter server's life: taking pushes, updating its slice, saving it where a checkpoint is due.

Like a worker's loop it can be entered at any point: what was done is read from the arena.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shoal.axes.server import Server
from shoal.axes.server_async import PushServer
from shoal.axes.updating import Hooks
from shoal.comm.arena import Note, Order, Phase, Signal
from shoal.comm.store import Columns
from shoal.job import Job
from shoal.process.failure import user_code
from shoal.train.faults import Faults
from shoal.train.lbfgs import LbfgsUpdater
from shoal.train.loop import Sender
from shoal.train.saving import StepSaver, decide
from shoal.train.schedule import Schedule
from shoal.train.settings import RunSettings
from shoal.train.update import Updater
from shoal.train.update_log import Commit, LogError, UpdateLog


class _RunEnds(Exception):
    """No further push will come."""


@contextlib.contextmanager
def logging(log: UpdateLog | None, axis: Server | PushServer) -> Iterator[None]:
    """Where the log of an update cannot be written, say so and wait for the end of the run: no push is taken any more."""
    try:
        yield
    except LogError as error:
        assert log is not None
        log.give_up(error)
        axis.await_end()


def epoch_sums(axis: Server, step: int) -> np.ndarray:
    """A row: the running sums over the epoch as a checkpoint keeps them, and the samples of each rank whose push counts."""
    if axis.number:
        return np.empty((0, 0))
    sources = axis.sources(step)
    ranks = range(axis.arena.world_size) if sources is None else sources
    records = {rank: axis.store.record(rank, step) for rank in ranks}
    total = np.sum(list(records.values()), axis=0)
    samples = np.zeros(axis.arena.world_size)
    samples[list(records)] = [record[Columns.SAMPLES] for record in records.values()]
    return np.concatenate([total[Columns.LOSS_SUM : Columns.SAMPLES_SUM + 1], total[Columns.VALUE_SUMS :], samples])[None]


@dataclass(frozen=True, kw_only=True)
class ServerParts:
    """What a server works with, put together by its host."""

    job: Job
    axis: Server
    updater: Updater
    schedule: Schedule
    faults: Faults
    settings: RunSettings
    channel: Sender
    log: UpdateLog | None = None


class ServerLoop:
    """Runs the updates of one server under ``sync``."""

    def __init__(self, parts: ServerParts) -> None:
        self.parts = parts
        axis, settings = parts.axis, parts.settings
        workers = axis.arena.world_size
        # The first one also writes what the workers have to remember: it lies in the arena.
        ranks = [*range(workers if axis.number == 0 else 0), workers + axis.number]
        self._saver = StepSaver(
            axis, parts.updater, ranks, [axis.slot], settings.checkpoint_dir, parts.channel.send, parts.faults,
            (parts.job.seed, axis.number),
        )  # fmt: skip
        self._hooks = Hooks(
            reach=parts.faults.reach, before_chunk=self._saver.before_chunk,
            after_chunk=parts.log.after_chunk if parts.log is not None else None,
        )  # fmt: skip

    def run(self) -> None:
        """Serve until the last step, or until the run is stopped."""
        axis, settings, slot = self.parts.axis, self.parts.settings, self.parts.axis.slot
        step = axis.steps_done()
        self.parts.schedule.recall(step)
        while True:
            if step and step % settings.steps_per_epoch == 0 and self._epoch_ends(step):
                break
            if step >= settings.total_steps or axis.must_stop(step):
                break
            try:
                self._step(step)
            except _RunEnds:
                break
            step += 1
        if self.parts.log is not None:
            self.parts.log.close()
        slot.enter(Phase.DONE, step)

    def _step(self, step: int) -> None:
        parts, axis, slot = self.parts, self.parts.axis, self.parts.axis.slot

        def check() -> None:
            if parts.log is not None:
                parts.log.check()
            if axis.must_stop(step):
                raise _RunEnds

        slot.enter(Phase.WAITING, step)
        with logging(parts.log, axis):
            axis.await_pushes(step, check)
        if axis.number == 0:
            decide(slot, axis.arena.supervisor, step)
        totals = axis.sum_up(step)
        if not math.isfinite(totals.loss):
            # The workers see it, too, and know the samples.
            axis.await_end()
        parts.faults.reach("taken", step)
        if not axis.has_taken(step):
            # Afterwards it is no step's beginning any more; a predecessor that had begun has written it.
            self._saver.write_ahead(step)
        axis.take(step)
        stripes = axis.stripes(step)
        if stripes is not None:
            parts.updater.take_sources(stripes)
        parts.faults.reach("reduce", step)
        slot.enter(Phase.UPDATE, step)
        if isinstance(parts.updater, LbfgsUpdater):
            self._direct(parts.updater, step, totals.factor)
        with logging(parts.log, axis):
            if parts.log is not None:
                parts.log.begin(step, step)
            with user_code("optimizer"):
                axis.update(step, totals, parts.job.grad_clip, self._hooks)
            parts.faults.reach("updated", step)
            with user_code("scheduler"):
                parts.schedule.after_step(step)
            if parts.log is not None:
                parts.log.commit(step, Commit(epoch_sums(axis, step), parts.schedule.page(step + 1), summed=True))
                parts.faults.reach("logged", step)
        axis.commit(step)
        parts.faults.reach("committed", step)

    def _direct(self, updater: LbfgsUpdater, step: int, factor: float) -> None:
        """Find out with the other servers where L-BFGS goes."""
        axis = self.parts.axis
        if axis.slot.signal(Signal.NORM) <= step:
            updater.multiply(factor)
            axis.slot.post(Signal.NORM, step + 1)
        axis.wait_updaters(Signal.NORM, step + 1)
        updater.direct(step)

    def _epoch_ends(self, step: int) -> bool:
        """Wait while the workers evaluate; whether the run ends here."""
        parts, axis = self.parts, self.parts.axis
        epoch = step // parts.settings.steps_per_epoch
        supervisor = axis.arena.supervisor
        axis.slot.enter(Phase.WAITING, step)
        axis.await_supervisor(Order.EPOCH_DONE, epoch, "the supervisor's decision on the epoch")
        with user_code("scheduler"):
            parts.schedule.after_epoch(supervisor.note(Note.EVAL_LOSS))
        return int(supervisor.note(Note.STOP_EPOCH)) == epoch
