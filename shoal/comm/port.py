"""A rank's place in the shared memory through which the ranks of one machine speak.

Nothing runs in the background: what a rank has begun and cannot finish yet goes on whenever that rank waits for
something, whatever it is. Every wait has a deadline and names who is missing. Every wait looks at the *generation*, a
word that somebody outside changes when a rank was lost: then it raises ``StepAborted``. All members, the replacement of
the lost one among them, call ``reset`` with the new generation, and go on from there with empty words.

One thread of a process speaks at a time. Every word has one writer, so a rank that is killed leaves no lock behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils._python_dispatch import _disable_current_modes

from shoal.cluster.local import find_cores
from shoal.comm import native, rounds
from shoal.comm.region import RegionLayout
from shoal.errors import DeadlineError, RequestError, ShoalError

if TYPE_CHECKING:
    from shoal.comm.meeting import Meeting

DEADLINE_S = 600.0
_SPIN_S = 200e-6
_YIELDS = 20
_FIRST_NAP_S, _LONGEST_NAP_S = 200e-6, 5e-3
_FIRST_NAP_NS = int(_FIRST_NAP_S * 1e9)
_KEY_AT = 2 * rounds.LINE
_NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


class StepAborted(ShoalError):
    """A rank of the replica was lost while this one waited: what the step has computed is void."""


class Pending(Protocol):
    """Something begun that may not be over yet."""

    done: bool

    def advance(self, spin_ns: int, yields: int, nap_ns: int) -> bool:
        """Go on as far as it goes, wait that long at most, say whether it is done."""

    def describe(self) -> str:
        """What it is, for whoever waits."""

    def missing(self) -> list[int]:
        """The ranks that it waits for."""


def _unseen() -> contextlib.AbstractContextManager[Any]:
    """Hide from modes that watch a model compute (selective recomputing) what a waiting rank happens to do for others."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else _NOTHING


