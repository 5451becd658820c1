"""Ranks that compute one share together: how they speak, and how they begin again when one of them is lost.

A *team* is a replica of a model that is split, or all ranks where weights are sharded. Its ranks speak through a region of the
arena by torch's collectives (``shared_group.py``). When one of them dies in the middle of a step, what the others have
computed of it is void: they give it up, meet the replacement, and compute the step again together.

Two words, written by the supervisor alone, lead through this. ``generation`` is what every wait of the team watches: when
it changes, the waiting ends with StepAborted. ``announced`` is the generation that the next computation belongs to. A death
before its step was computed changes both at once. After that nothing is void, since what the dead rank had sent lies in
shared memory; only its successor does not know what was said. So the new generation is announced, the others may finish, and
all meet at the beginning of the next step.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence

from shoal.comm.arena import Arena, Signal, Slot
from shoal.comm.grid import Grid
from shoal.comm.port import Port, StepAborted
from shoal.comm.region import exchange_bytes
from shoal.errors import DeadlineError

__all__ = ["Recovery", "StepAborted", "Team", "TeamWords", "team_bytes"]

_HEADER = 4096
_ANNOUNCED_AT = 64
_NAP_S = 0.0005


def team_bytes(grid: Grid) -> int:
    """Bytes of the arena's ``exchange`` region; 0 where nobody needs another within a step."""
    if not grid.splits_model:
        return 0
    return grid.world_size // grid.team_size * (_HEADER + exchange_bytes(grid.team_size))


class TeamWords:
    """The words of one team, in the arena."""

    def __init__(self, arena: Arena, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self._native = arena.native
        start, size = arena.layout.regions["exchange"]
        each = size // (arena.world_size // len(ranks))
        self.offset = start + each * (ranks[0] // len(ranks))
        self.size = each
        self.address = arena.memory.address + self.offset

    @property
    def generation(self) -> int:
        return int(ctypes.c_uint32.from_address(self.address).value)

    @property
    def announced(self) -> int:
        return int(ctypes.c_uint32.from_address(self.address + _ANNOUNCED_AT).value)

    def announce(self) -> None:
        """Say that there is a new generation from the next computation on. For the supervisor."""
        self._native.post(self.address + _ANNOUNCED_AT, self.announced + 1)

    def call_off(self) -> None:
        """Let what was announced hold now. For the supervisor."""
        if self.generation != self.announced:
            self._native.post(self.address, self.announced)


class Recovery:
    """Leads a team through the loss of its ranks. For the supervisor."""

    def __init__(self, arena: Arena, ranks: Sequence[int]) -> None:
        self._slots = [arena.slots[rank] for rank in ranks]
        self._words = TeamWords(arena, ranks)
        self._needed: tuple[int, int] | None = None

    def lose(self, rank: int) -> None:
        """A rank of the team (counted from its first one) is dead."""
        done = self._done(self._slots[rank])
        # What one of several dead ranks has not done, nobody can finish.
        self._needed = done if self._needed is None else min(self._needed, done)
        self._words.announce()
        self.attend()

    def attend(self) -> None:
        """Let the team begin anew once the others have done what needs nothing more from the dead."""
        if self._needed is None:
            return
        needed = self._needed
        if all(a >= b for slot in self._slots for a, b in zip(self._done(slot), needed, strict=True)):
            self._needed = None
            self._words.call_off()

    @staticmethod
    def _done(slot: Slot) -> tuple[int, int]:
        return slot.signal(Signal.COMPUTED), slot.signal(Signal.EVALUATED)


class Team:
    """One rank's membership of its team. Making it makes this process's default torch group."""

    def __init__(self, arena: Arena, grid: Grid, rank: int, spin_s: float, deadline_s: float) -> None:
        from shoal.comm import shared_group

        self.ranks = grid.team(rank)
        self.rank = self.ranks.index(rank)
        self._words = TeamWords(arena, self.ranks)
        self._deadline_s = deadline_s
        begin = self._words.offset + _HEADER
        region = arena.memory.bytes[begin : self._words.offset + self._words.size]
        self.port: Port = shared_group.init(
            region, self.rank, len(self.ranks), deadline_s=deadline_s, spin_s=spin_s,
            generation_address=self._words.address,
        )  # fmt: skip
        # A successor meets the others before it says anything; at the very beginning there is nothing to forget.
        self._met = self.port.generation if self._words.announced == 0 else -1

    def check(self) -> None:
        """StepAborted where a member was lost, so that what is being computed is void."""
        self.port.check()

    def gather(self) -> None:
        """Before computing: meet the others again where a member was lost, however often. DeadlineError."""
        deadline = time.monotonic() + self._deadline_s
        while self._met != self._words.announced:
            if self._words.generation != self._words.announced:
                # The others may still be at what the lost one had done its part of.
                if time.monotonic() > deadline:
                    raise DeadlineError(f"The supervisor has not let the team begin anew for {self._deadline_s:.0f} s.")
                time.sleep(_NAP_S)
                continue
            generation = self._words.generation
            try:
                self.port.reset(generation)
                self._met = generation
            except StepAborted:
                continue

    def flush(self) -> None:
        """Wait until all that this rank has said lies in shared memory, so that it can be read without this process."""
        deadline = time.monotonic() + self._deadline_s
        while self.port.help():
            self.port.check()
            if time.monotonic() > deadline:
                raise DeadlineError(f"Rank {self.rank} of a team could not deliver all messages in {self._deadline_s:.0f} s.")
            time.sleep(_NAP_S)
