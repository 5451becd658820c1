from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.parts import Region, part_shape, put, runs, take


@st.composite
def cuts(draw: Any) -> tuple[torch.Tensor, list[Region]]:
    """A tensor whose elements are numbered, and up to three regions that are applied one after the other."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    whole = torch.arange(int(np.prod(shape))).view(shape)
    regions, now = [], list(shape)
    for _ in range(draw(st.integers(0, 3))):
        dim = draw(st.integers(0, len(shape) - 1))
        borders = sorted(
            draw(st.lists(st.integers(0, now[dim]), min_size=2, max_size=4).filter(lambda b: len(b) % 2 == 0))
        )
        regions.append(Region(dim, tuple(zip(borders[::2], borders[1::2], strict=True))))
        now[dim] = regions[-1].length
    return whole, regions


@given(cuts())
def test_what_is_taken_has_the_shape_of_the_part_and_the_elements_of_the_regions(cut: tuple[Any, list[Region]]) -> None:
    whole, regions = cut
    expected = whole
    for region in regions:
        expected = expected.index_select(region.dim, torch.from_numpy(region.indices()))
    part = take(whole, regions)
    assert tuple(part.shape) == part_shape(whole.shape, regions)
    assert torch.equal(part, expected)


@given(cuts())
def test_what_is_put_changes_the_part_and_nothing_else(cut: tuple[Any, list[Region]]) -> None:
    whole, regions = cut
    numbers = take(whole, regions).clone()
    changed = whole.clone()
    put(changed, regions, -1 - numbers)
    assert torch.equal(take(changed, regions), -1 - numbers)
    untouched = torch.ones(whole.numel(), dtype=torch.bool)
    untouched[numbers.reshape(-1)] = False
    assert torch.equal(changed.view(-1)[untouched], whole.reshape(-1)[untouched])


@given(cuts(), st.data())
def test_runs_say_where_each_element_of_a_part_lies(cut: tuple[Any, list[Region]], data: Any) -> None:
    whole, regions = cut
    part = take(whole, regions).reshape(-1)
    start = data.draw(st.integers(0, part.numel()))
    stop = data.draw(st.integers(start, part.numel()))
    at = start
    for low, first, count in runs(whole.shape, regions, start, stop):
        assert low == at and count > 0
        assert part[low : low + count].tolist() == list(range(first, first + count))
        at += count
    assert at == stop


def test_a_part_along_one_range_is_a_view() -> None:
    whole = torch.zeros(4, 6)
    take(whole, [Region(0, ((1, 3),)), Region(1, ((2, 6),))]).fill_(1)
    assert whole.sum() == 8


def test_query_key_and_value_are_cut_by_heads() -> None:
    # Two heads of width 2 in each of the three: the second worker has the second head of each.
    assert take(torch.arange(12), [Region(0, ((2, 4), (6, 8), (10, 12)))]).tolist() == [2, 3, 6, 7, 10, 11]
