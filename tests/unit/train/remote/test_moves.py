"""Processes of a plan that is over, which are killed, or come again, while the next one begins."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.plan import Plan
from shoal.ps.client import Client
from shoal.ps.endpoint import RunKeys
from shoal.ps.placement import Placement
from shoal.train.remote import words
from shoal.train.remote.chains import Chains
from shoal.train.remote.desk import Asked
from shoal.train.remote.holding import BeginAgain
from shoal.train.remote.members import Lost, Members
from shoal.train.remote.moves import Moving, MovingLead


@pytest.fixture
def client() -> Iterator[Client]:
    found = Client({}, RunKeys.new())
    yield found
    found.close()


@pytest.fixture
def lead() -> Any:
    found: Any = object.__new__(MovingLead)
    found.told, found.forgotten = [], []
    found._desk = SimpleNamespace(forget=lambda identity, for_good: found.forgotten.append(identity))
    found._emit = lambda kind, **fields: found.told.append(kind)
    found._orders = lambda: words.Orders()
    found._members = Members(lambda role, rank: pytest.fail("nobody is to be started"), [("server", 0)])
    found._plan = Plan.parse("ps=2,workers=2,async")
    return found


def test_nobody_waits_for_a_killed_server_that_the_next_plan_has_not(lead: Any, client: Client) -> None:
    lead._moving = moving = Moving(Placement(range(4), ()), Placement(range(2), ()), 5, Chains(2, 0), True, {0, 1, 2, 3})
    for rank, returns in ((3, True), (1, True), (2, False)):
        member = lead._members.join("server", rank, 100 + rank, "here", "", b"%d" % rank)
        lead._bury_server(Lost(member, "SIGKILL", returns), 6)
    assert moving.lost and moving.struck and [*moving.died] == [1]
    # Neither where the next plan has begun before its keeper has ended it: no chain takes it in, and nothing is lost with it.
    lead._moving, lead._chains, lead._client = None, moving.chains, client
    moving.chains._client = client
    assert moving.chains.attend({3: "tcp://127.0.0.1:9"}) == [] and not client.places
    lead._bury_server(Lost(lead._members.of["server", 3], "SIGKILL", True), 7)


def test_who_comes_in_the_place_of_a_worker_that_was_to_leave_is_not_waited_for(lead: Any) -> None:
    lead._between, lead._leaving = True, {("worker", 0), ("worker", 1)}
    join = words.Join(number=1, role="worker", rank=1, pid=7, host="there", built="")
    lead._members.join("worker", 1, 7, "there", "", b"1")
    lead._answer_later(Asked(b"1", join, ()))
    assert lead._members.of == {} and lead.forgotten == [b"1"]


def test_copies_that_are_begun_anew_leave_no_connection_behind(lead: Any) -> None:
    """A server dies when there are copies already, and nothing else is left to be done."""
    whole = SimpleNamespace(places=[], forget_all=lambda: None)
    lead._moving = Moving(Placement([0], ()), Placement([0], ()), 5, Chains(1, 1), True, {0})
    lead._chains, lead._client = Chains(1, 0), whole
    made: list[Client] = []

    def copy(moving: Moving) -> None:
        moving.chains._client = Client({}, RunKeys.new())
        made.append(moving.chains._client)

    def look_around() -> None:
        if len(made) == 1:
            raise BeginAgain

    lead._move, lead._copy, lead._look_around = lambda moving: "moved", copy, look_around
    assert lead._let_move() == "moved" and len(made) == 2
    lead._chains.close()
    assert all(client._context.closed for client in made)
