"""What the ranks of an arena give to the small sums within a step (BatchNorm's), and how others find it.

A rank keeps what it gives one after the other, each behind a head that says among which replicas it is added up. Which sums a
rank takes part in depends on where it has samples, so that one sum may be one rank's third and another's fifth. What all who
take part agree on is the how manieth one among the same replicas it is: by that it is found.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from shoal.comm.table import align
from shoal.errors import ShoalError

NO_ROOM = "A step gathers more batch statistics than there is room for; use batchnorm=local."
DIFFERENT_LAYERS = (
    "The workers of a step call different layers, so that their batch statistics cannot be added up; let the model "
    "call its BatchNorm layers alike whatever the samples are, or use batchnorm=local."
)
HEAD_BYTES = 64
"""What stands before each part, in an arena of up to 448 ranks."""
_SIZE = struct.Struct("<q")


@dataclass
class _Reading:
    """How far one rank's parts have been looked at, and where those are that were found: (among whom, how manieth) -> bytes."""

    count: int = 0
    at: int = 0
    among: Counter[bytes] = field(default_factory=Counter)
    found: dict[tuple[bytes, int], slice] = field(default_factory=dict)


class Given:
    """One rank's view of what all have given in the step in work.

    Args:
        rank: whose view it is.
        ranks: how many there are.
        pages: a rank -> the bytes in which it keeps what it gives, which all can read.
        most: so many parts may a rank give in a step.
    """

    def __init__(self, rank: int, ranks: int, pages: Callable[[int], torch.Tensor], most: int) -> None:
        self._rank, self._pages, self._most = rank, pages, most
        self._mask_bytes = -(-ranks // 8)
        self._head_bytes = align(_SIZE.size + self._mask_bytes)
        self.begin()

    def begin(self) -> None:
        """A step is begun, or begun again."""
        self._readings: dict[int, _Reading] = {}
        self._among: Counter[bytes] = Counter()
        self._at, self.count = 0, 0

    def give(self, values: torch.Tensor, replicas: Sequence[int]) -> tuple[bytes, int]:
        """Keep this rank's part of a sum; ``count`` is one more then. Returns what the sum is found by.

        What a predecessor of this rank gave is written once more, to the same place.
        """
        mask = sum(1 << replica for replica in replicas).to_bytes(self._mask_bytes, "little")
        own, begin, size = self._pages(self._rank), self._at + self._head_bytes, values.nbytes
        if begin + size > own.numel() or self.count >= self._most:
            raise ShoalError(NO_ROOM)
        head = bytearray(_SIZE.pack(size) + mask)
        own[self._at : self._at + len(head)] = torch.frombuffer(head, dtype=torch.uint8)
        own[begin : begin + size].view(values.dtype).copy_(values.reshape(-1))
        self._at, self.count = align(begin + size), self.count + 1
        place = mask, self._among[mask]
        self._among[mask] += 1
        return place

    def find(
        self, rank: int, place: tuple[bytes, int], values: torch.Tensor, await_parts: Callable[[int, int], None]
    ) -> torch.Tensor:
        """What a rank has given to a sum, flat, in the form of ``values``; it is the rank's own memory.

        Args:
            place: as ``give`` returned it.
            await_parts: (a rank, a number) -> waits until that rank has given so many parts.
        """
        reading = self._readings.setdefault(rank, _Reading())
        page = self._pages(rank)
        while place not in reading.found:
            await_parts(rank, reading.count + 1)
            head = page[reading.at : reading.at + _SIZE.size + self._mask_bytes].numpy().tobytes()
            (size,), mask = _SIZE.unpack_from(head), head[_SIZE.size :]
            begin = reading.at + self._head_bytes
            reading.found[mask, reading.among[mask]] = slice(begin, begin + size)
            reading.among[mask] += 1
            reading.at, reading.count = align(begin + size), reading.count + 1
        where = reading.found[place]
        if where.stop - where.start != values.nbytes:
            raise ShoalError(DIFFERENT_LAYERS)
        return page[where].view(values.dtype)
