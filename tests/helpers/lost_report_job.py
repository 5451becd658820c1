"""``counted_job`` where workers push three units at a time, of which one dies when servers have its push and nobody else knows.

What it had is done again one by one; whoever is at the second of these waits for hours. SHOAL_TEST_CALLS names the folder that
says so: ``dead``, ``first``, ``held``. With ``over`` in it nobody waits, and whoever is at the first of them dies: ``again``.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from counted_job import Counted
from counted_job import job as counted

PUSH_EVERY = 3


def model() -> Counted:
    from shoal.train.remote.worker import RemoteWorker

    folder, report = Path(os.environ["SHOAL_TEST_CALLS"]), RemoteWorker.report

    def is_first(name: str) -> bool:
        try:
            (folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def lost(name: str) -> list[int]:
        said = (folder / name).read_text() if (folder / name).exists() else ""
        return json.loads(said) if said else []

    def report_or_not(axis: RemoteWorker, units: Sequence[int]) -> None:
        over = (folder / "over").exists()
        dead = "dead-over" if over else "dead"
        if len(units) == PUSH_EVERY and is_first(dead):
            (folder / dead).write_text(json.dumps(list(units)))
            os.kill(os.getpid(), signal.SIGKILL)
        if len(units) == 1 and not over and not is_first("first"):
            (folder / "held").touch()
            time.sleep(10_000)
        if len(units) == 1 and over and units[0] in lost(dead) and is_first("again"):
            os.kill(os.getpid(), signal.SIGKILL)
        report(axis, units)

    RemoteWorker.report = report_or_not  # type: ignore[method-assign]
    return Counted()


job = counted.replace(model=model)
