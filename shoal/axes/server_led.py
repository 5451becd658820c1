"""What ``sync`` has in common where a step does not wait for the push of every worker: server 0 leads.

It finds out when what a step needs is there, writes down for all servers what that is, and posts CHOSEN; only then does the first
server begin its update, so whoever replaces one takes the same. A worker may be at a step that was decided without it. What it
computes then comes from weights that may be half updated, and counts for nothing; it goes on with the step that the servers
are at.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable, Sequence

from shoal.axes.server import ServedWorker, Server
from shoal.axes.updating import SliceUpdater
from shoal.axes.waiting import Waiting
from shoal.comm.arena import Arena, Signal
from shoal.comm.store import Store


def is_decided(arena: Arena, step: int) -> bool:
    """Whether server 0 has decided on a step."""
    return arena.servers[0].signal(Signal.CHOSEN) > step


def decision(arena: Arena, step: int) -> Callable[[tuple[float, float]], int]:
    """What is tried while server 0's decision on a step is waited for: see ``wait_for``."""
    leader, place = arena.servers[0], arena.world_size

    def attempt(times: tuple[float, float]) -> int:
        return -1 if leader.wait(Signal.CHOSEN, step + 1, times[1], times[0]) else place

    return attempt


class LedWorker(ServedWorker):
    """A worker whose push may come too late; ``bells``: by which servers are woken."""

    def __init__(self, store: Store, rank: int, waiting: Waiting, bells: Sequence[int]) -> None:
        super().__init__(store, rank, waiting)
        self._bells = bells

    @property
    def meets_others(self) -> bool:
        return False

    def ring(self) -> None:
        """Let server 0 look again."""
        os.eventfd_write(self._bells[0], 1)

    def publish(self, step: int) -> None:
        super().publish(step)
        self.ring()

    def await_decision(self, step: int) -> None:
        """Wait until server 0 has decided on a step."""
        self.wait_for(decision(self.arena, step), f"the choice of pushes of step {step + 1}")

    def next_step(self, step: int) -> int:
        ahead = max(step + 1, *(slot.signal(Signal.UPDATED) for slot in self.arena.servers))
        self.wait_updaters(Signal.UPDATED, ahead)
        self.slot.post(Signal.UPDATED, ahead)
        return ahead


class LedServer(Server):
    """A server that server 0 tells when a step can be updated; ``bell``: by which it is woken."""

    def __init__(self, store: Store, number: int, updater: SliceUpdater, waiting: Waiting, bell: int) -> None:
        super().__init__(store, number, updater, waiting)
        self._bell = bell

    def missing(self, step: int) -> int:
        """For server 0: -1 where everything is there that a step needs, else a worker who has not done its part."""
        raise NotImplementedError

    def decide(self, step: int) -> None:
        """For server 0, right after ``missing`` has found nothing: write down what counts."""
        raise NotImplementedError

    def await_pushes(self, step: int, check: Callable[[], None]) -> None:
        if self.number:
            self.wait_for(decision(self.arena, step), f"the choice of pushes of step {step + 1}", check)
        elif not is_decided(self.arena, step):

            def gather(times: tuple[float, float]) -> int:
                missing = self.missing(step)
                if missing >= 0:
                    select.select([self._bell], [], [], times[1])
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._bell)
                    missing = self.missing(step)
                return missing

            self.wait_for(gather, f"the push of step {step + 1}", check)
            self.decide(step)
            self.slot.post(Signal.CHOSEN, step + 1)
