from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.grid import Grid, Place
from shoal.plan import Plan

grids = st.builds(Grid, dp=st.integers(1, 4), pp=st.integers(1, 4), tp=st.integers(1, 4), sharded=st.booleans()).filter(
    lambda g: not (g.sharded and g.pp > 1)
)


@given(grids)
def test_each_rank_has_a_place_of_its_own(grid: Grid) -> None:
    places = [grid.place(rank) for rank in range(grid.world_size)]
    assert len(set(places)) == grid.world_size == grid.dp * grid.pp * grid.tp
    assert [grid.rank(p.data, p.stage, p.tensor) for p in places] == list(range(grid.world_size))


@given(grids)
def test_teams_divide_the_ranks_and_hold_a_whole_model(grid: Grid) -> None:
    teams = {grid.team(rank) for rank in range(grid.world_size)}
    assert sorted(rank for team in teams for rank in team) == list(range(grid.world_size))
    for team in teams:
        assert {grid.owner(rank) for rank in team} == set(range(grid.owners))


@given(grids)
def test_owners_divide_the_ranks_and_ranks_of_one_have_the_same_part(grid: Grid) -> None:
    by_owner = [grid.ranks_of(owner) for owner in range(grid.owners)]
    assert sorted(rank for ranks in by_owner for rank in ranks) == list(range(grid.world_size))
    for owner, ranks in enumerate(by_owner):
        assert len({(grid.place(r).stage, grid.place(r).tensor) for r in ranks}) == 1
        place = grid.place(ranks[0])
        assert grid.owner_at(place.stage, place.tensor, place.data) == owner
        assert len(ranks) == (1 if grid.sharded else grid.dp)


@given(grids)
def test_along_the_data_axis_are_the_ranks_at_the_same_place(grid: Grid) -> None:
    for rank in range(grid.world_size):
        place, others = grid.place(rank), grid.along_data(rank)
        assert others[place.data] == rank
        assert [grid.place(r) for r in others] == [Place(d, place.stage, place.tensor) for d in range(grid.dp)]
        assert 0 <= grid.stripe(rank) < grid.stripes


def test_the_tensor_axis_is_the_innermost() -> None:
    grid = Grid.of(Plan.parse("dp=2,tp=2,pp=2"))
    assert grid.team(5) == (4, 5, 6, 7)
    assert grid.place(5) == Place(1, 0, 1)


def test_only_some_plans_split_the_model() -> None:
    split = {
        text: Grid.of(Plan.parse(text)).splits_model for text in ("dp=4", "dp=2,zero=2", "dp=2,zero=3", "tp=2", "pp=2")
    }
    assert [text for text, is_split in split.items() if is_split] == ["dp=2,zero=3", "tp=2", "pp=2"]
