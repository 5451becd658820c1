"""The supervisor's side: starting the template, keeping a standby ready, noticing deaths, cleaning up.

It lives in the process that called shoal. It never forks from that process: the user's may have threads, the template
has none.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import DeadlineError, JobFailed
from shoal.process.alive import is_gone, kernel_state
from shoal.process.channel import Channel, ChannelClosed, dumps
from shoal.process.failure import Failure
from shoal.process.gentle import GentleSession
from shoal.process.messages import Assign, Call, Exited, Fork, Forked, Load, Returned
from shoal.process.template import GENTLE, STACK_SIGNAL
from shoal.process.templates import Ground, Grown, start_template

# None of these is ever come near on a machine that is not in trouble: they only keep a wait from being endless.
_FORK_S = 120.0
_STACK_S = 2.0
_REST_S = 30.0
# Whoever is killed while the disk takes what it has written goes when that is done.
_GONE_S = 60.0


class TemplateLost(JobFailed):
    """The template died while it was asked for something."""


@dataclass
class Child:
    """A process that was forked from the template. ``rank`` and ``role`` are those it was assigned."""

    pid: int
    channel: Channel
    stack_fd: int
    role: str = "standby"
    rank: int = -1
    incarnation: int = 0
    status: int | None = None
    inbox: list[Any] = field(default_factory=list)

    def cause(self) -> str:
        """How it ended, for people: 'SIGKILL', 'exit code 3'."""
        if self.status is None:
            return "lost"
        if os.WIFSIGNALED(self.status):
            number = os.WTERMSIG(self.status)
            with contextlib.suppress(ValueError):
                return signal.Signals(number).name
            return f"signal {number}"
        return f"exit code {os.WEXITSTATUS(self.status)}"

    def stack(self) -> str:
        """Its Python stack now, or what the kernel says of it where it cannot answer, or does not within two seconds."""
        os.ftruncate(self.stack_fd, 0)
        os.lseek(self.stack_fd, 0, os.SEEK_SET)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, STACK_SIGNAL)
        text, until = "", time.monotonic() + _STACK_S
        while time.monotonic() < until:
            time.sleep(0.02)
            seen = os.pread(self.stack_fd, 1 << 16, 0).decode(errors="replace")
            if seen and seen == text:
                return seen.strip("\0").strip()
            text = seen
            if not seen and kernel_state(self.pid)[0] in "TtZg":
                # Stopped, dead or gone.
                break
        return text.strip("\0").strip() or f"no answer; the process is {kernel_state(self.pid)}"


class Supervisor:
    """The template and the processes forked from it.

    ``poll`` is the heart: it gathers what has happened since it was last called. Deaths come to light there, never by
    waiting for somebody.
    """

    def __init__(
        self, preload: Sequence[str] = (), environment: Mapping[str, str] | None = None, gentle: bool = False,
        ground: Ground | None = None,
    ) -> None:  # fmt: skip
        """``preload``: modules that the template imports while it waits for its first message.

        ``ground``: whom the template is forked from, which has imported all that already, in the environment of its own start.

        ``gentle``: all that the template does itself has the lowest priority, and it and its children leave the cores to others
        until ``hurry`` is called.
        """
        self._preload = tuple(preload)
        self._environment = dict(environment or {})
        self._gentle = gentle
        self._ground = ground
        self.children: dict[int, Child] = {}
        self._template: subprocess.Popen[bytes] | Grown | None = None
        self._channel: Channel | None = None
        self._load: Load | None = None
        self._session: GentleSession | None = None
        self.template_deaths = 0
        # Grows with every change of what ``processes`` returns.
        self.changes = 0

    # -- the template --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the template; it imports torch, where it has to, while the caller goes on."""
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        if self._ground is None:
            self._template = start_template(right, self._preload, self._environment, *[GENTLE] * self._gentle)
            if self._gentle:
                self.step_back()
        else:
            self._template = self._ground.grow(right, self._gentle)
        right.close()
        self._channel = Channel(left)
        self.changes += 1

    def hurry(self) -> None:
        """From now on everybody has as much of the cores as others, and so has a template that is started anew."""
        self._gentle = False
        session, self._session = self._session, None
        if session is not None:
            session.come_back()

    def step_back(self) -> None:
        """Leave the cores to others from now on; before the end, too: giving memory back takes some time."""
        if self._template is not None and self._session is None:
            self._session = GentleSession(self.template_pid, lambda: tuple(self.children))
            self._session.give_way()

    @property
    def template_pid(self) -> int:
        """Its process; waits for one that is still to be forked."""
        assert self._template is not None
        if isinstance(self._template, Grown):
            try:
                return self._template.await_pid(_FORK_S)
            except ChannelClosed:
                raise TemplateLost("No template could be forked; try again.") from None
        return self._template.pid

    def load(self, entry: str, payload: Any, timeout_s: float) -> None:
        """Make the host inside the template. Raises what its constructor raised."""
        self._load = Load(entry, dumps(payload), tuple(sys.path), os.getcwd())
        self._build(self._load, timeout_s, "the job to be built")

    def _build(self, load: Load, timeout_s: float, what: str) -> None:
        for again in (True, False):
            try:
                if self._gentle:
                    self.step_back()
                self._request(load, (), timeout_s, what)
                break
            except TemplateLost:
                if not again or self._template is None or self._template.pid is not None:
                    raise
                # The ground has died before it had forked one: there is another.
                self.close()
                self.start()
        # The template of a ground has its number by now.
        self.changes += 1

    def call(self, method: str, *arguments: Any, fds: tuple[int, ...] = (), timeout_s: float = 600.0) -> Any:
        """Call a method of the host and return its result, or raise what it raised."""
        return self._request(Call(method, arguments), fds, timeout_s, f"the template's {method}").value

    def alive(self) -> bool:
        """Whether the template is still there."""
        return self._template is not None and self._template.poll() is None

    def _request(self, message: Any, fds: tuple[int, ...], timeout_s: float, what: str) -> Returned:
        assert self._channel is not None
        deadline = time.monotonic() + timeout_s
        try:
            self._channel.send(message, fds)
            while True:
                answer, _ = self._channel.receive(max(0.0, deadline - time.monotonic()), what)
                if isinstance(answer, Failure):
                    raise answer.error()
                if isinstance(answer, Returned):
                    return answer
                self._note(answer)
        except ChannelClosed:
            raise TemplateLost(
                f"The template process died ({self._template_cause()}) while shoal waited for {what}; "
                "if it was killed for memory, use a smaller model or a machine with more."
            ) from None

    def _template_cause(self) -> str:
        assert self._template is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._template.wait(timeout=2)
            if isinstance(self._template, Grown) and self._template.lost:
                return "lost"
            return signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return "lost"

    # -- children ------------------------------------------------------------------------------------------------

    def fork(self, timeout_s: float = _FORK_S) -> Child:
        """Fork a standby."""
        assert self._channel is not None
        deadline = time.monotonic() + timeout_s
        self._channel.send(Fork())
        while True:
            answer, fds = self._channel.receive(max(0.0, deadline - time.monotonic()), "a new process")
            if isinstance(answer, Failure):
                raise answer.error()
            if isinstance(answer, Forked):
                child = Child(answer.pid, Channel.from_fd(fds[0]), fds[1])
                self.children[child.pid] = child
                self.changes += 1
                return child
            self._note(answer)

    def assign(self, child: Child, role: str, rank: int, incarnation: int) -> None:
        """Give a standby its role."""
        child.role, child.rank, child.incarnation = role, rank, incarnation
        self.changes += 1
        with contextlib.suppress(ChannelClosed):
            child.channel.send(Assign(role, rank, incarnation))

    def standby(self) -> Child:
        """A standby that is ready, or a new one."""
        for child in self.children.values():
            if child.role == "standby" and child.status is None:
                return child
        return self.fork()

    def poll(self, timeout_s: float) -> list[Child]:
        """Wait until something happens, ``timeout_s`` at most; take in messages; return the children that have died.

        ChannelClosed where the template itself is gone, and with it every child.
        """
        assert self._channel is not None
        by_fd = {c.channel.fileno(): c for c in self.children.values() if c.channel.fileno() >= 0}
        watched = [self._channel.fileno(), *by_fd]
        try:
            ready = select.select(watched, [], [], timeout_s)[0]
        except OSError:
            ready = []
        for fd in ready:
            if fd in by_fd:
                self._receive(by_fd[fd])
        while self._channel.ready():
            message, _ = self._channel.receive(_REST_S, "the rest of a message from the template")
            self._note(message)
        dead = [c for c in self.children.values() if c.status is not None]
        for child in dead:
            self._drain(child)
            self._forget(child)
        return dead

    def _receive(self, child: Child) -> None:
        try:
            child.inbox.append(child.channel.receive(_REST_S, f"the rest of a message from rank {child.rank}")[0])
        except (ChannelClosed, DeadlineError):
            child.channel.close()

    def _drain(self, child: Child) -> None:
        """Take in what a dead child had sent. Not until the end of the channel: a process of its own may hold that open."""
        while child.channel.fileno() >= 0 and child.channel.ready():
            self._receive(child)

    def _note(self, message: Any) -> None:
        if isinstance(message, Exited) and message.pid in self.children:
            self.children[message.pid].status = message.status

    def _forget(self, child: Child) -> None:
        self.children.pop(child.pid, None)
        self.changes += 1
        child.channel.close()
        os.close(child.stack_fd)

    def kill(self, child: Child) -> None:
        """SIGKILL: works on stopped and hung processes too."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)

    def processes(self) -> list[dict[str, Any]]:
        """What processes.json says."""
        host = socket.gethostname()
        rows = [("supervisor", 0, os.getpid())]
        template = self._template
        pid = None if template is None else template.pid
        if pid is not None:
            rows.append(("template", 0, pid))
        # A copy: another thread may ask than the one that starts and buries them.
        rows += [(c.role, max(c.rank, 0), c.pid) for c in list(self.children.values())]
        return [{"role": role, "rank": rank, "pid": pid, "host": host} for role, rank, pid in rows]

    def end_children(self) -> list[Child]:
        """Kill every child, wait for it and take in what it had still sent; return them all."""
        children = list(self.children.values())
        for child in children:
            self.kill(child)
        for child in children:
            _wait_gone(child.pid)
            self._drain(child)
        return children

    def dismiss(self) -> None:
        """End every child for good: whoever is forked from now on has what the template holds then."""
        for child in self.end_children():
            self._forget(child)

    def restart(self, timeout_s: float) -> None:
        """Begin again with a new template after the old one died: same host, no children."""
        load = self._load
        assert load is not None
        self.close()
        self.template_deaths += 1
        self.start()
        self._load = load
        self._build(load, timeout_s, "the job to be built again")

    def close(self) -> None:
        """End everything and wait for it; safe to call twice."""
        for child in list(self.children.values()):
            self.kill(child)
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._template is not None:
            # One that has nothing to clean up may still be importing.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._template.wait(timeout=0.5 if self._load is not None else 0.0)
            if self._template.poll() is None:
                self._template.kill()
            self._template.wait()
            self._template = None
        for child in list(self.children.values()):
            _wait_gone(child.pid)
            self._forget(child)
        session, self._session = self._session, None
        if session is not None:
            session.forget()


def _wait_gone(pid: int, timeout_s: float = _GONE_S) -> None:
    """Wait until a killed process that is not our own child has gone."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and not is_gone(pid):
        time.sleep(0.005)
