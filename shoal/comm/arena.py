"""The arena: one block of shared memory that holds everything a run must not lose.

The supervisor makes it and hands it down; workers come and go. It is cut into named regions. The first of them,
``control``, holds the words that processes signal each other with:

* every worker has a *slot*. Only that worker (or, once it is dead, its replacement) writes there, so a killed process
  can leave no lock behind and no half-done read-modify-write;
* so has every parameter server, behind those of the workers;
* the supervisor has one slot of its own, written by the supervisor alone.

A slot's *signals* are 32-bit counters on cache lines of their own. Posting a signal publishes everything written before
it (see ``native.c`` on memory order); waiting for it is a short spin and then a futex, always with a deadline. A slot's
*notes* are 64-bit numbers that nobody waits for: how far an update has come, what a worker is doing and since when.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from shoal.comm.grid import Grid
from shoal.comm.memory import Memory, PrivateMemory, SharedMemory
from shoal.comm.native import Native, load

_LINE = 64
_PAGE = 4096
SLOT_BYTES = 1024
_NOTES_AT = 512
FAULT_NOTES = 32


class Signal(IntEnum):
    """What a worker's slot counts; each is a number of steps (or epochs) that are finished."""

    GRADIENTS = 0
    NORM = 1
    UPDATED = 2
    EVALUATED = 3
    COLLECTIVE = 4
    AVERAGED = 5
    COMPUTED = 6
    CHOSEN = 7


class Order(IntEnum):
    """What the supervisor's slot counts."""

    EPOCH_DONE = 0
    STEP_SEEN = 1
    ABORT = 2
    STEPS_ALLOWED = 3
    OVER = 4


class Note(IntEnum):
    """What a slot says beside its signals; float64, written by its owner alone."""

    PHASE = 0
    PHASE_SINCE = 1
    STEP = 2
    WAITS_FOR = 3
    INCARNATION = 4
    CHUNK_DONE = 5
    CHUNK_SAVED = 6
    STOP_AFTER = 7
    CHECKPOINT_AT = 8
    CHECKPOINT_DONE = 9
    CHECKPOINT_FAILED = 10
    GRADIENT_NORM_SQUARED = 11
    CHECKPOINT_SEEN = 12
    UNDO_LINES = 13
    PUSH_FACTOR = 14
    PUSH_UNIT = 15
    PUSH_IN_WORK = 16
    METRICS_EPOCH = 17
    UNDO_BYTES = 18
    LOGGED = 19
    # the supervisor's
    STOP_WANTED = 20
    CHECKPOINT_WANTED = 21
    STOP_EPOCH = 22
    EVAL_LOSS = 23
    STOP_AT = 24
    FIRST_STEP = 25
    UNITS_SEEN = 26
    READING = 27
    CHECKPOINTED = 28


class Phase(IntEnum):
    """What a worker is doing, for whoever asks why it takes so long."""

    STARTING = 0
    DATA = 1
    FORWARD = 2
    BACKWARD = 3
    REDUCE = 4
    UPDATE = 5
    CHECKPOINT = 6
    EVALUATE = 7
    WAITING = 8
    DONE = 9


