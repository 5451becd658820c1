"""Work aside: its answer, its errors, and an end where it takes too long."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil
import pytest

from shoal.process.aside import aside


def test_what_takes_too_long_ends_with_all_that_it_started(tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / "pid").write_text(str(subprocess.Popen(["sleep", "60"]).pid), encoding="utf-8")
        (tmp_path / "pid").rename(tmp_path / "started")
        time.sleep(60)

    with pytest.raises(TimeoutError, match="^It took longer than 2 s to sleep"):
        aside(work, "sleep", 2.0)
    pid = int((tmp_path / "started").read_text(encoding="utf-8"))
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("what it had started goes on")


def test_an_answer_in_time_is_the_answer() -> None:
    assert aside(lambda: 6 * 7, "multiply", 60.0) == 42
    assert aside(lambda: 6 * 7, "multiply") == 42
