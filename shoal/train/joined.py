"""A run whose workers share no memory: processes of a job that torchrun or Slurm started, or that shoal starts here.

Every process runs the same loop over memory of its own (``shoal.axes.data_group``). Rank 0 is also what the supervisor
is elsewhere: it holds the run directory, tells the observers, ends epochs and writes checkpoints, in between its own
steps. The others are silent; what goes wrong with them, rank 0 hears and says.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import os
import random
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from shoal.axes.data_group import Course, GroupData, Outbox
from shoal.axes.data_parts import Held, PartsData
from shoal.cluster import Cluster
from shoal.comm.arena import Arena, Note, Order, Signal
from shoal.comm.grid import Grid
from shoal.comm.group import DEADLINE_S, Group, PeerFailed
from shoal.comm.journal import Journal
from shoal.comm.member import Member
from shoal.comm.mesh import make_mesh
from shoal.comm.store import Store
from shoal.errors import JobError, JobFailed, NotBuiltError, PlanError, RequestError, ShoalError, UserCodeError
from shoal.job import Job
from shoal.observe.events import EventLog
from shoal.plan import Plan
from shoal.planner.candidates import in_microbatches
from shoal.planner.memory import axes_text
from shoal.process.failure import Failure
from shoal.process.interrupts import Interrupts
from shoal.process.late_dynamo import LateDynamo
from shoal.train.allocator import keep_freed_memory
from shoal.train.api import Observer, TrainOptions, read_plan, start_supervisor
from shoal.train.choose import check_plan, divisible, remarks, split_of
from shoal.train.collect import Collector, deal_out
from shoal.train.crew import Patience
from shoal.train.device import CHUNK_BYTES, check_device, device_text, devices, full_precision, make_arena, open_device
from shoal.train.driver import (
    ENTRY,
    Emitter,
    abandon_if_refused,
    check_request,
    finished_run,
    portable,
    resumed_plan,
    tensorboard_observers,
)
from shoal.train.host import Beside, TrainHost
from shoal.train.lead import Gathered, InProcess, Lead
from shoal.train.loop import Loop
from shoal.train.metric_state import Piece, read_pieces, write_pieces
from shoal.train.neighbours import Neighbours
from shoal.train.own import Own, own_part
from shoal.train.run import Run
from shoal.train.rundir import RunDirectory
from shoal.train.session import run_settings
from shoal.train.settings import JobFacts, RunSettings
from shoal.train.split import Split, Ways, split_table
from shoal.train.update import Updater

# What is a process's own where the model is split comes last.
_SHARED_REGIONS = ("buffers", "buffer_steps", "weights", "state", "scalars")
# torchrun hands a terminal's Ctrl-C on to processes that the terminal has told already.
_ONE_INTERRUPT_S = 2.0
# What torch says when a process at the other end of a collective has gone.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError", "NCCL error")
_CAUSE_S = 5.0


def run_joined(job: Job, options: TrainOptions, observers: Sequence[Observer], member: Member) -> Run:
    """Train as one of the processes of a job that something else started; every one of them returns the Run.

    Only rank 0's observers and ``on_event`` are told, and it alone writes. PlanError where the plan is for another
    number of processes than there are.
    """
    plan = _asked(job, options)
    threads = max(1, Cluster.local(measure=False).cores // member.local_size)
    interrupts = _PatientInterrupts()
    with Group.join(member, _deadline_s()) as group, interrupts.caught(), _callers_state():
        if plan.ps is not None:
            from shoal.train.remote import start

            return start.run_joined(start.Request(job, options, plan, observers, interrupts, _deadline_s()), group, threads)
        return _Process(job, options, group, interrupts).run(plan, threads, observers)


def run_here(job: Job, options: TrainOptions, observers: Sequence[Observer]) -> Run:
    """Train on this machine without shared memory: this process is rank 0 and starts the others."""
    plan = _asked(job, options)
    interrupts = _PatientInterrupts()
    with contextlib.ExitStack() as stack:
        stack.enter_context(interrupts.caught())
        directory = RunDirectory.claim(options.run_dir, job.name, options.resume)
        if options.resume and options.plan is None:
            plan = resumed_plan(directory)
            check_device(plan)
        if plan.ps is not None:
            from shoal.train.remote import start

            stack.enter_context(_callers_state())
            return start.run_here(start.Request(job, options, plan, observers, interrupts, _deadline_s()), directory)
        cores = Cluster.local(measure=False).cores
        ways = devices(plan, cores)
        count = plan.world_size if plan.names_axes else min(ways, job.batch_size)
        stack.enter_context(_callers_state())
        neighbours = stack.enter_context(Neighbours.start(job, options, directory.path / ".meeting", count))
        group = stack.enter_context(Group.meet(neighbours.meeting, 0, count, _deadline_s(), neighbours.check))
        process = _Process(job, options, group, interrupts, neighbours)
        return process.run(plan, max(1, cores // count), observers, directory)


def work_for(job: Job, options: TrainOptions, meeting: str, rank: int, world_size: int) -> None:
    """What a process that ``run_here`` started does."""
    with Group.meet(meeting, rank, world_size, _deadline_s()) as group:
        _Process(job, options, group, Interrupts()).run(Plan(), 1, [])


def fit_plan(plan: Plan, world_size: int, threads: int) -> Plan:
    """The plan for a job of so many processes, with all axes that matter; PlanError where it is for another number."""
    if plan.ps is not None:
        raise NotBuiltError(
            f"The run has the plan ps={plan.ps}; to go on with it under torchrun or Slurm say so again: --plan ps={plan.ps},"
            f"workers={plan.data_ways}."
        )
    if plan.local_steps:
        raise NotBuiltError(
            f"local_steps={plan.local_steps} is not built for workers that share no memory; leave it out of the plan."
        )
    named = plan if plan.names_axes else plan.replace(dp=world_size)
    if named.world_size != world_size:
        raise PlanError(_another_number(named, world_size))
    return named.replace(dp=named.data_ways, threads=plan.threads or threads)


def _another_number(plan: Plan, world_size: int) -> str:
    inner = plan.world_size // plan.data_ways
    fitting = plan.replace(dp=world_size // inner, shares=None) if world_size % inner == 0 else Plan(dp=world_size)
    said = f"says dp={plan.data_ways}" if inner == 1 else f"{axes_text(plan)} takes {plan.world_size} processes"
    return (
        f"The plan {said} and the job was started with {world_size} processes; write {axes_text(fitting)}, or start "
        f"{plan.world_size} processes."
    )


def complete_plan(plan: Plan, job: Job, facts: JobFacts) -> Plan:
    """The plan with everything that it leaves open, explained."""
    whole = in_microbatches(plan, divisible(job, facts)).filled()
    check_plan(whole, job, facts)
    return whole.replace(explanation=tuple(remarks(whole, private=True)))


def _asked(job: Job, options: TrainOptions) -> Plan:
    check_request(job, options)
    plan = read_plan(options.plan)
    plan.require_built()
    check_device(plan)
    return plan


def _deadline_s() -> float:
    return Patience.from_environment().first_replace_s if os.environ.get("SHOAL_STALL_S") else DEADLINE_S


@contextlib.contextmanager
def _callers_state() -> Iterator[None]:
    """Give the process back as it was: it is the user's own, not a worker's."""
    threads, streams = torch.get_num_threads(), (random.getstate(), np.random.get_state(), torch.get_rng_state())
    late, collects = LateDynamo(), gc.isenabled()
    try:
        yield
    finally:
        late.take_back()
        if collects:
            gc.enable()
        torch.set_num_threads(threads)
        random.setstate(streams[0])
        np.random.set_state(streams[1])
        torch.set_rng_state(streams[2])


class _PatientInterrupts(Interrupts):
    """Takes signals that come in a burst for one."""

    def __init__(self) -> None:
        super().__init__()
        self._first: float | None = None

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.wanted and self._first is not None and now - self._first < _ONE_INTERRUPT_S:
            return
        if self._first is None:
            self._first = now
        super()._handle(number, frame)


@dataclasses.dataclass(frozen=True)
class _Start:
    """What rank 0 tells the others before the first step."""

    step: int
    orders: dict[Order, int]
    eval_loss: float
    notebook: Any
    metrics: list[list[Piece]]


class _Process:
    """One process of the group, from the job to the Run."""

    def __init__(
        self, job: Job, options: TrainOptions, group: Group, interrupts: Interrupts,
        neighbours: Neighbours | None = None,
    ) -> None:  # fmt: skip
        # What the script holds stays as it is: the model that is trained is the run's own.
        self._job = job.replace(model=copy.deepcopy(job.model)) if isinstance(job.model, nn.Module) else job
        self._options = options
        self._group = group
        self._interrupts = interrupts
        self._neighbours = neighbours
        self._emit: Emitter | None = None
        self._stalled: set[str] = set()

    def run(
        self, plan: Plan, threads: int, observers: Sequence[Observer], directory: RunDirectory | None = None
    ) -> Run:
        """Train. Whatever goes wrong in one of the processes is raised in all of them."""
        began = time.monotonic()
        group = self._group
        group.while_waiting = self._look_around
        with contextlib.ExitStack() as stack:
            try:
                if group.rank == 0:
                    options = self._options
                    directory = directory or RunDirectory.claim(options.run_dir, self._job.name, options.resume)
                    if options.resume and options.plan is None:
                        plan = resumed_plan(directory)
                    log = stack.enter_context(EventLog(directory.events))
                    everybody = [*observers, *tensorboard_observers(directory, self._options)]
                    self._emit = Emitter(log, everybody, self._options.on_event)
                plan, threads = group.broadcast_object((plan, threads), 0, "the plan")
                return self._train(fit_plan(plan, group.world_size, threads), directory, began)
            except PeerFailed as failed:
                group.fail(None)
                error = failed.value.error() if isinstance(failed.value, Failure) else KeyboardInterrupt()
                self._tell(error, directory)
                raise error from None
            except BaseException as raised:
                error = self._cause(raised)
                group.fail(Failure.of(error, group.rank) if isinstance(error, Exception) else None)
                self._tell(error, directory)
                raise error from None if error is not raised else raised.__cause__

    def _cause(self, error: BaseException) -> BaseException:
        """What lies behind an error: where a collective inside the model broke off, another process has failed or is gone."""
        text = getattr(error, "traceback_text", "") or str(error)
        if isinstance(error, PeerFailed) or not any(sign in text for sign in _LOST):
            return error
        deadline = time.monotonic() + _CAUSE_S
        while time.monotonic() < deadline:
            try:
                self._group.look_for_cause(0.1)
                if self._neighbours is not None:
                    self._neighbours.check()
            except PeerFailed as failed:
                return failed.value.error() if isinstance(failed.value, Failure) else KeyboardInterrupt()
            except ShoalError as found:
                return found
        return JobFailed(
            f"Rank {self._group.rank} lost another process in the middle of a step; see what ended it, and go on with --resume."
        )

    def _tell(self, error: BaseException, directory: RunDirectory | None) -> None:
        """Say what went wrong: rank 0 for all."""
        if self._emit is None or directory is None:
            # Whoever prints errors need not print this one again.
            error.told_by_rank_0 = True  # type: ignore[attr-defined]
            return
        if isinstance(error, ShoalError):
            text = error.traceback_text if isinstance(error, UserCodeError) else None
            self._emit("error", sentence=str(error), rank=getattr(error, "rank", None), traceback=text)
        abandon_if_refused(directory, error)

    def _look_around(self, what: str, waited_s: float) -> None:
        """While this process waits: whether a neighbour has died, and whom to name where it takes long."""
        if self._neighbours is not None:
            self._neighbours.check()
        if self._emit is None or what in self._stalled or waited_s < Patience.from_environment().report_s:
            return
        self._stalled.add(what)
        for rank in self._group.missing(what):
            self._emit(
                "stall", rank=rank, pid=None, step=None, phase="unknown", waited_s=waited_s, waits_for=what, stack="",
                replaced_after_s=None,
            )  # fmt: skip

    # -- the course of a run -------------------------------------------------------------------------------------

    def _train(self, plan: Plan, directory: RunDirectory | None, began: float) -> Run:
        group, job, options = self._group, self._job, self._options
        split = None
        device = open_device(plan, group)
        if plan.device != "cuda" and (Grid.of(plan).splits_model or plan.zero):
            group.meet_nearby()
        if Grid.of(plan).splits_model:
            # Found out by measuring, so once for all.
            found = self._cut(plan) if group.rank == 0 else None
            plan, split = group.broadcast_object(found, 0, "how the model is split")
        host = TrainHost(job, CHUNK_BYTES if plan.device == "cuda" else None)
        facts = host.facts()
        if facts.tables:
            raise NotBuiltError(
                f"The rows of {facts.tables[0].name} are shared in the memory of one machine; without that they need servers: "
                f"write ps=1,workers={max(1, group.world_size - 1)},sync."
            )
        if split is None:
            plan = complete_plan(plan, job, facts)
        self._compare(facts)
        done = finished_run(directory, job, options, facts) if directory is not None else None
        before = (done.path, done.summary()) if done is not None else None
        found = group.broadcast_object(before, 0, "what was done before")
        if found is not None:
            return Run(found[0], found[1], job)
        own = self._take_part(host, split, plan, facts)
        description = None
        if directory is not None and (own is not None or plan.device == "cuda"):
            # Later nobody has the whole model, or it is where a forked process cannot read it. What goes wrong here is said
            # where it matters, at the run's end.
            with contextlib.suppress(JobFailed, RequestError):
                description = host.describe_first()
        why = f"The job was started with {group.world_size} processes, which speak through {group.media}."
        plan = plan.replace(explanation=(why, *plan.explanation, *device_text(device)))
        place = group.broadcast_object(directory.path if directory is not None else None, 0, "the run directory")
        settings = run_settings(
            plan, job, facts, options, place / "checkpoints", own.split if own is not None else None, private=True
        )
        # Rank 0 alone has an observer, and all have to know of it.
        lockstep = group.broadcast_object(settings.wait_for_observer, 0, "the observer")
        settings = dataclasses.replace(settings, wait_for_observer=lockstep)
        arena = make_arena(settings.layout, device, plan)
        store = host.take_up(arena, settings, True)
        rows = group.gather_objects({"pid": os.getpid(), "host": socket.gethostname()}, "the list of processes")
        lead = None
        if directory is not None and self._emit is not None:
            lead = Lead(job, options, directory, InProcess(host, rows, description), facts, self._emit, self._interrupts)  # type: ignore[arg-type]
            lead.parts = None if own is None else Gathered(group, host, description is not None)
        try:
            if lead is not None:
                lead.begin(settings, store)
            self._share_start(store, host, lead, own)
            host.forget_first_weights()
            self._interrupts.armed = True
            keep_freed_memory()
            torch.set_num_threads(plan.threads or 1)
            loop = self._make_loop(host, store, settings, lead, own)
            with full_precision(plan):
                loop.run()
            self._gather_metrics(arena)
            ended = None
            if lead is not None:
                if lead.parts is not None:
                    lead.parts.collect = loop.parts.collect
                ended = lead.end(began)
            elif loop.parts.collect is not None and group.broadcast_object(None, 0, "the last checkpoint"):
                loop.parts.collect(arena.slots[0].signal(Signal.UPDATED))
            path, summary = group.broadcast_object(
                (ended.path, ended.summary()) if ended is not None else None, 0, "the end of the run"
            )
            return Run(path, summary, self._job)
        finally:
            if lead is not None:
                lead.release()

    def _cut(self, plan: Plan) -> tuple[Plan, Split]:
        """Complete a plan that splits the model, and decide how; in a template, whose torch state goes with it."""
        supervisor = start_supervisor()
        try:
            supervisor.load(ENTRY, portable(self._job), DEADLINE_S)
            facts: JobFacts = supervisor.call("facts")
            whole = complete_plan(plan, self._job, facts)
            split = split_of(whole, supervisor)
            assert split is not None
            return whole.replace(explanation=(*whole.explanation, *split.explanation)), split
        finally:
            supervisor.close()

    def _take_part(self, host: TrainHost, split: Split | None, plan: Plan, facts: JobFacts) -> Own | None:
        """What this process has of the model; None where that is all of it, and all update it alike."""
        zero, optimizer = plan.zero or 0, host.optimizer_name
        if split is None:
            if not zero or plan.data_ways == 1:
                return None
            grid = Grid.of(plan)
            split = Split(grid, *split_table(facts.table, grid, Ways({}, {}), optimizer))
        own = own_part(split, facts.table, self._group.rank, zero, optimizer)
        self._group.prepare(own.groups)
        return own

    def _compare(self, facts: JobFacts) -> None:
        """All processes must have built the same."""
        mine = (facts.samples, facts.eval_samples, facts.table)
        found = self._group.gather_objects(mine, "the job to be built")
        for rank, theirs in enumerate(found):
            if theirs != found[0]:
                raise JobError(
                    f"Rank {rank} has built another model or data set than rank 0 ({theirs[0]} samples); "
                    "let the job's functions do the same in every process."
                )

    def _share_start(self, store: Store, host: TrainHost, lead: Lead | None, own: Own | None) -> None:
        """Give everybody rank 0's weights, and where the run goes on."""
        group, arena = self._group, store.arena
        for name in _SHARED_REGIONS[: 2 if own is not None else None]:
            if arena.layout.regions[name][1]:
                group.broadcast(arena.region(name), 0, "the first weights")
        if own is not None:
            with_state = group.broadcast_object(lead is not None and lead.goes_on, 0, "where the run begins")
            read = lead.parts.read if lead is not None and lead.parts is not None else None
            deal_out(group, store, host.facts().table, read, with_state)
        step = arena.slots[0].signal(Signal.UPDATED)
        supervisor = arena.supervisor
        start = group.broadcast_object(
            _Start(
                step, {Order.EPOCH_DONE: supervisor.signal(Order.EPOCH_DONE)}, supervisor.note(Note.EVAL_LOSS),
                store.read_notebook(0, step),
                [read_pieces(Journal(arena, rank), step) for rank in range(group.world_size)],
            ),
            0, "where the run begins",
        )  # fmt: skip
        if group.rank == 0 or not start.step:
            return
        supervisor.write(Note.EVAL_LOSS, start.eval_loss)
        for order, value in start.orders.items():
            supervisor.post(order, value)
        for slot in arena.slots:
            for signal in (Signal.GRADIENTS, Signal.NORM, Signal.UPDATED):
                slot.post(signal, start.step)
            slot.post(Signal.EVALUATED, start.orders[Order.EPOCH_DONE])
        if start.notebook is not None:
            store.write_notebook(group.rank, start.step, start.notebook)
        write_pieces(Journal(arena, group.rank), start.step, start.metrics[group.rank])

    def _gather_metrics(self, arena: Arena) -> None:
        """Let rank 0 have everybody's training metrics, for the checkpoint of the run's end."""
        step = arena.slots[0].signal(Signal.UPDATED)
        found = self._group.gather_objects(read_pieces(Journal(arena, self._group.rank), step), "the last metrics")
        for rank, pieces in enumerate(found if self._group.rank == 0 else ()):
            write_pieces(Journal(arena, rank), step, pieces)

    def _make_loop(
        self, host: TrainHost, store: Store, settings: RunSettings, lead: Lead | None, own: Own | None
    ) -> Loop:
        group, outbox, grid, facts = self._group, Outbox(), settings.grid, host.facts()
        course = Course(
            total_steps=settings.total_steps, steps_per_epoch=settings.steps_per_epoch,
            every_step=settings.wait_for_observer,
        )  # fmt: skip
        beside = held = None
        if own is not None:
            held = Held(
                grid=grid, families=own.families, whole=own.whole, parameters=len(facts.table.trained),
                zero=settings.plan.zero or 0,
            )  # fmt: skip
            beside = Beside(
                make_mesh(group, grid, store.arena.device.type),
                lambda updater: Collector(group, store, own, facts.table, settings.checkpoint_dir, updater),
            )

        def make_axis(updater: Updater | None) -> GroupData:
            assert updater is not None, "plans with servers are refused"
            rest = (store, updater, group, outbox, course, lambda: self._interrupts.wanted, lead)
            return GroupData(*rest) if held is None else PartsData(held, *rest)

        loop = host.loop(group.rank, outbox, make_axis, beside)
        if facts.batchnorm:
            # A ragged batch leaves some without samples: these do not take part in its statistics.
            steps = (0, settings.steps_per_epoch - 1)
            shares = [share for step in steps for share in loop.parts.feed.shares(step)]
            taking_part = [[replica for replica, n in enumerate(share.counts) if n] for share in shares]
            columns = [grid.along_data(rank) for rank in range(grid.pp * grid.tp)]
            group.prepare([tuple(column[k] for k in some) for some in taking_part for column in columns])
        return loop
