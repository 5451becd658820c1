"""The server axis where workers wait for nobody: ``async`` (Downpour SGD, Dean et al. 2012) and bounded staleness.

How a push travels (one of W workers, and S servers, on one machine)::

    worker                                     server k
    claim the next unit                                                    a shard of a batch, in the global order
    pull: copy each server's slice             begins no update meanwhile  each slice whole, with its version
    gradient -> stripe
    push: GRADIENTS, a bell                    hears the bell
                                               sum (one stripe), optimize its slice, chunk by chunk
    --------- applied by all servers --------- commit: one word in the ledger
    claim is finished

Nobody waits for another worker: a slow one takes fewer units. With ``staleness=s`` (stale synchronous parallel, Ho et al.
2013) a unit is begun only if its batch is at most s steps ahead of the oldest unfinished one. ``push_every=n`` adds n units'
gradients up before a push, ``pull_every=n`` keeps a copy for n units.

What it moves, for P bytes of trained parameters: a unit copies P to the worker, writes P of gradients, and servers read it and
read and write weights, state and undo log, as in a step: with W workers so many times as often as ``sync``, on shards a W-th
as large. What it holds beyond ``sync``: a copy of P for each worker.

Why a killed process costs nothing: the word that says that a server has applied a push commits its last chunk, and the chunk
in work is in the undo log, so a successor goes on where it stopped and no push is applied twice. A worker that dies before
its push computes the units that it had claimed again; after it, the push lies in its stripe and counts.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shoal.axes.server import ServedWorker
from shoal.axes.updating import SliceUpdater, Updates
from shoal.axes.waiting import Spinning, Waiting
from shoal.comm import dense
from shoal.comm.arena import Note, Order, Signal
from shoal.comm.rest import Rests
from shoal.comm.store import Store
from shoal.plan import Plan
from shoal.ps.claims import Claims
from shoal.ps.ledger import Ledger, UnitColumns

_READER_S = 0.5
"""How long a server lets a worker finish its pull; one that has died leaves its sign behind."""


def make_bells(count: int) -> list[int]:
    """A descriptor for each server by which workers wake it."""
    return [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]


def claims_of(store: Store, plan: Plan, per_step: int | None = None) -> Claims:
    """The claims of a run under a plan; ``per_step``: units of a step, one a worker by default."""
    return Claims(store.arena, plan.staleness if plan.mode == "bounded" else None, per_step)


class PushingWorker(ServedWorker):
    """A worker that waits for nobody; see the module's docstring."""

    def __init__(self, store: Store, rank: int, waiting: Waiting, plan: Plan, bells: Sequence[int]) -> None:
        super().__init__(store, rank, waiting)
        self.ledger = Ledger(store.arena)
        self.claims = claims_of(store, plan)
        self._bells = bells
        self._pulled_into: torch.Tensor | None = None
        self._pullers: list[Callable[[], int]] = []
        self._for_version, self._for_update = Spinning(), Spinning()
        self._ranges = [store.ranges(server) for server in range(self.ledger.servers)]

    @property
    def units_per_step(self) -> int:
        """Into how many units a batch is cut."""
        return self.world_size

    @property
    def pushes(self) -> int:
        """How many pushes this worker, or its predecessor, has made."""
        return self.slot.signal(Signal.GRADIENTS)

    def beat(self) -> None:
        """Say that this worker is alive."""
        self.slot.write(Note.PHASE_SINCE, time.monotonic())

    def empty_stripe(self) -> None:
        """No gradient has come yet."""
        self.store.touched[self._stripe, self.own] = 0

    def pull(self, own: torch.Tensor) -> list[int]:
        """Copy the trained weights, as bytes, each server's part at one version; these versions (numbers of updates)."""
        if self._pulled_into is not own:
            self._pulled_into, self._pullers = own, self._pullers_into(own)
        versions = []
        for server, pull in enumerate(self._pullers):
            while (version := pull()) < 0:
                if (version := self.ledger.version(server)) % 2:
                    self._await_version(server, version)
            versions.append(version // 2)
        return versions

    def _pullers_into(self, own: torch.Tensor) -> list[Callable[[], int]]:
        return [
            dense.load().puller(
                *self.ledger.pull_words(self.rank, server),
                [(own[a:b], self.store.weight_range(a, b, torch.uint8)) for a, b in ranges],
            )
            for server, ranges in enumerate(self._ranges)
        ]

    def _await_version(self, server: int, version: int) -> None:
        place, ledger = self.world_size + server, self.ledger

        def attempt(times: tuple[float, float]) -> int:
            return -1 if ledger.wait_version(server, version, *times) else place

        self.wait_briefly(attempt, "a whole version to pull", self._for_version)

    def push(self, unit: int, factor: float) -> None:
        """Hand the stripe to the servers; ``unit``: the first of those in it, ``factor``: of the gradients."""
        self.slot.write(Note.PUSH_UNIT, unit)
        self.slot.write(Note.PUSH_FACTOR, factor)
        self.slot.post(Signal.GRADIENTS, self.pushes + 1)
        self.ring()

    def ring(self) -> None:
        """Wake the servers."""
        for bell in self._bells:
            os.eventfd_write(bell, 1)

    def await_applied(self) -> None:
        """Wait until all servers hold this worker's last push; then it, and what it held, is finished."""
        push = self.pushes

        def attempt(times: tuple[float, float]) -> int:
            late = self.ledger.wait_applied(self.rank, push, *times)
            return late if late < 0 else self.world_size + late

        self.wait_briefly(attempt, f"push {push} to be applied", self._for_update)
        self.claims.finish(self.rank)
        self.slot.post(Signal.UPDATED, push)

    def await_worker(self, worker: int) -> None:
        """Wait until another worker has finished what it has claimed."""
        claims = self.claims
        self.wait_for(lambda s: -1 if claims.wait_finished(worker, *s) else worker, "a push that is too far behind")

    def await_all(self) -> None:
        """Wait until every worker has."""
        for worker in range(self.world_size):
            self.await_worker(worker)


@dataclass(frozen=True, slots=True)
class Pushed:
    """A push that a server has not applied yet."""

    worker: int
    push: int
    unit: int
    factor: float


class PushServer(Updates):
    """A server that applies each push by itself; see the module's docstring."""

    def __init__(
        self, store: Store, number: int, updater: SliceUpdater, waiting: Waiting, plan: Plan, bell: int,
        guard: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(store, store.arena.world_size + number, updater, waiting, guard)
        self.number = number
        self.ledger = Ledger(store.arena)
        self._claims = claims_of(store, plan)
        self._bell = bell
        self._for_push = Spinning()
        # Nobody else counts them: what the ledger said once is counted on here.
        self.updates = self.ledger.updates(number, int(store.arena.supervisor.note(Note.FIRST_STEP)))
        """How many updates this server has made, counted from the step that the session began at."""
        self._writes = False
        self._others_read = self.ledger.reading_of(number)
        work = int(self.slot.note(Note.PUSH_IN_WORK))
        self._resumed: Pushed | None = None
        # Who took too long over a copy, as a worker that is stopped does: their sign counts again once it was taken back.
        self._left_behind: set[int] = set()
        push, worker = divmod(work, store.arena.world_size)
        if push and self.ledger.applied(number, worker) == push - 1:
            self._resumed = self._pushed(worker)
        else:
            # A predecessor may have died between its commit and saying that the update is over.
            self.ledger.post_version(number, 2 * self.updates)
            self.slot.post(Signal.UPDATED, self.updates)

    def next_push(self, over: Callable[[], bool]) -> Pushed | None:
        """Wait for a push and return it, the oldest work first; None when the run is over and all are applied."""
        if self._resumed is not None:
            return self._resumed
        found: list[Pushed] = []

        def attempt(times: tuple[float, float]) -> int:
            if not self.ledger.any_push(self.number, times[0]) and not over():
                # The bell says that somebody has pushed since it was last read.
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._bell)
                if not self.ledger.any_push(self.number, 0.0) and not over():
                    select.select([self._bell], [], [], times[1])
            found[:] = self._waiting_pushes()
            return -1 if found or over() else 0

        self.wait_briefly(attempt, "a push", self._for_push)
        return min(found, key=lambda pushed: pushed.unit, default=None)

    def _waiting_pushes(self) -> list[Pushed]:
        slots = self.arena.slots
        return [
            self._pushed(worker)
            for worker, slot in enumerate(slots)
            if slot.signal(Signal.GRADIENTS) != self.ledger.applied(self.number, worker)
        ]

    def _pushed(self, worker: int) -> Pushed:
        slot = self.arena.slots[worker]
        unit, factor = int(slot.note(Note.PUSH_UNIT)), slot.note(Note.PUSH_FACTOR)
        return Pushed(worker, slot.signal(Signal.GRADIENTS), unit, factor)

    def staleness(self, pushed: Pushed) -> int:
        """How many updates this server has made since the pull that a push was computed from; the same whoever applies it."""
        units = self._claims.open(pushed.worker)
        pulled = [int(self.ledger.pulled(u)[self.number]) for u in units if self.ledger.row(u)[UnitColumns.PUSH] == pushed.push]
        return self.updates - min(pulled, default=self.updates)

    def take(self, pushed: Pushed) -> None:
        """Begin to apply a push, or go on with it."""
        if self._resumed is None:
            self.begin_update()
            self.slot.write(Note.PUSH_IN_WORK, pushed.push * self.arena.world_size + pushed.worker)
            self.slot.post(Signal.GRADIENTS, self.updates + 1)
        self._resumed = None
        for unit in self._claims.open(pushed.worker):
            if self.ledger.row(unit)[UnitColumns.PUSH] == pushed.push:
                self.ledger.made(unit)[self.number] = self.updates + 1

    def begin_writing(self) -> None:
        # As late as can be: whoever pulls waits from here to the commit.
        if not self._writes:
            # Where a predecessor had begun, whoever reads waits for this process.
            if self.ledger.version(self.number) % 2 == 0:
                self._let_readers_finish()
            self.ledger.post_version(self.number, 2 * self.updates + 1)
            self._writes = True

    def commit(self, pushed: Pushed) -> None:
        """The push is applied, once and for all."""
        made = self.updates + 1
        self._writes = False
        self.ledger.commit(self.number, pushed.worker, pushed.push)
        self.updates = made
        self.ledger.post_version(self.number, 2 * made)
        self.slot.post(Signal.UPDATED, made)

    def unit_rows(self, pushed: Pushed) -> np.ndarray:
        """What the ledger says of the units in a push, a row each, for the log of server 0."""
        rows = [self.ledger.row(unit) for unit in self._claims.open(pushed.worker)] if self.number == 0 else []
        own = [row.copy() for row in rows if row[UnitColumns.PUSH] == pushed.push]
        return np.stack(own) if own else np.empty((0, 0))

    def over(self) -> bool:
        """Whether the supervisor has said that no push will come any more."""
        return self.arena.supervisor.signal(Order.OVER) > 0

    def _let_readers_finish(self) -> None:
        if not self._others_read.any():
            self._left_behind.clear()
            return
        deadline, rests = time.monotonic() + _READER_S, Rests()
        for worker in range(self.arena.world_size + 1):
            while self.ledger.reading(worker, self.number) and worker not in self._left_behind:
                if time.monotonic() >= deadline:
                    self._left_behind.add(worker)
                rests.rest()
            if not self.ledger.reading(worker, self.number):
                self._left_behind.discard(worker)
