"""The workers and servers of a run, seen from the supervisor: starting them, noticing deaths and stalls, putting workers back."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from shoal.comm.arena import Arena, Note, Phase, Signal
from shoal.comm.team import Recovery
from shoal.errors import RequestError, WorkerLostError
from shoal.process.channel import ChannelClosed
from shoal.process.failure import Failure
from shoal.process.messages import SERVER, WORKER
from shoal.process.supervisor import Child, Supervisor, TemplateLost
from shoal.train.settings import RunSettings

Emit = Callable[..., Any]
MOST_DEATHS_A_STEP = 3
MOST_TEMPLATES = 3


@dataclass(frozen=True)
class Patience:
    """How long a worker may take: before it is named, and before it is replaced.

    Both grow with the longest step seen so far. A first step may compile, warm up, or read from a cold disk.
    """

    report_s: float = 5.0
    replace_s: float = 60.0
    first_report_s: float = 30.0
    first_replace_s: float = 600.0

    @classmethod
    def from_environment(cls) -> Patience:
        """``SHOAL_STALL_S``: seconds after which a worker that does not answer is replaced."""
        text = os.environ.get("SHOAL_STALL_S")
        if text is None:
            return cls()
        try:
            seconds = float(text)
            assert seconds > 0
        except (ValueError, AssertionError):
            raise RequestError(f'SHOAL_STALL_S is "{text}"; give a positive number of seconds.') from None
        return cls(seconds / 2, seconds, seconds / 2, seconds)

    def limits(self, longest_step_s: float, first: bool) -> tuple[float, float]:
        """(report, replace) in seconds for a worker in its first step or a later one."""
        if first:
            return self.first_report_s, self.first_replace_s
        return max(self.report_s, 5 * longest_step_s), max(self.replace_s, 20 * longest_step_s)


@dataclass
class _Replaced:
    place: int
    pid: int
    step: int
    shown: int
    died_at: float
    action: str


def bind(supervisor: Supervisor, settings: RunSettings, fds: tuple[int, ...], last: bool, write: bool = True) -> None:
    """Let the template take up the arena of a run and, with ``write``, write the first weights there; a killed one is made again.

    ``fds``: of the arena and the tables; ``last``: no other run begins with the first weights after this one.
    """
    for attempt in range(MOST_TEMPLATES):
        try:
            if attempt:
                supervisor.restart(timeout_s=600.0)
            supervisor.call("bind", settings, write, fds=fds)
            if last:
                supervisor.call("forget_first_weights")
            return
        except TemplateLost:
            if attempt == MOST_TEMPLATES - 1:
                raise


class Crew:
    """The workers of one arena, and its servers."""

    def __init__(self, supervisor: Supervisor, arena: Arena, settings: RunSettings, emit: Emit, fds: tuple[int, ...]) -> None:
        self.supervisor = supervisor
        self._arena = arena
        self._settings = settings
        self._emit = emit
        self._fds = fds
        self._patience = Patience.from_environment()
        self._workers: dict[int, Child] = {}
        # All by place: workers, then servers. From 1: a slot that nobody has written to says 0.
        self._incarnations = [0] * len(arena.places)
        self._put_at = [0.0] * len(arena.places)
        self._spare = True
        self._deaths: dict[tuple[int, int], int] = {}
        self._recoveries: list[_Replaced] = []
        self._reported: dict[int, float] = {}
        self._stalled: set[int] = set()
        self._done: set[int] = set()
        grid = settings.grid
        self._team_size = grid.team_size
        firsts = range(0, grid.world_size, grid.team_size) if grid.splits_model else ()
        self._teams = [Recovery(arena, grid.team(first)) for first in firsts]
        self.first_steps = [slot.signal(Signal.UPDATED) for slot in arena.places]

    def start(self, spare: bool = True) -> None:
        """Fork and assign all workers, and a standby to replace the first that dies; none for a run that is only tried."""
        self._spare = spare
        # A template that is gone already comes to light, and is replaced, at the first ``poll``.
        with contextlib.suppress(ChannelClosed):
            self._fill()

    def _fill(self) -> None:
        """Put a process in every place that is empty. ChannelClosed where the template is gone."""
        for place in range(len(self._arena.places)):
            if place not in self._workers and place not in self._done:
                child = self.supervisor.standby()
                self._incarnations[place] += 1
                self._put_at[place] = time.monotonic()
                self._workers[place] = child
                self.supervisor.assign(child, *self._role(place), self._incarnations[place])
                for recovery in self._recoveries:
                    if recovery.place == place:
                        recovery.pid = child.pid
        children = self.supervisor.children.values()
        if self._spare and not any(c.role == "standby" and c.status is None for c in children):
            self.supervisor.fork()

    def _role(self, place: int) -> tuple[str, int]:
        """The role that a place is for, and the number among those who have it."""
        workers = self._arena.world_size
        return (WORKER, place) if place < workers else (SERVER, place - workers)

    def _place(self, child: Child) -> int:
        return child.rank + (self._arena.world_size if child.role == SERVER else 0)

    @property
    def begun(self) -> bool:
        """Whether every place has a process that has taken it up."""
        return all(self._has_begun(place) for place in range(len(self._arena.places)))

    @property
    def finished(self) -> bool:
        """Whether every worker and server has done its last step and left."""
        return len(self._done) == len(self._arena.places)

    def poll(self, timeout_s: float, longest_step_s: float, last_checkpoint: Callable[[], str]) -> list[Any]:
        """Wait for news; put dead workers back; return the messages of workers, oldest first.

        Raises what a worker raised, and WorkerLostError for one that keeps dying on the same step.
        """
        messages: list[Any] = []
        try:
            dead = self.supervisor.poll(timeout_s)
            messages += _messages([*dead, *self._workers.values()])
            for child in dead:
                self._bury(child, child.cause(), last_checkpoint)
            if dead:
                self._fill()
        except ChannelClosed:
            messages += self._begin_again(last_checkpoint)
        for team in self._teams:
            team.attend()
        self._look_for_recovered()
        self._look_for_stalled(longest_step_s)
        return messages

    # -- deaths --------------------------------------------------------------------------------------------------

    def _phase(self, place: int) -> Phase:
        """What a process does; its slot speaks of its predecessor until it has begun."""
        slot = self._arena.places[place]
        return Phase(int(slot.note(Note.PHASE))) if self._has_begun(place) else Phase.STARTING

    def _shown(self, place: int) -> int:
        """The step that a process was at, from 0: what a worker counts that waits for nobody are pushes."""
        slot = self._arena.places[place]
        waits = not self._settings.plan.waits_for_nobody
        return slot.signal(Signal.UPDATED) if waits else int(slot.note(Note.STEP))

    def _has_begun(self, place: int) -> bool:
        return int(self._arena.places[place].note(Note.INCARNATION)) == self._incarnations[place]

    def _bury(self, child: Child, cause: str, last_checkpoint: Callable[[], str]) -> None:
        """Take note of a child's death; nothing more where it was no worker, or had finished."""
        place = self._place(child)
        if self._workers.get(place) is not child:
            return
        del self._workers[place]
        if self._phase(place) == Phase.DONE:
            self._done.add(place)
            return
        (role, rank), slot = self._role(place), self._arena.places[place]
        step = slot.signal(Signal.UPDATED)
        if child.pid in self._stalled:
            cause = "stalled"
        phase = self._phase(place).name.lower()
        shown = self._shown(place) + 1
        self._emit("death", rank=rank, pid=child.pid, step=shown, phase=phase, cause=cause, role=role)
        self._deaths[place, step] = self._deaths.get((place, step), 0) + 1
        if self._deaths[place, step] >= MOST_DEATHS_A_STEP:
            raise WorkerLostError(
                f"{role.capitalize()} {rank} died {MOST_DEATHS_A_STEP} times in step {shown} (last by {cause}), so "
                f"something in that step kills it; {last_checkpoint()}"
            )
        computed = slot.signal(Signal.GRADIENTS)
        if self._teams and role == WORKER:
            computed = self._teams[rank // self._team_size].lose(rank % self._team_size)
        action = "rolled_forward" if computed > step else "recomputed"
        self._recoveries.append(_Replaced(place, 0, step, shown, time.monotonic(), action))
        self._reported.pop(place, None)

    def _begin_again(self, last_checkpoint: Callable[[], str]) -> list[Any]:
        """The template was killed, and its children with it: make another and go on from the arena.

        Returns the messages that the children had sent before they died.
        """
        messages = _messages(self.supervisor.end_children())
        for place in sorted(self._workers):
            self._bury(self._workers[place], "SIGKILL", last_checkpoint)
        for attempt in range(MOST_TEMPLATES):
            if self.finished:
                break
            try:
                self.supervisor.restart(timeout_s=600.0)
                self.supervisor.call("bind", self._settings, False, fds=self._fds)
                if self._spare:
                    # A run that is only tried (see ``start``) is followed by others, which begin with them.
                    self.supervisor.call("forget_first_weights")
                self._fill()
                break
            except (ChannelClosed, TemplateLost) as error:
                if attempt == MOST_TEMPLATES - 1:
                    raise WorkerLostError(
                        f"The process that workers are forked from died {MOST_TEMPLATES} times while it was made again "
                        f"({error}); {last_checkpoint()}"
                    ) from None
                self.supervisor.end_children()
                self._workers.clear()
        return messages

    def _look_for_recovered(self) -> None:
        for recovery in list(self._recoveries):
            slot = self._arena.places[recovery.place]
            if slot.signal(Signal.UPDATED) > recovery.step or self._phase(recovery.place) == Phase.DONE:
                self._recoveries.remove(recovery)
                role, rank = self._role(recovery.place)
                self._emit(
                    "recovered", rank=rank, pid=recovery.pid, step=recovery.shown,
                    after_s=time.monotonic() - recovery.died_at, action=recovery.action, role=role,
                )  # fmt: skip

    # -- stalls --------------------------------------------------------------------------------------------------

    def _look_for_stalled(self, longest_step_s: float) -> None:
        now = time.monotonic()
        for place, child in self._workers.items():
            slot = self._arena.places[place]
            phase = self._phase(place)
            # A waiting worker beats its heart; any other phase is entered anew at every step.
            silent_s = now - (slot.note(Note.PHASE_SINCE) if self._has_begun(place) else self._put_at[place])
            first = slot.signal(Signal.UPDATED) == self.first_steps[place] and phase != Phase.WAITING
            report_s, replace_s = self._patience.limits(longest_step_s, first)
            # It is named before it is replaced, also where the supervisor itself was kept from looking for as long.
            if silent_s > report_s and place not in self._reported:
                self._reported[place] = now
                self._report_stall(place, child, phase, silent_s, replace_s)
            elif silent_s > replace_s and child.pid not in self._stalled:
                self._stalled.add(child.pid)
                self.supervisor.kill(child)
            elif silent_s < report_s:
                self._reported.pop(place, None)

    def _report_stall(self, place: int, child: Child, phase: Phase, silent_s: float, replace_s: float) -> None:
        slot, (role, rank) = self._arena.places[place], self._role(place)
        missing = int(slot.note(Note.WAITS_FOR))
        waits_for = self._arena.place_name(missing) if missing >= 0 else None
        self._emit(
            "stall", role=role, rank=rank, pid=child.pid, step=self._shown(place) + 1, phase=phase.name.lower(),
            waited_s=silent_s, waits_for=waits_for, stack=child.stack(), replaced_after_s=replace_s,
        )  # fmt: skip


def _messages(children: Iterable[Child]) -> list[Any]:
    """Take the messages that have come from these. Raises the first failure among them."""
    messages: list[Any] = []
    for child in children:
        messages += child.inbox
        child.inbox = []
    for message in messages:
        if isinstance(message, Failure):
            raise message.error()
    return messages
