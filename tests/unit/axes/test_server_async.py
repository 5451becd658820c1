"""Pulls, claims and the pace of workers that wait for nobody, at the moments in which somebody dies, stops or is half done."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_store import MakeOptimizer, Net

from shoal.axes.server_async import PushingWorker, PushServer
from shoal.axes.waiting import Waiting
from shoal.comm.arena import Arena, Order
from shoal.comm.grid import Grid
from shoal.comm.journal import Journal
from shoal.comm.store import Store, arena_layout
from shoal.plan import Plan
from shoal.ps.claims import Claim, Claims
from shoal.ps.ledger import EMPTY, Ledger, UnitColumns, regions
from shoal.ps.lock import locked
from shoal.train import published as published_module
from shoal.train.describe import describe, fill
from shoal.train.metric_state import MetricNotes
from shoal.train.pacing import Pacer, PushRecorder
from shoal.train.published import PublishedWeights, PushClocks
from shoal.train.pushing import PushLoop
from shoal.train.settings import RunSettings
from shoal.train.update import make_updater

PLAN = Plan.parse("ps=2,workers=2,async")


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def nadam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.NAdam(model.parameters(), lr=0.1)


def make_store(make: MakeOptimizer = sgd, push_every: int = 1) -> Store:
    model = Net()
    table = describe(model, make(model))
    grid = Grid.of(PLAN)
    further = regions(grid.world_size, grid.servers, push_every)
    store = Store(Arena.create(arena_layout(table, grid, further=further)), table)
    fill(store, dict(model.named_parameters()), dict(model.named_buffers()))
    store.arena.supervisor.post(Order.STEPS_ALLOWED, 10)
    return store


@pytest.fixture
def store() -> Iterator[Store]:
    made = make_store()
    yield made
    made.arena.memory.close()


@pytest.mark.parametrize("make", [sgd, nadam])
def test_a_pull_is_whole_for_each_server_whatever_its_part_is(make: MakeOptimizer) -> None:
    """Its part may be a slice of the bytes or tensors that were dealt to it. While a worker waits for server 1, in the midst
    of an update, server 0, which has been copied, begins another."""
    store = make_store(make)
    ledger, model = Ledger(store.arena), Net()
    updaters = [make_updater(store, server, make(model), lambda: list(store.weights)) for server in (0, 1)]
    parts = [
        [s.data.view(torch.float64) for chunk in range(updater.count) for s in updater.saved(chunk) if s.kind == "weights"]
        for updater in updaters
    ]

    def write(server: int, value: float, half: bool = False) -> None:
        for part in parts[server]:
            part[len(part) // 2 if half else 0 :] = value

    class Pulling(PushingWorker):
        def _await_version(self, server: int, version: int) -> None:
            assert (server, version) == (1, 3)
            ledger.post_version(0, 1)
            write(0, 5.0, half=True)
            write(1, 2.0)
            ledger.post_version(1, 4)

    try:
        write(0, 4.0)
        write(1, 1.0)
        write(1, 2.0, half=True)
        ledger.post_version(1, 3)
        own = torch.zeros(store.table.trained_bytes, dtype=torch.uint8)
        assert Pulling(store, 0, Waiting(spin_s=0.0), PLAN, ()).pull(own) == [0, 2]
        first = store.weights[0].data_ptr()
        for server, value in ((0, 4.0), (1, 2.0)):
            for part in parts[server]:
                at = part.data_ptr() - first
                assert (own[at : at + part.nbytes].view(torch.float64) == value).all()
    finally:
        store.arena.memory.close()


class Dies(Exception):
    pass


class Deadly:
    """The counts of a worker that dies when it is about to count a claim."""

    def __init__(self, counts: Any) -> None:
        self._counts = counts

    def __getitem__(self, worker: int) -> Any:
        return self._counts[worker]

    def __setitem__(self, worker: int, count: int) -> None:
        raise Dies


@pytest.mark.parametrize("push_every", [1, 3])
def test_a_claim_that_is_not_counted_is_no_claim_and_one_that_is_says_whose(push_every: int) -> None:
    store = make_store(push_every=push_every)
    try:
        dying, other = (Claims(store.arena, None) for _ in range(2))
        dying._counts = Deadly(dying._counts)  # type: ignore[assignment]
        assert other.claim(0) == Claim(0, 0)
        other.finish(0)
        with pytest.raises(Dies):
            dying.claim(0)
        assert other.open(0) == [] and other.claim(1) == Claim(1, 0)
        # Whoever takes a place finds in the row what belongs to the unit.
        row = Ledger(store.arena).row(1)
        assert (row[UnitColumns.RANK], row[UnitColumns.SLOWEST]) == (1, 0)
        for unit in range(2, 2 + 3 * push_every):
            assert other.claim(0) == Claim(unit, 0)
            if len(other.open(0)) == push_every:
                assert other.open(0) == list(range(unit + 1 - push_every, unit + 1))
                other.finish(0)
        assert other.last() == 1 + 3 * push_every and other.open(1) == [1]
    finally:
        store.arena.memory.close()


class Recovering(PushLoop):
    """A worker that takes a place; what it computes and pushes is only written down."""

    def __init__(self, axis: PushingWorker, push_every: int) -> None:
        self._axis, self.rank, self._push_every = axis, axis.rank, push_every
        self._gathered: list[int] = []
        self.pushed: list[list[int]] = []
        self._metric_notes = MetricNotes({}, (), Journal(axis.arena, axis.rank))

    def _begin_epoch_again(self) -> None:
        """There are no metrics."""

    def _work(self, unit: int, slowest: int) -> None:
        self._gathered.append(unit)

    def _push(self) -> None:
        self.pushed.append(self._gathered)
        self._gathered = []
        self._axis.claims.finish(self.rank)


@pytest.mark.parametrize(("opened", "pushed"), [(1, []), (3, [[0, 1, 2]])])
def test_whoever_takes_a_place_pushes_all_that_was_claimed_together(opened: int, pushed: list[list[int]]) -> None:
    store = make_store(push_every=3)
    try:
        axis = PushingWorker(store, 0, Waiting(spin_s=0.0), PLAN.replace(push_every=3), ())
        for unit in range(opened):
            assert axis.claims.claim(0) == Claim(unit, 0)
        loop = Recovering(axis, 3)
        loop._recover()
        assert loop.pushed == pushed and len(axis.claims.open(0)) == opened % 3
    finally:
        store.arena.memory.close()


def test_a_lock_that_somebody_keeps_is_not_waited_for_beyond_its_deadline(store: Store) -> None:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        with locked(store.arena):
            os.write(write, b"!")
            signal.pause()
    try:
        os.read(read, 1)
        with locked(store.arena, within_s=0.01) as held:
            assert not held
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with locked(store.arena, within_s=10.0) as held:
        assert held


def finish(claims: Claims, worker: int, *units: int) -> None:
    """Say that units without samples are done."""
    for unit in units:
        row = claims._ledger.row(unit)
        row[UnitColumns.PUSH], row[UnitColumns.UNIT] = EMPTY, unit + 1
    claims.finish(worker)


def test_a_checkpoint_is_written_while_all_rest_also_after_one_that_was_called_off(store: Store) -> None:
    settings = RunSettings(plan=PLAN, layout=store.arena.layout, total_steps=8, steps_per_epoch=8)
    recorder = PushRecorder(store, lambda kind, **fields: None, settings, 0)
    pacer, claims, written = Pacer(store, settings, recorder, 0), recorder.claims, []
    pacer.attend(False, None)
    assert claims.claim(0) == Claim(0, 0)
    pacer.attend(False, written.append)
    assert store.arena.supervisor.signal(Order.STEPS_ALLOWED) == 1 and not written
    # The end of an epoch has written one meanwhile.
    pacer.attend(False, None)
    assert claims.claim(1) == Claim(1, 0)
    finish(claims, 0, 0)
    finish(claims, 1, 1)
    recorder.drain()
    assert claims.claim(0) == Claim(2, 1)
    finish(claims, 0, 2)
    pacer.attend(False, written.append)
    # Nobody has a unit, but step 2 is half done.
    assert not written and store.arena.supervisor.signal(Order.STEPS_ALLOWED) == 2
    assert claims.claim(0) == Claim(3, 1)
    finish(claims, 0, 3)
    recorder.drain()
    pacer.attend(False, written.append)
    assert written == [2] and store.arena.supervisor.signal(Order.STEPS_ALLOWED) == 8


def test_every_step_is_told_however_late_the_ledger_is_read(store: Store) -> None:
    settings = RunSettings(plan=PLAN, layout=store.arena.layout, total_steps=5000, steps_per_epoch=5000)
    told: list[int] = []
    recorder = PushRecorder(store, lambda kind, **fields: told.append(fields["step"]), settings, 0)
    Pacer(store, settings, recorder, 0).attend(False, None)
    for unit in range(4096):
        assert recorder.claims.claim(unit % 2) == Claim(unit, unit // 2)
        finish(recorder.claims, unit % 2, unit)
    recorder.drain()
    assert told == list(range(1, 2049)) and not recorder.lost_events


def test_a_worker_that_is_stopped_in_a_pull_holds_servers_up_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    server = PushServer(store, 0, None, Waiting(spin_s=0.0), PLAN, -1)  # type: ignore[arg-type]
    naps: list[float] = []
    looks = iter(range(1_000_000))
    clock = SimpleNamespace(monotonic=lambda: 1e-4 * next(looks) + 0.1 * len(naps), sleep=naps.append)
    for module in ("shoal.axes.server_async", "shoal.comm.rest"):
        monkeypatch.setattr(f"{module}.time", clock)
    server.ledger.set_reading(1, 0, True)
    server._let_readers_finish()
    assert naps
    naps.clear()
    server._let_readers_finish()
    assert not naps
    server.ledger.set_reading(1, 0, False)
    server._let_readers_finish()
    server.ledger.set_reading(1, 0, True)
    server._let_readers_finish()
    assert naps


@pytest.mark.parametrize("make", [sgd, nadam])
def test_readers_get_whole_weights_of_servers_that_never_rest(
    make: MakeOptimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(make)
    ledger, over = Ledger(store.arena), threading.Event()

    def serve(server: PushServer) -> None:
        ranges = [store.weight_range(a, b, torch.float64) for a, b in store.ranges(server.number)]
        update = 0
        while not over.is_set():
            server._let_readers_finish()
            ledger.post_version(server.number, 2 * update + 1)
            update += 1
            for part in ranges:
                part.fill_(update)
            ledger.post_version(server.number, 2 * update)

    servers = [PushServer(store, k, None, Waiting(spin_s=0.0), PLAN, -1) for k in (0, 1)]  # type: ignore[arg-type]
    threads = [threading.Thread(target=serve, args=[server]) for server in servers]
    published = PublishedWeights(store, PushClocks(ledger))
    monkeypatch.setattr(published_module, "_WHOLE_S", 60.0)
    out = np.zeros(published.size, np.uint8)
    for thread in threads:
        thread.start()
    try:
        while min(published.versions()) == 0:
            over.wait(0.001)
        for _ in range(10):
            for k in (0, 1):
                copied = published.copy((k,), out)
                assert copied is not None
                for start, stop in store.ranges(k):
                    assert (out[start:stop].view(np.float64) == copied.versions[0]).all()
    finally:
        over.set()
        for thread in threads:
            thread.join()
        store.arena.memory.close()
