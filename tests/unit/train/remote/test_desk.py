"""What a lead is asked and answers, and who is there."""

import random
import time
from types import SimpleNamespace

import pytest

from shoal.errors import JobFailed
from shoal.plan import Plan
from shoal.ps.endpoint import Endpoint, RunKeys
from shoal.ps.messages import Refused
from shoal.ps.requests import Ticket
from shoal.ps.wire import Malformed, encode
from shoal.train.remote import words
from shoal.train.remote.bond import LOST
from shoal.train.remote.desk import Asked, Desk
from shoal.train.remote.lead import RemoteLead
from shoal.train.remote.line import LEAD, Line, Meeting
from shoal.train.remote.members import Members
from shoal.train.remote.recovery import Recovery
from shoal.train.remote.teams import Teams
from shoal.train.remote.words import Claim, Gone, Join, Later, Look, Orders


class Process:
    """A process that ends when it is told to."""

    def __init__(self, pid: int) -> None:
        self.pid, self.code = pid, None

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        self.code = -9


@pytest.fixture
def meeting():
    keys = RunKeys.new()
    endpoint = Endpoint(keys)
    yield Desk(endpoint), Meeting(endpoint.address, keys, deadline_s=60.0)
    endpoint.close()


def next_of(desk: Desk) -> Asked:
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        found = desk.receive(0.05)
        if found:
            return found[0]
    raise AssertionError("nobody has asked")


def test_a_question_that_comes_again_is_answered_alike_and_counted_once(meeting):
    desk, where = meeting
    line = Line(where, "worker", 1)
    ticket = line.send(LEAD, lambda n: Claim(n, 1, 0))
    asked = next_of(desk)
    assert asked.said == Claim(ticket.number, 1, 0)
    # Sent again before it is answered, and after that.
    line._transmit(ticket)
    assert desk.receive(0.3) == []
    desk.answer(asked, lambda n: Later(n, 0, Orders(over=1)))
    line.wait([ticket], "an answer")
    line._transmit(ticket)
    assert desk.receive(0.3) == [] and desk.open == []
    assert ticket.answer == Later(ticket.number, 0, Orders(over=1))
    # A refusal is raised with its reason.
    ticket = line.look(None)
    asked = next_of(desk)
    assert isinstance(asked.said, Look)
    desk.answer(asked, lambda n: Refused(n, "The run has failed."))
    with pytest.raises(JobFailed, match="The run has failed"):
        line.wait([ticket], "new orders")
    line.close()


def test_a_dead_process_is_not_heard_any_more(meeting):
    desk, where = meeting
    dead, other = Line(where, "worker", 1), Line(where, "worker", 0)
    dead.look(None)
    asked = next_of(desk)
    desk.forget(asked.identity, for_good=False)
    assert desk.open == [] and not desk.is_open(asked)
    desk.answer(asked, lambda n: Later(n, 0, Orders()))
    # It lives, and may ask again.
    dead.send(LEAD, lambda n: Claim(n, 1, 0))
    again = next_of(desk)
    assert again.said.rank == 1
    dead.send(LEAD, lambda n: Claim(n, 1, 2))
    desk.forget(asked.identity, for_good=True)
    other.look(None)
    assert next_of(desk).said.rank == 0 and [a.said.rank for a in desk.open] == [0]
    dead.close()
    other.close()


def test_who_follows_a_dead_process_may_be_heard_before_that_is_buried_and_the_dead_one_after_it_is_gone(meeting):
    desk, where = meeting
    members = Members(lambda role, rank: Process(0), [])
    lead = object.__new__(RemoteLead)
    lead._desk, lead._members, lead._built, lead._gone, lead._client = desk, members, "net", set(), None
    lead._turned_away, lead._teams = set(), Teams(Plan.parse("ps=1,workers=3"))
    lead._recovery = Recovery(desk, members, *[None] * 4)  # type: ignore[arg-type]
    lines = [Line(where, "worker", number) for number in range(3)]

    def say(line: Line, word: type, **fields: object) -> None:
        before = len(desk.open)
        ticket = line.send(LEAD, lambda n: word(number=n, role="worker", **fields))
        deadline = time.monotonic() + 60.0
        while len(desk.open) == before and ticket.answer is None and time.monotonic() < deadline:
            lead._hear(0.05)
            line.receive(0.0)

    def join(line: Line, rank: int, pid: int) -> None:
        say(line, Join, rank=rank, pid=pid, host="there", built="net")

    lead._orders = Orders  # type: ignore[method-assign]
    join(lines[0], 0, 10)
    say(lines[1], Gone, rank=0, pid=10, host="there", cause="SIGKILL")
    join(lines[2], 0, 11)
    assert members.of["worker", 0].pid == 10 and members.of["worker", 0].died == "SIGKILL"
    assert [lost.member.pid for lost in members.lost(lambda member: 60.0)] == [10]
    lead._hear(0.0)
    assert members.of["worker", 0].pid == 11 and members.of["worker", 0].joined
    # A lead that was busy may read them in another order than they were sent.
    say(lines[1], Gone, rank=1, pid=20, host="there", cause="SIGKILL")
    # One of the same number on another machine.
    say(lines[1], Gone, rank=1, pid=21, host="elsewhere", cause="SIGKILL")
    say(lines[1], Gone, rank=0, pid=11, host="elsewhere", cause="SIGKILL")
    assert not members.of["worker", 0].died
    join(lines[0], 1, 20)
    assert ("worker", 1) not in members.of
    join(lines[2], 1, 21)
    assert members.of["worker", 1].pid == 21
    # Who says to be somebody that is there is turned away, and what it says of its end ends nothing.
    other = Line(where, "worker", 1)
    join(other, 1, 99)
    ticket = other.send(LEAD, lambda n: words.Failed(number=n, rank=1, kind="JobFailed", sentence="Turned away.", traceback=""))
    deadline = time.monotonic() + 60.0
    while ticket.answer is None and time.monotonic() < deadline:
        lead._hear(0.05)
        other.receive(0.0)
    assert isinstance(ticket.answer, words.Heard) and members.of["worker", 1].pid == 21
    for line in (*lines, other):
        line.close()


