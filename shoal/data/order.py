"""The one global order of samples, and how a batch is divided. Pure functions.

Batch *i* of an epoch is the same set of samples under every plan; a plan only decides who computes which part.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
# Keeps the stream that orders the samples apart from whatever else is derived from the same (seed, epoch).
_ORDER_STREAM = 0x6F72646572


def _splitmix64(value: int) -> int:
    """One step of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers that spreads every bit."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


# Most of what seeds are made of (what for, the job's seed, a rank) comes again at every step.
_spread = functools.lru_cache(maxsize=256)(_splitmix64)


def mix(*values: int) -> int:
    """Return one 63-bit seed made of several integers, the same on every machine and in every version of Python.

    ``h = len(values)``, then for each value ``h = splitmix64(h ^ splitmix64(value mod 2**64))``; the result is
    ``h >> 1``, which every torch generator accepts. Order and number of the values count: ``mix(1, 2)``,
    ``mix(2, 1)`` and ``mix(1, 2, 0)`` differ.
    """
    state = len(values)
    for value in values:
        state = _splitmix64(state ^ _spread(value & _MASK))
    return state >> 1


def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order in which the samples 0…n−1 are visited: a permutation, a function of (seed, epoch) alone.

    ``torch.randperm`` from a generator of its own, so no other random stream is touched or matters.
    """
    import torch

    generator = torch.Generator().manual_seed(mix(_ORDER_STREAM, seed, epoch))
    return torch.randperm(n, generator=generator, dtype=torch.int64).numpy()


def batch_count(n: int, batch_size: int) -> int:
    """Return the number of batches in an epoch of n samples; the last one may be smaller than the others."""
    return -(-n // batch_size)


def batch_indices(order: NDArray[np.int64], index: int, batch_size: int) -> NDArray[np.int64]:
    """Return the samples of batch ``index`` (from 0): a view of ``order``, shorter only for the last batch.

    Raises IndexError where the epoch has no such batch.
    """
    if not 0 <= index < batch_count(len(order), batch_size):
        raise IndexError(f"batch {index} of {batch_count(len(order), batch_size)}")
    return order[index * batch_size : (index + 1) * batch_size]


def share_bounds(count: int, shares: Sequence[int]) -> list[tuple[int, int]]:
    """Divide ``count`` samples among workers in proportion to ``shares``: contiguous (begin, end), in rank order.

    Sizes sum to ``count`` exactly and are as near to proportional as whole numbers can be (largest remainder,
    Hamilton's method: the least sum of absolute differences); of equal remainders the lower rank comes first.
    A share of 0 gets nothing; with fewer samples than workers some get nothing.

    Raises ValueError for a negative count or share, and where all shares are 0.
    """
    total = sum(shares)
    if count < 0 or total <= 0 or min(shares) < 0:
        raise ValueError(f"cannot divide {count} samples by the shares {list(shares)}")
    sizes = [count * share // total for share in shares]
    remainders = [count * share % total for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda rank: (-remainders[rank], rank))
    for rank in by_remainder[: count - sum(sizes)]:
        sizes[rank] += 1
    bounds, begin = [], 0
    for size in sizes:
        bounds.append((begin, begin + size))
        begin += size
    return bounds
