from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.grid import Grid
from shoal.comm.table import (
    ALIGNMENT,
    FROZEN,
    ParameterTable,
    TensorSpec,
    align,
    chunks_of,
    deal_tensors,
    lane_of,
    slice_bounds,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def table_of(sizes: list[tuple[int, int]], splittable: bool = True) -> ParameterTable:
    """A table of 1-D parameters from (elements, index of the dtype), and a frozen one after them."""
    specs, at = [], 0
    for index, (numel, dtype) in enumerate(sorted(sizes, key=lambda size: size[1])):
        specs.append(TensorSpec((f"p{index}",), (numel,), DTYPES[dtype], at, 0))
        at = align(at + specs[-1].nbytes)
    frozen = TensorSpec(("frozen",), (5,), torch.float32, at, FROZEN)
    return ParameterTable((*specs, frozen), (), at, align(at + frozen.nbytes), 0, True, splittable=splittable)


tables = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 2)), min_size=1, max_size=8).map(table_of)


@given(st.integers(0, 10_000), st.integers(1, 9))
def test_slices_are_neighbours_that_begin_on_cache_lines_and_are_of_nearly_equal_size(total: int, parts: int) -> None:
    bounds = slice_bounds(total, parts)
    assert [a for a, _ in bounds] + [total] == [0] + [b for _, b in bounds]
    assert all(a % ALIGNMENT == 0 or a == total for a, _ in bounds)
    sizes = [-(-(b - a) // ALIGNMENT) for a, b in bounds]
    assert max(sizes) - min(sizes) <= 1


@given(tables, st.integers(1, 6), st.sampled_from([64, 192, 1 << 20]))
def test_chunks_of_all_slices_cover_every_trained_element_exactly_once(
    table: ParameterTable, parts: int, chunk_bytes: int
) -> None:
    seen = [np.zeros(spec.numel, dtype=int) for spec in table.trained]
    for rank in range(parts):
        lane = lane_of(table, rank, Grid(dp=parts), local=False)
        end = lane.start
        for chunk in chunks_of(table, lane.start, lane.stop, chunk_bytes):
            assert end <= chunk.start < chunk.stop <= lane.stop
            end = chunk.stop
            assert chunk.stop - chunk.start <= chunk_bytes
            assert len({table.trained[piece.parameter].dtype for piece in chunk.pieces}) == 1
            for piece in chunk.pieces:
                spec = table.trained[piece.parameter]
                assert chunk.start <= spec.offset + piece.start * spec.dtype.itemsize
                assert spec.offset + piece.stop * spec.dtype.itemsize <= chunk.stop
                seen[piece.parameter][piece.start : piece.stop] += 1
    assert all((count == 1).all() for count in seen)


@given(tables, st.integers(1, 6))
def test_dealing_gives_every_tensor_to_one_worker(table: ParameterTable, parts: int) -> None:
    hands = deal_tensors(table, parts)
    assert len(hands) == parts
    assert sorted(index for hand in hands for index in hand) == list(range(len(table.trained)))
    loads = [sum(table.trained[index].nbytes for index in hand) for hand in hands]
    # Greedy: the fullest hand was the emptiest before it took its last tensor.
    assert max(loads) - min(loads) <= max(spec.nbytes for spec in table.trained)


def test_an_optimizer_that_looks_across_tensors_gets_them_all_in_one_place() -> None:
    table = table_of([(3, 0), (9, 0), (4, 1)], splittable=False)
    assert deal_tensors(table, 3) == [[0, 1, 2], [], []]


def test_a_worker_that_trains_alone_updates_all_of_its_replica_from_its_own_gradients() -> None:
    table = table_of([(3, 0), (90, 0)])
    lane = lane_of(table, 1, Grid(dp=3), local=True)
    assert (lane.start, lane.stop, lane.sources, lane.replica) == (0, table.trained_bytes, (1,), 1)
