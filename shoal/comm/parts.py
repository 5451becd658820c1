"""Parts of tensors: which elements of a whole tensor a local one holds.

A *region* picks ranges along one dimension. Several regions are applied one after the other, so that a part may be cut
along two dimensions (a tensor-parallel weight that is sharded as well), or a cut part cut again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Region:
    """A part of a tensor: the ``ranges`` (start, stop) of dimension ``dim``, one after the other.

    Several ranges because a fused projection is cut by heads in each of query, key and value.
    """

    dim: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def indices(self) -> np.ndarray:
        """Positions along the dimension, in order."""
        return np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in self.ranges] or [np.empty(0, np.int64)])


def part_shape(whole: Sequence[int], regions: Sequence[Region]) -> tuple[int, ...]:
    """The shape of a part of a tensor with the shape ``whole``."""
    shape = list(whole)
    for region in regions:
        shape[region.dim] = region.length
    return tuple(shape)


def take_ranges(whole: torch.Tensor, dim: int, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The ranges (start, stop) of a dim, one after the other; a view where there is one range."""
    pieces = [whole.narrow(dim, start, stop - start) for start, stop in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def take(whole: torch.Tensor, regions: Sequence[Region]) -> torch.Tensor:
    """The part of a whole tensor; a view where the regions allow it."""
    for region in regions:
        whole = take_ranges(whole, region.dim, region.ranges)
    return whole


def put(whole: torch.Tensor, regions: Sequence[Region], part: torch.Tensor) -> None:
    """Write a part into its place in the whole tensor."""
    if not regions:
        whole.copy_(part)
        return
    first, rest = regions[0], regions[1:]
    if rest:
        middle = take(whole, [first]).clone()
        put(middle, rest, part)
        part = middle
    at = 0
    for start, stop in first.ranges:
        whole.narrow(first.dim, start, stop - start).copy_(part.narrow(first.dim, at, stop - start))
        at += stop - start


def runs(whole: Sequence[int], regions: Sequence[Region], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Where elements ``start`` to ``stop`` of the flat part lie in the flat whole tensor.

    Gives (first element of the part, first element of the whole, number of elements), contiguous in both, in order.
    """
    if stop <= start:
        return
    if not regions:
        yield start, start, stop - start
        return
    shape = part_shape(whole, regions)
    places = [np.arange(n, dtype=np.int64) for n in whole]
    for region in regions:
        places[region.dim] = places[region.dim][region.indices()]
    # Below the last dimension that is cut, elements lie together.
    last = max(region.dim for region in regions)
    inner = math.prod(shape[last + 1 :])
    rows = np.arange(start // inner, -(-stop // inner), dtype=np.int64)
    offsets = np.zeros(len(rows), dtype=np.int64)
    for dim, index in enumerate(np.unravel_index(rows, shape[: last + 1])):
        offsets += places[dim][index] * math.prod(whole[dim + 1 :])
    breaks = np.flatnonzero(np.diff(offsets) != inner) + 1
    firsts = np.concatenate([[0], breaks])
    counts = np.diff(np.concatenate([firsts, [len(rows)]]))
    for first, count in zip(firsts.tolist(), counts.tolist(), strict=True):
        begin = int(rows[first]) * inner
        low, high = max(start, begin), min(stop, begin + count * inner)
        yield low, int(offsets[first]) + low - begin, high - low
