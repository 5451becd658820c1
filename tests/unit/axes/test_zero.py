from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.axes.zero import Moved, chunk_rows, held, kept_whole, moved, shards


@given(st.integers(0, 60), st.integers(1, 9))
def test_rows_are_cut_as_torch_chunk_cuts_them(rows: int, ways: int) -> None:
    lengths = [stop - start for start, stop in chunk_rows(rows, ways)]
    expected = [len(chunk) for chunk in torch.arange(rows).chunk(ways)] if rows else []
    assert lengths == expected + [0] * (ways - len(expected))
    assert [row for start, stop in chunk_rows(rows, ways) for row in range(start, stop)] == list(range(rows))


def test_every_rank_gets_a_region_and_scalars_stay_whole() -> None:
    found = shards({"weight": (5, 3), "bias": (2,), "scale": ()}, 4)
    assert {name: [region.ranges for region in regions] for name, regions in found.items()} == {
        "weight": [((0, 2),), ((2, 4),), ((4, 5),), ((5, 5),)],
        "bias": [((0, 1),), ((1, 2),), ((2, 2),), ((2, 2),)],
    }
    assert {region.dim for regions in found.values() for region in regions} == {0}


def test_trained_weights_of_another_dtype_stay_whole() -> None:
    dtypes = {"a": "fp32", "b": "bf16", "frozen": "bf16", "scale": "fp32"}
    shapes = {"a": (4, 4), "b": (4,), "frozen": (9, 9), "scale": ()}
    assert kept_whole(dtypes, shapes, {"a": 64, "b": 8, "scale": 4}) == {"b", "scale"}
    assert kept_whole(dtypes, shapes, {}) == {"scale"}


def test_what_is_moved() -> None:
    # Of four ways a worker lacks three quarters: of two blocks twice and of the rest once, then all gradients once.
    assert moved([400, 400], 200, 4) == Moved(all_gather=1350, reduce_scatter=750, calls=8)
    assert moved([400, 400], 200, 4, microbatches=3).total == 3 * 2100
    assert moved([400], 200, 1).total == 0


@pytest.mark.parametrize("ways", [2, 4])
def test_what_is_held_for_good_falls_with_the_workers_and_what_is_gathered_does_not(ways: int) -> None:
    found = held([400, 400], 200, ways, state_tensors=2)
    assert (found.weights, found.gradients, found.state) == (1000 // ways, 1000 // ways, 2000 // ways)
    assert found.gathered == 4 * 400 + 2 * 200
    assert found.total == 4 * 1000 // ways + found.gathered
