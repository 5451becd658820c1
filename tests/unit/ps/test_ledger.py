from __future__ import annotations

import pytest

from shoal.comm.arena import Arena, ArenaLayout
from shoal.comm.grid import Grid
from shoal.ps.ledger import UNITS_KEPT, Ledger, UnitColumns, regions

WORKERS, SERVERS = 3, 2


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(Arena.create(ArenaLayout.plan(WORKERS, regions(WORKERS, SERVERS, 2), Grid(dp=WORKERS, servers=SERVERS))))


def test_a_push_is_applied_when_every_server_has_it(ledger: Ledger) -> None:
    ledger.commit(0, 1, 1)
    assert not ledger.is_applied(1, 1) and ledger.wait_applied(1, 1, 0.0, 0.01) == 1
    ledger.commit(1, 1, 1)
    assert ledger.is_applied(1, 1) and ledger.wait_applied(1, 1, 0.0, 0.01) == -1
    assert [ledger.applied(server, worker) for server in range(SERVERS) for worker in range(WORKERS)] == [0, 1, 0] * 2
    assert not ledger.is_applied(1, 2) and ledger.is_applied(0, 0)


def test_updates_are_counted_from_where_the_session_began_also_when_counts_overflow(ledger: Ledger) -> None:
    first = 2**32 - 2
    ledger.begin_at(first)
    assert ledger.updates(0, first) == first and ledger.is_applied(2, first)
    for push in range(1, 4):
        ledger.commit(0, 2, (first + push) % 2**32)
        assert not ledger.is_applied(2, (first + push) % 2**32), "the other server lacks it"
        ledger.commit(1, 2, (first + push) % 2**32)
        assert ledger.is_applied(2, (first + push) % 2**32)
    ledger.commit(0, 0, first + 1)
    assert ledger.updates(0, first) == first + 4 and ledger.updates(1, first) == first + 3


def test_versions_and_readers_have_a_word_each(ledger: Ledger) -> None:
    ledger.post_version(1, 7)
    assert (ledger.version(0), ledger.version(1)) == (0, 7)
    assert ledger.wait_version(1, 6, 0.0, 0.01) and not ledger.wait_version(1, 7, 0.0, 0.01)
    # The row behind the workers' is the publisher's.
    marks = [(worker, server) for worker in range(WORKERS + 1) for server in range(SERVERS)]
    for mark in marks:
        ledger.set_reading(*mark, True)
        assert [m for m in marks if ledger.reading(*m)] == [mark]
        ledger.set_reading(*mark, False)


def test_a_row_speaks_of_the_unit_that_it_names(ledger: Ledger) -> None:
    row = ledger.row(5)
    row[UnitColumns.UNIT] = 6
    ledger.pulled(5)[:] = 3, 4
    ledger.made(5)[:] = 8, 9
    assert list(ledger.row(5)[UnitColumns.VERSIONS :]) == [3, 4, 8, 9]
    assert ledger.row(5 + UNITS_KEPT)[UnitColumns.UNIT] == 6, "the same row, used again: it does not speak of that unit"
    assert ledger.row(6)[UnitColumns.UNIT] == 0
