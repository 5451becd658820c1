"""Choosing among plans by trying them in turn, in short rounds. Pure: the trial is handed in."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.plan import Plan

HOPELESS = 1.3
"""After each round plans are dropped that take so many times as long as the fastest."""
TIE = 1.03
"""Two plans are equals where one takes at most so many times as long as the other."""


@dataclass(frozen=True)
class Tried:
    """What trials found: a plan's step in seconds, the median of its rounds' medians, over so many steps."""

    plan: Plan
    step_s: float
    steps: int


def search(
    candidates: Sequence[Plan],
    trial: Callable[[Plan, float], list[float]],
    seconds: float,
    rounds: int = 4,
    enough: Callable[[], bool] = lambda: False,
    favourite: Callable[[Plan], bool] = lambda plan: False,
    further: int = 4,
) -> list[Tried]:
    """Try all candidates in turn, again and again, so that whatever else the machine does disturbs all of them alike.

    Args:
        candidates: at least one plan.
        trial: runs a plan for about so many seconds and returns the times of its steps.
        seconds: for everything together.
        rounds: how often each plan is tried that is not hopeless; two are always kept.
        enough: asked after each trial of a plan that was tried before, whether there is no time for more.
        favourite: which plans to take among equals.
        further: how often the two fastest are tried once more, in turn, where their rounds do not tell them apart.

    Returns the best first; plans that were dropped come last.
    """
    medians: dict[Plan, list[float]] = {plan: [] for plan in candidates}
    steps = dict.fromkeys(candidates, 0)
    field = list(candidates)
    for number in range(rounds):
        each = seconds / rounds / len(field)
        for plan in field:
            if number and enough():
                break
            times = trial(plan, each)
            steps[plan] += len(times)
            if times:
                medians[plan].append(statistics.median(times))
        field.sort(key=lambda plan: _median(medians[plan]))
        limit = _median(medians[field[0]]) * HOPELESS
        field = [plan for place, plan in enumerate(field) if place < 2 or _median(medians[plan]) <= limit]
    each = seconds / rounds / 2
    for _ in range(further):
        field.sort(key=lambda plan: _median(medians[plan]))
        pair = field[:2]
        # Of equals of which one is a favourite that one is taken, whichever is a little faster.
        open_still = len(pair) == 2 and favourite(pair[0]) == favourite(pair[1]) and overlap(*(medians[plan] for plan in pair))
        if not open_still or enough():
            break
        for plan in pair:
            times = trial(plan, each)
            steps[plan] += len(times)
            if times:
                medians[plan].append(statistics.median(times))
    tried = [Tried(plan, _median(medians[plan]), steps[plan]) for plan in candidates]
    return rank([t for t in tried if t.plan in field], favourite) + rank([t for t in tried if t.plan not in field])


def rank(tried: Sequence[Tried], favourite: Callable[[Plan], bool] = lambda plan: False) -> list[Tried]:
    """The fastest first, but before it a favourite that is its equal."""
    found = sorted(tried, key=lambda entry: entry.step_s)
    best = next((t for t in found if favourite(t.plan) and t.step_s <= found[0].step_s * TIE), None)
    return found if best is None else [best, *(t for t in found if t is not best)]


def overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two plans' rounds do not tell them apart: the middle halves of what they measured have something in common."""
    if not one or not other:
        return False
    low, high = zip(_middle(one), _middle(other), strict=True)
    return max(low) <= min(high)


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """Between which values the middle half lies; of three and fewer, all."""
    ordered = sorted(values)
    cut = len(ordered) // 4
    return ordered[cut], ordered[-1 - cut]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("inf")
