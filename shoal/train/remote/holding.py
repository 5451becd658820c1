"""What a lead has to do with its servers: what they begin with, which have died, and who comes in their place."""

from __future__ import annotations

import contextlib
import time

import msgspec

from shoal.errors import WorkerLostError
from shoal.process.messages import SERVER
from shoal.ps.client import Client, Patience
from shoal.ps.replication import follow
from shoal.train.crew import Patience as Stalls
from shoal.train.remote import words
from shoal.train.remote.desk import Asked, Desk
from shoal.train.remote.keeper import ROLE as KEEPER
from shoal.train.remote.keepers import Keepers
from shoal.train.remote.keeping import Keeping
from shoal.train.remote.line import Meeting
from shoal.train.remote.members import START_S, Lost, Member, Members
from shoal.train.remote.published import RemoteSource
from shoal.train.remote.state import push_id

_POLL_S = 0.05
# So long may a server take to say why it has refused something.
_HOLD_S = 0.5
_KEEPERS_S = 10.0


class BeginAgain(Exception):
    """A server has died while servers were given what they are to have: another one will be there, and it is done anew."""


class Holding(Keeping):
    """A lead without its workers.

    Attributes:
        _emptied: when servers died whose place is still empty, and in which step.
    """

    _desk: Desk
    _members: Members
    _meeting: Meeting
    _source: RemoteSource
    _emptied: dict[int, tuple[float, int]]
    _began_at: float
    _per_step: int
    # Workers that are gone and that nobody starts again.
    _gone: set[int]
    # The job's processes, where others have started these, and each keeps a server or a worker.
    keepers: Keepers | None = None
    # When all that these keep had left as the run had ended.
    _alone_since = 0.0
    # Whether a server has died since all were there, and before all had what the run begins with.
    _died_early = False

    def _take_said(self, asked: Asked) -> None:
        raise NotImplementedError

    def _answer_later(self, asked: Asked) -> None:
        raise NotImplementedError

    def _bury(self, lost: Lost) -> None:
        raise NotImplementedError

    def _orders(self) -> words.Orders:
        raise NotImplementedError

    def _orders_for(self, said: words.Look) -> words.Orders:
        """What one is told who looks: a server that the run is over when no worker can ask it for anything any more.

        One that is slow may have sent a push just before the end, and would wait for its answer.
        """
        orders = self._orders()
        if said.role == KEEPER and self.keepers is not None:
            return msgspec.structs.replace(orders, keeps=self.keepers.keeps(said.rank))
        asks = said.role == SERVER and self._members.has_workers
        return msgspec.structs.replace(orders, over=0) if asks else orders

    def _settled_at(self, step: int) -> tuple[int, int, int]:
        """The first push behind a step."""
        return self._id_of(step * self._per_step)

    def _id_of(self, unit: int) -> tuple[int, int, int]:
        return push_id(unit, self._per_step, self._settings.steps_per_epoch)

    def _hear_from(self, asked: Asked) -> None:
        """Who asks is alive."""
        said = asked.said
        if isinstance(said, (words.Look, words.Leave)):
            self._members.hear(said.role, said.rank)
        elif isinstance(said, (words.Claim, words.Report, words.Gives, words.Evaluated, words.Bad)):
            self._members.hear("worker", said.rank)

    def _let_go(self, said: words.Leave) -> None:
        """Somebody is done."""
        self._members.leave(said.role, said.rank)
        if self.keepers is not None and said.role == KEEPER:
            self.keepers.leave(said.rank)

    def _have_left(self) -> bool:
        """The run has ended: whether nobody is to be waited for any more. Who keeps others may leave a moment after these."""
        if not all(m.left or not m.joined or m.is_over for m in self._members.of.values()):
            return False
        self._alone_since = self._alone_since or time.monotonic()
        return self.keepers is None or self.keepers.have_left or time.monotonic() - self._alone_since > _KEEPERS_S

    def _hear_of_logs(self) -> None:
        """A server has refused a step: it says by itself where that is because of its log."""
        deadline = time.monotonic() + _HOLD_S
        while self._log.kept and time.monotonic() < deadline:
            for asked in self._desk.receive(_POLL_S):
                if isinstance(asked.said, words.LogFailed):
                    self._take_said(asked)

    def _limits(self) -> tuple[float, float]:
        """After how many seconds of silence somebody is named, and after how many it is taken for lost."""
        first = self._recorder.first_step_at is None
        return Stalls.from_environment().limits(self._recorder.longest_step_s, first)

    def _silence_s(self, member: Member) -> float:
        # Of a run that is told to end, too: who is silent then has the most to finish.
        return self._limits()[1]

    def _tell_missed(self) -> None:
        """Name whom the run may be waiting for."""
        named_s, lost_s = self._limits()
        for member in self._members.missed(named_s):
            own = self._members.is_own(member.role, member.rank)
            self._emit(
                "stall", role=member.role, rank=member.rank, pid=member.pid, step=self._recorder.step + 1, phase="unknown",
                waited_s=time.monotonic() - member.heard_at, waits_for=None, stack="", replaced_after_s=lost_s if own else None,
            )  # fmt: skip

    def _look_for_parts(self) -> None:
        """An evaluation cannot end without the part of a worker that is gone for good."""
        epoch = self._epochs_done + 1
        missing = self._gone - set(self._parts.get(epoch, {}))
        if missing and self._recorder.step == epoch * self._settings.steps_per_epoch:
            raise WorkerLostError(
                f"Worker {min(missing)} is gone, and nobody evaluates its part of epoch {epoch}; go on with --resume: "
                f"{self._name_last_checkpoint()}"
            )

    def _tell_death(self, lost: Lost) -> None:
        member = lost.member
        self._emit(
            "death", rank=member.rank, pid=member.pid, step=self._recorder.step + 1, phase="unknown", cause=lost.cause,
            role=member.role,
        )  # fmt: skip

    def _attend_servers(self) -> None:
        """Let those begin who are all there, and those join a chain who have come back."""
        joined = self._members.joined("server")
        addresses = {m.rank: m.address for m in joined}
        if self._client is None and len(joined) == len(self._chains.ranks):
            self._died_early = False
            with contextlib.suppress(BeginAgain):
                self._fill_servers(addresses)
        for rank in self._chains.attend(addresses):
            died_at, step = self._emptied.pop(rank)
            after_s = time.monotonic() - died_at
            pid = self._members.of["server", rank].pid
            self._emit("recovered", rank=rank, pid=pid, step=step, after_s=after_s, action="copied", role="server")
        if self._client is None and time.monotonic() - self._began_at > START_S:
            missing = sorted(set(self._chains.ranks) - set(addresses))
            raise WorkerLostError(f"Server {missing[0]} has not come within {START_S:.0f} s; see what keeps it.")

    def _fill_servers(self, addresses: dict[int, str]) -> None:
        """All servers are there: give them what the run begins with. BeginAgain where one of them dies meanwhile."""
        patience = Patience(deadline_s=self._meeting.deadline_s)
        self._chains.know(addresses)
        with contextlib.ExitStack() as stack:
            client = Client(self._chains.heads, self._meeting.keys, patience, self._look_around)
            stack.callback(client.close)
            settled = self._settled_at(self._first_step)
            for server in self._placement.servers:
                if self._plan.replicas:
                    # One that has seen another die before may wait for it.
                    follow(client, server, "")
                client.put(server, self._state.give(server, self._first_step, settled, self._log.ahead_ids), whole=True)
            self._tables.client = client  # type: ignore[attr-defined]
            self._tables.fill()  # type: ignore[attr-defined]
            if self._plan.replicas:
                others = Client(addresses, self._meeting.keys, patience, self._look_around)
                stack.callback(others.close)
                self._chains.begin(others)
            self._source.follow(self._chains.heads)
            if self._log.kept and self._last_checkpoint is None:
                # What the logs are about to say is said of this.
                self._last_one(self._first_step)
            # Until then a server that dies could not be brought back: it may have what no checkpoint of the run has.
            self._log.begin(self._first_step, self._last_checkpoint, self._write_base)
            stack.pop_all()
        self._client = client
        self._tables.begun()  # type: ignore[attr-defined]
        if self._log.kept:
            self._recovery.begin(client)

    def _look_around(self) -> None:
        """While a server's answer is awaited: who has died? What else is said is heard afterwards."""
        for asked in self._desk.receive(0.0):
            if isinstance(asked.said, words.Gone):
                self._take_said(asked)
            else:
                self._recovery.put_off(asked)
        # Who waits for us is not silent.
        for asked in self._desk.open:
            self._hear_from(asked)
        for lost in self._members.lost(self._silence_s):
            self._bury(lost)
        if self._client is None and self._died_early:
            raise BeginAgain

    def _bury_server(self, lost: Lost, step: int) -> None:
        """Another one that has the same shard answers for it at once; without one the run cannot go on."""
        rank, chains = lost.member.rank, self._chains
        if rank not in chains.ranks:
            # Of a plan that is over; it holds nothing, and nobody comes in its place.
            return
        comes_back = lost.returns or self._members.is_own("server", rank)
        if self._log.kept and self._log.baselines and self._client is not None and comes_back:
            self._bring_back(rank, step)
            return
        if self._client is None and self._may_begin_again(rank):
            self._died_early = True
            return
        if self._client is None or not chains.lose(rank):
            raise self._lost_server(f"Server {rank} died ({lost.cause})")
        shard = rank % self._plan.servers
        self._client.connect(shard, chains.heads[shard])
        self._source.follow(chains.heads)
        self._emptied.setdefault(rank, (time.monotonic(), step))
        if self._members.is_own("server", rank) and chains.may_return(rank):
            self._members.start("server", rank)

    def _may_begin_again(self, rank: int) -> bool:
        """Whether another server comes in the place of one that died before it had been given anything to hold."""
        own = self._members.is_own("server", rank)
        if not (own or self._servers_move) or not self._chains.may_begin_again(rank):
            return False
        if own:
            self._members.start("server", rank)
        return True

    def _bring_back(self, rank: int, step: int) -> None:
        """A server that keeps a log has died: another process goes on from it."""
        died_at, client = time.monotonic(), self._client
        assert client is not None
        self._chains.moved(rank, self._recovery.bring_back(rank, self._let_in))
        client.connect(rank, self._chains.heads[rank])
        self._source.follow(self._chains.heads)
        after_s, pid = time.monotonic() - died_at, self._members.of["server", rank].pid
        self._emit(
            "recovered", rank=rank, pid=pid, step=step, after_s=after_s, action="replayed", role="server",
            parts_s=self._recovery.seconds,
        )  # fmt: skip

    def _let_in(self, asked: Asked) -> None:
        self._take_said(asked)
        # Who says that it is one that is there already, has been answered.
        if self._desk.is_open(asked):
            self._answer_later(asked)

    def _lost_server(self, what: str) -> WorkerLostError:
        return WorkerLostError(f"{what}, and what it held is gone with it; go on with --resume: {self._name_last_checkpoint()}")
