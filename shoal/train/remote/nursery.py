"""Where the lead's own processes come from: forked from a template that has built the job, which takes milliseconds.

They share no memory that anybody writes to. Where the system has no such template each process is started by itself.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from shoal.comm.grid import Grid
from shoal.comm.memory import supported
from shoal.errors import JobFailed
from shoal.job import Job
from shoal.plan import Plan
from shoal.process.channel import Channel, ChannelClosed
from shoal.process.messages import PARTNER, SERVER, Assign
from shoal.process.supervisor import Child, Supervisor, TemplateLost
from shoal.train.ahead import import_ahead
from shoal.train.api import TrainOptions, start_supervisor
from shoal.train.choose import split_of
from shoal.train.driver import portable
from shoal.train.host import TrainHost
from shoal.train.neighbours import start_process
from shoal.train.remote.head import lead_team
from shoal.train.remote.line import Meeting
from shoal.train.remote.partner import assist
from shoal.train.remote.server import serve
from shoal.train.remote.worker import work
from shoal.train.split import Split

ENTRY = "shoal.train.remote.nursery:RemoteHost"
_BUILD_S = 3600.0


class Process(Protocol):
    """A process that was started: what ``subprocess.Popen`` and a forked child have in common."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def kill(self) -> None: ...


class RemoteHost(TrainHost):
    """What the template holds; ``run`` is what a process does that is forked from it."""

    _meeting: Meeting
    _options: TrainOptions
    _split: Split | None

    def meet(self, meeting: Meeting, options: TrainOptions, split: Split | None) -> None:
        """Say where the lead is, before anybody is forked; ``split``: how the model is divided within a worker."""
        self._meeting, self._options, self._split = meeting, options, split
        if split is not None:
            import_ahead(Plan(tp=split.grid.tp, pp=split.grid.pp))

    def run(self, role: Assign, channel: Channel) -> None:
        live, arguments = _life(role.role, self._meeting, self._options, self._split)
        live(lambda: self, *arguments(role.rank))


def _life(
    role: str, meeting: Meeting, options: TrainOptions, split: Split | None
) -> tuple[Callable[..., Any], Callable[[int], tuple[Any, ...]]]:
    """What a process of a role does, and what it is told beside the job, by its rank."""
    if role == SERVER:
        return serve, lambda rank: (meeting, rank)
    if split is None:
        return work, lambda rank: (options, meeting, rank)
    return assist if role == PARTNER else lead_team, lambda rank: (options, meeting, rank, split)


class Forked:
    """A process that was forked from the template."""

    def __init__(self, nursery: Nursery, child: Child) -> None:
        self._nursery, self._child = nursery, child
        self.pid = child.pid
        self._lost = False

    def lose(self) -> None:
        """The template is gone, and this one with it."""
        self._lost = self._child.status is None

    def poll(self) -> int | None:
        self._nursery.attend()
        status = self._child.status
        if status is None:
            return -9 if self._lost else None
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 9)


class Nursery:
    """Starts the lead's own processes."""

    def __init__(self, job: Job, options: TrainOptions, meeting: Meeting) -> None:
        """Begin to prepare; ``ready`` waits for it."""
        self._job, self._options, self.meeting = portable(job), options, meeting
        self._supervisor: Supervisor | None = start_supervisor() if supported() else None
        self._forked: list[Forked] = []
        self._started: list[Process] = []
        self._loaded = False
        # How the model is divided within a worker, where it is.
        self.split: Split | None = None

    @property
    def template_pid(self) -> int | None:
        """The template's process, where there is one."""
        return self._supervisor.template_pid if self._supervisor is not None and self._supervisor.alive() else None

    def ready(self) -> None:
        """Have the job built. Raises what that raises."""
        if self._supervisor is not None:
            self._load(self._supervisor)
            self._supervisor.call("meet", self.meeting, self._options, self.split)

    def cut(self, plan: Plan) -> None:
        """Find out, once, how the model is divided within a worker, where it is. PlanError where it does not fit the plan."""
        if not Grid.of(plan).splits_model or self.split is not None:
            return
        if self._supervisor is not None:
            self._load(self._supervisor)
            self.split = split_of(plan, self._supervisor)
            return
        # Not aside of this process, which has threads.
        supervisor = start_supervisor()
        try:
            supervisor.load(ENTRY, self._job, _BUILD_S)
            self.split = split_of(plan, supervisor)
        finally:
            supervisor.close()

    def _load(self, supervisor: Supervisor) -> None:
        if not self._loaded:
            supervisor.load(ENTRY, self._job, _BUILD_S)
            self._loaded = True

    def describe(self, host: TrainHost, timeout_s: float) -> dict[str, Any]:
        """What goes into the model and comes out, while the run goes on; ``host``: the lead's, where there is no template."""
        if self._supervisor is None or not self._supervisor.alive():
            return host.describe_first()
        found: dict[str, Any] = self._supervisor.call("describe_first", timeout_s=timeout_s)
        return found

    def start(self, role: str, rank: int) -> Process:
        """Start a process of a role."""
        if self._supervisor is None:
            live, arguments = _life(role, self.meeting, self._options, self.split)
            started = start_process(live, partial(TrainHost, self._job), *arguments(rank))
            self._started.append(started)
            return started
        if not self._supervisor.alive():
            self._renew()
        try:
            child = self._supervisor.fork()
        except ChannelClosed:
            # It was killed after it was looked at.
            self._renew()
            child = self._supervisor.fork()
        self._supervisor.assign(child, role, rank, 1)
        found = Forked(self, child)
        self._forked.append(found)
        self._started.append(found)
        return found

    def _renew(self) -> None:
        """Make another template in the place of one that was killed."""
        assert self._supervisor is not None
        self._supervisor.close()
        # Nobody will say of them that they have died: the one that would have is gone.
        for forked in self._forked:
            forked.lose()
        try:
            self._supervisor, self._loaded = start_supervisor(), False
            self.ready()
        except (ChannelClosed, TemplateLost) as error:
            raise JobFailed(
                f"The process that others are forked from was killed again ({error}); go on with --resume."
            ) from None

    def attend(self) -> None:
        """Take note of processes that have died."""
        if self._supervisor is None:
            return
        try:
            self._supervisor.poll(0.0)
        except (ChannelClosed, AssertionError):
            for forked in self._forked:
                forked.lose()

    def close(self, within_s: float) -> None:
        """Wait for all that were started to end, and kill those that do not."""
        processes = self._started
        deadline = time.monotonic() + within_s
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(0.01)
        for process in processes:
            if process.poll() is None:
                process.kill()
            if isinstance(process, subprocess.Popen):
                process.wait()
                if process.stdin is not None:
                    with contextlib.suppress(OSError):
                        process.stdin.close()
        if self._supervisor is not None:
            self._supervisor.close()


def here(nursery: Nursery, host: str) -> list[dict[str, Any]]:
    """The template as a row of ``processes.json``."""
    pid = nursery.template_pid
    return [] if pid is None else [{"role": "template", "rank": 0, "pid": pid, "host": host}]
