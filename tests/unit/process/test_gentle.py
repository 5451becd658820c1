import ctypes
import os
import platform
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.process.gentle import GentleSession, _had_and_wants, gently, left_nothing, lengthen_slices

_SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}


def _slice_ns(thread: int) -> int:
    """How long a thread's slices are; 0 for the usual ones, and from kernels that know no others."""
    found = ctypes.create_string_buffer(64)
    assert ctypes.CDLL(None).syscall(_SCHED_GETATTR[platform.machine()], thread, found, 64, 0) == 0
    return int(struct.unpack_from("=IIQiIQ", found)[5])


def _slices_can_be_set() -> bool:
    release = tuple(int(word) for word in platform.release().split("-")[0].split(".")[:2])
    return platform.system() == "Linux" and release >= (6, 12) and platform.machine() in _SCHED_GETATTR


def test_work_has_the_lowest_priority_and_nobody_else() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)

    def look() -> tuple[int, int]:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), threading.get_native_id()

    priority, thread = gently(look)
    assert priority == 19 and thread != threading.get_native_id()
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
    child = os.fork()
    if child == 0:
        os._exit(os.getpriority(os.PRIO_PROCESS, 0) - before)
    assert os.waitpid(child, 0)[1] == 0


def test_what_it_raises_comes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        gently(lambda: 1 / 0)


@pytest.mark.skipif(not _slices_can_be_set(), reason="this kernel has slices of one length only")
def test_gentle_work_has_slices_that_others_may_cut_short() -> None:
    usual = _slice_ns(0)
    assert gently(lambda: _slice_ns(threading.get_native_id())) == 100_000_000
    assert _slice_ns(0) == usual


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield started
    started.kill()
    started.wait()


def test_a_session_gives_way_and_comes_back(child: subprocess.Popen[bytes]) -> None:
    group = Path(f"/proc/{child.pid}/autogroup")
    seen: list[tuple[int, int]] = []

    def look() -> None:
        nice = int(group.read_text().split()[-1]) if group.exists() else 0
        seen.append((nice, _slice_ns(child.pid) if _slices_can_be_set() else 0))

    session = GentleSession(child.pid)
    look()
    session.give_way()
    look()
    session.come_back()
    look()
    assert seen[2] == seen[0]
    assert not group.exists() or seen[1][0] == 19
    assert not _slices_can_be_set() or seen[1][1] == 100_000_000
    # Nothing waits for one that has ended.
    session.forget()
    assert not any(thread.name == "shoal-giving-way" for thread in threading.enumerate())


def test_of_a_process_that_has_ended_nothing_is_asked(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    session = GentleSession(child.pid)
    session.give_way()
    session.come_back()
    assert not lengthen_slices(child.pid) and _had_and_wants(child.pid) == (0.0, False)


def test_who_is_left_next_to_nothing_does_not_wait_for_ever(child: subprocess.Popen[bytes]) -> None:
    assert left_nothing(0.0, True) and left_nothing(0.05, True)
    # It has what it wants, or wants nothing: a disk is waited for, or a message.
    assert not left_nothing(1.5, True) and not left_nothing(0.0, False)
    had_s, wants = _had_and_wants(os.getpid())
    assert wants and 0.0 < had_s <= sum(os.times()[:2]) + 0.02
