"""What a fleet makes of messages; its crews are started nowhere here."""

from __future__ import annotations

from pathlib import Path

from shoal.serve.crew import Crew
from shoal.serve.fleet import Fleet
from shoal.serve.scaling import ReplicaRange
from shoal.serve.source import ModelSource


def test_a_gateway_that_has_no_numbers_yet_of_a_new_model_is_no_trouble(tmp_path: Path) -> None:
    fleet = Fleet({}, 2, ReplicaRange(), lambda message, fds: None, lambda model: model)
    fleet._active["new"] = Crew(ModelSource(tmp_path, "new"), 2, None)
    fleet.hear({"new": {}, "unknown": {}}, 1.0)
    assert fleet.gateway_numbers == {"new": {}, "unknown": {}}
