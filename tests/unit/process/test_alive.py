"""Whether a process has ended is told of whoever's child it is, buried or not."""

from __future__ import annotations

import os
import subprocess
import sys

from noisy_job import wait_until

from shoal.process.alive import is_gone, kernel_state


def test_a_process_is_gone_when_it_has_ended_and_not_only_when_it_is_buried() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not is_gone(child.pid) and not is_gone(os.getpid())
    assert child.stdin is not None
    child.stdin.close()
    wait_until(lambda: is_gone(child.pid))
    assert kernel_state(child.pid).startswith("Z")
    child.wait()
    assert is_gone(child.pid) and kernel_state(child.pid) == "gone"