class Port:
    """One rank's place.

    Attributes:
        beginnings: how often this port was reset; what was begun before the last time is void.
        names: what the ranks are called where somebody is told about them; their own numbers, unless they are part of more.
        world: which ranks they are in torch's default group; the same numbers, unless that reaches beyond this memory.
        while_waiting: called now and then while this rank waits, with what it waits for and for how many seconds.
    """

    def __init__(
        self, region: torch.Tensor, rank: int, world_size: int, *, deadline_s: float = DEADLINE_S,
        spin_s: float | None = None, generation_address: int = 0, layout: RegionLayout | None = None,
    ) -> None:  # fmt: skip
        """Take a place in ``region``, ``exchange_bytes(world_size)`` bytes of shared memory (1-D uint8).

        Args:
            deadline_s: after how long a wait ends with DeadlineError.
            spin_s: how long a wait spins before it sleeps; by default not at all where there are more ranks than cores.
            generation_address: of a 32-bit word in shared memory; what it is now counts as this port's generation.
        """
        self.layout = layout or RegionLayout(world_size=world_size)
        if region.numel() < self.layout.bytes:
            raise RequestError(
                f"{world_size} ranks need {self.layout.bytes} bytes of shared memory to speak and {region.numel()} are there; "
                "ask exchange_bytes for how many."
            )
        from shoal.comm.mailbox import Mailbox

        self.rank, self.world_size, self.deadline_s = rank, world_size, deadline_s
        self.names: Sequence[int] = range(world_size)
        self.world: Sequence[int] = range(world_size)
        self.while_waiting: Callable[[str, float], None] = lambda what, waited_s: None
        self.base = region.data_ptr()
        self._region = region
        self.native = native.load()
        self.advance, self.lay = rounds.load()
        if spin_s is None:
            spin_s = _SPIN_S if world_size <= find_cores() else 0.0
        self.spin_s = spin_s
        self.spin_ns, self.yields = int(spin_s * 1e9), _YIELDS
        self.beginnings = 0
        self.generation_address = generation_address
        self._generation = (
            ctypes.c_uint32.from_address(generation_address) if generation_address else ctypes.c_uint32(0)
        )
        self.generation = self._generation.value
        self._seats: list[Meeting | None] = [None] * self.layout.seats
        self._next_seat = 0
        self._uses: dict[str, int] = {}
        self.mail = Mailbox(self)

    # -- waiting -------------------------------------------------------------------------------------------------

    def finish(self, pending: Pending, limit_s: float | None = None) -> None:
        """Wait until something is done, for ``limit_s`` or the port's deadline. DeadlineError, StepAborted."""
        if not pending.done:
            with _unseen():
                if not pending.advance(self.spin_ns, self.yields, _FIRST_NAP_NS):
                    self._wait(pending, self.deadline_s if limit_s is None else limit_s)
        self.check()

    def poll(self, pending: Pending) -> bool:
        """Go on with something without waiting for it, and with all else that was begun; whether it is done."""
        if not pending.done:
            with _unseen():
                if not pending.advance(0, 0, 0):
                    self.help()
        self.check()
        return pending.done

    def check(self) -> None:
        """Raise StepAborted where the generation is no longer the one that this port was reset to."""
        if not self.generation_holds():
            raise StepAborted(
                f"Rank {self.rank} gives up what it was at, because another rank of its replica was lost."
            )

    def generation_holds(self) -> bool:
        """Whether the generation is still the one that this port was reset to."""
        return self._generation.value == self.generation

    def doze(self, nap_ns: int) -> None:
        """Sleep for a moment where there is no word to wait for yet."""
        if nap_ns > 0:
            time.sleep(min(nap_ns * 1e-9, _FIRST_NAP_S))

    def help(self) -> bool:
        """Go on with everything that was begun, without waiting; whether something is left."""
        left = self.mail.progress()
        for meeting in self._seats:
            if meeting is not None and meeting.queue:
                left = not meeting.queue[0].advance(0, 0, 0) or bool(meeting.queue) or left
        return left

    def _wait(self, pending: Pending, limit_s: float, alone: bool = False) -> None:
        began = time.monotonic()
        nap_s = _FIRST_NAP_S
        while True:
            self.check()
            busy = not alone and self.help()
            if pending.done:
                return
            waited_s = time.monotonic() - began
            if waited_s >= limit_s:
                raise DeadlineError(
                    f"Rank {self.names[self.rank]} waited {waited_s:.3g} s for {pending.describe()} from "
                    f"{_names([self.names[rank] for rank in pending.missing()])}; "
                    "see what keeps it."
                )
            self.while_waiting(pending.describe(), waited_s)
            nap_s = _FIRST_NAP_S if busy else min(2 * nap_s, _LONGEST_NAP_S)
            if pending.advance(0, 0, int(min(nap_s, limit_s) * 1e9)):
                return

    # -- seats ---------------------------------------------------------------------------------------------------

    def take_seat(self, meeting: Meeting) -> int:
        """Give a group a seat of its own, marked with its key; its index."""
        for step in range(len(self._seats)):
            index = (self._next_seat + step) % len(self._seats)
            if self._seats[index] is None:
                break
        else:
            raise RequestError(
                f"Rank {self.rank} is in {len(self._seats)} groups and cannot join {meeting.name}; "
                "reserve shared memory for more seats."
            )
        # The one after it next time: a seat that was just given up may still be read from.
        self._next_seat = index + 1
        self._seats[index] = meeting
        self._uses[meeting.name] = self._uses.get(meeting.name, 0) + 1
        meeting.mark(self._uses[meeting.name])
        self._mark(index)
        return index

    def leave_seat(self, meeting: Meeting) -> None:
        """Take a seat back. It stays as it is: somebody may not have seen the last post there yet."""
        self._seats = [None if holder is meeting else holder for holder in self._seats]

    def find_seat(self, rank: int, key: int) -> int:
        """The address of the seat that a rank has marked with a key; 0 where there is none yet."""
        for index in range(self.layout.seats):
            address = self.base + self.layout.seat(rank, index)
            if ctypes.c_uint64.from_address(address + _KEY_AT).value == key:
                return address
        return 0

    def _mark(self, index: int) -> None:
        """Empty the words of a seat of mine, then say whose it is now."""
        address = self.base + self.layout.seat(self.rank, index)
        key = ctypes.c_uint64.from_address(address + _KEY_AT)
        key.value = 0
        ctypes.memset(address, 0, _KEY_AT)
        holder = self._seats[index]
        # A post is a release: the emptied words are seen before the key.
        self.native.post(address, 0)
        key.value = holder.key if holder is not None else 0

    # -- starting anew -------------------------------------------------------------------------------------------

    def reset(self, generation: int) -> None:
        """Drop everything that was begun, empty this rank's words, and wait until all others have done so.

        StepAborted where the generation is no longer this one already: reset to the new one then.
        """
        self.generation = generation & 0xFFFFFFFF
        self.beginnings += 1
        self.mail.clear()
        self._uses = {}
        for index, meeting in enumerate(self._seats):
            if meeting is not None:
                self._uses[meeting.name] = 1
                meeting.mark(1)
                meeting.clear()
            self._mark(index)
        self.native.post(self.base + self.layout.met(self.rank), self.generation)
        # Until all have met, the others' words are still those of before: nothing else goes on meanwhile.
        self._wait(_Met(self), self.deadline_s, alone=True)
        self.check()


class _Met:
    """That all ranks have emptied their words."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self.done = False

    def advance(self, spin_ns: int, yields: int, nap_ns: int) -> bool:
        port = self._port
        stride = port.layout.met(1) - port.layout.met(0)
        late = port.native.wait_all(port.base, stride, port.world_size, port.generation, 0.0, nap_ns * 1e-9)
        self.done = late < 0
        return self.done

    def describe(self) -> str:
        return "a new beginning"

    def missing(self) -> list[int]:
        port = self._port
        return [
            rank
            for rank in range(port.world_size)
            if port.native.wait_all(port.base + port.layout.met(rank), rounds.LINE, 1, port.generation, 0.0, 0.0) >= 0
        ]


def _names(ranks: Sequence[int]) -> str:
    return " and ".join(f"rank {rank}" for rank in ranks) or "nobody in particular"
