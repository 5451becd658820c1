"""How templates come to be: started as a program, or forked from the *ground*, a template that has imported everything already.

Importing torch takes a second of processor time. Whoever starts one template after the other, each for another model or another
version of one, starts a ground first; what is forked from it has its pages, and none of anybody's model or code.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from shoal.errors import DeadlineError
from shoal.process.alive import is_gone
from shoal.process.channel import Channel, ChannelClosed
from shoal.process.messages import Exited, Forked, Grow
from shoal.process.template import GROUND

_THREADS_OFF = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_LOOK_S = 0.005
_END_S = 0.5
_AGAIN_S = 5.0
# A message that has begun to come is there soon.
_REST_S = 30.0
_LOST = 256
"""Stands for the exit code of a template of which nobody knows how it ended; there is no such code."""


def start_template(
    sock: socket.socket, preload: Sequence[str], environment: Mapping[str, str], *options: str
) -> subprocess.Popen[bytes]:
    """Start a template as a program, in a session of its own; it obeys whoever has the other end of ``sock``.

    ``options``: ``GENTLE``, ``GROUND``.
    """
    env = {**os.environ, **dict.fromkeys(_THREADS_OFF, "1"), **environment}
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "shoal.process.template", str(sock.fileno()), *options, *preload]
    return subprocess.Popen(command, pass_fds=[sock.fileno()], env=env, start_new_session=True, stdin=subprocess.DEVNULL)


class Ground:
    """The process that templates are forked from. Any thread may ask it.

    It may die: the templates that have come from it live on, and it is started anew when it is needed again.
    """

    def __init__(self, preload: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        self._preload, self._environment = tuple(preload), dict(environment or {})
        self._lock = threading.Lock()
        self._root: _Root | None = None
        self._started_at = 0.0

    def start(self) -> None:
        """Have it there; it imports what it needs while the caller goes on."""
        with self._lock:
            self._have()

    def keep(self) -> None:
        """Start it anew where it has died, so that it is there when it is needed; not more often than now and then."""
        with self._lock:
            if self._root is not None and not self._root.alive() and time.monotonic() - self._started_at > _AGAIN_S:
                # Where that fails, whoever needs one is told so.
                with contextlib.suppress(OSError):
                    self._have()

    def grow(self, sock: socket.socket, gentle: bool) -> Grown:
        """Have a template forked, as ``start_template`` would start one, without waiting for it."""
        with self._lock:
            return self._have().grow(sock, gentle)

    def close(self) -> None:
        """End it and wait for it; safe to call twice. What has come from it obeys its own supervisors."""
        with self._lock:
            root, self._root = self._root, None
        if root is not None:
            root.close()

    @property
    def pid(self) -> int | None:
        """Its process; None where there is none."""
        root = self._root
        return root.program.pid if root is not None and root.alive() else None

    def _have(self) -> _Root:
        if self._root is not None and not self._root.alive():
            self._root.close()
            self._root = None
        if self._root is None:
            self._root, self._started_at = _Root(self._preload, self._environment), time.monotonic()
        return self._root


class _Root:
    """One life of the ground."""

    def __init__(self, preload: Sequence[str], environment: Mapping[str, str]) -> None:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.program = start_template(right, preload, environment, GROUND)
        right.close()
        self._channel = Channel(left)
        self._lock = threading.Lock()
        self.over = False
        # Asked for and not there yet, in order; and those that are, by pid.
        self._asked: deque[Grown] = deque()
        self._grown: dict[int, Grown] = {}

    def alive(self) -> bool:
        return not self.over and self.program.poll() is None

    def grow(self, sock: socket.socket, gentle: bool) -> Grown:
        grown = Grown(self)
        with self._lock:
            self._asked.append(grown)
            try:
                self._channel.send(Grow(gentle), (sock.fileno(),))
            except ChannelClosed:
                self._end()
        return grown

    def take_in(self) -> None:
        """Hear what it has said."""
        with self._lock:
            try:
                while not self.over and self._channel.ready():
                    message, _ = self._channel.receive(_REST_S, "the rest of a message from the templates' ground")
                    if isinstance(message, Forked):
                        grown = self._asked.popleft()
                        grown.born(message.pid)
                        self._grown[message.pid] = grown
                    elif isinstance(message, Exited) and message.pid in self._grown:
                        self._grown.pop(message.pid).ended(os.waitstatus_to_exitcode(message.status))
                    elif not isinstance(message, Exited):
                        # It could not fork.
                        self._asked.popleft().ended(_LOST)
            except (ChannelClosed, DeadlineError):
                self._end()

    def _end(self) -> None:
        self.over = True
        for grown in self._asked:
            grown.ended(_LOST)
        self._asked.clear()

    def close(self) -> None:
        with self._lock:
            self._end()
            self._channel.close()
        # It has nothing to clean up.
        self.program.kill()
        self.program.wait()


class Grown:
    """A template that was forked from the ground: as much of ``subprocess.Popen`` as its supervisor needs."""

    def __init__(self, root: _Root) -> None:
        self._root = root
        self._pid: int | None = None
        self._code: int | None = None
        self._gone_at = 0.0

    def born(self, pid: int) -> None:
        """The ground says that it is there."""
        self._pid = pid

    def ended(self, code: int) -> None:
        """How it ended, as the ground says, or ``_LOST``."""
        self._code = code

    @property
    def lost(self) -> bool:
        """Whether it has ended and nobody knows how."""
        return self._code == _LOST

    @property
    def pid(self) -> int | None:
        """None as long as it is not there."""
        self._root.take_in()
        return self._pid

    def await_pid(self, timeout_s: float) -> int:
        """Wait until it is there, or was; ChannelClosed where it never will be, DeadlineError after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while self.pid is None:
            if self._code is not None:
                raise ChannelClosed("There is nobody to fork a template from.")
            if time.monotonic() > deadline:
                raise DeadlineError("Waited too long for a template to be forked.")
            time.sleep(_LOOK_S)
        assert self._pid is not None
        return self._pid

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it lives, or is still to come."""
        self._root.take_in()
        if self._code is None and self._pid is not None and is_gone(self._pid):
            # The ground says how in a moment, unless it has ended or hangs.
            self._gone_at = self._gone_at or time.monotonic()
            if self._root.over or time.monotonic() - self._gone_at > _END_S:
                self._code = _LOST
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; subprocess.TimeoutExpired after ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired("template", timeout or 0.0)
            time.sleep(_LOOK_S)
        return code

    def kill(self) -> None:
        """SIGKILL. One that is still to come finds that nobody is there whom it could obey."""
        if self.poll() is None:
            if self._pid is None:
                self._code = _LOST
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
