"""Starting a run whose servers and workers share no memory: here, with processes of our own, or as what torchrun has started."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import socket
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shoal.comm import nearby
from shoal.comm.arena import Arena
from shoal.comm.group import Group, PeerFailed
from shoal.errors import PlanError, ShoalError, UserCodeError
from shoal.job import Job
from shoal.observe.events import EventLog
from shoal.plan import Plan
from shoal.planner.memory import axes_text
from shoal.process.failure import Failure
from shoal.process.interrupts import Interrupts
from shoal.process.messages import SERVER
from shoal.ps.endpoint import Endpoint, RunKeys
from shoal.ps.messages import Refused
from shoal.train.api import Observer, TrainOptions
from shoal.train.driver import Emitter, abandon_if_refused, finished_run, tensorboard_observers
from shoal.train.host import TrainHost
from shoal.train.push_log import wants_log
from shoal.train.remote.desk import Desk
from shoal.train.remote.elastic import ElasticLead
from shoal.train.remote.keeper import keep
from shoal.train.remote.keepers import Keepers, roles, servers_of
from shoal.train.remote.line import Meeting
from shoal.train.remote.members import Members
from shoal.train.remote.nursery import Nursery
from shoal.train.remote.plans import complete, threads_of
from shoal.train.remote.server import serve
from shoal.train.remote.stand_ins import InLead
from shoal.train.remote.state import placement_of
from shoal.train.remote.teams import members_of, size_of
from shoal.train.remote.worker import remote_settings, work
from shoal.train.run import SUMMARY, Run
from shoal.train.rundir import RunDirectory
from shoal.train.split import Split

_END_S = 10.0


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for, and what hears of it."""

    job: Job
    options: TrainOptions
    plan: Plan
    observers: Sequence[Observer]
    interrupts: Interrupts
    deadline_s: float

    @functools.cached_property
    def host(self) -> TrainHost:
        """The job as this process has built it, once it has. Raises what that raises, and then builds it anew."""
        return TrainHost(self.job)


def run_here(request: Request, directory: RunDirectory) -> Run:
    """Train on this machine: this process is the lead, and starts all others."""
    plan = request.plan
    with contextlib.closing(Endpoint(keys := RunKeys.new())) as endpoint:
        meeting = Meeting(endpoint.address, keys, request.deadline_s)
        own = [(SERVER, n) for n in range(servers_of(plan))]
        own += [member for worker in range(plan.data_ways) for member in members_of(worker, plan)]
        with _nursery(request, meeting) as nursery:
            return _lead(request, directory, endpoint, nursery, own, threads_of(plan.world_size))


def run_joined(request: Request, group: Group, threads: int) -> Run:
    """Train as one of the processes of a job: the first is the lead (and starts server 0), then servers, then workers."""
    plan, rank = request.plan, group.rank
    servers = servers_of(plan)
    # What makes no sense is refused by all processes alike.
    wants_log(request.options.push_log or False, plan, Path())
    _check_count(plan, servers + plan.world_size, group.world_size)
    machines = group.gather_objects(nearby.machine_key(), "the names of the machines") if plan.replicas else [""]
    machines = machines if plan.replicas else [""] * group.world_size
    role, number = roles(machines, plan)[rank]
    with contextlib.ExitStack() as stack:
        endpoint = meeting = directory = nursery = done = None
        # Whether those who serve and work are processes of their own, which others keep.
        kept = False
        if rank == 0:
            options = request.options
            directory = RunDirectory.claim(options.run_dir, request.job.name, options.resume)
            done = _done_before(request, directory)
            # Of a worker that is several none outlives another, and the processes of the job shall not end with them.
            kept = bool(plan.replicas) or wants_log(options.push_log, plan, directory.path) or size_of(plan) > 1
            keys = RunKeys.new()
            here = group.on_one_machine
            endpoint = stack.enter_context(contextlib.closing(Endpoint(keys, f"tcp://{'127.0.0.1' if here else '0.0.0.0'}:*")))
            address = endpoint.address.replace("0.0.0.0", _own_address())
            meeting = Meeting(address, keys, request.deadline_s)
            nursery = stack.enter_context(_nursery(request, meeting))
            if done is None and size_of(plan) > 1 and (failure := _cut(request, nursery, threads)) is not None:
                group.fail(failure)
                # The others have left, so that it is of no use if it went well the next time.
                return _lead(request, directory, endpoint, nursery, [(SERVER, 0)], threads, failure=failure)
        split = nursery.split if nursery is not None else None
        meeting, kept, split, done = _shared(group, (meeting, kept, split, done))
        if done is not None:
            return Run(*done, request.job)
        if nursery is not None:
            assert endpoint is not None and directory is not None
            keepers = Keepers(machines, plan) if kept else None
            return _lead(request, directory, endpoint, nursery, [(SERVER, 0)], threads, keepers)
        make = partial(TrainHost, request.job)
        # Whoever started the job interrupts all of its processes: the lead ends the run then, and tells the others.
        request.interrupts.armed = True
        if kept:
            nursery = stack.enter_context(_nursery(request, meeting))
            nursery.split = split
            path, summary = keep(nursery, role, number, rank)
        elif role == SERVER:
            path, summary = serve(make, meeting, number)
        else:
            path, summary = work(make, request.options, meeting, number)
        return Run(path, summary, request.job)


