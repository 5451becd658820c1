"""Ranks that compute one share together: how they speak, and how they begin again when one of them is lost.

A *team* is a replica of a model that is split, or all ranks where weights are sharded. Its ranks speak through a region of the
arena by torch's collectives (``shared_group.py``). When one of them dies in the middle of a step, what the others have
computed of it is void: they give it up, meet the replacement, and compute the step again together.

Two words, written by the supervisor alone, lead through this. ``generation`` is what every wait of the team watches: when
it changes, the waiting ends with StepAborted. ``announced`` is the generation that the next computation belongs to. A death
before its step was computed changes both at once. After that nothing is void, since what the dead rank had sent lies in
shared memory; only its successor does not know what was said. So the new generation is announced, the others may finish, and
all meet at the beginning of the next step. Whatever was done beyond the point at which a generation begins is void: who has
said that it had done it takes that back before it meets the others, and a successor does so for its predecessor.
"""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from shoal.comm.arena import Arena, Signal, Slot
from shoal.comm.grid import Grid
from shoal.comm.port import Port, StepAborted
from shoal.comm.region import RegionLayout, exchange_bytes
from shoal.errors import DeadlineError

__all__ = ["Recovery", "StepAborted", "Team", "TeamWords", "team_bytes"]

_HEADER = 4096
_ANNOUNCED_AT = 64
_VOID_AT = 128

Done = tuple[int, int]
"""How many steps a rank has computed, and how many epochs evaluated; later pairs are larger."""
_NAP_S = 0.0005
_GLOO = "SHOAL_TEAM_ON_GLOO"
"""Names a folder for teams to meet in and speak through gloo instead. For benchmarks alone: on gloo nobody may be lost."""


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
        self._layout = RegionLayout(world_size=len(self.ranks))
        start, size = arena.layout.regions["exchange"]
        each = size // (arena.world_size // len(ranks))
        self.offset = start + each * (ranks[0] // len(ranks))
        self.size = each
        self.address = arena.memory.address + self.offset

    @property
    def generation(self) -> int:
        return self._word(0)

    @property
    def announced(self) -> int:
        return self._word(_ANNOUNCED_AT)

    @property
    def void(self) -> Done:
        """What was done beyond this before the present generation began does not count."""
        return self._word(_VOID_AT), self._word(_VOID_AT + 4)

    def met(self, index: int) -> int:
        """The generation in which a rank of the team was last ready to speak."""
        return self._word(_HEADER + self._layout.met(index))

    def announce(self) -> None:
        """Say that there is a new generation from the next computation on. For the supervisor."""
        self._native.post(self.address + _ANNOUNCED_AT, self.announced + 1)

    def call_off(self, void: Done) -> None:
        """Let what was announced hold now, and all that was done beyond ``void`` be void. For the supervisor."""
        if self.generation != self.announced:
            for at, value in zip((_VOID_AT, _VOID_AT + 4), void, strict=True):
                ctypes.c_uint32.from_address(self.address + at).value = value
            self._native.post(self.address, self.announced)

    def _word(self, at: int) -> int:
        return int(ctypes.c_uint32.from_address(self.address + at).value)


class Recovery:
    """Leads a team through the loss of its ranks. For the supervisor."""

    def __init__(self, arena: Arena, ranks: Sequence[int]) -> None:
        self._slots = [arena.slots[rank] for rank in ranks]
        self._words = TeamWords(arena, ranks)
        self._needed: Done | None = None

    def lose(self, rank: int) -> int:
        """A rank of the team (counted from its first one) is dead. Returns how many steps it has computed that count."""
        done = self._done(self._slots[rank])
        if self._words.met(rank) != self._words.generation:
            # It has died before it could take back what had become void already.
            done = min(done, self._words.void)
        # What one of several dead ranks has not done, nobody can finish.
        self._needed = done if self._needed is None else min(self._needed, done)
        self._words.announce()
        self.attend()
        return done[0]

    def attend(self) -> None:
        """Let the team begin anew once the others have done what needs nothing more from the dead."""
        if self._needed is None:
            return
        needed = self._needed
        if all(self._done(slot) >= needed for slot in self._slots):
            self._needed = None
            self._words.call_off(needed)

    @staticmethod
    def _done(slot: Slot) -> Done:
        return slot.signal(Signal.COMPUTED), slot.signal(Signal.EVALUATED)


class Team:
    """One rank's membership of its team. Making it makes this process's default torch group.

    Args:
        beat: called now and then while this rank waits for others of the team.
    """

    def __init__(
        self, arena: Arena, grid: Grid, rank: int, spin_s: float, deadline_s: float,
        beat: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        from shoal.comm import shared_group

        self.ranks = grid.team(rank)
        self.rank = self.ranks.index(rank)
        self._words = TeamWords(arena, self.ranks)
        self._deadline_s = deadline_s
        self._beat = beat
        # Taking a place empties the words of whoever had it, and the others may still read there.
        self._await_call_off()
        self._take_back(arena.slots[rank])
        begin = self._words.offset + _HEADER
        region = arena.memory.bytes[begin : self._words.offset + self._words.size]
        where = os.environ.get(_GLOO)
        make = shared_group.init if where is None else functools.partial(_on_gloo, where, self.ranks[0])
        self.port: Port = make(
            region, self.rank, len(self.ranks), deadline_s=deadline_s, spin_s=spin_s,
            generation_address=self._words.address,
        )  # fmt: skip
        self.port.names = self.ranks
        self.port.while_waiting = lambda what, waited_s: beat()
        # A successor meets the others before it says anything; at the very beginning there is nothing to forget.
        self._met = self.port.generation if self._words.announced == 0 else -1

    def check(self) -> None:
        """StepAborted where a member was lost, so that what is being computed is void."""
        self.port.check()

    @property
    def apart(self) -> bool:
        """Whether a member was lost since all have last met."""
        return self._met != self._words.announced

    def gather(self) -> None:
        """Before computing: meet the others again where a member was lost, however often. DeadlineError."""
        while self.apart:
            self._await_call_off()
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
                raise DeadlineError(
                    f"Rank {self.ranks[self.rank]} could not deliver all messages in {self._deadline_s:.0f} s."
                )
            self._beat()
            time.sleep(_NAP_S)

    def _await_call_off(self) -> None:
        """The others may still be at what a lost one had done its part of."""
        deadline = time.monotonic() + self._deadline_s
        while self._words.generation != self._words.announced:
            if time.monotonic() > deadline:
                raise DeadlineError(f"The supervisor has not let the team begin anew for {self._deadline_s:.0f} s.")
            self._beat()
            time.sleep(_NAP_S)

    def _take_back(self, slot: Slot) -> None:
        """What a predecessor has done may be void: it can have died before it knew."""
        if self._words.generation:
            computed, evaluated = min(Recovery._done(slot), self._words.void)
            slot.post(Signal.COMPUTED, computed)
            slot.post(Signal.EVALUATED, evaluated)


def _on_gloo(folder: str, first: int, region: Any, rank: int, size: int, *, deadline_s: float, **rest: Any) -> Port:
    """As ``shared_group.init``, but that torch's default group is gloo's: what benchmarks compare with."""
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    limit = timedelta(seconds=deadline_s)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{first}", rank=rank, world_size=size, timeout=limit)
    return Port(region, rank, size, deadline_s=deadline_s, **rest)
