"""Work that must not slow others down.

Who waits for a core behind a process that computes waits until that one's slice of time is over, two to four milliseconds, unless
the kernel takes the core away. Linux (6.12 and newer) does so where the other's slices are longer, and it has had its part. So
who gives way asks for the longest slices, and for little: by the priority of its threads, and by that of its *session*, for
between sessions the cores are shared out first (sched(7), "The autogroup feature").
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")
_LOWEST = 19
# The longest slice there is; zero is the usual one.
_LONG_NS, _USUAL_NS = 100_000_000, 0
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_KEEP_POLICY = 0x08
# Linux lets a session's priority be changed ten times a second at the most, by anybody.
_TRY_S, _AGAIN_S = 2.0, 0.02
# Who gives way and has had less than this share of a core since it was last looked at is left nothing by others.
_LEAST, _LOOK_S = 0.1, 1.0
# It gets more then: a seventh of what others get, which still lets nearly all of them have its core at once; then as much.
_STEPS = (8, 0)


def gently(work: Callable[[], _T]) -> _T:
    """Do some work at the lowest priority, and wait for it; returns what it returns, raises what it raises.

    In a thread of its own: on Linux each thread has its priority, and without privileges one can give it up but never take it
    back. What is forked later, from the thread that waits here, has the usual one.
    """
    found: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
        lengthen_slices(threading.get_native_id())
        try:
            found.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="shoal-gently")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]


def lengthen_slices(thread: int, long: bool = True) -> bool:
    """Have a thread, by its number, give its core to whoever wakes up with a shorter slice; or no more.

    What it starts has slices as long. Older kernels take no notice. Returns whether it was done.
    """
    number = _SCHED_SETATTR.get(os.uname().machine)
    if number is None:
        return False
    with contextlib.suppress(OSError):
        # struct sched_attr: size, policy, flags, nice, priority, runtime (the slice), deadline, period.
        nice = os.getpriority(os.PRIO_PROCESS, thread)
        wanted = struct.pack("=IIQiIQQQ", 48, 0, _KEEP_POLICY, nice, 0, _LONG_NS if long else _USUAL_NS, 0, 0)
        return bool(ctypes.CDLL(None).syscall(number, thread, wanted, 0) == 0)
    return False


class GentleSession:
    """The session of a process that was started in one of its own: it gives way to others, and comes back.

    It comes back by itself, in two steps, where others leave it next to nothing: else whoever waits for it might do so for ever.
    """

    def __init__(self, leader: int, others: Callable[[], Sequence[int]] = tuple) -> None:
        """``leader``: who was started so. ``others``: the processes that it has started, at that moment."""
        self._leader, self._others = leader, others
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="shoal-giving-way", daemon=True)

    def give_way(self) -> None:
        """From now on, with all its processes; to be called once."""
        for pid in self._pids():
            lengthen_slices(pid)
        if _set_session(self._leader, _LOWEST):
            self._watcher.start()

    def come_back(self) -> None:
        """Have as much as others again, with all processes there are."""
        self.forget()
        for pid in self._pids():
            lengthen_slices(pid, False)
        _set_session(self._leader, 0)

    def forget(self) -> None:
        """The process has ended, or is about to."""
        self._over.set()
        if self._watcher.is_alive():
            self._watcher.join()

    def _pids(self) -> tuple[int, ...]:
        return (self._leader, *self._others())

    def _watch(self) -> None:
        before_s, steps = 0.0, iter(_STEPS)
        while not self._over.wait(_LOOK_S):
            found = [_had_and_wants(pid) for pid in self._pids()]
            had_s = sum(had for had, _ in found)
            if left_nothing(had_s - before_s, any(wants for _, wants in found)):
                nice = next(steps)
                _set_session(self._leader, nice)
                if nice == 0:
                    return
            before_s = had_s


def left_nothing(had_s: float, wants: bool) -> bool:
    """Whether others leave somebody nothing worth having who had so much processor time between two looks, and ``wants`` more."""
    return wants and had_s < _LEAST * _LOOK_S


def _had_and_wants(pid: int) -> tuple[float, bool]:
    """Seconds of processor time that a process has had, and whether a thread of it wants some now."""
    try:
        # Behind the name, which may hold anything: the state, …, the ticks in user mode (12th) and in the kernel.
        said = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        states = [(thread / "stat").read_text().rpartition(")")[2].split()[0] for thread in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return 0.0, False
    return (int(said[11]) + int(said[12])) / os.sysconf("SC_CLK_TCK"), "R" in states


def _set_session(pid: int, nice: int) -> bool:
    """Returns whether it was done: not where sessions do not matter, or nobody is there."""
    file = Path(f"/proc/{pid}/autogroup")
    until_s = time.monotonic() + _TRY_S
    while True:
        try:
            file.write_text(str(nice))
            return True
        except BlockingIOError:
            if time.monotonic() > until_s:
                return False
            time.sleep(_AGAIN_S)
        except OSError:
            return False
