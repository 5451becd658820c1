"""The life of a worker that waits for nobody: claiming units, computing their gradients on its own copy, pushing them.

Like every loop it can be entered at any point: claims, pushes and what was applied are read from the arena.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shoal.axes.server_async import PushingWorker
from shoal.comm.arena import Note, Order, Phase, Signal
from shoal.comm.store import VALUE_COLUMNS, Store
from shoal.process.failure import user_code
from shoal.ps.claims import Claim
from shoal.ps.ledger import EMPTY, REJECTED, UnitColumns
from shoal.train.feed import Share
from shoal.train.gradients import examine, find_bad
from shoal.train.loop import Loop, Parts, Sums
from shoal.train.passes import Surroundings
from shoal.train.settings import BadPush

_NAP_S = 0.001


def own_copy(store: Store, parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """Give trained parameters memory of this process's own, laid out as the shared weights are; its bytes."""
    own = store.weight_range(0, store.table.trained_bytes, torch.uint8).clone()
    for parameter, spec in zip(parameters, store.table.trained, strict=True):
        parameter.data = spec.view_in(own)
    return own


class PushLoop(Loop):
    """Computes units until there are none left."""

    def __init__(self, parts: Parts, around: Surroundings, copy: torch.Tensor) -> None:
        super().__init__(parts)
        assert isinstance(parts.axis, PushingWorker)
        self._axis: PushingWorker = parts.axis
        self._around = around
        self._copy = copy
        plan = parts.settings.plan
        self._push_every, self._pull_every = plan.push_every or 1, plan.pull_every or 1
        self._since_pull = 0
        self._pulled: list[int] = []
        # Under bounded staleness: all steps before this one are in the copy.
        self._bound = plan.staleness if plan.mode == "bounded" else None
        self._copied_at = 0
        # The units whose gradients the stripe holds.
        self._gathered: list[int] = []
        self._edge = -1

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until the last unit, or until the run is stopped."""
        self.parts.model.train()
        self._recover()
        step = 0
        while True:
            got = self._axis.claims.claim(self.rank, self._axis.beat)
            step = got.unit // self._axis.units_per_step if isinstance(got, Claim) else got.step
            if isinstance(got, Claim):
                self._work(got.unit, got.slowest)
                self._push_if_full()
                continue
            # What others may wait for must not wait for more.
            self._push()
            self.slot.enter(Phase.WAITING, step)
            if got.worker is not None:
                self._axis.await_worker(got.worker)
            elif self._rests(step):
                break
        self.slot.enter(Phase.DONE, step)

    def _recover(self) -> None:
        """Finish what a predecessor had begun."""
        axis = self._axis
        for server in range(axis.ledger.servers):
            axis.ledger.set_reading(self.rank, server, False)
        self._metric_notes.recall(axis.pushes)
        self._begin_epoch_again()
        units = axis.claims.open(self.rank)
        rows = [axis.ledger.row(unit) for unit in units]
        if any(
            row[UnitColumns.UNIT] == unit + 1 and row[UnitColumns.PUSH] == axis.pushes
            for row, unit in zip(rows, units, strict=True)
        ):
            axis.ring()
            axis.await_applied()
            return
        for unit, row in zip(units, rows, strict=True):
            self._work(unit, int(row[UnitColumns.SLOWEST]))
        # Not before all are gathered: a push finishes whatever is claimed.
        self._push_if_full()

    def _begin_epoch_again(self) -> None:
        """Metrics that keep a state begin anew with an epoch; a predecessor may have died before it came to that."""
        done = self._axis.arena.supervisor.signal(Order.EPOCH_DONE)
        if self.slot.note(Note.METRICS_EPOCH) < done:
            self._metric_notes.begin_again(self._axis.pushes)
            self.slot.write(Note.METRICS_EPOCH, done)

    def _rests(self, step: int) -> bool:
        """No unit may be begun for now: evaluate at the edge of an epoch, or wait; whether the run ends here."""
        settings, axis = self.parts.settings, self._axis
        supervisor = axis.arena.supervisor
        if supervisor.signal(Order.STEPS_ALLOWED) > step:
            # The supervisor has yet to read what was done.
            axis.beat()
            time.sleep(_NAP_S)
            return False
        if step and step % settings.steps_per_epoch == 0 and step != self._edge:
            self._edge = step
            if self._edge_ends(step):
                return True
        if step >= settings.total_steps or supervisor.signal(Order.OVER):
            return True

        def attempt(times: tuple[float, float]) -> int:
            if supervisor.signal(Order.OVER):
                return -1
            return -1 if supervisor.wait(Order.STEPS_ALLOWED, step + 1, times[1]) else len(axis.arena.places)

        axis.wait_for(attempt, "the supervisor's leave to go on")
        return supervisor.signal(Order.OVER) > 0

    def _edge_ends(self, step: int) -> bool:
        axis, supervisor = self._axis, self._axis.arena.supervisor
        epoch = step // self.parts.settings.steps_per_epoch
        if self.slot.signal(Signal.EVALUATED) < epoch:
            axis.await_all()
            self._pull()
            self._evaluate(step, epoch)
            self.slot.enter(Phase.WAITING, step)
        axis.await_supervisor(Order.EPOCH_DONE, epoch, "the supervisor's decision on the epoch")
        self._begin_epoch_again()
        return int(supervisor.note(Note.STOP_EPOCH)) == epoch

    # -- a unit --------------------------------------------------------------------------------------------------

    def _pull(self) -> None:
        self._pulled = self._axis.pull(self._copy)
        self._since_pull = 0

    def _is_too_old(self, step: int) -> bool:
        """Whether the copy may not be used for a unit of this step: not for more units than agreed, nor for later steps."""
        if self._since_pull % self._pull_every == 0 or not self._pulled:
            return True
        return self._bound is not None and step - self._copied_at > self._bound

    def _work(self, unit: int, slowest: int) -> None:
        """Compute a unit's gradient into the stripe; ``slowest``: all steps before this one were done when it was claimed."""
        axis, parts, slot = self._axis, self.parts, self.slot
        step, shard = divmod(unit, axis.units_per_step)
        row = axis.ledger.row(unit)
        began = time.monotonic()
        axis.waited_s = 0.0
        slot.enter(Phase.DATA, step)
        parts.faults.reach("data", step)
        self._around.replica = shard
        batches = self._fetch(step, shard)
        fetched = time.monotonic()
        if self._is_too_old(step):
            self._pull()
            self._copied_at = slowest
        self._since_pull += 1
        computing = time.monotonic()
        if not self._gathered:
            axis.empty_stripe()
            parts.gradients.begin()
        count = sum(len(share.indices) for share, _ in batches)
        if count:
            self._buffers.load(step)
            sums = self._go_through(step, batches, self._mean_over([share for share, _ in batches]))
            parts.faults.drag(step, time.monotonic() - computing, parts.gradients.is_void)
            self.publish_buffers(unit)
            self._write_unit(row, sums)
            axis.ledger.pulled(unit)[:] = self._pulled
        now = time.monotonic()
        row[UnitColumns.BEGAN], row[UnitColumns.ENDED] = began, now
        row[UnitColumns.DATA], row[UnitColumns.COMPUTE] = fetched - began, now - computing
        row[UnitColumns.REDUCE] = row[UnitColumns.WAIT] = 0.0
        self._gathered.append(unit)
        if not count:
            self._settle([unit], EMPTY)
            self._gathered.remove(unit)

    def _fetch(self, step: int, shard: int) -> Sequence[tuple[Share, Any]]:
        """The samples of a unit, with their batches."""
        self.parts.feed.replica = shard
        with user_code("train_data", self.rank):
            return self.parts.feed.batches(step)

    def _shares(self, step: int, shard: int) -> Sequence[Share]:
        """What samples a unit has."""
        self.parts.feed.replica = shard
        return self.parts.feed.shares(step)

    def _mean_over(self, shares: Sequence[Share]) -> int:
        """How many samples the loss of a unit with these shares is the mean over."""
        return sum(len(share.indices) for share in shares)

    def _write_unit(self, row: np.ndarray, sums: Sums) -> None:
        values = self.named_values(sums)
        row[UnitColumns.LOSS], row[UnitColumns.WEIGHT], row[UnitColumns.SAMPLES] = sums.loss, sums.weight, sums.samples
        row[UnitColumns.MEASURED] = float(sums.measured)
        row[UnitColumns.VALUES : UnitColumns.VALUES + VALUE_COLUMNS] = values

    def _settle(self, units: list[int], push: int) -> None:
        """Say with which push units went, or why with none."""
        for unit in units:
            row = self._axis.ledger.row(unit)
            row[UnitColumns.PUSH] = push
            if push == EMPTY:
                row[UnitColumns.LOSS : UnitColumns.MEASURED + 1] = 0.0
            row[UnitColumns.UNIT] = unit + 1

    # -- a push --------------------------------------------------------------------------------------------------

    def _push_if_full(self) -> None:
        if len(self._axis.claims.open(self.rank)) >= self._push_every:
            self._push()

    def _push(self) -> None:
        """Push what has gathered, and wait until every server holds it."""
        axis, units = self._axis, self._gathered
        if not units:
            if axis.claims.open(self.rank):
                axis.claims.finish(self.rank)
            return
        step = units[-1] // axis.units_per_step
        rows = [axis.ledger.row(unit) for unit in units]
        stripe = self.parts.store.stripe_of(self.rank)
        clip, squared = self.parts.job.grad_clip, 0.0
        # The rows of all that has gathered go together, as the stripe does.
        self.parts.gradients.collect()
        if clip is None:
            bad = find_bad(self.parts.store, stripe, axis.own, self.parts.gradients.finite)
        else:
            squared, bad = examine(self.parts.store, stripe, axis.own)
        bad = bad or self.parts.gradients.bad_row
        loss = sum(row[UnitColumns.LOSS] for row in rows)
        if bad is not None or not math.isfinite(loss):
            self._reject(bad)
            return
        factor = self._factor(rows, squared + self.parts.gradients.rows_squared)
        self._metric_notes.keep(axis.pushes + 1)
        self._settle(units, axis.pushes + 1)
        axis.push(units[0], factor)
        self.parts.faults.reach("published", step)
        self.slot.enter(Phase.WAITING, step)
        axis.await_applied()
        self._gathered = []
        self.parts.faults.reach("committed", step)

    def _factor(self, rows: Sequence[np.ndarray], squared: float) -> float:
        """What the gradients of these units are multiplied by, so that their sum is a mean, and clipped."""
        weight = sum(row[UnitColumns.WEIGHT] for row in rows)
        measured = any(row[UnitColumns.MEASURED] for row in rows)
        factor = len(rows) / weight if measured and weight else 1.0
        clip = self.parts.job.grad_clip
        return factor if clip is None else factor * min(1.0, clip / (math.sqrt(squared) * factor + 1e-6))

    def _reject(self, parameter: str | None) -> None:
        """A gradient that is no number never reaches a server."""
        axis, units = self._axis, self._gathered
        shares = [share for unit in units for share in self._shares(*divmod(unit, axis.units_per_step))]
        samples = [int(sample) for share in shares for sample in share.indices]
        self.parts.channel.send(BadPush(self.rank, tuple(units), parameter, tuple(samples)))
        if not self.parts.settings.skip_bad_pushes:
            axis.await_end()
        self._metric_notes.go_back(axis.pushes)
        self._settle(units, REJECTED)
        self._gathered = []
        axis.claims.finish(self.rank)
