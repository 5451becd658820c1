"""Driving a run from the process that asked for it: from the job to the Run."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

from shoal.comm.member import Member, shares_memory
from shoal.errors import JobError, JobFailed, RequestError, ShoalError, UserCodeError
from shoal.job import Job
from shoal.observe.events import EventLog, read_events
from shoal.plan import Plan
from shoal.process.channel import dumps
from shoal.process.interrupts import Interrupts
from shoal.process.supervisor import Supervisor
from shoal.train.api import Observer, TrainOptions, read_plan, start_supervisor
from shoal.train.run import SUMMARY, Run, open_run
from shoal.train.rundir import RunDirectory
from shoal.train.settings import JobFacts

ENTRY = "shoal.train.host:TrainHost"
_BUILD_TIMEOUT_S = 3600.0


class Emitter:
    """Where events go: the file, the observers, and the user's ``on_event``, whose answer it remembers."""

    def __init__(self, log: EventLog, observers: Sequence[Observer], on_event: Observer | None) -> None:
        self._log = log
        self._observers = observers
        self._on_event = on_event
        self.stop_wanted = False
        # What the user's own callback wants the run to go on with.
        self.plan_wanted: Plan | None = None
        self._flushed = time.monotonic()

    def __call__(self, kind: str, **fields: Any) -> None:
        event = self._log.write(kind, **fields)
        if self._on_event is not None:
            # What somebody was told is in the file: a run that was killed tells nothing twice when it goes on.
            self._log.flush()
        for observer in self._observers:
            observer(event)
        answer = self._on_event(event) if self._on_event is not None else None
        if isinstance(answer, Plan):
            self.plan_wanted = answer
        elif answer == "stop":
            self.stop_wanted = True
        self.attend()

    def attend(self) -> None:
        """Flush where that is due: also while nothing happens, the file is no further behind than half a second."""
        if time.monotonic() - self._flushed > 0.5:
            self.flush()

    def flush(self) -> None:
        self._flushed = time.monotonic()
        self._log.flush()


def run_job(
    job: Job, options: TrainOptions, observers: Sequence[Observer], supervisor: Supervisor | None = None
) -> Run:
    """Train a job to the end, or to where it is stopped; leave everything in its run directory.

    ``supervisor``: one that was started already, so that its template could import torch in the meantime.
    """
    member = Member.of(os.environ)
    if member is not None:
        from shoal.train.joined import run_joined

        return run_joined(job, options, observers, member)
    if not shares_memory(os.environ):
        from shoal.train.joined import run_here

        return run_here(job, options, observers)
    check_request(job, options)
    plan = read_plan(options.plan)
    plan.require_built()
    if _by_messages(plan, job, options):
        from shoal.train.joined import run_here

        if supervisor is not None:
            supervisor.close()
        return run_here(job, options, observers)
    supervisor = supervisor or start_supervisor()
    interrupts = Interrupts()
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.callback(supervisor.close)
        stack.enter_context(interrupts.caught())
        with interrupts.deferred():
            directory = RunDirectory.claim(options.run_dir, job.name, options.resume)
            stack.push(lambda kind, *_: _abandon_if_called_off(directory, kind))
        if options.resume and options.plan is None:
            plan = resumed_plan(directory)
        log = stack.enter_context(EventLog(directory.events))
        observers = [*observers, *tensorboard_observers(directory, options)]
        emitter = Emitter(log, observers, options.on_event)
        try:
            supervisor.load(ENTRY, portable(job), _BUILD_TIMEOUT_S)
            facts: JobFacts = supervisor.call("facts")
            finished = finished_run(directory, job, options, facts)
            if finished is not None:
                return finished
            from shoal.train.elastic import ElasticSession

            session = ElasticSession(job, options, directory, supervisor, facts, emitter, interrupts)
            return session.run(plan, began)
        except ShoalError as error:
            text = error.traceback_text if isinstance(error, UserCodeError) else None
            emitter("error", sentence=str(error), rank=getattr(error, "rank", None), traceback=text)
            abandon_if_refused(directory, error)
            raise


def _by_messages(plan: Plan, job: Job, options: TrainOptions) -> bool:
    """Whether a plan's processes, or those of the run that is gone on with, share no memory: on GPUs, and copies of servers."""
    if options.resume and options.plan is None:
        path = RunDirectory.latest(options.run_dir, job.name)
        with contextlib.suppress(OSError):
            if path is not None:
                plan = Plan.from_toml((path / "plan.toml").read_text())
    return plan.device == "cuda" or bool(plan.replicas)


def check_request(job: Job, options: TrainOptions) -> None:
    """Refuse what makes no sense before anything starts."""
    for name, value in (("epochs", options.epochs), ("steps", options.steps)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise RequestError(f"{name} is {value!r}; give a whole number of at least 1.")
    if sys.platform == "win32":
        raise RequestError("shoal does not run on Windows itself; use it inside WSL2.")


def portable(job: Job) -> Any:
    """The job as it will be sent to other processes, by value. JobError names the field that cannot be."""
    try:
        dumps(job)
        return job
    except Exception as error:
        for name in type(job).__dataclass_fields__:
            try:
                dumps(getattr(job, name))
            except Exception:
                raise JobError(
                    f"{name} cannot be sent to the worker processes ({type(error).__name__}: {error}); "
                    "let it make what cannot be pickled (open files, locks, connections) inside the function."
                ) from None
        raise


def resumed_plan(directory: RunDirectory) -> Plan:
    """The plan that a run had, or an empty one where it never came to have one."""
    try:
        return Plan.from_toml((directory.path / "plan.toml").read_text())
    except OSError:
        return Plan()


def versions() -> dict[str, str]:
    import torch

    from shoal.bundle import shoal_version

    return {"python": platform.python_version(), "torch": torch.__version__, "shoal": shoal_version()}


def finished_run(directory: RunDirectory, job: Job, options: TrainOptions, facts: JobFacts) -> Run | None:
    """The Run, where a resumed run has nothing left to do."""
    if not options.resume:
        return None
    summary = directory.read_json(SUMMARY)
    if not isinstance(summary, dict):
        return None
    per_epoch = -(-facts.samples // job.batch_size)
    total = (options.epochs or job.epochs) * per_epoch
    total = min(total, options.steps) if options.steps else total
    done = summary.get("steps", 0) >= total or summary.get("stopped_by") in ("until", "patience")
    if not done:
        return None
    run = open_run(directory.path)
    run._job = job
    return run


def tensorboard_observers(directory: RunDirectory, options: TrainOptions) -> list[Observer]:
    if not options.tensorboard:
        return []
    from shoal.observe.tensorboard import TensorBoardObserver

    return [TensorBoardObserver(directory.path / "tensorboard")]


def _abandon_if_called_off(directory: RunDirectory, kind: type[BaseException] | None) -> None:
    """Ctrl-C before the run began leaves nothing behind either."""
    began = directory.events.exists() and any(read_events(directory.events, ["run_start"]))
    if kind is not None and issubclass(kind, KeyboardInterrupt) and not began:
        directory.abandon()


def abandon_if_refused(directory: RunDirectory, error: BaseException) -> None:
    """A request that was refused before the first step leaves no directory behind that would be in the way."""
    if not isinstance(error, JobFailed) and not any(read_events(directory.events, ["step"])):
        directory.abandon()
