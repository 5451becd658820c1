"""The portions of a batch as the lead hands them out, and again: see ``shoal.ps.portions``, which does it in an arena.

What a worker has been at for too long is given to whoever has nothing to do as well. The first result counts: its push is
the one that all servers hold, and who computes the same later is told that it counts for nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from shoal.ps import messages
from shoal.ps.ledger import UNCOUNTED, UnitColumns
from shoal.ps.portions import next_portion
from shoal.train.remote import words


@dataclass(frozen=True)
class Orphan:
    """A unit whose worker was lost, or may be; ``row``: the place in which it was claimed."""

    unit: int
    row: int


class Left:
    """What the units of a step have made of the buffers that it began with: those of the first with samples are the next step's.

    Whoever computes a unit, and whenever, begins with the buffers of the step's beginning, and the next step with the same bits.

    Attributes:
        buffers: what the first unit that has samples has left of the model's; None where none has.
    """

    def __init__(self) -> None:
        self._first: int | None = None
        self.buffers: Mapping[str, torch.Tensor] | None = None

    def take(self, said: words.Report, rows: Sequence[words.Row], frames: Sequence[object]) -> None:
        """These units were reported for the first time."""
        for row in rows if said.buffers else ():
            if int(row.columns[UnitColumns.PUSH]) not in UNCOUNTED:
                self.leave(row.unit, messages.unpack_tensors(said.buffers, frames))

    def leave(self, unit: int, buffers: Mapping[str, torch.Tensor]) -> None:
        """A unit that has samples is done."""
        if self._first is None or unit < self._first:
            self._first, self.buffers = unit, {name: buffer.clone() for name, buffer in buffers.items()}


class Dealt:
    """The units of the step in work.

    Attributes:
        done: of those that were handed out more than once, which are done: somebody may still be at them.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[int, dict[int, float]] = {}
        self._times: Counter[int] = Counter()
        self._took: list[float] = []
        self.done: tuple[int, ...] = ()

    def begin(self) -> None:
        """A step is over; of the next one nothing was handed out yet."""
        self._since, self._times, self._took = {}, Counter(), []
        self.done = ()

    def give(self, unit: int, rank: int) -> None:
        """A worker has a unit from now on."""
        self._since.setdefault(unit, {})[rank] = self._clock()
        self._times[unit] += 1

    def lose(self, unit: int, rank: int) -> bool:
        """A worker has it no more; whether somebody else does."""
        holders = self._since[unit]
        del holders[rank]
        return bool(holders)

    def finish(self, unit: int, rank: int) -> None:
        """The first result of a unit is there, from a worker that has it."""
        self._took.append(self._clock() - self._since.pop(unit)[rank])
        if self._times[unit] > 1:
            self.done = (*self.done, unit)

    def times(self, unit: int) -> int:
        """How often a unit was handed out."""
        return self._times[unit]

    def late(self) -> int | None:
        """The unit to be handed out once more, to somebody who has none; None where none is late."""
        if not self._since:
            return None
        found = next_portion({unit: [*since.values()] for unit, since in self._since.items()}, self._took, self._clock())
        return found if isinstance(found, int) else None