def _cut(request: Request, nursery: Nursery, threads: int) -> Failure | None:
    """Find out, before anybody has to know, how the model is divided within a worker; what went wrong, for the others."""
    try:
        nursery.cut(complete(request.plan, request.host, threads))
    except Exception as error:
        return Failure.of(error, 0)
    return None


def _done_before(request: Request, directory: RunDirectory) -> tuple[Path, dict[str, Any]] | None:
    """Where a resumed run has nothing left to do: its directory and its summary, which all processes are told."""
    if not request.options.resume or directory.read_json(SUMMARY) is None:
        return None
    try:
        done = finished_run(directory, request.job, request.options, request.host.facts())
    except Exception:
        # The lead meets the same, and says so.
        return None
    return None if done is None else (done.path, done.summary())


_Found = tuple[Any, bool, Split | None, tuple[Path, dict[str, Any]] | None]


def _shared(group: Group, found: _Found) -> _Found:
    """What the first process has found, for all. Raises what that has raised."""
    try:
        shared: _Found = group.broadcast_object(found, 0, "where the lead is")
    except PeerFailed as failed:
        error = failed.value.error()
        error.told_by_rank_0 = True
        raise error from None
    return shared


def _check_count(plan: Plan, wanted: int, found: int) -> None:
    """PlanError where a job has another number of processes than its plan takes."""
    if found == wanted:
        return
    size = size_of(plan)
    if size > 1:
        raise PlanError(
            f"{axes_text(plan)} takes {wanted} processes, {servers_of(plan)} of them servers, and the job was started with "
            f"{found}; start {wanted}, or change the plan."
        )
    said = f"ps={plan.ps},workers={plan.data_ways}"
    if plan.replicas:
        raise PlanError(
            f"{said},replicas={plan.replicas} takes {wanted} processes, {servers_of(plan)} of them servers, and the job was "
            f"started with {found}; start {wanted}, or change the plan."
        )
    servers = min(plan.servers, found - 1)
    raise PlanError(
        f"{said} takes {wanted} processes and the job was started with {found}; start {wanted}, or write "
        f"ps={servers},workers={found - servers}."
    )


def _own_address() -> str:
    """This machine's address for others."""
    return socket.gethostbyname(socket.gethostname())


@contextlib.contextmanager
def _nursery(request: Request, meeting: Meeting) -> Iterator[Nursery]:
    """Where processes of our own come from; they are ended when this is left."""
    quiet = dataclasses.replace(request.options, on_event=None, cluster=None, tensorboard=False)
    nursery, ended = Nursery(request.job, quiet, meeting), 0.0
    try:
        yield nursery
        ended = _END_S
    finally:
        nursery.close(ended)


def _lead(
    request: Request, directory: RunDirectory, endpoint: Endpoint, nursery: Nursery, own: Sequence[tuple[str, int]],
    threads: int, keepers: Keepers | None = None, failure: Failure | None = None,
) -> Run:  # fmt: skip
    """Bring a run to its end, or tell of the ``failure`` that it could not begin for."""
    job, options, began = request.job, request.options, time.monotonic()
    members = Members(nursery.start, own)
    with EventLog(directory.events) as log:
        emit = Emitter(log, [*request.observers, *tensorboard_observers(directory, options)], options.on_event)
        desk, lead = Desk(endpoint), None
        try:
            if failure is not None:
                raise failure.error()
            host = request.host
            facts = host.facts()
            plan = complete(request.plan, host, threads)
            nursery.cut(plan)
            if nursery.split is not None:
                plan = plan.replace(explanation=(*plan.explanation, *nursery.split.explanation))
            wants_log(options.push_log, plan, directory.path)
            done = finished_run(directory, job, options, facts)
            if done is not None:
                return done
            settings = remote_settings(plan, job, facts, options, str(Path(directory.checkpoints)))
            store = host.take_up(Arena.private(settings.layout), settings, True)
            nursery.ready()
            members.begin()
            placement = placement_of(facts.table, facts.tables, range(plan.servers))
            lead = ElasticLead(job, options, directory, InLead(host, members, nursery), facts, emit, request.interrupts)  # type: ignore[arg-type]
            lead.keepers = keepers
            lead.begin(settings, store, host, placement, members, desk, nursery.meeting)
            return lead.serve(began)
        except BaseException as error:
            if isinstance(error, ShoalError):
                text = error.traceback_text if isinstance(error, UserCodeError) else None
                emit("error", sentence=str(error), rank=getattr(error, "rank", None), traceback=text)
                abandon_if_refused(directory, error)
            if any(not m.process for m in members.of.values()):
                _refuse(desk, str(error))
            raise
        finally:
            if lead is not None:
                lead.close()


def _refuse(desk: Desk, sentence: str) -> None:
    """The run has failed: whoever asks for something within a moment is told so."""
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        for asked in list(desk.open):
            desk.answer(asked, lambda n: Refused(n, sentence))
        desk.receive(0.05)

