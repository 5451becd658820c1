"""The lead of a run whose servers and workers share no memory: it hands out units and hears what was done of them.

It keeps an arena of its own in which it writes what the processes of an arena would write there themselves: claims, the
ledger's words and rows, signals. So what reads these (``PushRecorder``, ``Pacer``, ``Session``) is the same in both.

Under ``sync`` pushes are staged on the servers; once those of all shards of a step are there the lead has the servers apply their
sum, and only then is anything of the next step handed out. With ``backup=b`` all shards but b are enough; the others are dropped
then, whoever has them. What a worker had begun when it was lost, another one does again, under the same id, so that no server
counts it twice.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from shoal.comm.arena import Note, Order, Signal
from shoal.comm.store import Store
from shoal.errors import JobFailed
from shoal.process.failure import Failure
from shoal.process.messages import SERVER
from shoal.ps import messages
from shoal.ps.claims import Claim, Claims
from shoal.ps.client import NotStaged
from shoal.ps.lbfgs import DIRECTION
from shoal.ps.ledger import DROPPED, UNCOUNTED, UnitColumns
from shoal.ps.placement import Placement
from shoal.train import notes
from shoal.train.choose import predicted_step
from shoal.train.evaluate import Tally
from shoal.train.host import TrainHost
from shoal.train.metric_state import metrics_of
from shoal.train.pacing import Pacer
from shoal.train.push_log import wants_log
from shoal.train.remote import words
from shoal.train.remote.batch_sums import BatchSums
from shoal.train.remote.chains import Chains
from shoal.train.remote.checks import check_of
from shoal.train.remote.coordinator import Coordinator
from shoal.train.remote.dealing import Dealt, Left, Orphan
from shoal.train.remote.desk import Asked, Desk
from shoal.train.remote.joining import Joining
from shoal.train.remote.line import Meeting
from shoal.train.remote.log import LoggedRecorder, RemoteLog
from shoal.train.remote.members import Members
from shoal.train.remote.published import RemoteSource
from shoal.train.remote.recovery import Recovery
from shoal.train.remote.stand_ins import Groups
from shoal.train.remote.state import RemoteTables, StoreState
from shoal.train.remote.teams import Teams
from shoal.train.remote.worker import built_as
from shoal.train.run import Run
from shoal.train.settings import BadPush, EpochPart, RunSettings, ValueNames
from shoal.train.update_log import LogTrouble

logger = logging.getLogger(__name__)

_POLL_S = 0.05
# A question that waits for something is answered after so long all the same: who asks knows then that the lead lives.
_HOLD_S = 0.5


class RemoteLead(Joining):
    """The supervisor's part of such a run."""

    def begin(
        self, settings: RunSettings, store: Store, host: TrainHost, placement: Placement, members: Members, desk: Desk,
        meeting: Meeting,
    ) -> None:  # fmt: skip
        """Take up the run; fill the store from a checkpoint where there is one to go on from."""
        self._host, self._members = host, members
        self._desk, self._meeting = desk, meeting
        self._built = built_as(self._facts)
        self._turned_away = set()
        self._use(settings, store, placement)
        self._chains = Chains(self._plan.servers, self._plan.replicas or 0)
        self._tables.begin_with(host.first_rows)  # type: ignore[attr-defined]
        first = self._restore(store)
        self._write_beginning(first)
        self._man(first)
        self._log.take_up(self._recorder, self._schedule, self._emit)
        self._source = RemoteSource(store, placement, self._facts.tables, meeting.keys, self._sync, first)
        self._began_at = time.monotonic()

    def _use(self, settings: RunSettings, store: Store, placement: Placement) -> None:
        """Take up a plan, with a store that fits it; what the store holds comes later."""
        self._settings, self._plan = settings, settings.plan
        self._store, self._arena, self._placement = store, store.arena, placement
        self._desk.check = check_of(self._plan, store, self._job, settings.total_steps)
        self._teams = Teams(self._plan)
        self._sync = not self._plan.waits_for_nobody
        self._tables = RemoteTables(self._facts.tables, placement)  # type: ignore[assignment]
        self._state = StoreState(store, placement)
        self._predicted_s = predicted_step(self._plan, self._job, self._facts)
        run = self._directory.path
        self._log = RemoteLog(run, self._plan, wants_log(self._options.push_log, self._plan, run), store, self._host)
        self._recovery = Recovery(self._desk, self._members, self._meeting, self._log, self._settled_at, self._emit)

    def _man(self, first: int) -> None:
        """Begin behind a step, which the store holds."""
        store, host = self._store, self._host
        self._recorder = LoggedRecorder(store, self._emit, self._settings, first, self._log)
        self._pacer = Pacer(store, self._settings, self._recorder, first)
        self._per_step = self._settings.units_per_step
        self._claims = Claims(store.arena, self._ahead(), self._per_step)
        # Where a batch is cut into portions: what is out of the step in work, and before which unit everything is done.
        self._dealt = Dealt() if self._settings.portions else None
        self._past, self._left = 0, Left()
        # Where workers normalise over the whole batch together, each of them is needed in every step.
        self._together = self._facts.batchnorm and self._plan.batchnorm != "local" and self._plan.data_ways > 1
        self._batch_sums = BatchSums(self._per_step, self._facts.collective_bytes(self._plan), first * self._per_step)
        self._first_step = first
        self._groups = Groups()
        self._schedule = host.schedule(store.arena.world_size, self._groups)
        page = store.read_notebook(store.arena.world_size, first) if first else None
        memory = (page or {}).get("optimizer") or {}
        self._state.numbers = dict(memory.get("state", {}))
        self._coordinator = Coordinator(memory) if DIRECTION in self._facts.table.state_keys else None
        self._schedule.recall(first)
        self._collected = first
        self._versions = {}
        self._orphans: deque[Orphan] = deque()
        # Who has which units: their rank -> (unit, the row that it was claimed in).
        self._given: dict[int, list[Orphan]] = {}
        # Under sync: what was reported of the units of the step in work.
        self._staged: dict[int, tuple[words.Report, words.Row]] = {}
        # Units of which it was told that their gradients are no numbers.
        self._bad: set[int] = set()
        self._deaths, self._died_at, self._gone, self._unexplained = {}, {}, set(), {}
        self._emptied = {}

    def _ahead(self) -> int | None:
        if self._sync:
            return 0
        return self._plan.staleness if self._plan.mode == "bounded" else None

    # -- while it runs -------------------------------------------------------------------------------------------

    def serve(self, began: float) -> Run:
        """Bring the run to its end."""
        self._interrupts.armed = True
        self._train()
        while self._goes_on():
            self._train()
        self._startup_s = (self._recorder.first_step_at or time.monotonic()) - began
        run = self._end(began)
        self._dismiss(run)
        return run

    def _train(self, goes_on: Callable[[], bool] = lambda: False) -> None:
        with self._source.published(self._publication, self._meeting, goes_on):
            while not self._is_over():
                # Before anybody is missed: while a server was waited for, or we did not run, all may have said something.
                self._hear(_POLL_S)
                self._attend_members()
                if self._client is not None:
                    self._attend()
                    self._look_for_parts()
            self._recorder.drain()

    def _is_over(self) -> bool:
        return self._arena.supervisor.signal(Order.OVER) > 0 and self._claims.all_finished()

    def _dismiss(self, run: Run) -> None:
        """Tell everybody how it ended."""
        summary = json.dumps(run.summary()).encode()
        # While the run was brought to its end nobody was heard.
        for member in self._members.of.values():
            self._members.hear(member.role, member.rank)
        deadline = time.monotonic() + self._meeting.deadline_s
        while time.monotonic() < deadline:
            for asked in list(self._desk.open):
                self._hear_from(asked)
                if isinstance(asked.said, words.Leave):
                    self._desk.answer(asked, lambda n: words.Ended(n, str(run.path), summary))
                    self._let_go(asked.said)
                elif isinstance(asked.said, (words.Join, words.Gone)):
                    if isinstance(gone := asked.said, words.Gone):
                        self._members.gone(gone.role, gone.rank, gone.pid, gone.host, gone.cause)
                    self._desk.answer(asked, lambda n: messages.Refused(n, "the run has ended"))
                elif isinstance(asked.said, words.Look):
                    self._answer_later(asked)
                elif isinstance(asked.said, words.Claim):
                    self._desk.answer(asked, lambda n: words.Later(n, self._recorder.step, self._orders()))
                else:
                    self._desk.answer(asked, lambda n: words.Heard(n, self._orders()))
            self._members.lost(self._silence_s)
            if self._have_left():
                return
            self._tell_missed()
            self._desk.receive(_POLL_S)

    # -- what is said --------------------------------------------------------------------------------------------

    def _hear(self, timeout_s: float) -> None:
        backlog, self._recovery.backlog = self._recovery.backlog, []
        for asked in [*backlog, *self._desk.receive(0.0 if backlog else timeout_s)]:
            if not self._desk.is_open(asked):
                continue
            self._hear_from(asked)
            self._take_said(asked)
        # What was asked while a server was waited for is heard the next time, and answered then.
        unheard = self._recovery.backlog
        for asked in list(self._desk.open):
            if not any(asked is other for other in unheard):
                self._answer_later(asked)

    def _take_said(self, asked: Asked) -> None:
        said, desk = asked.said, self._desk
        if isinstance(said, words.Join):
            self._join(asked, said)
        elif isinstance(said, words.Report):
            self._report(asked, said)
        elif isinstance(said, words.Gives):
            self._batch_sums.hear(desk, asked)
        elif isinstance(said, words.Names):
            self._take(ValueNames(said.names))
            desk.answer(asked, lambda n: words.Heard(n, self._orders()))
        elif isinstance(said, words.Evaluated):
            self._evaluated(said, asked.frames)
            desk.answer(asked, lambda n: words.Heard(n, self._orders()))
        elif isinstance(said, words.Bad):
            desk.answer(asked, lambda n: words.Heard(n, self._orders()))
            # What another one does meanwhile is none of its.
            own = {orphan.unit for orphan in self._given.get(said.rank, [])}
            units = tuple(unit for unit in said.units if unit in own - self._bad)
            self._bad.update(units)
            if units:
                self._take(BadPush(said.rank, units, said.parameter, said.samples))
        elif isinstance(said, words.Gone):
            joined, is_copy = self._hear_of_end(said), said.role == "server" and bool(self._plan.replicas)
            if is_copy and not self._chains.may_return(said.rank):
                desk.answer(asked, lambda n: messages.Refused(n, "it has died many times before it was of any use"))
            else:
                desk.answer(asked, lambda n: words.Heard(n, self._orders(), counts=joined))
        elif isinstance(said, words.LogFailed):
            self._log.fail(LogTrouble(said.rank, said.reason), self._emit)
        elif isinstance(said, words.Failed):
            desk.answer(asked, lambda n: words.Heard(n, self._orders()))
            if asked.identity in self._turned_away:
                return
            error = Failure(said.kind, said.sentence, said.traceback, said.rank).error()
            raise error

    def _answer_later(self, asked: Asked) -> None:
        """Answer what waits for something, where that is there, or where it has waited long enough."""
        said, desk, held_s = asked.said, self._desk, time.monotonic() - asked.since
        if isinstance(said, words.Claim):
            self._answer_claim(asked, said, held_s > _HOLD_S)
        elif isinstance(said, words.Gives):
            self._batch_sums.answer(desk, asked, self._orders, self._worker_of, held_s > _HOLD_S)
        elif isinstance(said, words.Leave):
            # It is answered when the run has ended; until then it says nothing else.
            self._hear_from(asked)
        elif isinstance(said, words.Look):
            if said.seen != (orders := self._orders_for(said)) or held_s > _HOLD_S:
                desk.answer(asked, lambda n: words.Heard(n, orders))
        elif isinstance(said, words.Join) and (said.role == SERVER or self._client is not None):
            self._place(asked, said)

    def _orders(self) -> words.Orders:
        supervisor = self._arena.supervisor
        return words.Orders(
            steps_allowed=supervisor.signal(Order.STEPS_ALLOWED), over=supervisor.signal(Order.OVER),
            epoch_done=supervisor.signal(Order.EPOCH_DONE), stop_epoch=int(supervisor.note(Note.STOP_EPOCH)),
            stop_at=int(supervisor.note(Note.STOP_AT)), eval_loss=supervisor.note(Note.EVAL_LOSS),
            idle=self._claims.all_finished(),
            heads=tuple(self._chains.heads.values()) if self._client is not None and self._servers_move else (),
            past=self._past, done=self._dealt.done if self._dealt is not None else (),
        )  # fmt: skip

    def _evaluated(self, said: words.Evaluated, frames: Sequence[Any]) -> None:
        evaluation, training = (metrics_of(notes.from_bytes(frame), self._job.metrics) for frame in frames)
        found = None
        if said.sums is not None:
            found = Tally({name: (a, b) for name, (a, b) in said.sums.items()}, evaluation)
        if said.epoch != self._epochs_done + 1:
            return
        self._arena.slots[said.rank].post(Signal.EVALUATED, said.epoch)
        self._take(EpochPart(said.epoch, said.rank, found, Tally(metrics=training), said.seconds))

    # -- units ---------------------------------------------------------------------------------------------------

    def _answer_claim(self, asked: Asked, said: words.Claim, waited: bool) -> None:
        """Hand out a unit: first those whose worker was lost, each to be pushed by itself."""
        rank = said.rank
        self._teams.meet(rank)
        if not said.open:
            # What it does not know of, it will not do: it was given to a predecessor at the last moment.
            self._take_back(rank)
        # Who has to be there for what others are at does nothing of theirs.
        lost = [orphan for orphan in self._orphans if not self._together or orphan.row == rank]
        given = lost[0] if lost and not said.open else None
        if given is not None:
            self._orphans.remove(given)
        else:
            # Portions are finished together, so that nobody has to be done with those of a row before it claims more.
            own = self._dealt is None and any(o.row == rank for o in (*self._orphans, *self._given_to_others(rank)))
            got = None if own else self._claims.claim(rank)
            if isinstance(got, Claim):
                self._give(asked, rank, Orphan(got.unit, rank), got.slowest, alone=False)
                return
            given = self._late()
        if given is not None:
            self._give(asked, rank, given, given.unit // self._per_step, alone=True)
            return
        step = (self._claims.last() + 1) // self._per_step
        rests = self._claims.all_finished() and self._is_at_edge(step)
        if waited or said.open or rests:
            # All evaluate with the same buffers: those that are kept.
            heads, frames = self._state.pack_buffers() if rests else ((), [])
            self._desk.answer(asked, lambda n: words.Later(n, step, self._orders(), heads), frames)

    def _take_back(self, rank: int) -> None:
        """Let others do what a worker was given and has not done."""
        for orphan in self._log.together(self._given.pop(rank, [])):
            # Under sync it may be staged already: then it is done, but for the others.
            if orphan.unit in self._staged:
                self._given.setdefault(rank, []).append(orphan)
            elif self._dealt is None or not self._dealt.lose(orphan.unit, rank):
                self._orphans.append(orphan)

    def _late(self) -> Orphan | None:
        """A unit that another worker has been at for too long."""
        unit = None if self._dealt is None else self._dealt.late()
        return next((orphan for own in self._given.values() for orphan in own if orphan.unit == unit), None)

    def _is_at_edge(self, step: int) -> bool:
        supervisor = self._arena.supervisor
        return supervisor.signal(Order.STEPS_ALLOWED) <= step or supervisor.signal(Order.OVER) > 0

    def _worker_of(self, unit: int) -> int | None:
        return next((rank for rank, own in self._given.items() if any(orphan.unit == unit for orphan in own)), None)

    def _given_to_others(self, rank: int) -> list[Orphan]:
        return [orphan for other, own in self._given.items() if other != rank for orphan in own]

    def _give(self, asked: Asked, rank: int, given: Orphan, slowest: int, alone: bool) -> None:
        """Hand a unit out."""
        unit, step = given.unit, given.unit // self._per_step
        self._given.setdefault(rank, []).append(given)
        if self._dealt is not None:
            self._dealt.give(unit, rank)
        groups = self._groups_of(step) if not self._sync else None
        heads, frames = self._state.pack_buffers()
        settled = self._id_of(self._recorder.next_unit)
        self._desk.answer(
            asked,
            lambda n: words.Unit(
                number=n, unit=unit, slowest=slowest, alone=alone, groups=groups, settled=settled, buffers=heads,
                orders=self._orders(),
            ),
            frames,
        )  # fmt: skip

    def _groups_of(self, step: int) -> tuple[dict[str, Any], ...] | None:
        """The hyperparameters of a step, as far as they are numbers; None where no scheduler changes them."""
        if self._job.scheduler is None:
            return None
        schedule, supervisor = self._schedule, self._arena.supervisor
        while schedule.epochs < supervisor.signal(Order.EPOCH_DONE):
            schedule.after_epoch(supervisor.note(Note.EVAL_LOSS))
        # The schedule goes by batches, in whatever order their shards come.
        schedule.reach(step)
        return tuple(self._host.plain_groups())

    def _report(self, asked: Asked, said: words.Report) -> None:
        known = {orphan.unit for orphan in self._given.get(said.rank, [])}
        # Also where nothing of it counts in the end (``backup``).
        self._deaths.pop(said.rank, None)
        rows = [row for row in said.rows if row.unit in known]
        if self._sync:
            self._left.take(said, [row for row in rows if row.unit not in self._staged], asked.frames)
        elif said.buffers and rows:
            self._state.take_buffers(messages.unpack_tensors(said.buffers, asked.frames))
            self._source.keep_buffers()
        if self._dealt is not None:
            self._take_portions(said, rows)
        for row in rows:
            if self._sync:
                self._staged[row.unit] = (said, row)
            else:
                self._settle(row, said.rank, int(row.columns[UnitColumns.PUSH]), said.made)
        if rows and not self._sync:
            self._source.made(said.made)
            self._log.settled([row.unit for row in rows], self._recorder, self._emit)
        if self._staged:
            self._commit()
        # Whoever reports something that was done by another meanwhile is told to go on.
        self._desk.answer(asked, lambda n: words.Heard(n, self._orders(), len(rows) == len(said.rows)))

    def _take_portions(self, said: words.Report, rows: Sequence[words.Row]) -> None:
        """These are the first results of what they are about: who else is at it computes for nothing."""
        assert self._dealt is not None
        for row in rows:
            if row.unit in self._staged:
                continue
            self._dealt.finish(row.unit, said.rank)
            for rank, others in self._given.items():
                if rank != said.rank:
                    others[:] = [orphan for orphan in others if orphan.unit != row.unit]

    def _commit(self) -> None:
        """Let the servers apply a step once all of its shards are there, or all but those that need not be waited for."""
        count, client, dealt = self._per_step, self._client, self._dealt
        assert client is not None
        step = min(self._staged) // count
        units = range(step * count, (step + 1) * count)
        here = [unit for unit in units if unit in self._staged]
        counted = [u for u in here if int(self._staged[u][1].columns[UnitColumns.PUSH]) not in UNCOUNTED]
        # Shards without samples are the first to be there; they are not what a step is made of.
        if len(here) < count - (self._plan.backup or 0 if counted else 0):
            return
        if self._left.buffers is not None:
            self._state.take_buffers(self._left.buffers)
        self._left = Left()
        made: Sequence[int] = ()
        if counted:
            weight = sum(self._staged[u][1].columns[UnitColumns.WEIGHT] for u in counted)
            scale = 1.0 / weight if weight else 1.0
            ids = [self._id_of(u) for u in counted]
            settled = self._id_of(units.stop)
            try:
                clip = self._job.grad_clip
                if clip is not None:
                    norm = math.sqrt(client.norm_squared(ids)) * scale
                    scale *= min(1.0, clip / (norm + 1e-6))
                groups = self._groups_of(step)
                if self._coordinator is not None:
                    groups = self._coordinator.decide(client, ids, scale, groups or self._host.plain_groups())
                with self._source.step():
                    versions = client.commit(ids, settled, scale, groups)
                    self._source.keep_buffers()
            except NotStaged:
                raise self._lost_server(f"A server has lost the pushes of step {step + 1}") from None
            except JobFailed:
                self._hear_of_logs()
                raise
            made = [versions[server] for server in self._placement.servers]
            self._source.made(made)
        ranks = []
        for unit in here:
            said, row = self._staged.pop(unit)
            ranks.append(said.rank)
            push = int(row.columns[UnitColumns.PUSH])
            self._settle(row, said.rank, push, made)
        if len(here) < count:
            self._drop([unit for unit in units if unit not in here], ranks, self._recorder.ledger.row(here[0]))
        self._batch_sums.begin(units.stop)
        if dealt is not None:
            self._past = units.stop
            dealt.begin()
        self._log.settled(units, self._recorder, self._emit)

    def _drop(self, units: Sequence[int], others: Sequence[int], like: np.ndarray) -> None:
        """Units of a step that was applied without them (``backup``): what is computed of them counts for nothing.

        Args:
            others: the workers whose units it holds; ``like``: the row of one of these.
        """
        claims, ledger = self._claims, self._recorder.ledger
        lost = [orphan for orphan in self._orphans if orphan.unit in units]
        rank_of = {orphan.unit: orphan.row for orphan in lost}
        self._orphans = deque(orphan for orphan in self._orphans if orphan.unit not in units)
        for rank, own in self._given.items():
            rank_of.update({orphan.unit: rank for orphan in own if orphan.unit in units})
            self._given[rank] = [orphan for orphan in own if orphan.unit not in units]
        # Nobody has begun anything of the next step: all that is claimed is done, or dropped.
        for row in range(self._arena.world_size):
            claims.finish(row)
        while claims.last() < max(units):
            # Nobody has even asked for it.
            claimed = claims.claim(0)
            assert isinstance(claimed, Claim)
            claims.finish(0)
        idle = [r for r in range(self._arena.world_size) if r not in others and r not in rank_of.values()]
        for unit in units:
            place, slowest = ledger.row(unit), unit // self._per_step
            place[: UnitColumns.VERSIONS] = 0.0
            place[UnitColumns.RANK] = rank_of[unit] if unit in rank_of else idle.pop(0) if idle else others[0]
            place[UnitColumns.PUSH], place[UnitColumns.SLOWEST] = DROPPED, slowest
            place[UnitColumns.BEGAN], place[UnitColumns.ENDED] = like[UnitColumns.BEGAN], like[UnitColumns.ENDED]
            place[UnitColumns.UNIT] = unit + 1

    def _settle(self, row: words.Row, rank: int, push: int, made: Sequence[int]) -> None:
        """Write a unit's row where recorders read it, and count it as done."""
        ledger, own = self._recorder.ledger, self._given[rank]
        given = next(orphan for orphan in own if orphan.unit == row.unit)
        own.remove(given)
        place = ledger.row(row.unit)
        slowest = place[UnitColumns.SLOWEST]
        place[: len(row.columns)] = row.columns
        place[UnitColumns.RANK], place[UnitColumns.SLOWEST] = rank, slowest
        place[UnitColumns.GIVEN] = 1 if self._dealt is None else self._dealt.times(row.unit)
        self._bad.discard(row.unit)
        ledger.pulled(row.unit)[:] = row.pulled or 0
        if push not in UNCOUNTED:
            ledger.made(row.unit)[:] = made
            count = ledger.applied(0, rank) + 1
            for server in range(ledger.servers):
                ledger.commit(server, rank, count)
            place[UnitColumns.PUSH] = count
        place[UnitColumns.UNIT] = row.unit + 1
        self._deaths.pop(rank, None)
        self._recovery.heard()
        member = self._members.of.get(("worker", rank))
        # What one had pushed before it died may be settled while nobody is in its place yet.
        if rank in self._died_at and member is not None and member.joined:
            died_at, step = self._died_at.pop(rank)
            after_s = time.monotonic() - died_at
            self._emit("recovered", rank=rank, pid=member.pid, step=step, after_s=after_s, action="recomputed", role="worker")
        remaining = [o for o in (*self._orphans, *(o for g in self._given.values() for o in g)) if o.row == given.row]
        if not remaining:
            self._claims.finish(given.row)

    # -- processes -----------------------------------------------------------------------------------------------

    def _attend_members(self) -> None:
        self._tell_missed()
        for lost in self._members.lost(self._silence_s):
            self._bury(lost)
        if self._members.changed:
            self._tell_processes()
        self._attend_servers()

