from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shoal.comm.grid import Grid
from shoal.comm.parts import Region
from shoal.comm.table import FROZEN, ParameterTable
from shoal.errors import PlanError
from shoal.train.describe import describe
from shoal.train.split import Ways, split_table


def model() -> nn.Module:
    """Two layers that can be cut, a weight that two stages share, one that is frozen, and one that cannot be cut."""
    made = nn.Module()
    made.first, made.second = nn.Linear(6, 8), nn.Linear(8, 5)
    made.table = nn.Embedding(9, 6)
    made.frozen = nn.Linear(3, 3, bias=False).requires_grad_(False)
    made.scale = nn.Parameter(torch.tensor(1.0))
    return made


@functools.lru_cache
def table(optimizer: type[torch.optim.Optimizer] = torch.optim.Adam) -> ParameterTable:
    made = model()
    return describe(made, optimizer((p for p in made.parameters() if p.requires_grad), lr=0.1))  # type: ignore[call-arg]


def along(dim: int, total: int, ways: int) -> list[tuple[Region, ...]]:
    cuts = [total * k // ways for k in range(ways + 1)]
    return [(Region(dim, ((a, b),)),) for a, b in itertools.pairwise(cuts)]


def ways_of(grid: Grid) -> Ways:
    regions = {
        "first.weight": along(0, 8, grid.tp), "first.bias": along(0, 8, grid.tp), "second.weight": along(1, 8, grid.tp)
    }  # fmt: skip
    last = grid.pp - 1
    users = {"first.weight": [0], "first.bias": [0], "second.weight": [last], "second.bias": [last]}
    users |= {"table.weight": sorted({0, last}), "frozen.weight": sorted({0, last}), "scale": [last]}
    return Ways(users, regions if grid.tp > 1 else {})


grids = st.builds(
    Grid, dp=st.integers(1, 3), pp=st.integers(1, 3), tp=st.integers(1, 3), sharded=st.booleans()
).filter(lambda g: not (g.sharded and g.pp > 1))


@given(grids)
def test_the_parts_of_each_tensor_cover_it_exactly_once(grid: Grid) -> None:
    base = table()
    found, _ = split_table(base, grid, ways_of(grid), "Adam")
    for spec in base.parameters:
        seen = np.zeros(spec.shape, dtype=int)
        for part in (p for p in found.parameters if p.names == spec.names):
            assert part.whole_shape == spec.shape and part.group == spec.group
            places = [np.arange(n) for n in spec.shape]
            for region in part.regions:
                places[region.dim] = places[region.dim][region.indices()]
            seen[np.ix_(*places)] += 1
            assert part.shape == tuple(map(len, places))
        assert (seen == 1).all()
        # One of them speaks for what there is once a tensor, such as Adam's step.
        assert sum(p.leads for p in found.parameters if p.names == spec.names) == 1


@given(grids)
def test_each_owner_is_one_range_and_no_two_parts_overlap(grid: Grid) -> None:
    found, _ = split_table(table(), grid, ways_of(grid), "Adam")
    trained = [p for p in found.parameters if p.group != FROZEN]
    assert list(found.trained) == trained == list(found.parameters[: len(trained)])
    assert [p.owner for p in trained] == sorted(p.owner for p in trained)
    ends = [0, *(p.offset + p.nbytes for p in found.parameters)]
    assert all(end <= p.offset for end, p in zip(ends, found.parameters, strict=False))
    assert ends[-1] <= found.weight_bytes and trained[-1].offset + trained[-1].nbytes <= found.trained_bytes


@given(grids)
def test_every_rank_finds_what_its_stage_needs_and_all_gradients_are_counted(grid: Grid) -> None:
    ways = ways_of(grid)
    found, holds = split_table(table(), grid, ways, "Adam")
    for rank in range(grid.world_size):
        place = grid.place(rank)
        for name, stages in ways.users.items():
            if place.stage in stages:
                part = found.parameters[holds[grid.owner(rank), name]]
                regions = ways.regions.get(name)
                assert part.regions[: len(regions[place.tensor])] == regions[place.tensor] if regions else True
    # Where two stages share a weight, one owns it, and the other's gradient has a place of its own. Along the tensor axis all
    # have the same gradient of what is not cut, so that one of them is enough.
    echoed = {(found.parameters[e.parameter].name, e.owner) for e in found.echoes}
    if grid.sharded:
        assert {name for name, _ in echoed} == ({"scale"} if grid.dp > 1 else set())
    else:
        owner = next(part.owner for part in found.trained if part.name == "table.weight")
        assert echoed == {("table.weight", grid.owner_at(s, 0)) for s in ways.users["table.weight"]} - {("table.weight", owner)}


def test_optimizer_state_is_cut_like_its_parameter() -> None:
    grid = Grid(tp=2)
    base = table(torch.optim.NAdam)
    found, _ = split_table(base, grid, ways_of(grid), "NAdam")
    shapes = {(found.parameters[s.parameter].name, found.parameters[s.parameter].owner, s.key): s.shape for s in found.states}
    assert shapes["first.weight", 0, "exp_avg"] == shapes["first.weight", 1, "exp_avg"] == (4, 6)
    assert shapes["second.weight", 1, "exp_avg_sq"] == (5, 4)
    assert shapes["second.weight", 1, "mu_product"] == ()
    assert ("second.bias", 1, "exp_avg") not in shapes


@pytest.mark.parametrize("grid", [Grid(tp=2), Grid(dp=2, sharded=True)])
def test_an_optimizer_that_needs_whole_tensors_is_refused_where_they_are_cut(grid: Grid) -> None:
    with pytest.raises(PlanError, match=r"^Adafactor needs whole tensors and the plan cuts \w+\.\w+; use dp and pp only, or"):
        split_table(table(torch.optim.Adafactor), grid, ways_of(grid), "Adafactor")


def test_an_optimizer_that_needs_whole_tensors_may_go_with_a_pipeline() -> None:
    found, _ = split_table(table(torch.optim.Adafactor), Grid(pp=2), ways_of(Grid(pp=2)), "Adafactor")
    assert not any(part.regions for part in found.parameters)
    assert {part.owner for part in found.trained} == {0, 1}