def test_a_worker_begins_only_with_those_whose_joining_was_heard(meeting):
    """Its head may say that it is there while the lead waits for a server: that is heard later, and so is where it is found."""
    desk, where = meeting
    members = Members(lambda role, rank: Process(0), [])
    lead = object.__new__(RemoteLead)
    lead._desk, lead._members, lead._built, lead._gone, lead._client = desk, members, "net", set(), object()
    lead._plan = Plan.parse("tp=2,ps=1,sync")
    lead._turned_away, lead._unexplained, lead._teams, lead._first_step = set(), {}, Teams(lead._plan), 0
    lead._recovery = Recovery(desk, members, *[None] * 4)  # type: ignore[arg-type]
    lead._settings = SimpleNamespace(total_steps=9, checkpoint_dir="c")
    lead._chains, lead._log = SimpleNamespace(heads={0: "tcp://127.0.0.1:4"}), SimpleNamespace(kept=False)
    lead._orders = Orders  # type: ignore[method-assign]
    head, partner = Line(where, "worker", 0), Line(where, "partner", 0)

    def join(line: Line, pid: int, address: str = "") -> Ticket:
        return line.send(LEAD, lambda n: Join(number=n, role=line.role, rank=0, pid=pid, host="", built="net", address=address))

    asked = join(partner, 11)
    deadline = time.monotonic() + 60.0
    while ("partner", 0) not in members.of and time.monotonic() < deadline:
        lead._hear(0.05)
    also = join(head, 10, "tcp://127.0.0.1:5")
    # What the lead does with a question that comes while it waits for a server.
    lead._recovery.put_off(next_of(desk))
    lead._answer_later(desk.open[0])
    assert len(desk.open) == 2 and not lead._teams.begun
    lead._hear(0.0)
    head.wait([also], "the run to begin")
    partner.wait([asked], "the run to begin")
    assert also.answer.team == asked.answer.team == "tcp://127.0.0.1:5" and also.answer.token == asked.answer.token
    # Nor with one of which it is known that it has died.
    lead._teams.begun.clear()
    asked, also = join(partner, 11), join(head, 10, "tcp://127.0.0.1:5")
    members.gone("worker", 0, 10, "", "SIGKILL")
    while len(desk.open) < 2 and time.monotonic() < deadline:
        desk.receive(0.05)
    for question in list(desk.open):
        lead._answer_later(question)
    assert not lead._teams.begun
    head.close()
    partner.close()


def test_what_is_none_of_a_runs_words_is_dropped(meeting):
    desk, where = meeting
    dice, line = random.Random(2), Line(where, "worker", 0)
    whole = encode(words.Report(number=1, rank=0, rows=(words.Row(3, (1.0,), (0,)),), made=(1,), buffers=()))
    refused = 0
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(dice.randrange(1, 5)):
            raw[dice.randrange(len(raw))] = dice.randrange(256)
        try:
            words.decode_said([bytes(raw[: dice.randrange(len(raw) + 1)])])
        except Malformed:
            refused += 1
    assert refused > 250
    line._sockets[LEAD].send_multipart([b"\x80", b"junk"])
    ticket = line.look(None)
    asked = next_of(desk)
    assert asked.said.number == ticket.number and desk.endpoint.dropped == 1
    line.close()


def test_who_asks_too_much_at_once_is_not_heard_and_others_are(meeting):
    desk, where = meeting
    greedy, other = Line(where, "worker", 1), Line(where, "worker", 0)
    for k in range(1, 41):
        greedy._sockets[LEAD].send_multipart([encode(Claim(k, 1, 0))])
    deadline = time.monotonic() + 60.0
    while len(desk.open) + desk.endpoint.dropped < 40 and time.monotonic() < deadline:
        desk.receive(0.05)
    assert len(desk.open) == 16 and desk.endpoint.dropped == 24
    other.look(None)
    assert next_of(desk).said.rank == 0
    greedy.close()
    other.close()


