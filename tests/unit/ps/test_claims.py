from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from shoal.comm.arena import Arena, ArenaLayout, Note, Order
from shoal.comm.grid import Grid
from shoal.ps.claims import Claim, Claims, Later
from shoal.ps.ledger import UNITS_KEPT, Ledger, UnitColumns, regions

WORKERS = 3


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena.create(ArenaLayout.plan(WORKERS, regions(WORKERS, 1, 2), Grid(dp=WORKERS, servers=1)))
    made.supervisor.post(Order.STEPS_ALLOWED, 10)
    yield made
    made.memory.close()


def test_units_are_handed_out_in_order_each_once_whoever_asks(arena: Arena) -> None:
    claims, draw = Claims(arena, None), random.Random(0)
    taken: dict[int, int] = {}
    while True:
        worker = draw.randrange(WORKERS)
        if len(claims.open(worker)) == 2:
            claims.finish(worker)
            assert claims.open(worker) == []
        got = claims.claim(worker)
        if isinstance(got, Later):
            break
        assert got.unit == len(taken) and claims.last() == got.unit and claims.open(worker)[-1] == got.unit
        taken[got.unit] = worker
    assert got == Later(None, 10) and len(taken) == 10 * WORKERS
    ledger = Ledger(arena)
    assert all(ledger.row(unit)[UnitColumns.RANK] == worker for unit, worker in taken.items())
    assert not claims.all_finished()
    for worker in range(WORKERS):
        claims.finish(worker)
    assert claims.all_finished() and claims.last() == 10 * WORKERS - 1


def test_a_step_may_have_more_units_than_there_are_workers(arena: Arena) -> None:
    arena.supervisor.write(Note.FIRST_STEP, 8)
    claims = Claims(arena, 0, per_step=5)
    assert claims.first == 40
    got = [claims.claim(unit % WORKERS) for unit in range(5)]
    assert got == [Claim(unit, 8) for unit in range(40, 45)]
    # All of a step are done before anything of the next one is begun.
    assert claims.claim(2) == Later(0, 9)
    for worker in range(WORKERS):
        claims.finish(worker)
    assert claims.claim(2) == Claim(45, 9)


def test_a_successor_finds_what_was_claimed_and_not_finished(arena: Arena) -> None:
    arena.supervisor.write(Note.FIRST_STEP, 4)
    claims = Claims(arena, None)
    assert claims.first == 12 and claims.last() == 11
    assert [claims.claim(worker).unit for worker in (1, 0, 1)] == [12, 13, 14]  # type: ignore[union-attr]
    again = Claims(Arena.attach(arena.memory.fd, arena.layout), None)
    assert [again.open(worker) for worker in range(WORKERS)] == [[13], [12, 14], []]
    assert not again.wait_finished(1, 0.0, 0.01)
    claims.finish(1)
    assert again.wait_finished(1, 0.0, 0.01) and again.open(1) == [] and again.finished(1) == 2


def test_a_claim_that_was_not_counted_is_none(arena: Arena) -> None:
    """Who is killed between writing the unit and counting it has claimed nothing, and hides nothing that others have."""
    claims = Claims(arena, None)
    for _ in range(2):
        assert isinstance(claims.claim(0), Claim)
    place = claims.claimed(0) % claims._places
    claims._units[0, place] = 99
    assert claims.open(0) == [0, 1] and claims.last() == 1
    assert claims.claim(1) == Claim(2, 0)


@pytest.mark.parametrize("staleness", [0, 2])
def test_nobody_is_more_steps_ahead_than_allowed(arena: Arena, staleness: int) -> None:
    claims = Claims(arena, staleness)
    assert claims.claim(0) == Claim(0, 0)
    unit, got = 0, claims.claim(1)
    while isinstance(got, Claim):
        assert got.unit == (unit := unit + 1) and got.unit // WORKERS - got.slowest <= staleness
        claims.finish(1)
        got = claims.claim(1)
    # It waits for the worker that has the oldest unit, and goes on when that is done.
    assert got == Later(0, staleness + 1) and unit == (staleness + 1) * WORKERS - 1
    claims.finish(0)
    assert claims.claim(1) == Claim(unit + 1, staleness + 1)


def test_a_row_is_not_used_again_before_the_supervisor_has_read_it(arena: Arena) -> None:
    arena.supervisor.post(Order.STEPS_ALLOWED, 10**6)
    claims = Claims(arena, None)
    arena.supervisor.write(Note.FIRST_STEP, UNITS_KEPT // WORKERS)
    first = claims.first
    arena.supervisor.write(Note.UNITS_SEEN, first + 1 - UNITS_KEPT)
    assert claims.claim(0) == Claim(first, first // WORKERS)
    assert isinstance(claims.claim(1), Later)
    arena.supervisor.write(Note.UNITS_SEEN, first + 2 - UNITS_KEPT)
    assert isinstance(claims.claim(1), Claim)
