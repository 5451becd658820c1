"""Rows that a worker keeps: which are read without asking, for how long, and who is kept."""

from __future__ import annotations

import numpy as np
import torch

from shoal.ps.row_cache import RowCache

WIDTH = 4


class Servers:
    """Rows that change with each step: a row is its key and the step that it was fetched at."""

    def __init__(self) -> None:
        self.step = 0
        self.fetched: list[int] = []

    def fetch(self, keys: np.ndarray) -> torch.Tensor:
        self.fetched += keys.tolist()
        made = torch.empty(len(keys), WIDTH, dtype=torch.float64)
        made[:, 0], made[:, 1:] = torch.from_numpy(keys), self.step
        return made


def pull(cache: RowCache, servers: Servers, keys: list[int]) -> list[int]:
    """Pull at the servers' step; at which step each row was fetched."""
    servers.fetched = []
    rows = cache.pull(np.array(keys, np.int64), servers.step, servers.fetch)
    assert rows[:, 0].long().tolist() == keys and torch.equal(rows[:, 1], rows[:, 3])
    return [int(row) for row in rows[:, 1]]


def test_a_row_is_read_for_as_many_steps_as_the_bound_says() -> None:
    cache, servers = RowCache(64, WIDTH, torch.float64, bound=2), Servers()
    key = -(1 << 62)
    assert pull(cache, servers, [key, 3]) == [0, 0] and servers.fetched == [key, 3]
    for servers.step in (1, 2):
        assert pull(cache, servers, [3, key]) == [0, 0] and servers.fetched == []
    servers.step = 3
    assert pull(cache, servers, [key]) == [3] and servers.fetched == [key]
    # A step that is made again has no use for a row that is too new, either.
    servers.step = 0
    assert pull(cache, servers, [key]) == [0]
    assert (cache.asked, cache.hits) == (8, 4) and cache.hit_rate == 0.5
    cache.clear()
    assert pull(cache, servers, [key]) == [0] and servers.fetched == [key]


def test_without_a_bound_rows_are_shared_by_the_passes_of_one_step_only() -> None:
    cache, servers = RowCache(8, WIDTH, torch.float64, bound=0), Servers()
    pull(cache, servers, [5])
    assert pull(cache, servers, [5]) == [0] and servers.fetched == []
    servers.step = 1
    assert pull(cache, servers, [5]) == [1]


def test_popular_rows_stay_in_a_cache_that_is_far_too_small() -> None:
    """Never a row too old, never more than there is room for, and of a power law's keys most are here."""
    rows, bound, draw = 4_000, 4, np.random.default_rng(0)
    cache, servers = RowCache(rows, WIDTH, torch.float64, bound), Servers()
    assert cache.capacity <= rows
    weights = np.cumsum(np.arange(1, 200_001, dtype=np.float64) ** -1.2)
    kept: list[bool] = []
    for servers.step in range(40):
        keys = np.unique(np.searchsorted(weights, draw.random(20_000) * weights[-1]))
        if servers.step == 20:
            cache.asked = cache.hits = 0
        ages = servers.step - np.array(pull(cache, servers, keys.tolist()))
        assert ages.min() >= 0 and ages.max() <= bound
        if servers.step >= 20:
            kept += (ages[keys < 300] > 0).tolist()
    # Of the most popular ones, all but the fifth whose time is up.
    assert np.mean(kept) > 0.75
    assert cache.nbytes == cache.capacity * (8 * WIDTH + 17)
    # In a batch each key stands once, so the long tail is most of it.
    assert 0.2 < cache.hit_rate < 0.8


def test_keys_that_want_one_place_do_not_mix() -> None:
    """A cache of one set: whoever is kept has its own row, whatever else came with it."""
    cache, servers = RowCache(8, WIDTH, torch.float64, bound=9), Servers()
    draw = np.random.default_rng(1)
    for servers.step in range(200):
        pull(cache, servers, draw.permutation(30)[: 1 + servers.step % 25].tolist())
    assert 0 < cache.hits < cache.asked
