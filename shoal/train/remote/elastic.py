"""A run without shared memory whose plan changes while it runs: servers and workers come and go, and keys move by their ring.

At the end of a step everything that was begun is applied, on all servers. Workers leave then, for they hold nothing. Servers
stay: those that come are forked, what the ring gives to another server goes there with all that belongs to it, and nothing else
travels; those that are not in the new plan leave when they have handed on what they had. Then workers are forked that know the
new placement, and the run goes on behind that step.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from shoal.comm.arena import Arena, Note
from shoal.errors import NotBuiltError, RequestError, WorkerLostError
from shoal.plan import Plan
from shoal.process.messages import SERVER, WORKER
from shoal.ps.moving import Moved, move
from shoal.ps.placement import Placement
from shoal.train import notes
from shoal.train.carried import begin_at, carry_all_but_state
from shoal.train.elastic import ChangingSession, Pause
from shoal.train.evaluate import put_together
from shoal.train.metric_state import metrics_of
from shoal.train.remote import plans, words
from shoal.train.remote.checks import SaidCheck, check_of
from shoal.train.remote.desk import Asked
from shoal.train.remote.holding import START_S
from shoal.train.remote.lead import RemoteLead
from shoal.train.remote.members import Lost, Member
from shoal.train.remote.published import RemoteSource
from shoal.train.remote.state import placement_of
from shoal.train.remote.worker import remote_settings
from shoal.train.replan import Change
from shoal.train.run import Run
from shoal.train.settings import EpochPart

_POLL_S = 0.02
_LEAVE_S = 10.0
"""Whoever has nothing more to do and has not left within so long is killed: nothing is lost with it."""


class ElasticLead(ChangingSession, RemoteLead):
    """The lead of such a run."""

    # Whether one plan is over, and the next one has not begun; whom it does not need.
    _between = False
    # When the workers of the present plan were started.
    _started_at = 0.0
    _leaving: Collection[tuple[str, int]] = ()

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # What workers that have left had gathered in training metrics with a state: (epoch, rank, metrics by name).
        self._left_over: list[tuple[int, int, dict[str, Any]]] = []

    def serve(self, began: float) -> Run:
        try:
            return super().serve(began)
        finally:
            self._hear_no_more()

    # -- hearing of it -------------------------------------------------------------------------------------------

    @property
    def _may_change(self) -> bool:
        # Under each plan at least a step is done, so that a run comes to its end whatever it is asked.
        return super()._may_change and self._recorder.step > self._first_step

    def _change_to(self, asked: Plan) -> tuple[Plan, Arena | None]:
        instead = f"stop the run, and go on with it by --resume --plan {asked}."
        if not self._members.are_own:
            raise RequestError(f"torchrun or Slurm has started this run's processes, whose number cannot change; {instead}")
        if self._log.kept or self._plan.replicas:
            what = "a log of pushes" if self._log.kept else "copies"
            raise NotBuiltError(f"Servers with {what} that share no memory hand on no keys while a run is under way; {instead}")
        return plans.changed(asked, self._plan, self._host), None

    def _all_there(self) -> bool:
        joined = {member.rank for member in self._members.joined(WORKER)}
        missing = sorted(set(range(self._arena.world_size)) - joined)
        if missing and time.monotonic() - self._started_at > START_S:
            raise WorkerLostError(f"Worker {missing[0]} has not come within {START_S:.0f} s; see what keeps it.")
        return not missing

    # -- what is said meanwhile ----------------------------------------------------------------------------------

    def _orders(self) -> words.Orders:
        orders = super()._orders()
        # A plan is over, and not the run.
        return msgspec.structs.replace(orders, over=0) if self._between else orders

    def _answer_claim(self, asked: Asked, said: words.Claim, waited: bool) -> None:
        # So that nothing is done under a plan before it is told that there is one.
        if self._pause is None:
            super()._answer_claim(asked, said, waited)

    def _answer_later(self, asked: Asked) -> None:
        said = asked.said
        if not self._between:
            super()._answer_later(asked)
        elif (getattr(said, "role", WORKER), getattr(said, "rank", -1)) in self._leaving:
            self._let_leave(asked)
        elif getattr(said, "role", WORKER) == SERVER:
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

    def _take(self, message: Any) -> None:
        if isinstance(message, EpochPart) and message.rank == 0:
            # With what those had seen who have left, the epoch's training metrics are of all its samples.
            training: Any = message.training
            self._left_over = [left for left in self._left_over if left[0] >= message.epoch]
            for epoch, rank, metrics in self._left_over:
                for name, own in training.metrics.items() if epoch == message.epoch else ():
                    training.metrics[name] = put_together(own, metrics[name], name, rank)
        super()._take(message)

    def _silence_s(self, member: Member) -> float:
        # Nobody is heard while keys move, and all are our own: who dies is seen.
        return math.inf if self._between else super()._silence_s(member)

    def _bury(self, lost: Lost) -> None:
        if (lost.member.role, lost.member.rank) in self._leaving:
            # It had nothing to do, and nobody comes in its place.
            self._desk.forget(lost.member.identity, for_good=True)
            self._members.gone(lost.member.role, lost.member.rank, lost.member.pid, lost.cause)
            self._tell_death(lost)
        else:
            super()._bury(lost)

    # -- making it -----------------------------------------------------------------------------------------------

    def _make(self, change: Change) -> None:
        self._finish_completing()
        step, plan, before = self._recorder.step, change.plan, self._placement
        pause = self._pause = Pause(change, self._plan, step, self._recorder.last_end or time.monotonic())
        after = placement_of(self._facts.table, self._facts.tables, range(plan.servers))
        self._between = True
        self._desk.check = self._both(plan)
        self._members.let_be([("server", n) for n in after.servers] + [("worker", n) for n in range(plan.data_ways)])
        self._send_away(WORKER, range(self._arena.world_size))
        self._plan = plan
        moved = self._move(before, after, step)
        pause.moved = {
            "keys_moved": moved.keys, "keys": moved.of, "rows_moved": moved.rows, "bytes_moved": moved.nbytes
        }  # fmt: skip
        self._take_up(plan, after, step, moved.version)
        self._between = False
        self._started_at = time.monotonic()
        for rank in range(plan.data_ways):
            self._members.start(WORKER, rank)

    def _both(self, plan: Plan) -> SaidCheck:
        """What may be said by those of the plan that was, and by those of the one that comes."""
        check = check_of(self._plan, self._store, self._job, self._settings.total_steps)
        workers, servers = max(check.workers, plan.data_ways), max(check.servers, plan.servers)
        return dataclasses.replace(check, workers=workers, servers=servers)

    def _send_away(self, role: str, ranks: Iterable[int]) -> None:
        """Let these leave, who hold nothing that anybody needs; who does not in a while is killed."""
        members, deadline = self._members, time.monotonic() + _LEAVE_S
        self._leaving = {(role, rank) for rank in ranks}
        while there := [member for key, member in members.of.items() if key in self._leaving]:
            self._hear(_POLL_S)
            for lost in members.lost(self._silence_s):
                self._bury(lost)
            for member in there:
                process = member.process
                if process is None or process.poll() is not None:
                    if member.identity:
                        self._desk.forget(member.identity, for_good=True)
                    members.forget(role, member.rank)
                elif not member.joined or time.monotonic() > deadline:
                    # One that has just been forked has not even begun.
                    member.left = True
                    process.kill()
        self._leaving = ()

    def _move(self, before: Placement, after: Placement, step: int) -> Moved:
        """Let keys go where the ring of the servers that there will be has them."""
        client = self._client
        assert client is not None
        joining = sorted(set(after.servers) - set(before.servers))
        leaving = sorted(set(before.servers) - set(after.servers))
        for rank in joining:
            self._members.start(SERVER, rank)
        self._await_servers(joining)
        for member in self._members.joined(SERVER):
            if member.rank in joining:
                client.connect(member.rank, member.address)
        moved = move(client, before, after, self._settled_at(step))
        self._send_away(SERVER, leaving)
        for rank in leaving:
            client.disconnect(rank)
        return moved

    def _await_servers(self, ranks: Sequence[int]) -> None:
        """Wait until these are there."""
        deadline = time.monotonic() + START_S
        while missing := set(ranks) - {member.rank for member in self._members.joined(SERVER)}:
            self._hear(_POLL_S)
            for lost in self._members.lost(self._silence_s):
                self._bury(lost)
            if time.monotonic() > deadline:
                raise WorkerLostError(f"Server {min(missing)} has not come within {START_S:.0f} s; see what keeps it.")

    def _take_up(self, plan: Plan, placement: Placement, step: int, version: int) -> None:
        """Begin behind a step under another plan; all servers count ``version`` updates."""
        left, recorder, backlog = self._store, self._recorder, self._recovery.backlog
        eval_loss = left.arena.supervisor.note(Note.EVAL_LOSS)
        self._note(step)
        settings = remote_settings(plan, self._job, self._facts, self._options, str(Path(self._directory.checkpoints)))
        store = self._host.take_up(Arena.private(settings.layout), settings, True)
        restored = carry_all_but_state(left, store, step)
        self._log.close()
        self._use(settings, store, placement)
        self._recovery.backlog = backlog
        self._log.begin(step, self._last_checkpoint, self._write_base)
        self._tables.client = self._client  # type: ignore[attr-defined]
        begin_at(store, restored, step, self._epochs_done, eval_loss)
        self._man(step)
        self._recorder.go_on_from(recorder)
        # What the servers have is brought into the store when it is needed.
        self._collected = -1
        self._desk.check = check_of(plan, store, self._job, settings.total_steps, version)
        self._chains.know({member.rank: member.address for member in self._members.joined(SERVER)})
        self._source = RemoteSource(store, placement, self._facts.tables, self._meeting.keys, self._sync, version)
        self._source.follow(self._chains.heads)
