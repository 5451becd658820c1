"""The compiled helpers and their fallback give the same bits."""

from __future__ import annotations

import pytest
import torch

from shoal.comm import native

_LARGE = (8 << 20) // 4  # from here on results are written past the caches


@pytest.fixture(scope="module")
def compiled() -> native.Native:
    helpers = native.load()
    if helpers.name != "c":
        pytest.skip("no C compiler here")
    return helpers


def sources(count: int, n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(count + n)
    return [torch.rand(count, generator=random, dtype=dtype) for _ in range(n)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 7, 2048, 2049, 10_001])
def test_sums_are_the_fallbacks_bit_for_bit(compiled: native.Native, count: int, n: int, dtype: torch.dtype) -> None:
    assert_same(compiled, sources(count, n, dtype))


@pytest.mark.parametrize(
    ("count", "dtype"),
    [(_LARGE - 1, torch.float32), (_LARGE + 3, torch.float32), (_LARGE // 2 + 1, torch.float64)],
)
def test_large_sums_too(compiled: native.Native, count: int, dtype: torch.dtype) -> None:
    assert_same(compiled, sources(count, 3, dtype))


def assert_same(compiled: native.Native, given: list[torch.Tensor]) -> None:
    ours, plain = torch.empty_like(given[0]), torch.empty_like(given[0])
    compiled.sum_into(ours, given, 1 / 3)
    native._Fallback().sum_into(plain, given, 1 / 3)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("skipped", [0, 1, 4])
def test_a_large_result_may_begin_anywhere_and_nothing_beside_it_is_touched(
    compiled: native.Native, skipped: int
) -> None:
    given = sources(_LARGE + 5, 2, torch.float32)
    room = torch.full((_LARGE + 5 + 16,), -7.0)
    out = room[skipped : skipped + _LARGE + 5]
    compiled.sum_into(out, given, 0.5)
    assert torch.equal(out, (given[0] + given[1]) * 0.5)
    assert torch.all(room[:skipped] == -7.0) and torch.all(room[skipped + _LARGE + 5 :] == -7.0)


def test_a_large_result_may_be_one_of_the_sources(compiled: native.Native) -> None:
    given = sources(_LARGE + 1, 3, torch.float32)
    expected = ((given[0] + given[1]) + given[2]) * 0.25
    compiled.sum_into(given[1], given, 0.25)
    assert torch.equal(given[1], expected)


@pytest.mark.parametrize("fallback", [False, True])
def test_a_word_that_differs_from_its_fellow_is_found(compiled: native.Native, fallback: bool) -> None:
    helpers = native._Fallback() if fallback else compiled
    words, fellows = torch.zeros(3, 16, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32)
    given = (words.data_ptr(), 64, fellows.data_ptr(), 8, 3)
    assert helpers.wait_any(*given, spin_s=0.0) == helpers.wait_any(*given, spin_s=1e-4) == -1
    words[2, 0] = words[1, 1] = fellows[1, 1] = 5
    assert helpers.wait_any(*given, spin_s=60.0) == 2
    fellows[2, 0], fellows[0, 0] = 5, 1
    assert helpers.wait_any(*given, spin_s=0.0) == 0
