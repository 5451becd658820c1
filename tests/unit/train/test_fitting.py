"""Which plans are worth trying is read from what passes took while rewrites were looked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from shoal.plan import Plan
from shoal.planner.candidates import local_candidates
from shoal.train.fitting import Fitting
from shoal.train.tune import Tuned


class _Template:
    """Answers as a template that has measured: by the layout, seconds of a pass over eight samples."""

    def __init__(self, **passes_s: float) -> None:
        self._passes_s = passes_s

    def call(self, method: str, question: Any, beat_s: float | None, timeout_s: float) -> Tuned:
        assert method == "tune"
        return Tuned((), 0, (), 8, self._passes_s[question.layout])


def _promising(batch: int, **passes_s: float) -> tuple[list[str], list[str]]:
    facts: Any = SimpleNamespace(batch_size=batch, batchnorm=True)
    template: Any = _Template(**passes_s)
    fitting = Fitting(Plan.parse("auto"), facts, template, lambda key: None, lambda key, found: None)
    candidates = fitting.fit(local_candidates(Plan.parse("auto"), 2, batch, images=True))
    assert len(candidates) == 6
    found, said = fitting.promising(candidates, 2)
    return [f"{plan.dp}x{plan.threads} {plan.layout}" for plan in found], said


def test_a_quick_job_is_tried_in_every_way() -> None:
    found, said = _promising(64, contiguous=0.001, channels_last=0.0012)
    assert len(found) == 6 and said == []


def test_a_layout_that_is_far_behind_is_left_out() -> None:
    found, said = _promising(64, contiguous=0.004, channels_last=0.002)
    assert found == ["1x1 channels_last", "1x2 channels_last", "2x1 channels_last"]
    assert said == ["layout=contiguous was not tried: a pass takes 2.0 × as long as in channels_last."]


def test_long_steps_are_not_tried_with_cores_that_do_nothing() -> None:
    found, said = _promising(64, contiguous=0.2, channels_last=0.19)
    assert found == ["1x2 contiguous", "1x2 channels_last", "2x1 contiguous", "2x1 channels_last"]
    assert said == ["Plans that leave cores idle were not tried: a step takes 1.5 s on one thread."]
