"""Which processes make up a worker, and that they begin and end together."""

import pytest

from shoal.plan import Plan
from shoal.train.remote.teams import Teams, member_of, members_of, parts_of, place_of, size_of


@pytest.mark.parametrize(
    ("plan", "parts"),
    [
        ("ps=1,workers=3", (0,)),
        ("tp=2,ps=1", (0, 1)),
        # The loss comes out where the last stage is.
        ("pp=3,ps=1", (2, 0, 1)),
        ("pp=2,schedule=zbv,ps=1", (0, 1)),
        ("pp=2,schedule=interleaved,interleave=2,ps=1", (1, 0)),
        ("pp=2,tp=2,ps=1", (2, 0, 1, 3)),
    ],
)
def test_the_head_is_where_the_loss_comes_out(plan: str, parts: tuple[int, ...]) -> None:
    assert parts_of(Plan.parse(plan)) == parts
    assert size_of(Plan.parse(plan)) == len(parts)


def test_processes_of_a_worker_are_neighbours_and_each_is_found_again() -> None:
    plan = Plan.parse("tp=3,ps=2,workers=2,sync")
    found = [member_of(number, plan) for number in range(6)]
    first = [("worker", 0), ("partner", 0), ("partner", 1)]
    assert found == [*first, ("worker", 1), ("partner", 2), ("partner", 3)] and members_of(0, plan) == first
    assert [place_of(role, rank, plan) for role, rank in found] == [(w, place) for w in (0, 1) for place in range(3)]


def test_one_that_is_lost_takes_the_others_with_it_once_they_have_begun() -> None:
    plan = Plan.parse("tp=2,ps=1,workers=2,sync")
    teams = Teams(plan)
    # They wait for it, and go on with the next one in its place.
    assert teams.break_up("partner", 1) == [("partner", 1)]
    begun = teams.begin(1, "tcp://127.0.0.1:5", {("worker", 1): 20, ("partner", 1): 21})
    again = teams.begin(0, "tcp://127.0.0.1:6", {("worker", 0): 10, ("partner", 0): 11})
    assert begun.token != again.token and len(begun.token) == 32
    assert teams.break_up("partner", 1) == [("worker", 1), ("partner", 1)]
    assert teams.is_broken("worker", 1, 20) and not teams.is_broken("worker", 1, 30) and not teams.is_broken("worker", 0, 10)
    assert set(teams.begun) == {0}
    # A process may get the number of one that has ended.
    teams.begin(1, "tcp://127.0.0.1:7", {("worker", 1): 20, ("partner", 1): 22})
    assert not teams.is_broken("worker", 1, 20) and teams.is_broken("partner", 1, 21)
