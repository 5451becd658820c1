"""The order of samples: one permutation for (seed, epoch), divided without loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.data.order import batch_count, batch_indices, epoch_order, mix, share_bounds

SHARES = st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(lambda shares: sum(shares) > 0)


def test_mix_is_pinned() -> None:
    # Resumed runs and other machines rely on these numbers: they may never change.
    assert (mix(), mix(0), mix(1, 2)) == (0, 313702574736366215, 8051174431233965979)
    assert mix(2**64 - 1) == mix(-1) == 3760944106085730822


@given(st.lists(st.integers(-(2**63), 2**64 - 1), max_size=5))
def test_mix_gives_seeds_for_torch(values: list[int]) -> None:
    seed = mix(*values)
    assert 0 <= seed < 2**63
    assert torch.Generator().manual_seed(seed).initial_seed() == seed


def test_mix_tells_neighbours_order_and_count_apart() -> None:
    pairs = {mix(a, b) for a in range(100) for b in range(100)}
    assert len(pairs | {mix(a) for a in range(100)} | {mix(a, 0, 0) for a in range(100)}) == 10_200


def test_mix_spreads_one_bit() -> None:
    flips = [bin(mix(5, 7) ^ mix(5, 7 ^ (1 << bit))).count("1") for bit in range(64)]
    assert 26 < sum(flips) / len(flips) < 37


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 1000))
def test_epoch_order_is_a_permutation_of_seed_and_epoch_alone(n: int, seed: int, epoch: int) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    order = epoch_order(n, seed, epoch)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(n))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert np.array_equal(order, epoch_order(n, seed, epoch))


def test_the_order_is_pinned() -> None:
    assert epoch_order(10, 0, 1).tolist() == [3, 0, 5, 2, 7, 9, 8, 4, 6, 1]
    assert epoch_order(10, 7, 3).tolist() == [3, 0, 2, 1, 8, 5, 9, 6, 4, 7]


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_order(20, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@given(st.integers(0, 500), st.integers(1, 120))
def test_batches_cover_the_order_once(n: int, batch_size: int) -> None:
    order = np.arange(n, dtype=np.int64)[::-1]
    batches = [batch_indices(order, index, batch_size) for index in range(batch_count(n, batch_size))]
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert [sample for batch in batches for sample in batch] == order.tolist()
    for index in (-1, len(batches)):
        with pytest.raises(IndexError):
            batch_indices(order, index, batch_size)


@given(st.integers(0, 2000), SHARES)
def test_shares_are_contiguous_and_nearest_to_proportional(count: int, shares: list[int]) -> None:
    bounds = share_bounds(count, shares)
    assert len(bounds) == len(shares)
    assert bounds[0][0] == 0 and bounds[-1][1] == count
    assert all(end == begin for (_, end), (begin, _) in zip(bounds, bounds[1:], strict=False))
    total = sum(shares)
    errors = [(end - begin) * total - count * share for (begin, end), share in zip(bounds, shares, strict=True)]
    assert all(abs(error) < total for error in errors)
    # Moving one sample from any worker to any other does not bring the sizes nearer.
    for giver, error in enumerate(errors):
        for taker, other in enumerate(errors):
            if giver != taker and bounds[giver][1] > bounds[giver][0]:
                assert abs(error - total) + abs(other + total) >= abs(error) + abs(other)
    assert all(begin == end for (begin, end), share in zip(bounds, shares, strict=True) if share == 0)


def test_equal_shares_give_the_rest_to_the_first_ranks() -> None:
    assert share_bounds(100, [1, 1, 1]) == [(0, 34), (34, 67), (67, 100)]
    assert share_bounds(3, [3, 1]) == [(0, 2), (2, 3)]
    assert share_bounds(1, [1, 1, 1]) == [(0, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize(("count", "shares"), [(5, []), (5, [0, 0]), (5, [2, -1]), (-1, [1])])
def test_shares_that_divide_nothing(count: int, shares: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot divide"):
        share_bounds(count, shares)
