"""Workers of several processes as their lead sees them come, fall silent and fail to meet."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.errors import WorkerLostError
from shoal.plan import Plan
from shoal.train.remote.bond import LOST
from shoal.train.remote.dealing import Orphan
from shoal.train.remote.desk import Asked, Desk
from shoal.train.remote.keepers import Keepers
from shoal.train.remote.lead import RemoteLead
from shoal.train.remote.members import START_S, Members
from shoal.train.remote.teams import Teams, members_of
from shoal.train.remote.words import Join

PLAN = Plan.parse("tp=2,ps=1,workers=2,sync")
AT = "tcp://127.0.0.1:5"


@pytest.fixture
def lead() -> Any:
    """Of a run whose processes torchrun has started: two workers of two, which have met, and nobody has finished anything."""
    found: Any = object.__new__(RemoteLead)
    found._plan, found._teams, found._desk = PLAN, Teams(PLAN), Desk(None)  # type: ignore[arg-type]
    found._members = Members(lambda role, rank: pytest.fail("the lead has started somebody"), [("server", 0)])
    found.keepers = Keepers([""] * 5, PLAN)
    found._recorder, found._log = SimpleNamespace(step=6), SimpleNamespace(together=list)
    found._deaths, found._died_at, found._gone, found._unexplained, found._together = {}, {}, set(), {}, False
    found._given, found._staged, found._dealt, found._orphans = {0: [Orphan(12, 0)]}, {}, None, deque()
    found._name_last_checkpoint = lambda: "step 4"
    found.told = []
    found._emit = lambda kind, **fields: found.told.append((kind, fields["role"], fields["rank"], fields["cause"]))
    for worker in (0, 1):
        begin(found, worker, 10)
        found._teams.meet(worker)
    return found


def begin(lead: Any, worker: int, first: int) -> None:
    pids = {member: first + 2 * worker + k for k, member in enumerate(members_of(worker, PLAN))}
    for (role, rank), pid in pids.items():
        lead._members.join(role, rank, pid, "there", AT, b"%d" % pid)
    lead._teams.begin(worker, AT, pids)


def bury_all(lead: Any) -> None:
    for lost in lead._members.lost(lambda member: 60.0):
        lead._bury(lost)


def test_where_one_is_silent_those_who_keep_its_worker_end_all_of_it_and_begin_anew(lead: Any) -> None:
    lead._members.of["partner", 0].heard_at -= 90.0
    bury_all(lead)
    assert lead.told == [("death", "partner", 0, "silence")]
    assert [lead.keepers.keeps(place) for place in range(5)] == [
        ("server", 0, 0), ("worker", 0, 1), ("partner", 0, 1), ("worker", 1, 0), ("partner", 1, 0),
    ]  # fmt: skip
    # Whoever is there until then is not heard, and what it had begun others do; the worker is missed for a while only.
    assert lead._desk._dead == {b"10", b"11"} and list(lead._orphans) == [Orphan(12, 0)]
    assert set(lead._died_at) == {0} and lead._gone == set() and set(lead._members.of) == set(members_of(1, PLAN))
    # Their ends are no further deaths, and what comes after them is.
    for pid, (role, rank) in zip((10, 11), members_of(0, PLAN), strict=True):
        lead._members.gone(role, rank, pid, "there", "SIGKILL")
        assert lead._members.was_gone(role, rank, pid, "there")
    begin(lead, 0, 20)
    bury_all(lead)
    assert len(lead.told) == 1 and lead._deaths == {0: 1}


@pytest.mark.parametrize(
    ("have_met", "said"), [(False, f"did not meet at {AT}"), (True, rf"last by exit code {LOST}\), so something in its work")]
)
def test_it_is_said_of_a_worker_whose_processes_never_meet(lead: Any, have_met: bool, said: str) -> None:
    with pytest.raises(WorkerLostError, match=f"Worker 1 died 5 times without having finished anything.*{said}.*; step 4"):
        for time in range(5):
            begin(lead, 1, 30 + 10 * time)
            if have_met:
                lead._teams.meet(1)
            lead._members.gone("worker", 1, 32 + 10 * time, "there", f"exit code {LOST}")
            bury_all(lead)
    assert lead._deaths == {1: 5}


def test_who_never_comes_is_named_and_who_waits_for_it_is_not_silent(lead: Any) -> None:
    lead._teams.break_up("partner", 1)
    lead._members.forget("partner", 1)
    head = Join(number=1, role="worker", rank=1, pid=12, host="there", built="", address=AT)
    asked = Asked(b"12", head, ())
    lead._desk.open.append(asked)
    lead._members.of["worker", 1].heard_at -= 90.0
    lead._place(asked, head)
    bury_all(lead)
    assert ("worker", 1) in lead._members.of
    asked.since -= START_S + 1.0
    with pytest.raises(WorkerLostError, match=r"Partner 1 has not come within 300 s, and worker 1 cannot begin.*step 4"):
        lead._place(asked, head)
