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
        (tmp_path / "pid").write_text(str(subprocess.Popen(["sleep", "600"]).pid), encoding="utf-8")
        (tmp_path / "pid").rename(tmp_path / "started")
        time.sleep(600)

    # A busy machine may need longer to start anything at all.
    for limit_s in (1, 4, 16, 64):
        with pytest.raises(TimeoutError, match=f"^It took longer than {limit_s} s to sleep"):
            aside(work, "sleep", float(limit_s))
        if (tmp_path / "started").exists():
            break
    pid = int((tmp_path / "started").read_text(encoding="utf-8"))
    deadline = time.monotonic() + 60
    while _runs(pid):
        assert time.monotonic() < deadline, "what it had started goes on"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_answer_in_time_is_the_answer() -> None:
    assert aside(lambda: 6 * 7, "multiply", 60.0) == 42
    assert aside(lambda: 6 * 7, "multiply") == 42
