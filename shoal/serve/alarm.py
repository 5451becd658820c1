"""An alarm clock for an event loop that is finer than the loop's own timers.

asyncio and uvloop both round timers to milliseconds, which would send a Poisson stream of some thousand a second in bursts.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

_CLOCK_MONOTONIC = 1


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class _Setting(ctypes.Structure):
    _fields_ = [("interval", _Timespec), ("value", _Timespec)]


class Alarm:
    """Calls ``ring`` some time after ``set``, once; setting it again replaces what was set before. Close it at the end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._handle: asyncio.TimerHandle | None = None
        self._setting = _Setting()
        self._libc: Any = None
        self._fd = -1
        self._is_set = False
        if sys.platform == "linux":
            # Python itself has timerfd only from 3.13 on.
            with contextlib.suppress(OSError, AttributeError):
                self._libc = ctypes.CDLL(None, use_errno=True)
                self._fd = self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd >= 0:
            loop.add_reader(self._fd, self._rang)

    def set(self, after_s: float) -> None:
        """Ring after so many seconds; at once where that is not above zero."""
        # A setting of zero would turn the alarm off.
        ns = max(1, int(after_s * 1e9))
        if self._fd < 0:
            if self._handle is not None:
                self._handle.cancel()
            self._handle = self._loop.call_later(ns / 1e9, self._ring)
            return
        self._is_set = True
        value = self._setting.value
        value.seconds, value.nanoseconds = divmod(ns, 1_000_000_000)
        self._libc.timerfd_settime(self._fd, 0, ctypes.byref(self._setting), None)

    def close(self) -> None:
        """Ring no more."""
        if self._handle is not None:
            self._handle.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _rang(self) -> None:
        # Setting it again takes back that it has rung, as reading would: mostly that saves a system call.
        self._is_set = False
        self._ring()
        if not self._is_set and self._fd >= 0:
            with contextlib.suppress(BlockingIOError):
                os.read(self._fd, 8)
