"""The template: a fresh, single-threaded process that prepares everything once and then forks the others.

It is started as ``python -m shoal.process.template FD [--gentle] [--ground] MODULE…``, imports torch and these modules, and
obeys the supervisor on the other end of FD: it makes a *host* (an object that knows what the processes are for), calls its
methods, and forks children from it. A child is a standby until the supervisor gives it a role; then ``host.run(role,
channel)`` is its whole life. One without a host may be the ground of others (``shoal.process.templates``).

Forking costs milliseconds and shares every page that was there before. It is safe because nothing here ever ran on
more than one thread: a fork after threaded work would hang in the first operation that wants the threads."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import os
import selectors
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cloudpickle

from shoal.process.channel import Channel, ChannelClosed
from shoal.process.failure import Failure, user_code
from shoal.process.gentle import gently
from shoal.process.late_dynamo import LateDynamo
from shoal.process.messages import Call, Exited, Fork, Forked, Grow, Load, Returned

STACK_SIGNAL = signal.SIGUSR1
GENTLE, GROUND = "--gentle", "--ground"
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    channel = Channel.from_fd(int(sys.argv[1]))
    options = {GENTLE, GROUND} & set(sys.argv[2:])
    modules = [word for word in sys.argv[2:] if word not in options]
    if GROUND not in options:
        # A ground may be started by a thread that does not live long, which counts as its parent; it ends with its channel.
        die_with_parent()
    os.set_inheritable(channel.fileno(), False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What user code prints must not get between the lines that a command promises on standard output.
    os.dup2(2, 1)
    # Nobody reads a terminal there, so Python would keep lines back, and lose those of a process that is killed.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    do = _way(GENTLE in options)
    do(lambda: _prepare(modules))
    # Ctrl-C, a closed terminal: the supervisor decides what they mean.
    with contextlib.suppress(ChannelClosed):
        _Template(channel, do).serve()
    os._exit(0)


def _way(gentle: bool) -> Callable[[Callable[[], Any]], Any]:
    """How a template does what takes long."""
    return gently if gentle else _at_once


def _at_once(work: Callable[[], Any]) -> Any:
    return work()


def _prepare(modules: Sequence[str]) -> None:
    importlib.import_module("torch").set_num_threads(1)
    LateDynamo()
    for name in modules:
        importlib.import_module(name)


class _Template:
    def __init__(self, channel: Channel, do: Callable[[Callable[[], Any]], Any]) -> None:
        """``do``: how to do what takes long."""
        self._channel = channel
        self._do = do
        self._host: Any = None
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        os.set_blocking(self._wake_read, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._channel, selectors.EVENT_READ, "command")
        selector.register(self._wake_read, selectors.EVENT_READ, "child")
        while True:
            ready = [key.data for key, _ in selector.select()]
            if "child" in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
                self._reap()
            if "command" in ready:
                message, fds = self._channel.receive()
                self._obey(message, fds)

    def _obey(self, message: Any, fds: list[int]) -> None:
        try:
            if isinstance(message, Load):
                self._do(partial(self._load, message))
                self._channel.send(Returned(None))
            elif isinstance(message, Call):
                extra = (fds,) if fds else ()
                method = partial(getattr(self._host, message.method), *message.arguments, *extra)
                self._channel.send(Returned(self._do(method)))
            elif isinstance(message, Fork):
                self._fork()
            elif isinstance(message, Grow):
                self._grow(fds[0], message.gentle)
            else:
                raise TypeError(f"the template does not know {type(message).__name__}")
        except ChannelClosed:
            raise
        except Exception as error:
            self._channel.send(Failure.of(error))

    def _load(self, message: Load) -> None:
        os.chdir(message.cwd)
        sys.path[:] = list(message.sys_path)
        module, _, name = message.entry.partition(":")
        host = getattr(importlib.import_module(module), name)
        # Only now, because what it names may lie on the path that has just been set.
        with user_code("loading the job"):
            payload = cloudpickle.loads(message.payload)
        self._host = host(payload)

    def _fork(self) -> None:
        ours, theirs = Channel.pair()
        stack = os.memfd_create("shoal-stack", os.MFD_CLOEXEC)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                ours.close()
                code = self._child(theirs, stack, parent)
            except ChannelClosed:
                code = 0
            finally:
                os._exit(code)
        theirs.close()
        self._channel.send(Forked(pid), (ours.fileno(), stack))
        ours.close()
        os.close(stack)

    def _grow(self, fd: int, gentle: bool) -> None:
        """Fork a template in a session of its own; it does not die with this one, but ends when nobody is there to be obeyed."""
        # Nothing that is here already shall be looked at, and so be copied, when either of them clears up.
        gc.freeze()
        ends = [fd]
        try:
            read, write = os.pipe()
            ends += [read, write]
            pid = os.fork()
        except OSError:
            # Else whoever waits at its other end would not see that there is nobody.
            for end in ends:
                os.close(end)
            raise
        if pid == 0:
            code = 1
            try:
                os.setsid()
                os.close(read)
                os.close(write)
                self._leave()
                with contextlib.suppress(ChannelClosed):
                    _Template(Channel.from_fd(fd), _way(gentle)).serve()
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(fd)
        os.close(write)
        # Until it has its session.
        os.read(read, 1)
        os.close(read)
        self._channel.send(Forked(pid))

    def _leave(self) -> None:
        """A child's: what belongs to the template is none of its business."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._channel.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _child(self, channel: Channel, stack: int, parent: int) -> int:
        die_with_parent()
        if os.getppid() != parent:
            return 1
        self._leave()
        faulthandler.register(STACK_SIGNAL, file=stack, all_threads=True)
        role, _ = channel.receive()
        try:
            self._host.run(role, channel)
        except Exception as error:
            channel.send(Failure.of(error, role.rank))
            return 3
        return 0

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._channel.send(Exited(pid, status))


if __name__ == "__main__":
    main()
