"""A run without shared memory whose plan changes while it runs: servers and workers come and go, and keys move by their ring.

At the end of a step everything that was begun is applied, on all servers. Workers leave then, for they hold nothing. Servers
stay: those that come are forked, what the ring gives to another server goes there with all that belongs to it, and nothing else
travels; those that are not in the new plan leave when they have handed on what they had (``shoal.train.remote.moves``). Then
copies follow and logs begin anew, where there are any, workers are forked that know the new placement, and the run goes on behind
that step.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from shoal.comm.arena import Arena, Note
from shoal.errors import JobFailed, RequestError, WorkerLostError
from shoal.plan import Plan
from shoal.process.messages import SERVER, WORKER
from shoal.ps.moving import Moved
from shoal.ps.placement import Placement
from shoal.train.carried import begin_at, carry_all_but_state
from shoal.train.elastic import ChangingSession, Pause
from shoal.train.evaluate import put_together
from shoal.train.remote import plans, words
from shoal.train.remote.checks import SaidCheck, check_of
from shoal.train.remote.desk import Asked
from shoal.train.remote.keepers import servers_of
from shoal.train.remote.members import START_S
from shoal.train.remote.moves import MovingLead
from shoal.train.remote.published import RemoteSource
from shoal.train.remote.state import placement_of
from shoal.train.remote.worker import remote_settings
from shoal.train.replan import Change
from shoal.train.run import Run
from shoal.train.settings import EpochPart


class ElasticLead(ChangingSession, MovingLead):
    """The lead of such a run."""

    # When the workers of the present plan were started.
    _started_at = 0.0

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
        if self.keepers is not None:
            plan = plans.changed(asked, self._plan, self._host, self._plan.threads)
            self.keepers.refuse(plan)
            return plan, None
        if not self._members.are_own:
            raise RequestError(
                "torchrun or Slurm has started this run's processes, which stay what they are where servers have neither a log "
                f"nor copies; stop the run, and go on with it by --resume --plan {asked}."
            )
        return plans.changed(asked, self._plan, self._host), None

    def _all_there(self) -> bool:
        joined = {member.rank for member in self._members.joined(WORKER)}
        missing = sorted(set(range(self._arena.world_size)) - joined)
        if missing and time.monotonic() - self._started_at > START_S:
            raise WorkerLostError(f"Worker {missing[0]} has not come within {START_S:.0f} s; see what keeps it.")
        return not missing

    # -- what is said meanwhile ----------------------------------------------------------------------------------

    def _answer_claim(self, asked: Asked, said: words.Claim, waited: bool) -> None:
        # So that nothing is done under a plan before it is told that there is one.
        if self._pause is None:
            super()._answer_claim(asked, said, waited)

    def _take(self, message: Any) -> None:
        if isinstance(message, EpochPart) and message.rank == 0:
            # With what those had seen who have left, the epoch's training metrics are of all its samples.
            training: Any = message.training
            self._left_over = [left for left in self._left_over if left[0] >= message.epoch]
            for epoch, rank, metrics in self._left_over:
                for name, own in training.metrics.items() if epoch == message.epoch else ():
                    training.metrics[name] = put_together(own, metrics[name], name, rank)
        super()._take(message)

    # -- making it -----------------------------------------------------------------------------------------------

    def _make(self, change: Change) -> None:
        self._finish_completing()
        step, plan, before = self._recorder.step, change.plan, self._placement
        pause = self._pause = Pause(change, self._plan, step, self._recorder.last_end or time.monotonic())
        after = placement_of(self._facts.table, self._facts.tables, range(plan.servers))
        # Of the same servers copies stay what they are.
        moves = not plan.replicas or before.servers != after.servers or self.keepers is not None
        if moves and self._servers_move and not self._secure(step):
            pause.refused = self._not_secured(plan)
            plan, after, moves = self._plan, before, False
        self._between = True
        self._desk.check = self._both(plan)
        own = [(SERVER, n) for n in range(servers_of(plan))] + [(WORKER, n) for n in range(plan.data_ways)]
        self._members.let_be(own if self.keepers is None else own[:1])
        workers, self._plan = range(self._arena.world_size), plan
        if moves:
            self._begin_moving(before, after, step)
        self._send_away(WORKER, workers)
        moved = self._let_move() if moves else self._nothing_moves(after)
        pause.moved = {
            "keys_moved": moved.keys, "keys": moved.of, "rows_moved": moved.rows, "bytes_moved": moved.nbytes
        }  # fmt: skip
        self._take_up(plan, after, step, moved.version)
        self._between = False
        self._started_at = time.monotonic()
        if self.keepers is not None:
            if not moves:
                # All others have begun anew already.
                self.keepers.appoint(plan, only=WORKER)
            return
        for rank in range(plan.data_ways):
            self._members.start(WORKER, rank)

    def _secure(self, step: int) -> bool:
        """Write a checkpoint that holds everything; whether there is one."""
        self._last_one(step)
        self._collect()
        return self._last_checkpoint is not None and self._last_checkpoint.step == step

    def _not_secured(self, plan: Plan) -> str:
        """Why the plan stays as it is. JobFailed where a log stands on the checkpoint that could not be written."""
        sentence = (
            f"No checkpoint could be written in {self._directory.checkpoints}, from which servers go on that are killed while "
            "their plan changes; make room, and "
        )
        if self._log.kept:
            raise JobFailed(f"{sentence}go on with --resume --plan {plan.brief()}; what was acknowledged is in the log.")
        return f"{sentence}ask again."

    def _nothing_moves(self, placement: Placement) -> Moved:
        client = self._client
        assert client is not None
        return Moved(0, placement.keys, version=max(client.ping(server) for server in placement.servers))

    def _both(self, plan: Plan) -> SaidCheck:
        """What may be said by those of the plan that was, and by those of the one that comes."""
        check = check_of(self._plan, self._store, self._job, self._settings.total_steps)
        servers = max(check.servers, servers_of(plan))
        return dataclasses.replace(check, workers=max(check.workers, plan.data_ways), servers=servers)

    def _take_up(self, plan: Plan, placement: Placement, step: int, version: int) -> None:
        """Begin behind a step under another plan; all servers count ``version`` updates."""
        left, recorder, backlog, emptied = self._store, self._recorder, self._recovery.backlog, self._emptied
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
        # Whose place is empty yet in a chain that goes on.
        self._emptied = {rank: since for rank, since in emptied.items() if not self._chains.has(rank % plan.servers, rank)}
        self._recorder.go_on_from(recorder)
        # What the servers have is brought into the store when it is needed.
        self._collected = -1
        self._desk.check = check_of(plan, store, self._job, settings.total_steps, version)
        self._source = RemoteSource(store, placement, self._facts.tables, self._meeting.keys, self._sync, version)
        self._source.follow(self._chains.heads)
        if self._log.kept:
            assert self._client is not None
            self._recovery.begin(self._client, dict.fromkeys(placement.servers, version))
