"""What hears of a run's events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.observe.events import EventLog
from shoal.train.driver import Emitter


def test_what_somebody_is_told_is_in_the_file_already(tmp_path: Path) -> None:
    """A run that was killed looks there for what it has told, and tells the rest."""
    path, told = tmp_path / "events.jsonl", list[int]()

    def on_event(event: dict[str, Any]) -> None:
        told.append(event["shard"])
        assert [json.loads(line)["shard"] for line in path.read_text().splitlines()] == told

    with EventLog(path) as log:
        emit = Emitter(log, [], on_event)
        for shard in range(3):
            emit("push_ack", rank=0, epoch=1, batch=1, shard=shard, versions=[1], staleness=0)
    assert told == [0, 1, 2]
