"""The portions of a batch as the lead hands them out, and again: see ``shoal.ps.portions``, which does it in an arena.

What a worker has been at for too long is given to whoever has nothing to do as well. The first result counts: its push is
the one that all servers hold, and who computes the same later is told that it counts for nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from shoal.ps.portions import next_portion


@dataclass(frozen=True)
class Orphan:
    """A unit whose worker was lost, or may be; ``row``: the place in which it was claimed."""

    unit: int
    row: int


class Dealt:
    """The units of the step in work.

    Attributes:
        done: of those that were handed out more than once, which are done: somebody may still be at them.
        buffers: what the first unit that has samples has left of the model's; None where none has.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[int, dict[int, float]] = {}
        self._times: Counter[int] = Counter()
        self._took: list[float] = []
        self._first: int | None = None
        self.done: tuple[int, ...] = ()
        self.buffers: Mapping[str, torch.Tensor] | None = None

    def begin(self) -> None:
        """A step is over; of the next one nothing was handed out yet."""
        self._since, self._times, self._took, self._first = {}, Counter(), [], None
        self.done, self.buffers = (), None

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

    def leave(self, unit: int, buffers: Mapping[str, torch.Tensor]) -> None:
        """What a unit that has samples has made of the buffers that the step began with: the first one's are the next step's."""
        if self._first is None or unit < self._first:
            self._first, self.buffers = unit, {name: buffer.clone() for name, buffer in buffers.items()}
