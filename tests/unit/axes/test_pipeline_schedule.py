"""The orders of a pipeline can be carried out, and idle as much as the papers say."""

from __future__ import annotations

import itertools

import pytest

from shoal.axes.pipeline_schedule import (
    SCHEDULES,
    Kind,
    bubble,
    idle,
    in_flight,
    orders,
    rank_of_stage,
    stages_a_rank,
    stages_of_rank,
    traffic,
)
from shoal.errors import PlanError

EQUAL = (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("schedule", "ranks", "micros"), list(itertools.product(SCHEDULES, (1, 2, 3, 4), (1, 2, 3, 5, 8, 13)))
)
def test_every_microbatch_passes_every_stage_once_and_messages_meet(schedule: str, ranks: int, micros: int) -> None:
    found = orders(schedule, ranks, None, micros)
    count = ranks * stages_a_rank(schedule, None)
    every = set(itertools.product(range(count), range(micros)))
    for kind in (Kind.FORWARD, Kind.BACKWARD_WEIGHT if schedule == "zbv" else Kind.BACKWARD):
        done = [(a.stage, a.micro) for order in found for a in order if a.kind is kind]
        assert len(done) == len(every) and set(done) == every
    for rank, order in enumerate(found):
        assert {a.stage for a in order} <= set(stages_of_rank(schedule, ranks, None, rank))
    # What one rank sends to another arrives in the order in which the other expects it.
    for sends, receives, step in (
        (Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD, 1),
        (Kind.SEND_BACKWARD, Kind.RECEIVE_BACKWARD, -1),
    ):
        assert any(a.kind is sends for order in found for a in order) == (ranks > 1)
        for left, right in itertools.permutations(range(ranks), 2):
            sent = [
                (a.stage + step, a.micro)
                for a in found[left]
                if a.kind is sends and rank_of_stage(schedule, ranks, a.stage + step) == right
            ]
            expected = [
                (a.stage, a.micro)
                for a in found[right]
                if a.kind is receives and rank_of_stage(schedule, ranks, a.stage - step) == left
            ]
            assert sent == expected


@pytest.mark.parametrize(("ranks", "micros"), [(2, 8), (4, 8), (4, 16)])
def test_closed_formulas_are_what_going_through_the_orders_gives(ranks: int, micros: int) -> None:
    for schedule, each in (("gpipe", None), ("1f1b", None), ("interleaved", 2), ("interleaved", 3)):
        assert bubble(schedule, ranks, micros, each) == pytest.approx(idle(schedule, ranks, micros, EQUAL, each))
    assert bubble("1f1b", ranks, micros) == pytest.approx((ranks - 1) / (micros + ranks - 1))
    assert bubble("zbv", ranks, micros) == pytest.approx((ranks - 1) / (6 * micros + ranks - 1))
    assert bubble("interleaved", ranks, micros) < bubble("1f1b", ranks, micros)


def test_1f1b_holds_no_more_microbatches_than_ranks_come_after() -> None:
    assert [in_flight("gpipe", 4, rank, 8) for rank in range(4)] == [8, 8, 8, 8]
    assert [in_flight("1f1b", 4, rank, 8) for rank in range(4)] == [4, 3, 2, 1]
    assert [in_flight("zbv", 4, rank, 8) for rank in range(4)] == [8, 8, 8, 8]


def test_traffic_counts_what_leaves_a_rank_both_ways() -> None:
    assert [traffic("1f1b", 3, [10.0, 100.0], rank) for rank in range(3)] == [10.0, 110.0, 100.0]
    # Stages 1 and 2 of the V are on one rank.
    assert [traffic("zbv", 2, [10.0, 100.0, 1.0], rank) for rank in range(2)] == [11.0, 11.0]


def test_whole_backward_passes_are_in_one_part() -> None:
    for order in orders("zbv", 2, None, 4, whole_backward=True):
        kinds = {action.kind for action in order}
        assert Kind.BACKWARD in kinds and not {Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT} & kinds


@pytest.mark.parametrize(("schedule", "interleave"), [("gpipe", 2), ("zbv", 3), ("interleaved", 1), ("2f2b", None)])
def test_numbers_that_a_schedule_has_no_use_for_are_refused(schedule: str, interleave: int | None) -> None:
    with pytest.raises(PlanError, match="interleave=|schedule="):
        stages_a_rank(schedule, interleave)
