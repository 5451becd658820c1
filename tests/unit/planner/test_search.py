from __future__ import annotations

import pytest

from shoal.plan import Plan
from shoal.planner.search import search

PLANS = [Plan(dp=dp, threads=1) for dp in (1, 2, 3, 4, 5)]


def test_the_fastest_comes_first_and_the_slow_half_is_tried_once() -> None:
    speed = dict(zip(PLANS, (5.0, 1.0, 4.0, 2.0, 3.0), strict=True))
    tried: list[tuple[Plan, float]] = []

    def trial(plan: Plan, seconds: float) -> list[float]:
        tried.append((plan, seconds))
        return [speed[plan]] * 4

    found = search(PLANS, trial, seconds=10.0)
    assert [entry.step_s for entry in found] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [entry.plan for entry in found[:3]] == [PLANS[1], PLANS[3], PLANS[4]]
    again = [plan for plan, _ in tried[len(PLANS) :]]
    assert again == [PLANS[1], PLANS[3], PLANS[4]]
    assert [entry.steps for entry in found] == [8, 8, 8, 4, 4]
    assert sum(seconds for _, seconds in tried) == pytest.approx(10.0)


def test_a_lucky_first_trial_does_not_win_over_the_second() -> None:
    times = {PLANS[0]: [[1.0], [9.0, 9.0]], PLANS[1]: [[2.0], [2.0, 2.0]]}
    found = search(PLANS[:2], lambda plan, seconds: times[plan].pop(0), seconds=1.0)
    assert found[0].plan == PLANS[1]


def test_a_plan_without_a_single_step_is_never_the_choice() -> None:
    found = search(PLANS[:2], lambda plan, seconds: [] if plan == PLANS[0] else [3.0], seconds=1.0)
    assert found[0].plan == PLANS[1]
    assert found[1].step_s == float("inf")