def test_an_answer_to_something_else_is_dropped(meeting):
    desk, where = meeting
    line = Line(where, "worker", 1)
    ticket = line.send(LEAD, lambda n: Claim(n, 1, 0))
    asked = next_of(desk)
    desk.endpoint.send(asked.identity, encode(words.Heard(ticket.number, Orders())))
    desk.endpoint.send(asked.identity, encode(Later(ticket.number, 0, Orders(steps_allowed=-1))))
    desk.answer(asked, lambda n: Later(n, 7, Orders()))
    line.wait([ticket], "an answer")
    assert ticket.answer == Later(ticket.number, 7, Orders())
    line.close()


def test_who_is_lost_is_found_out_once_and_started_again():
    made: list[Process] = []

    def start(role: str, rank: int) -> Process:
        made.append(Process(100 + len(made)))
        return made[-1]

    members = Members(start, [("server", 0), ("worker", 0)])
    members.begin()
    for role, rank, pid in (("server", 0, 100), ("worker", 0, 101), ("worker", 1, 500)):
        members.join(role, rank, pid, "here", "", b"")
    assert members.lost(lambda member: 60.0) == []
    made[1].kill()
    lost = members.lost(lambda member: 60.0)
    assert [(found.member.role, found.member.rank, found.cause, found.dead) for found in lost] == [
        ("worker", 0, "SIGKILL", True)
    ]
    assert members.lost(lambda member: 60.0) == [] and members.is_own("worker", 0) and not members.is_own("worker", 1)
    # Of those that go together the one is named first that the others have followed.
    pair = Members(lambda role, rank: Process(rank), [("worker", 0), ("partner", 0)])
    pair.begin()
    pair.of["worker", 0].process.code, pair.of["partner", 0].process.code = LOST, -9
    assert [found.cause for found in pair.lost(lambda member: 60.0)] == ["SIGKILL", "exit code 75"]
    members.start("worker", 0)
    rows = members.rows({"role": "supervisor", "rank": 0, "pid": 1, "host": "here"})
    assert [(row["role"], row["rank"], row["pid"]) for row in rows] == [
        ("supervisor", 0, 1), ("server", 0, 100), ("worker", 0, 102), ("worker", 1, 500),
    ]  # fmt: skip
    # Who was started elsewhere is lost when it says nothing for too long; who has left is not.
    members.of["server", 0].left = True
    assert [(found.member.rank, found.cause, found.dead) for found in members.lost(lambda member: -1.0)] == [
        (1, "silence", False)
    ]


def test_who_is_silent_is_named_once_and_waited_for_as_long_where_the_run_is_to_end(monkeypatch):
    """A run that was interrupted waits for what its slowest worker has begun; one that has asked for the end is not missed."""
    monkeypatch.delenv("SHOAL_STALL_S", raising=False)
    told: list[dict] = []
    lead = object.__new__(RemoteLead)
    lead._recorder = SimpleNamespace(first_step_at=1.0, longest_step_s=0.01, step=7)
    lead._emit = lambda kind, **fields: told.append({"kind": kind, **fields})
    lead._members = members = Members(lambda role, rank: Process(100), [("worker", 0)])
    lead._stopped_by = "interrupt"
    lead._desk = None
    members.begin()
    for rank in (0, 1, 2):
        members.join("worker", rank, 100 + rank, "here", "", b"%d" % rank)
    members.of["worker", 1].heard_at -= 30.0
    members.of["worker", 2].heard_at -= 30.0
    lead._answer_later(Asked(b"2", words.Leave(1, "worker", 2), ()))
    assert members.lost(lead._silence_s) == []
    lead._tell_missed()
    lead._tell_missed()
    (stall,) = told
    expected = {"kind": "stall", "role": "worker", "rank": 1, "step": 8, "replaced_after_s": None}
    assert stall.items() >= expected.items()
    assert 30.0 <= stall["waited_s"] < 60.0
    members.hear("worker", 1)
    members.of["worker", 1].heard_at -= 90.0
    lead._tell_missed()
    assert len(told) == 2
    assert [(lost.member.rank, lost.cause) for lost in members.lost(lead._silence_s)] == [(1, "silence")]
    # A first step may compile, or read from a cold disk.
    lead._recorder.first_step_at = None
    members.of["worker", 2].heard_at -= 90.0
    assert members.lost(lead._silence_s) == []


def test_servers_hear_of_the_end_when_no_worker_can_ask_them_for_anything() -> None:
    lead = object.__new__(RemoteLead)
    lead._orders = lambda: Orders(over=1)
    lead._members = members = Members(lambda role, rank: Process(100), [("worker", 0), ("worker", 1), ("server", 0)])
    members.begin()
    for role, rank in (("worker", 0), ("worker", 1), ("server", 0)):
        members.join(role, rank, 100, "here", "", b"")
    assert lead._orders_for(Look(1, "worker", 0)).over == 1
    assert lead._orders_for(Look(1, "server", 0)).over == 0
    members.leave("worker", 0)
    assert lead._orders_for(Look(1, "server", 0)).over == 0
    # One that has died asks for nothing, either.
    members.of["worker", 1].process.kill()
    assert lead._orders_for(Look(1, "server", 0)).over == 1