@dataclass(frozen=True)
class ArenaLayout:
    """Where each region lies: name -> (offset, bytes). A value that can be sent to another process.

    ``grid`` is how those are arranged that divide gradients and updates among themselves: the workers of an arena that all
    of them share; a single one where a process has memory of its own and its peers are reached through a process group.
    """

    regions: Mapping[str, tuple[int, int]]
    size: int
    world_size: int
    grid: Grid

    @property
    def places(self) -> int:
        """Workers and servers: everybody whose process can be replaced."""
        return self.world_size + self.grid.servers

    @classmethod
    def plan(cls, world_size: int, sizes: Mapping[str, int], grid: Grid | None = None) -> ArenaLayout:
        """Lay the regions out one after the other, each on a page of its own."""
        regions: dict[str, tuple[int, int]] = {}
        grid = grid or Grid(dp=world_size)
        at = 0
        for name, size in {"control": SLOT_BYTES * (world_size + grid.servers + 1), **sizes}.items():
            regions[name] = (at, size)
            at += -(-size // _PAGE) * _PAGE
        return cls(regions, max(at, _PAGE), world_size, grid)


class Arena:
    """The mapped arena of one run; ``device``: where the tensors lie that are computed with."""

    device = torch.device("cpu")

    def __init__(self, memory: Memory, layout: ArenaLayout, native: Native | None = None) -> None:
        self.memory = memory
        self.layout = layout
        self.native = native or load()
        # Workers, then servers: the order in which everything is counted that either may have.
        self.places = [Slot(self, place) for place in range(layout.places)]
        self.slots = self.places[: layout.world_size]
        self.servers = self.places[layout.world_size :]
        self.supervisor = Slot(self, layout.places)

    @classmethod
    def create(cls, layout: ArenaLayout) -> Arena:
        """Reserve the memory that the layout needs, all zero."""
        return cls(SharedMemory.create(layout.size, "shoal-arena"), layout)

    @classmethod
    def private(cls, layout: ArenaLayout) -> Arena:
        """The same in memory that no other process sees."""
        return cls(PrivateMemory(layout.size), layout)

    @classmethod
    def attach(cls, fd: int, layout: ArenaLayout) -> Arena:
        """Map the arena behind a descriptor."""
        return cls(SharedMemory.attach(fd, layout.size), layout)

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def updaters(self) -> list[Slot]:
        """The slots of those who update weights: the servers, or the workers where there are none."""
        return self.servers or self.slots

    @property
    def leader(self) -> Slot:
        """The slot of the one who decides what happens after a step."""
        return self.updaters[0]

    def place_name(self, place: int) -> str:
        """What a sentence calls a place."""
        if place < self.world_size:
            return f"rank {place}"
        return f"server {place - self.world_size}" if place < self.layout.places else "the supervisor"

    def region(self, name: str) -> torch.Tensor:
        """The bytes of a region, 1-D uint8."""
        offset, size = self.layout.regions[name]
        return self.memory.bytes[offset : offset + size]

    def view(self, name: str, offset: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A 1-D view of ``numel`` elements, ``offset`` bytes into a region."""
        return self.memory.tensor(self.layout.regions[name][0] + offset, numel, dtype)

    def wait_all(self, signal: Signal, target: int, spin_s: float, timeout_s: float) -> int:
        """Wait until every worker's signal has reached target; -1, or the rank that had not after timeout_s."""
        return self._wait(0, self.world_size, signal, target, spin_s, timeout_s)

    def wait_updaters(self, signal: Signal, target: int, spin_s: float, timeout_s: float) -> int:
        """The same for all who update weights; -1, or the place that had not."""
        if not self.servers:
            return self.wait_all(signal, target, spin_s, timeout_s)
        return self._wait(self.world_size, len(self.servers), signal, target, spin_s, timeout_s)

    def slot_address(self, signal: Signal) -> int:
        """Where a signal of the first slot lies; those of the others follow at every SLOT_BYTES."""
        return self.memory.address + self.layout.regions["control"][0] + int(signal) * _LINE

    def _wait(self, first: int, count: int, signal: Signal, target: int, spin_s: float, timeout_s: float) -> int:
        address = self.slot_address(signal) + first * SLOT_BYTES
        late = self.native.wait_all(address, SLOT_BYTES, count, target, spin_s, timeout_s)
        return late if late < 0 else first + late


class Slot:
    """One process's corner of the control region: see the module's docstring."""

    def __init__(self, arena: Arena, index: int) -> None:
        offset = arena.layout.regions["control"][0] + index * SLOT_BYTES
        self._native = arena.native
        self._address = arena.memory.address + offset
        raw = arena.memory.bytes[offset : offset + SLOT_BYTES].numpy()
        self._words = raw[:_NOTES_AT].view(np.uint32)
        self._notes = raw[_NOTES_AT:].view(np.float64)

    def signal(self, signal: IntEnum) -> int:
        """How far a signal has come."""
        return int(self._words[int(signal) * (_LINE // 4)])

    def post(self, signal: IntEnum, value: int) -> None:
        """Publish what was written before, set the signal, wake the sleepers."""
        self._native.post(self._address + int(signal) * _LINE, value)

    def wait(self, signal: IntEnum, target: int, timeout_s: float, spin_s: float = 0.0) -> bool:
        """Wait for one signal of this slot; False where the time ran out."""
        return self._native.wait_all(self._address + int(signal) * _LINE, _LINE, 1, target, spin_s, timeout_s) < 0

    def note(self, note: Note) -> float:
        return float(self._notes[int(note)])

    def address(self, note: Note) -> int:
        """Where a note lies, for native code that writes it."""
        return self._address + _NOTES_AT + 8 * int(note)

    def write(self, note: Note, value: float) -> None:
        self._notes[int(note)] = value

    def count_fault(self, index: int, times: int) -> bool:
        """Whether a fault on purpose is to strike once more; it is counted then. The last notes of a slot are for these."""
        counts = self._notes[-FAULT_NOTES:]
        if counts[index] >= times:
            return False
        counts[index] += 1
        return True

    def enter(self, phase: Phase, step: int) -> None:
        """Say what this worker does now."""
        notes = self._notes
        notes[0], notes[1], notes[2], notes[3] = int(phase), time.monotonic(), step, -1
