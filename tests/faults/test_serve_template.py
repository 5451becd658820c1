"""The template of a service is killed just when a process is asked of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import bundles
from noisy_job import gone, wait_until

from shoal.serve.crew import Crew
from shoal.serve.source import ModelSource


def _kill_all(crew: Crew) -> None:
    pids = [row["pid"] for row in crew.processes()]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    # So that the end of the template's channel is there before it is asked.
    wait_until(lambda: gone(pids))


def test_a_replica_is_replaced_though_the_template_dies_when_it_is_asked_for_one(tmp_path: Path) -> None:
    crew = Crew(ModelSource(bundles.odd(tmp_path / "odd")), cores=1, replicas=1)
    down: list[int] = []
    crew.on_down = down.append

    def until(true: Callable[[], object]) -> None:
        end = time.monotonic() + 60.0
        while not true():
            assert time.monotonic() < end
            crew.poll(0.05)

    def released() -> bool:
        # What a gateway says of each that is down.
        while down:
            crew.release(down.pop())
        return bool(crew.ready())

    try:
        crew.start()
        crew.load()
        crew.choose()
        os.kill(next(row["pid"] for row in crew.processes() if row["role"] == "replica"), signal.SIGKILL)
        until(lambda: down)
        # There is no spare process either: the template is asked for one.
        os.kill(next(row["pid"] for row in crew.processes() if row["role"] == "standby"), signal.SIGKILL)
        until(lambda: all(row["role"] == "template" for row in crew.processes()))
        _kill_all(crew)
        until(released)
        _kill_all(crew)
        crew.add()
        until(released)
        os.kill(next(row["pid"] for row in crew.processes() if row["role"] == "replica"), signal.SIGKILL)
        until(lambda: down)
        until(released)
        # The gateway dies as well: nobody says then that a ring is free, also not of who is found dead while one is replaced.
        until(lambda: len(crew.ready()) == 2)
        for role in ("replica", "standby"):
            os.kill(max((row["rank"], row["pid"]) for row in crew.processes() if row["role"] == role)[1], signal.SIGKILL)
        until(lambda: down and all(row["role"] != "standby" for row in crew.processes()))
        _kill_all(crew)
        crew.release_all()
        until(lambda: len(crew.ready()) == 2)
    finally:
        crew.close()
