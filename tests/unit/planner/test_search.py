from __future__ import annotations

import pytest

from shoal.plan import Plan
from shoal.planner.search import Tried, overlap, rank, search

PLANS = [Plan(dp=dp, threads=1) for dp in (1, 2, 3, 4, 5)]


def test_plans_are_tried_in_turn_and_the_hopeless_ones_once() -> None:
    speed = dict(zip(PLANS, (5.0, 1.0, 4.0, 1.2, 3.0), strict=True))
    tried: list[tuple[Plan, float]] = []

    def trial(plan: Plan, seconds: float) -> list[float]:
        tried.append((plan, seconds))
        return [speed[plan]] * 4

    found = search(PLANS, trial, seconds=10.0, rounds=3)
    assert [entry.step_s for entry in found] == [1.0, 1.2, 3.0, 4.0, 5.0]
    assert [plan for plan, _ in tried] == [*PLANS, PLANS[1], PLANS[3], PLANS[1], PLANS[3]]
    assert [entry.steps for entry in found] == [12, 12, 4, 4, 4]
    assert sum(seconds for _, seconds in tried) == pytest.approx(10.0)


def test_two_plans_stay_however_slow_the_second_is() -> None:
    tried: list[Plan] = []

    def trial(plan: Plan, seconds: float) -> list[float]:
        tried.append(plan)
        return [float(PLANS.index(plan)) + 1]

    search(PLANS[:3], trial, seconds=1.0, rounds=2)
    assert tried == [*PLANS[:3], *PLANS[:2]]


@pytest.mark.parametrize("odd", [0.5, 9.0])
def test_one_round_that_was_lucky_or_disturbed_decides_nothing(odd: float) -> None:
    times = {PLANS[0]: [[odd] * 50, [2.0], [2.0]], PLANS[1]: [[1.9], [1.9], [1.9]]}
    if odd > 2:
        times = {PLANS[1]: times[PLANS[1]], PLANS[0]: [[1.8], [odd] * 50, [1.8]]}
    found = search(PLANS[:2], lambda plan, seconds: times[plan].pop(0), seconds=1.0, rounds=3, further=0)
    assert found[0].plan == (PLANS[1] if odd < 2 else PLANS[0])


def test_when_there_is_no_time_left_every_plan_has_been_tried_once() -> None:
    tried: list[Plan] = []
    search(PLANS, lambda plan, seconds: tried.append(plan) or [1.0], seconds=1.0, enough=lambda: True)
    assert tried == PLANS


def test_among_equals_the_favourite_is_taken() -> None:
    found = [Tried(PLANS[0], 1.0, 1), Tried(PLANS[1], 1.02, 1), Tried(PLANS[2], 1.05, 1)]
    assert [t.plan for t in rank(found, lambda plan: plan == PLANS[1])] == [PLANS[1], PLANS[0], PLANS[2]]
    assert [t.plan for t in rank(found, lambda plan: plan == PLANS[2])] == PLANS[:3]
    assert [t.plan for t in rank(found[::-1])] == PLANS[:3]
    speed = {t.plan: t.step_s for t in found}
    chosen = search(PLANS[:3], lambda plan, seconds: [speed[plan]], 1.0, favourite=lambda plan: plan == PLANS[1])
    assert chosen[0].plan == PLANS[1]


def test_a_plan_without_a_single_step_is_never_the_choice() -> None:
    found = search(PLANS[:2], lambda plan, seconds: [] if plan == PLANS[0] else [3.0], seconds=1.0)
    assert found[0].plan == PLANS[1]
    assert found[1].step_s == float("inf")


@pytest.mark.parametrize(("favourites", "more"), [((), 2), ((0, 1), 2), ((0,), 0)])
def test_the_fastest_two_are_tried_further_until_they_are_told_apart(favourites: tuple[int, ...], more: int) -> None:
    # The first three rounds say that the first is the faster; whoever goes on sees that it is not.
    rounds = {PLANS[0]: [1.0, 1.3, 1.0, 1.3, 1.3], PLANS[1]: [1.1, 1.1, 1.2, 1.1, 1.1], PLANS[2]: [2.0]}
    tried: list[Plan] = []

    def trial(plan: Plan, seconds: float) -> list[float]:
        tried.append(plan)
        return [rounds[plan].pop(0)]

    found = search(
        PLANS[:3], trial, seconds=1.0, rounds=3, favourite=lambda plan: plan in [PLANS[k] for k in favourites], further=2
    )
    assert len(tried) == 7 + 2 * more
    assert found[0].plan == (PLANS[1] if more else PLANS[0])


def test_rounds_that_have_nothing_in_common_tell_plans_apart() -> None:
    assert overlap([1.0, 1.2, 1.1], [1.2, 1.3, 1.4])
    assert not overlap([1.0, 1.1, 1.2], [1.25, 1.3, 1.4])
    # One round in four may have been disturbed on either side.
    assert not overlap([1.0, 1.1, 1.2, 9.0], [0.1, 1.3, 1.3, 1.4])
    assert not overlap([], [1.0])
