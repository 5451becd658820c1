"""How keys come to where the servers of another plan are to have them, whoever of these is killed meanwhile.

Nobody works meanwhile, so where a log or copies keep what servers have, a checkpoint that is written first holds everything. Keys
then go from server to server. When one is killed that something is lost with, all servers of the new plan are given what the
checkpoint has, whatever they had got by then: never does one begin with a part of the one and another with a part of the other.
Without log and copies there is no such checkpoint, and only a server that has just come, and has nothing that others have not,
may be killed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shoal.errors import WorkerLostError
from shoal.process.messages import SERVER, WORKER
from shoal.ps.client import Client, Patience
from shoal.ps.moving import Moved, move
from shoal.ps.placement import Placement
from shoal.ps.replication import follow
from shoal.train import notes
from shoal.train.metric_state import metrics_of
from shoal.train.remote import words
from shoal.train.remote.chains import Chains
from shoal.train.remote.desk import Asked
from shoal.train.remote.holding import BeginAgain
from shoal.train.remote.keeper import ROLE as KEEPER
from shoal.train.remote.keepers import Keepers
from shoal.train.remote.lead import RemoteLead
from shoal.train.remote.members import MOST_DEATHS, START_S, Lost, Member
from shoal.train.remote.state import RemoteTables, StoreState

_POLL_S = 0.02
_LEAVE_S = 10.0
"""Whoever has nothing more to do and has not left within so long is killed: nothing is lost with it."""


@dataclass
class Moving:
    """A move under way, behind ``step``.

    Attributes:
        before, after: who had what, and who is to have it.
        chains: of the plan that comes.
        kept: whether the last checkpoint has everything.
        sources: the servers that have what ``before`` says.
        parting: whether servers forget what they gave away: from then on those of ``after`` are the only ones that have it.
        lost: whether something was lost with a server, so that the checkpoint is what servers begin with.
        struck: whether a server has died since this was looked at.
        died: when servers died that others came in the place of.
    """

    before: Placement
    after: Placement
    step: int
    chains: Chains
    kept: bool
    sources: set[int]
    parting: bool = False
    lost: bool = False
    struck: bool = False
    died: dict[int, float] = field(default_factory=dict)
    deaths: Counter[int] = field(default_factory=Counter)

    def part(self) -> None:
        self.parting = True


class MovingLead(RemoteLead):
    """The lead while a plan is over and the next one has not begun."""

    # Whether that is so; whom the next plan does not need; and which keys are on their way.
    _between = False
    _leaving: Collection[tuple[str, int]] = ()
    _moving: Moving | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # What workers that have left had gathered in training metrics with a state: (epoch, rank, metrics by name).
        self._left_over: list[tuple[int, int, dict[str, Any]]] = []

    # -- what is said meanwhile ----------------------------------------------------------------------------------

    def _orders(self) -> words.Orders:
        orders = super()._orders()
        # A plan is over, and not the run.
        return msgspec.structs.replace(orders, over=0) if self._between else orders

    def _answer_later(self, asked: Asked) -> None:
        said = asked.said
        if not self._between:
            super()._answer_later(asked)
        elif (getattr(said, "role", WORKER), getattr(said, "rank", -1)) in self._leaving:
            self._let_leave(asked)
        elif getattr(said, "role", WORKER) in (SERVER, KEEPER):
            super()._answer_later(asked)

    def _let_leave(self, asked: Asked) -> None:
        said, orders = asked.said, msgspec.structs.replace(self._orders(), over=1)
        if isinstance(said, words.Leave):
            for frame in asked.frames:
                gathered = metrics_of(notes.from_bytes(frame), self._job.metrics)
                self._left_over.append((self._epochs_done + 1, said.rank, gathered))
            self._desk.answer(asked, lambda n: words.Ended(n, str(self._directory.path), b"{}"))
            self._members.leave(said.role, said.rank)
        elif isinstance(said, words.Claim):
            self._desk.answer(asked, lambda n: words.Later(n, self._recorder.step, orders))
        elif isinstance(said, words.Look):
            self._desk.answer(asked, lambda n: words.Heard(n, orders))
        elif isinstance(said, words.Join):
            member = self._members.of.get((said.role, said.rank))
            # In the place of one that was killed its keeper has started another, which it ends when it is told of the plan.
            if member is not None and member.process is None:
                self._forget(member)

    def _silence_s(self, member: Member) -> float:
        # Nobody is heard while keys move, and all are our own: who dies is seen.
        return math.inf if self._between else super()._silence_s(member)

    # -- who dies meanwhile --------------------------------------------------------------------------------------

    def _bury(self, lost: Lost) -> None:
        if (lost.member.role, lost.member.rank) in self._leaving:
            # It had nothing to do, and nobody comes in its place.
            self._desk.forget(lost.member.identity, for_good=True)
            self._members.gone(lost.member.role, lost.member.rank, lost.member.pid, lost.member.machine, lost.cause)
            self._tell_death(lost)
        else:
            super()._bury(lost)

    def _bury_server(self, lost: Lost, step: int) -> None:
        moving, rank = self._moving, lost.member.rank
        if moving is None:
            super()._bury_server(lost, step)
            return
        if moving.parting or rank in moving.sources:
            if not moving.kept:
                raise self._lost_server(f"Server {rank} died ({lost.cause})")
            moving.lost = True
        moving.struck = True
        own = self._members.is_own(SERVER, rank)
        if not (own or (lost.returns and rank in moving.chains.ranks)):
            # The plan that comes needs none of this number.
            return
        moving.deaths[rank] += 1
        if moving.deaths[rank] >= MOST_DEATHS:
            raise WorkerLostError(
                f"Server {rank} died {moving.deaths[rank]} times while the plan changed (last by {lost.cause}); see what kills "
                f"it, and go on with --resume: {self._name_last_checkpoint()}"
            )
        moving.died.setdefault(rank, time.monotonic())
        if own:
            self._members.start(SERVER, rank)

    def _look_around(self) -> None:
        super()._look_around()
        self._begin_again_if_struck()

    def _begin_again_if_struck(self) -> None:
        if self._moving is not None and self._moving.struck:
            raise BeginAgain

    # -- servers that come and go --------------------------------------------------------------------------------

    def _send_away(self, role: str, ranks: Iterable[int]) -> None:
        """Let these leave, who hold nothing that anybody needs; who does not in a while is killed."""
        members, deadline = self._members, time.monotonic() + _LEAVE_S
        self._leaving = {(role, rank) for rank in ranks}
        while there := [member for key, member in members.of.items() if key in self._leaving]:
            self._hear(_POLL_S)
            for lost in members.lost(self._silence_s):
                self._bury(lost)
            for member in there:
                process, late = member.process, time.monotonic() > deadline
                if process.poll() is not None if process is not None else member.left or late:
                    self._forget(member)
                elif process is not None and (late or not member.joined):
                    # One that has just been forked has not even begun.
                    member.left = True
                    process.kill()
        self._leaving = ()

    def _forget(self, member: Member) -> None:
        """It has gone, or goes: nothing that it says is heard any more."""
        if member.identity:
            self._desk.forget(member.identity, for_good=True)
        self._members.forget(member.role, member.rank)

    def _servers_there(self) -> list[int]:
        """The numbers of all servers that were started."""
        return [rank for role, rank in self._members.of if role == SERVER]

    def _gather(self, ranks: Collection[int]) -> dict[int, str]:
        """Start those of these servers that are not there, and wait for them; their addresses. BeginAgain where one dies."""
        for rank in sorted(set(ranks) - set(self._servers_there())):
            if self.keepers is None or self._members.is_own(SERVER, rank):
                self._members.start(SERVER, rank)
        deadline = time.monotonic() + START_S
        while missing := set(ranks) - {member.rank for member in self._members.joined(SERVER)}:
            self._hear(_POLL_S)
            for lost in self._members.lost(self._silence_s):
                self._bury(lost)
            self._begin_again_if_struck()
            if time.monotonic() > deadline:
                raise WorkerLostError(f"Server {min(missing)} has not come within {START_S:.0f} s; see what keeps it.")
        return {member.rank: member.address for member in self._members.joined(SERVER) if member.rank in ranks}

    def _reach(self, ranks: Collection[int]) -> Client:
        """Speak to these servers, where they are now, and to no others."""
        client, addresses = self._client, self._gather(ranks)
        assert client is not None
        for rank in client.places:
            client.disconnect(rank)
        for rank, address in addresses.items():
            client.connect(rank, address)
        return client

    # -- keys ----------------------------------------------------------------------------------------------------

    def _begin_moving(self, before: Placement, after: Placement, step: int) -> None:
        """From here on servers may die: see ``Moving``."""
        plan, kept = self._plan, self._servers_move
        sources = {shard for shard in before.servers if self._chains.has(shard, shard)}
        self._moving = Moving(before, after, step, Chains(plan.servers, plan.replicas or 0), kept, sources)
        # Of a shard another has all; then that one's number is not the shard's, and it cannot go on.
        self._moving.lost = len(sources) < len(before.servers)

    def _let_move(self) -> Moved:
        """Let servers hold what they are to hold, and their copies, too; all count the same updates then."""
        moving, client = self._moving, self._client
        assert moving is not None and client is not None
        # Copies of what was: while keys move, the checkpoint is what protects them.
        self._send_away(SERVER, sorted(set(self._servers_there()) - moving.sources))
        while True:
            moving.struck = False
            if self.keepers is not None:
                self._appoint(self.keepers)
                moving.lost = True
            with contextlib.suppress(BeginAgain):
                moved = self._give_all(moving) if moving.lost else self._move(moving)
                self._copy(moving)
                self._look_around()
                break
            client.forget_all()
            moving.chains.close()
        self._chains.close()
        self._chains, self._moving = moving.chains, None
        for rank, died_at in sorted(moving.died.items()):
            after_s, pid = time.monotonic() - died_at, self._members.of[SERVER, rank].pid
            self._emit("recovered", rank=rank, pid=pid, step=moving.step, after_s=after_s, action="given", role="server")
        return moved

    def _appoint(self, keepers: Keepers) -> None:
        """Let the processes of the job keep those of the new plan: whoever they have kept ends, and all begin anew."""
        for member in [member for member in self._members.of.values() if member.process is None]:
            self._forget(member)
        keepers.appoint(self._plan)
        self._send_away(SERVER, self._servers_there())

    def _move(self, moving: Moving) -> Moved:
        """Let keys go from server to server."""
        before, after = moving.before, moving.after
        client = self._reach({*before.servers, *after.servers})
        if moving.chains.replicas:
            for server in before.servers:
                follow(client, server, "")
        moved = move(client, before, after, self._settled_at(moving.step), moving.part)
        leaving = sorted(set(before.servers) - set(after.servers))
        self._send_away(SERVER, leaving)
        for server in leaving:
            client.disconnect(server)
        return moved

    def _give_all(self, moving: Moving) -> Moved:
        """Give every server what the checkpoint has of it."""
        after, step = moving.after, moving.step
        if self.keepers is None:
            self._send_away(SERVER, sorted(set(self._servers_there()) - set(after.servers)))
        client = self._reach(after.servers)
        state = StoreState(self._store, after)
        state.numbers = dict(self._state.numbers)
        tables = RemoteTables(self._facts.tables, after)
        tables.client = client
        assert self._last_checkpoint is not None and self._last_checkpoint.step == step
        tables.restore(self._last_checkpoint.path, step)
        moved = Moved(after.keys, after.keys, version=max(self._versions.values()))
        for server in after.servers:
            if moving.chains.replicas:
                follow(client, server, "")
            own = state.give(server, moved.version, self._settled_at(step))
            client.hold(server, [piece.number for piece in after.pieces_of(server)], after.shards_of(server))
            client.put(server, own, whole=True)
            moved.nbytes += sum(tensor.nbytes for tensor in own.tensors.values())
        moved.rows, nbytes = tables.fill()
        moved.nbytes += nbytes
        return moved

    def _copy(self, moving: Moving) -> None:
        """Let there be copies of what the servers have, as many as the plan says."""
        chains = moving.chains
        addresses = self._gather(chains.ranks)
        chains.know(addresses)
        if chains.replicas:
            others = Client(addresses, self._meeting.keys, Patience(deadline_s=self._meeting.deadline_s), self._look_around)
            try:
                chains.begin(others)
            except BaseException:
                others.close()
                raise
