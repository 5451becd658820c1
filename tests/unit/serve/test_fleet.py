"""What a fleet makes of messages."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from shoal.serve.crew import Crew
from shoal.serve.fleet import Fleet
from shoal.serve.messages import Asked, Told
from shoal.serve.scaling import ReplicaRange
from shoal.serve.source import ModelSource


def test_a_gateway_that_has_no_numbers_yet_of_a_new_model_is_no_trouble(tmp_path: Path) -> None:
    fleet = Fleet({}, 2, ReplicaRange(), lambda message, fds: None, lambda model: model)
    fleet._active["new"] = Crew(ModelSource(tmp_path, "new"), 2, None)
    fleet.hear({"new": {}, "unknown": {}}, 1.0)
    assert fleet.gateway_numbers == {"new": {}, "unknown": {}}


def test_what_a_gateway_asked_that_is_gone_is_not_told_to_the_next_one(tmp_path: Path) -> None:
    """Each numbers its questions from 1: the next one would take it for the answer to a question of its own."""
    told: list[Told] = []

    def send(message: Any, fds: tuple[int, ...]) -> None:
        told.extend([message] if isinstance(message, Told) else [])

    # Neither can be loaded, which comes to light when both have begun.
    fleet = Fleet({name: tmp_path / name for name in ("first", "second")}, 1, ReplicaRange(1, 1), send, lambda model: model)
    fleet._crews.clear()
    try:
        fleet.take_in(Asked(1, "first", True, {}))
        fleet.gateway_died()
        fleet.take_in(Asked(1, "second", True, {}))
        assert set(fleet._rollouts) == {"first", "second"}
        deadline = time.monotonic() + 120.0
        while fleet._rollouts and time.monotonic() < deadline:
            fleet.step(0.02)
        (answer,) = told
        assert answer.number == 1 and str(tmp_path / "second") in str(answer.sentence)
    finally:
        fleet.close()
