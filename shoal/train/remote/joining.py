"""Who comes to a lead, and who is gone: processes that join, begin together where they make up one worker, and are buried."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from shoal.errors import JobError, WorkerLostError
from shoal.process.messages import SERVER, WORKER
from shoal.ps import messages
from shoal.train.remote import words
from shoal.train.remote.desk import Asked
from shoal.train.remote.holding import Holding
from shoal.train.remote.members import MOST_DEATHS, SILENCE, START_S, WENT_TOO, Lost, Member
from shoal.train.remote.teams import Teams, members_of, place_of, size_of

logger = logging.getLogger(__name__)

_FIRST_S = 0.5
_NAP_S = 0.005


class Joining(Holding):
    """A lead without what it hands out.

    Attributes:
        _built: what this process has built; ``_turned_away``: who has said that it is somebody who is there already.
        _deaths: of workers, since they have finished anything; ``_died_at``: when, and in which step.
        _together: BatchNorm sees the batch of all workers.
    """

    _built: str
    _turned_away: set[bytes]
    _teams: Teams
    _deaths: dict[int, int]
    _died_at: dict[int, tuple[float, int]]
    _together: bool
    # Of workers, the process that went because another one had, of which nothing is known yet.
    _unexplained: dict[int, Lost]
    _take_back: Callable[[int], None]

    def _join(self, asked: Asked, said: words.Join) -> None:
        known = self._members.of.get((said.role, said.rank))
        replaced = known is not None and known.process is not None and known.pid != said.pid
        if replaced or self._members.was_gone(said.role, said.rank, said.pid, said.host):
            # Of one that died before this was heard; another is in its place, or will be.
            self._desk.forget(asked.identity, for_good=True)
            return
        if known is not None and known.died and not known.is_process(said.pid, said.host):
            # The one before it is known to have died, and is to be buried first.
            self._recovery.put_off(asked)
            return
        as_built = said.built == self._built
        same = known is not None and known.is_process(said.pid, said.host) and known.address == said.address
        if known is not None and known.joined and not (as_built and same):
            # Whoever is there goes on, and so does the run; what this one says of its end does not end it.
            self._turned_away.add(asked.identity)
            logger.warning("A second process says that it is %s %d; it was turned away.", said.role, said.rank)
            reason = f"Two processes say that they are {said.role} {said.rank}; start each once."
            self._desk.answer(asked, lambda n: messages.Refused(n, reason))
            return
        if not as_built:
            raise JobError(
                f"{said.role.capitalize()} {said.rank} has built another model or data set than the lead; let the job's "
                "functions do the same in every process."
            )
        if said.role == WORKER:
            self._gone.discard(said.rank)
        self._members.join(said.role, said.rank, said.pid, said.host, said.address, asked.identity)

    def _place(self, asked: Asked, said: words.Join) -> None:
        """Let somebody begin, once those are there with whom it makes up a worker."""
        team = token = ""
        if said.role != SERVER and size_of(self._plan) > 1:
            worker, _ = place_of(said.role, said.rank, self._plan)
            begun = self._teams.begun.get(worker)
            if begun is None:
                asking = self._who_can_begin()
                wanted = members_of(worker, self._plan)
                if missing := [member for member in wanted if member not in asking]:
                    self._await_others(asked, said, worker, missing[0])
                    return
                if (unexplained := self._unexplained.pop(worker, None)) is not None:
                    self._tell_death(unexplained)
                begun = self._teams.begin(worker, self._members.of[wanted[0]].address, {m: asking[m] for m in wanted})
            team, token = begun.address, begun.token
        servers = {str(s): address for s, address in self._chains.heads.items()} if said.role == WORKER else {}
        self._desk.answer(
            asked,
            lambda n: words.Placed(
                number=n, plan=str(self._plan), total_steps=self._settings.total_steps, first_step=self._first_step,
                checkpoints=self._settings.checkpoint_dir, servers=servers, orders=self._orders(),
                log=str(self._log.directory) if self._log.kept else "", team=team, token=token,
            ),
        )

    def _await_others(self, asked: Asked, said: words.Join, worker: int, missing: tuple[str, int]) -> None:
        role, rank = missing
        # It may have come while the lead waited for somebody else, and be heard next.
        has_asked = any(isinstance(a.said, words.Join) and (a.said.role, a.said.rank) == missing for a in self._desk.open)
        if time.monotonic() - asked.since > START_S and not has_asked:
            raise WorkerLostError(
                f"{role.capitalize()} {rank} has not come within {START_S:.0f} s, and worker {worker} cannot begin without it; "
                f"see what keeps it, and go on with --resume: {self._name_last_checkpoint()}"
            )
        # Who waits for others to come is not silent.
        self._members.hear(said.role, said.rank)

    def _who_can_begin(self) -> dict[tuple[str, int], int]:
        """Who has joined and waits for the others of its worker, and its process: not who has asked and was not heard yet."""
        found = {}
        for asked in self._desk.open:
            if isinstance(asked.said, words.Join):
                member = self._members.of.get((asked.said.role, asked.said.rank))
                if member is not None and member.joined and not member.died and member.pid == asked.said.pid:
                    found[member.role, member.rank] = member.pid
        return found

    def _bury(self, lost: Lost) -> None:
        """Somebody is gone. What a worker had begun goes to others; a server's place takes one that has the same."""
        member = lost.member
        # Of a worker of several, one that is silent is ended with the others by those who keep them.
        several = member.role != SERVER and size_of(self._plan) > 1
        renews = self.keepers if several and lost.cause == SILENCE else None
        # A unit that a dead worker has asked for would be nobody's.
        self._desk.forget(member.identity, for_good=lost.dead or renews is not None)
        if self._teams.is_broken(member.role, member.rank, member.pid):
            return
        step = self._recorder.step + 1
        if member.role == SERVER:
            self._tell_death(lost)
            self._bury_server(lost, step)
            return
        worker, _ = place_of(member.role, member.rank, self._plan)
        cause, apart = self._tell_first(lost, worker), self._teams.apart(worker)
        others = self._break_up(lost)
        if renews is not None:
            renews.renew(others)
        deaths = self._deaths[worker] = self._deaths.get(worker, 0) + 1
        if deaths >= MOST_DEATHS:
            why = f" (last by {cause}), so something in its work kills it"
            if apart and cause == WENT_TOO:
                why = f", the last time because its processes did not meet at {apart}; see that they reach each other there"
            raise WorkerLostError(
                f"Worker {worker} died {deaths} times without having finished anything{why}; {self._name_last_checkpoint()}"
            )
        self._take_back(worker)
        own = self._members.is_own(member.role, member.rank)
        if own or lost.returns or renews is not None:
            self._died_at[worker] = (time.monotonic(), step)
            for role, rank in others if own else ():
                self._members.start(role, rank)
            return
        if self._together:
            raise WorkerLostError(
                f"Worker {worker} is gone ({lost.cause}), and BatchNorm over the global batch needs all of them; go on with "
                f"--resume, or write batchnorm=local: {self._name_last_checkpoint()}"
            )
        self._gone.add(worker)
        if not any(m.role == WORKER for m in self._members.of.values()):
            raise WorkerLostError(f"The last worker is gone ({lost.cause}); {self._name_last_checkpoint()}")

    def _tell_first(self, lost: Lost, worker: int) -> str:
        """Tell of a death: of those that make up a worker, of the one that went before the others had to. What it died of."""
        if lost.cause != WENT_TOO or worker not in self._teams.begun:
            self._tell_death(lost)
            return lost.cause
        others = [self._members.of.get(key) for key in members_of(worker, self._plan)]
        until = time.monotonic() + _FIRST_S
        while any(other is not None and other.process is not None for other in others):
            first = next((found for other in others if other is not None and (found := self._members.ended(other))), None)
            if first is not None and first.cause != WENT_TOO:
                lost = first
                break
            if time.monotonic() > until:
                break
            time.sleep(_NAP_S)
        if lost.cause != WENT_TOO or lost.member.process is not None:
            self._tell_death(lost)
        else:
            # Whoever has started the other one will say what it died of.
            self._unexplained[worker] = lost
        return lost.cause

    def _hear_of_end(self, said: words.Gone) -> bool:
        """Somebody has died, says who had started it; whether it had joined."""
        if self._teams.is_broken(said.role, said.rank, said.pid):
            worker, _ = place_of(said.role, said.rank, self._plan)
            if said.cause != WENT_TOO and self._unexplained.pop(worker, None) is not None:
                self._tell_death(Lost(Member(said.role, said.rank, said.pid), said.cause))
        return self._members.gone(said.role, said.rank, said.pid, said.host, said.cause)

    def _break_up(self, lost: Lost) -> list[tuple[str, int]]:
        """Those that make up a worker with somebody who is gone go as well; all of them are to begin anew."""
        members = self._teams.break_up(lost.member.role, lost.member.rank)
        for role, rank in members:
            other = self._members.of.get((role, rank))
            if other is not None:
                if other.process is not None:
                    # It would find out by itself, a moment later.
                    other.process.kill()
                self._desk.forget(other.identity, for_good=True)
                self._members.forget(role, rank)
        return members
