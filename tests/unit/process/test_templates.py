"""Templates that are forked from one that has imported everything: as good as those that were started, and none the worse when
it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from noisy_job import gone, wait_until

from shoal.process.channel import ChannelClosed
from shoal.process.supervisor import Supervisor, TemplateLost
from shoal.process.templates import Ground

_LOAD_S = 60.0


@pytest.fixture
def ground() -> Iterator[Ground]:
    made = Ground()
    made.start()
    yield made
    made.close()


def _loaded(ground: Ground, letters: str, gentle: bool = False) -> Supervisor:
    """A supervisor whose template holds a Counter of letters."""
    supervisor = Supervisor(gentle=gentle, ground=ground)
    supervisor.start()
    supervisor.load("collections:Counter", letters, _LOAD_S)
    return supervisor


def test_templates_of_one_ground_hold_each_their_own_and_outlive_it(ground: Ground) -> None:
    one, two = _loaded(ground, "aab"), _loaded(ground, "bccc", gentle=True)
    try:
        assert one.call("most_common", 1) == [("a", 2)] and two.call("most_common", 1) == [("c", 3)]
        first = ground.pid
        assert first is not None
        # Each in a session of its own, so that each gives way by itself.
        assert {os.getsid(s.template_pid) for s in (one, two)} == {s.template_pid for s in (one, two)}
        assert {row["role"] for row in one.processes()} == {"supervisor", "template"}
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: gone([first]))
        assert one.call("most_common", 1) == [("a", 2)]
        assert one.fork().pid in one.children
        # Another template comes from another ground, and the old one is none of its business.
        os.kill(two.template_pid, signal.SIGKILL)
        with pytest.raises(TemplateLost):
            two.call("most_common", 1)
        two.restart(_LOAD_S)
        assert two.call("most_common", 1) == [("c", 3)] and two.template_deaths == 1
        assert ground.pid not in (None, first)
    finally:
        pids = [one.template_pid, two.template_pid, *one.children]
        one.close()
        two.close()
    assert gone(pids)


def test_how_a_template_ended_is_known_from_the_ground(ground: Ground) -> None:
    supervisor = _loaded(ground, "a")
    try:
        os.kill(supervisor.template_pid, signal.SIGKILL)
        with pytest.raises(TemplateLost, match=r"\(SIGKILL\)"):
            supervisor.call("most_common")
        assert not supervisor.alive()
    finally:
        supervisor.close()


def test_a_supervisor_may_close_before_its_template_is_there(ground: Ground) -> None:
    # The ground is still importing: nobody waits for that.
    early = Supervisor(ground=ground)
    early.start()
    assert early.processes()[1:] == []
    early.close()
    late = _loaded(ground, "a")
    try:
        # What was forked for nobody has found that out.
        children = Path(f"/proc/{ground.pid}/task/{ground.pid}/children")
        wait_until(lambda: children.read_text().split() == [str(late.template_pid)])
    finally:
        late.close()


def test_a_ground_that_dies_before_it_has_forked_is_followed_by_another(ground: Ground) -> None:
    first = ground.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    supervisor = Supervisor(gentle=True, ground=ground)
    supervisor.start()
    os.kill(first, signal.SIGKILL)
    try:
        supervisor.load("collections:Counter", "aab", _LOAD_S)
        assert supervisor.call("most_common", 1) == [("a", 2)]
        assert ground.pid not in (None, first)
    finally:
        supervisor.close()


def test_a_ground_that_cannot_live_is_no_reason_to_wait() -> None:
    broken = Ground(preload=("there_is_no_such_module",))
    supervisor = Supervisor(ground=broken)
    supervisor.start()
    try:
        with pytest.raises(TemplateLost):
            supervisor.load("collections:Counter", "a", _LOAD_S)
        with pytest.raises((TemplateLost, ChannelClosed)):
            _ = supervisor.template_pid
    finally:
        supervisor.close()
        broken.close()


_ABANDONED = """
import os, sys
from shoal.process.supervisor import Supervisor
from shoal.process.templates import Ground
ground = Ground()
supervisor = Supervisor(ground=ground)
supervisor.start()
supervisor.load("collections:Counter", "a", 60.0)
print(ground.pid, supervisor.template_pid, supervisor.fork().pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_nothing_is_left_when_the_supervisor_is_killed() -> None:
    said = subprocess.run([sys.executable, "-c", _ABANDONED], capture_output=True, text=True, timeout=_LOAD_S)
    pids = [int(word) for word in said.stdout.split()]
    assert len(pids) == 3, said.stderr
    wait_until(lambda: gone(pids))
