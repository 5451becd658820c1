"""Runs by the command line that keep a log of pushes, and are killed with all of their processes at once."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from noisy_job import command, environment, gone, kill, processes, wait_until


def run_command(target: str, run: Path, *more: str) -> tuple[list[str], dict[str, str]]:
    """The words of a command, and its environment: as often as the test has set, there are checkpoints."""
    words = command(run, *more)
    words[words.index("train") + 1] = target
    return words, environment(SHOAL_CHECKPOINT_S=os.environ["SHOAL_CHECKPOINT_S"])


def train(target: str, run: Path, *more: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """Train by the command line; what --json says, and what was said beside."""
    words, own = run_command(target, run, *more)
    done = subprocess.run(words, env=own, capture_output=True, text=True, timeout=250)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout), done.stderr


@contextlib.contextmanager
def killed_whole(target: str, run: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """Train meanwhile; then everything is killed with -9 at once, while it is well under way."""
    family = list[int]()
    words, own = run_command(target, run, *more)
    with subprocess.Popen(words, env=own, stdout=-3, stderr=-3) as process:
        try:
            yield process
            family = processes(run)
            assert process.poll() is None and len(family) >= 5
        finally:
            for pid in {process.pid, *family}:
                kill(pid)
            process.wait()
    wait_until(lambda: gone(family))
