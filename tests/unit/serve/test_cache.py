"""The exact cache: whole keys, bytes, age."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shoal.serve.cache import ResponseCache, key_of


def outputs(value: float, count: int = 1) -> list[np.ndarray]:
    return [np.full((1, count), value, np.float32)]


def key(value: int, *shape: int) -> object:
    return key_of([np.full(shape or (1, 4), value, np.uint8)])


def test_gives_what_was_put_until_it_is_too_old() -> None:
    cache = ResponseCache(10_000, ttl_s=5.0)
    cache.put(key(1), outputs(1.0), now_s=0.0)
    assert cache.get(key(1), 4.9) is not None
    assert cache.get(key(2), 0.0) is None
    assert cache.get(key(1, 2, 2), 0.0) is None, "the same bytes in another shape"
    assert cache.get(key(1), 5.0) is None
    assert (cache.entries, cache.bytes) == (0, 0)


def test_the_least_recently_used_goes_first() -> None:
    cache = ResponseCache(10_000, ttl_s=5.0)
    cache.put(key(0), outputs(0.0), 0.0)
    one = cache.bytes
    cache = ResponseCache(2 * one, ttl_s=5.0)
    for value in (1, 2):
        cache.put(key(value), outputs(value), 0.0)
    cache.get(key(1), 1.0)
    cache.put(key(3), outputs(3.0), 1.0)
    assert [cache.get(key(value), 1.0) is not None for value in (1, 2, 3)] == [True, False, True]


def test_what_is_larger_than_all_of_it_is_not_kept() -> None:
    cache = ResponseCache(10_000, ttl_s=5.0)
    cache.put(key(1), outputs(1.0), 0.0)
    cache.put(key(2), outputs(2.0, 4000), 0.0)
    assert cache.get(key(2), 0.0) is None and cache.get(key(1), 0.0) is not None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 400)), max_size=60))
def test_never_holds_more_than_it_may(puts: list[tuple[int, int]]) -> None:
    cache = ResponseCache(3_000, ttl_s=1e9)
    last: dict[int, int] = {}
    for now, (value, count) in enumerate(puts):
        cache.put(key(value), outputs(value, count), float(now))
        last[value] = count
        assert 0 <= cache.bytes <= 3_000
    for value, count in last.items():
        found = cache.get(key(value), 1e6)
        assert found is None or found[0].shape == (1, count)
