"""Choosing among plans by trying them: successive halving over short trials. Pure: the trial is handed in."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.plan import Plan


@dataclass(frozen=True)
class Tried:
    """What a trial found: the median step of a plan, in seconds, over so many steps."""

    plan: Plan
    step_s: float
    steps: int


def search(
    candidates: Sequence[Plan],
    trial: Callable[[Plan, float], list[float]],
    seconds: float,
    rounds: int = 2,
    enough: Callable[[], bool] = lambda: False,
) -> list[Tried]:
    """Try every candidate briefly, then the better half again for longer; the fastest first.

    Args:
        candidates: at least one plan.
        trial: runs a plan for about so many seconds and returns the times of its steps.
        seconds: for everything together.
        rounds: how often the field is halved.
        enough: asked after each trial of a plan that was tried before, whether there is no time for more.
    """
    times: dict[Plan, list[float]] = {plan: [] for plan in candidates}
    field = list(candidates)
    for number in range(rounds):
        each = seconds / rounds / len(field)
        for plan in field:
            if number == 0 or not enough():
                times[plan] += trial(plan, each)
        field.sort(key=lambda plan: _median(times[plan]))
        field = field[: max(2, -(-len(field) // 2))] if number + 1 < rounds else field
    ranked = sorted(candidates, key=lambda plan: (plan not in field, _median(times[plan])))
    return [Tried(plan, _median(times[plan]), len(times[plan])) for plan in ranked]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("inf")
