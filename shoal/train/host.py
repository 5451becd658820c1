"""The host: what the template builds once, and what every worker that is forked from it has from its first moment."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shoal.axes import recompute
from shoal.axes.data import ArenaData
from shoal.axes.server import ServedWorker, Server
from shoal.axes.server_async import PushingWorker, PushServer, make_bells
from shoal.axes.server_backup import BackedServer, BackedWorker
from shoal.axes.server_order import OrderedPushServer
from shoal.axes.server_portions import PortionServer, PortionWorker
from shoal.axes.waiting import Waiting
from shoal.comm.arena import Arena, Note, Phase, Signal, Slot
from shoal.comm.store import Store
from shoal.comm.team import Team
from shoal.data.source import Source, open_source
from shoal.errors import JobError, JobFailed
from shoal.job import Job
from shoal.plan import Plan
from shoal.process.aside import aside
from shoal.process.channel import Channel
from shoal.process.failure import user_code
from shoal.process.messages import SERVER, Assign
from shoal.ps.dense import Numbers, Piece, plain_groups
from shoal.ps.embedding import embeddings
from shoal.ps.lbfgs import BatchLBFGS
from shoal.ps.spec import TableSpec
from shoal.ps.staleness import factor_of
from shoal.ps.table import Rows, Table
from shoal.rewrites.install import Installed, install
from shoal.train import streams
from shoal.train.ahead import DYNAMO, import_ahead
from shoal.train.allocator import give_back_freed_memory, keep_freed_memory
from shoal.train.batchnorm import GlobalBatchNorm, statistics_bytes
from shoal.train.built import Built
from shoal.train.compiling import NAME as COMPILE
from shoal.train.compiling import compile_aside, compile_model, give_up, warm_up
from shoal.train.describe import (
    bind,
    describe,
    fill,
    give_parameters,
    make_optimizer,
    move_buffers,
    optimizer_like,
    sliced_group,
)
from shoal.train.embedding import Embeddings, quicken_embeddings
from shoal.train.evaluate import is_stateful
from shoal.train.export import describe_model
from shoal.train.faults import Faults
from shoal.train.feed import Feed, division_of
from shoal.train.forecast import Measured, measure
from shoal.train.gradients import Gradients
from shoal.train.lbfgs import LbfgsUpdater
from shoal.train.loop import Loop, Parts, Sender
from shoal.train.part import Part, cut_model, take_part, to_meta, whole_part
from shoal.train.passes import Surroundings, make_passes
from shoal.train.portions import PortionLoop
from shoal.train.push_server import PushServerLoop, PushServerParts
from shoal.train.pushing import PushLoop, own_copy
from shoal.train.row_tables import Owner, RowGradients, TableUpdater, attach_tables, first_rows, name_tables
from shoal.train.schedule import NoSchedule, Schedule
from shoal.train.server import ServerLoop, ServerParts
from shoal.train.settings import JobFacts, RunSettings, portions_of, table_of
from shoal.train.split import Split
from shoal.train.tune import Finding, Question, Tuned, processes_gain, rewrites_of, tune
from shoal.train.update import Updater, make_updater
from shoal.train.update_log import UpdateLog
from shoal.train.work import work_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_DESCRIBE_S = 50.0


def build_model(job: Job) -> nn.Module:
    """Build the job's model after seeding, or take the instance that it has."""
    if isinstance(job.model, nn.Module):
        return job.model
    streams.seed_for_model(job.seed)
    with user_code("model"):
        model = job.model()
    if not isinstance(model, nn.Module):
        raise JobError(f"model made a {type(model).__name__}; it must return a torch.nn.Module.")
    return model


def build_data(value: Any, what: str) -> Source:
    """Open the job's data; errors in its functions are the user's."""
    with user_code(what):
        return open_source(value, what)


def build(job: Job) -> Built:
    """Build everything that a job names."""
    model = build_model(job)
    if next(iter(model.parameters()), None) is None:
        raise JobError("The model has no parameters, so there is nothing to train.")
    for parameter in model.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    with user_code("optimizer"):
        optimizer = make_optimizer(job.optimizer, model)
    train = build_data(job.train_data, "train_data")
    evaluation = None if job.eval_data is None else build_data(job.eval_data, "eval_data")
    return Built(job, model, optimizer, train, evaluation)


@dataclass(frozen=True)
class Beside:
    """What a worker that has a part of the model, and shares no memory, works with.

    Attributes:
        mesh: the ranks along each axis, by torch's groups.
        collector: makes, from what updates the part, what brings all parts together for a checkpoint.
    """

    mesh: DeviceMesh
    collector: Callable[[Updater], Callable[[int], None]]


def _described_aside(describe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``describe`` returns in a forked child. JobFailed where it takes too long."""

    def work() -> dict[str, Any]:
        # In a joined job this is the user's own process: threads that it has had are not there after the fork.
        torch.set_num_threads(1)
        return describe()

    try:
        return aside(work, "find out what goes into the model and comes out", _DESCRIBE_S)
    except TimeoutError as error:
        raise JobFailed(str(error)) from None


class TrainHost:
    """Lives in the template; ``run`` is what its forked children do."""

    def __init__(self, job: Job, chunk_bytes: int | None = None) -> None:
        """Build a job; ``chunk_bytes``: how much is updated as one, where that is not what suits a processor's caches."""
        began = time.monotonic()
        self._built = build(job)
        built = self._built
        table = describe(built.model, built.optimizer)
        if chunk_bytes is not None:
            table = dataclasses.replace(table, chunk_bytes=chunk_bytes)
        statistics = statistics_bytes(built.model)
        self._facts = JobFacts(
            table=table,
            tables=name_tables(built.model),
            samples=len(built.train),
            eval_samples=len(built.evaluation) if built.evaluation is not None else 0,
            batchnorm=statistics > 0,
            statistics_bytes=statistics,
            images=_has_images(built),
            build_s=time.monotonic() - began,
            batch_size=min(job.batch_size, len(built.train)),
            stateful=any(is_stateful(metric) for metric in job.metrics.values()),
        )
        # The first values, to begin again from when several runs are tried. Parameters are never changed where they lie:
        # a run moves them elsewhere.
        self._first = {name: p.detach() for name, p in built.model.named_parameters(remove_duplicate=False)}
        self._first_buffers = {n: b.detach().clone() for n, b in built.model.named_buffers(remove_duplicate=False)}
        self._first_rows = first_rows(built.model)
        self._tables: list[Table] = []
        self._splits: dict[Plan, Split | None] = {}
        self._store: Store | None = None
        self._settings: RunSettings | None = None
        self._bells: list[int] = []
        self._embeddings: Embeddings | None = None
        self._rewrites: Installed | None = None
        # Where no store has the whole model: what it has come to, for the bundle.
        self.final_state: Mapping[str, torch.Tensor] | None = None

    @property
    def job(self) -> Job:
        return self._built.job

    @property
    def buffered(self) -> nn.Module:
        """The model as it was built, which has all of its buffers."""
        return self._built.model

    @property
    def optimizer_name(self) -> str:
        return type(self._built.optimizer).__name__

    def first_weight(self, name: str) -> torch.Tensor:
        """A parameter as the model was built with it."""
        return self._first[name]

    def facts(self) -> JobFacts:
        return self._facts

    def bind(self, settings: RunSettings, write: bool, fds: list[int]) -> None:
        """Map the arena of a run and take it up."""
        import_ahead(settings.plan)
        if self._store is not None:
            # Of a run that was only tried: the memory lives as long as its descriptor.
            self._store.arena.memory.close()
        for table in self._tables:
            table.close()
        self.take_up(Arena.attach(fds[0], settings.layout), settings, write)
        first = self._first_rows if write else {}
        self._tables = attach_tables(self._built.model, fds[1:], settings.cold_dir, first)
        gc.collect()
        gc.freeze()

    def split(self, plan: Plan) -> Split | None:
        """How the model is divided under a plan, found out aside; None where every worker has all of it."""
        keys = ("dp", "ps", "workers", "tp", "pp", "zero", "schedule", "interleave", "microbatches", "sequence_parallel")
        asked = plan.replace(**dict.fromkeys(set(plan.values()) - set(keys)))
        if asked not in self._splits:
            import_ahead(plan)
            # Stages are cut by measured times: asked again, another cut may come out, and it takes seconds.
            self._splits[asked] = aside(
                lambda: cut_model(self._built, self._facts.table, plan), "find out how the model can be split"
            )
        return self._splits[asked]

    def forecast(self, plan: Plan, cut: Sequence[str]) -> Measured:
        """What decides the memory that a plan needs, found out aside; ``cut``: the parameters that the tensor axis cuts."""
        # Shapes without tensors need it, each time.
        importlib.import_module(DYNAMO)
        return aside(lambda: measure(self._built, self._facts, plan, cut), "find out how much memory the model needs")

    def tune(self, question: Question, beat_s: float | None = None) -> Tuned:
        """What a rewritten model gains, measured aside."""
        return aside(lambda: tune(self._built, question, beat_s), "find out what rewriting the model gains")

    def processes_gain(self) -> dict[str, float]:
        """What is gained by rewrites that change how processes compute and no model, measured aside."""
        return aside(processes_gain, "find out how fast this machine computes")

    def try_compiling(self, plan: Plan, samples: int, limit_s: float | None) -> Finding:
        """What compiling the model gives, found out aside; it is given up after ``limit_s``."""
        try:
            return aside(lambda: compile_aside(self._built, plan, samples), "compile the model", limit_s)
        except TimeoutError as late:
            return Finding(COMPILE, trouble=str(late))

    def take_up(self, arena: Arena, settings: RunSettings, write: bool) -> Store:
        """Write the first weights into an arena where ``write`` says so, and bind the model to it where it is not split."""
        store = Store(arena, table_of(self._facts, settings.split))
        if write:
            fill(store, self._first, self._first_buffers)
        if settings.split is None:
            bind(self._built.model, store)
        self._store, self._settings = store, settings
        for bell in self._bells:
            os.close(bell)
        rings = settings.plan.waits_for_nobody or settings.plan.backup or portions_of(settings.plan, self._facts)
        self._bells = make_bells(settings.grid.servers) if rings else []
        return store

    def forget_first_weights(self) -> None:
        """No further run will begin anew: give back the memory of the first weights."""
        self._first, self._first_rows = {}, {}
        if self._settings is not None and self._settings.split is not None:
            to_meta(self._built.model)

    def describe_bundle(self, step: int, program: str | None) -> dict[str, Any]:
        """What the trained model takes and gives, for bundle.json; export it to ``program`` where torch can."""
        assert self._store is not None and self._settings is not None
        model = self._built.model
        if self._rewrites is not None:
            # Where workers are no forks of this process, this is the model that was trained.
            self._rewrites.remove()
        give_up(model)
        if self._settings.split is not None:
            from shoal.axes import tensor

            state = self._store.state_dict(step % 2) if self.final_state is None else self.final_state
            tensor.materialise(model, state.__getitem__)
        elif self._store.arena.device.type != "cpu":
            # Where it was trained does not matter to who reads it, and nothing is left to be trained.
            model.cpu()
        with torch.no_grad():
            buffers = dict(model.named_buffers(remove_duplicate=False))
            for index, spec in enumerate(self._store.table.buffers):
                buffers[spec.name].copy_(self._store.buffer(step % 2, index))
        return describe_model(self._built, program)

    def describe_aside(self) -> dict[str, Any]:
        """The same while the run goes on, without a program: nothing of it is left in this process."""
        return _described_aside(lambda: self.describe_bundle(0, None))

    def describe_first(self) -> dict[str, Any]:
        """The same before anything is done to the model: of one in parts nobody has the whole while the run goes on."""
        return _described_aside(lambda: describe_model(self._built, None))

    def run(self, role: Assign, channel: Channel) -> None:
        """A worker's or a server's whole life."""
        store, settings = self._store, self._settings
        assert store is not None and settings is not None
        if settings.grid.sharded:
            # What is gathered for a moment has to go at once: that is what sharding is for.
            give_back_freed_memory()
        else:
            keep_freed_memory()
        torch.set_num_threads(settings.plan.threads or 1)
        self.quicken()
        place = role.rank + (store.arena.world_size if role.role == SERVER else 0)
        store.arena.places[place].write(Note.INCARNATION, role.incarnation)
        waiting = Waiting(spin_s=settings.spin_s)
        portions = portions_of(settings.plan, self._facts)

        def make_axis(updater: Updater | None) -> ArenaData:
            if updater is None and settings.plan.waits_for_nobody:
                return PushingWorker(store, role.rank, waiting, settings.plan, self._bells)
            if updater is None and settings.plan.backup:
                return BackedWorker(store, role.rank, waiting, self._bells)
            if updater is None and portions:
                return PortionWorker(store, role.rank, waiting, self._bells, portions)
            if updater is None:
                return ServedWorker(store, role.rank, waiting)
            return ArenaData(store, role.rank, updater, waiting, settings.guard)

        serves = role.role == SERVER
        loop: Loop | ServerLoop | PushServerLoop = (
            self.server(role.rank, channel, waiting) if serves else self.loop(role.rank, channel, make_axis)
        )
        with contextlib.suppress(KeyboardInterrupt):
            loop.run()

    def quicken(self) -> None:
        """Use what computes gradients of embeddings faster, in this process, from now on."""
        self._embeddings = quicken_embeddings()

    def _with_tables(self, updater: Updater, own: Owner, slot: Slot) -> Updater:
        """The same updater, which also updates its part of the model's tables."""
        if not self._tables:
            return updater
        return TableUpdater(updater, self._tables, own, lambda: slot.signal(Signal.UPDATED))

    def server(self, number: int, channel: Sender, waiting: Waiting) -> ServerLoop | PushServerLoop:
        """The loop of one parameter server in the run that was taken up."""
        store, settings, built = self._store, self._settings, self._built
        assert store is not None and settings is not None
        place = store.arena.world_size + number
        slot = store.arena.places[place]
        slot.enter(Phase.STARTING, slot.signal(Signal.UPDATED))
        parameters = [nn.Parameter(store.weights[index]) for index in range(len(store.table.trained))]
        give_parameters(built.optimizer, parameters, store.table)
        updater: Updater
        if isinstance(built.optimizer, BatchLBFGS):
            updater = LbfgsUpdater(store, number, built.optimizer)
        else:
            updater = make_updater(store, number, built.optimizer, lambda: parameters)
        with user_code("scheduler"):
            schedule = Schedule(built.job, built.optimizer, store, place, updater)
        grid = settings.grid
        updater = self._with_tables(updater, Owner(number, grid.servers, grid.dp), slot)
        faults = Faults(number, slot, server=True)
        log: UpdateLog | None = None
        if settings.log_dir:
            def beat() -> None:
                slot.write(Note.PHASE_SINCE, time.monotonic())

            log = UpdateLog(store, number, updater, settings.log_dir, channel.send, beat)
        if settings.plan.waits_for_nobody:
            kind = PushServer if log is None else OrderedPushServer
            pushed = kind(store, number, updater, waiting, settings.plan, self._bells[number], settings.guard)
            return PushServerLoop(
                PushServerParts(
                    job=built.job, axis=pushed, updater=updater, schedule=schedule, faults=faults,
                    factor_of=factor_of(built.optimizer), log=log,
                )  # fmt: skip
            )
        axis = Server(store, number, updater, waiting, settings.guard)
        per_epoch, portions = settings.steps_per_epoch, portions_of(settings.plan, self._facts)
        if portions:
            axis = PortionServer(store, number, updater, waiting, self._bells[number], portions, per_epoch)
        elif settings.plan.backup:
            batch, samples = built.job.batch_size, len(built.train)
            axis = BackedServer(
                store, number, updater, waiting, settings.plan.backup, self._bells[number],
                lambda step: min(batch, samples - step % per_epoch * batch),
            )  # fmt: skip
        return ServerLoop(
            ServerParts(
                job=built.job,
                axis=axis,
                updater=updater,
                schedule=schedule,
                faults=faults,
                settings=settings,
                channel=channel,
                log=log,
            )
        )

    def loop(
        self, rank: int, channel: Sender, make_axis: Callable[[Updater | None], ArenaData], beside: Beside | None = None
    ) -> Loop:
        """The loop of one worker in the run that was taken up; ``beside``: where it shares no memory and has a part.

        It is told no updater where servers update.
        """
        parts, around, own = self.worker(rank, channel, make_axis, beside)
        if parts.settings.plan.waits_for_nobody:
            return PushLoop(parts, around, own_copy(parts.store, own))
        return PortionLoop(parts, around) if isinstance(parts.axis, PortionWorker) else Loop(parts)

    def worker(
        self, rank: int, channel: Sender, make_axis: Callable[[Updater | None], ArenaData], beside: Beside | None = None,
        make_rows: Callable[[nn.Module], RowGradients] | None = None,
    ) -> tuple[Parts, Surroundings, Sequence[nn.Parameter]]:  # fmt: skip
        """What a worker works with, and its trained parameters; ``make_rows``: what takes the gradients of its tables."""
        store, settings, built = self._store, self._settings, self._built
        assert store is not None and settings is not None
        plan, job, grid = settings.plan, built.job, settings.grid
        slot = store.arena.slots[rank]
        slot.enter(Phase.STARTING, slot.signal(Signal.UPDATED))
        batchnorm = GlobalBatchNorm() if self._facts.batchnorm and plan.batchnorm != "local" and grid.dp > 1 else None

        def prepare(module: nn.Module) -> None:
            recompute.apply(module, plan.recompute)
            if batchnorm is not None:
                batchnorm.take_over(module)

        part, team = self._take_part(rank, slot, prepare, beside)
        updater: Updater | None = None
        if not grid.servers:
            updater = make_updater(store, store.part_of(rank), built.optimizer, lambda: part.parameters)
        own = Owner(rank, grid.dp, grid.dp)
        whole = None if updater is None else self._with_tables(updater, own, slot)
        axis = make_axis(whole)
        axis.check = team.check if team is not None else None
        for source in (built.train, built.evaluation):
            if source is not None:
                source.prefer_layout(plan.layout == "channels_last")
        if batchnorm is not None:
            batchnorm.add_up = axis.sum_small
        schedule: Schedule | NoSchedule = NoSchedule()
        if updater is not None:
            with user_code("scheduler", rank):
                schedule = Schedule(job, built.optimizer, store, rank, updater)
        feed = Feed(built.train, division_of(job, plan), grid.place(rank).data, job.collate, plan.layout == "channels_last")
        faults = Faults(rank, slot)
        if make_rows is None and self._tables:
            # Where each push is an update by itself, rows age by updates.
            clock = store.arena.servers[0] if plan.waits_for_nobody else slot

            def make_rows(model: nn.Module) -> RowGradients:
                return RowGradients(model, rank, lambda: clock.signal(Signal.UPDATED), grid.servers > 0)

        around = Surroundings(
            job=job, rank=rank, replica=feed.replica, slot=slot, faults=faults, precision=plan.precision,
            batchnorm=batchnorm, device=store.arena.device,
        )  # fmt: skip
        parts = Parts(
            job=job,
            model=part.model,
            buffered=built.model,
            publishes=part.publishes,
            passes=make_passes(part, around, feed, plan),
            gradients=Gradients(
                store, store.stripe_of(rank), part.targets, part.shards,
                make_rows(part.model) if make_rows is not None else None,
                self._embeddings, type(axis) is ArenaData,
            ),
            store=store,
            axis=axis,
            updater=whole,
            team=team,
            feed=feed,
            eval_source=built.evaluation,
            schedule=schedule,
            faults=faults,
            settings=settings,
            channel=channel,
            collect=None if beside is None or updater is None else beside.collector(updater),
        )
        return parts, around, part.parameters

    def optimizer_over(self, pieces: Sequence[tuple[Piece, nn.Parameter]]) -> torch.optim.Optimizer:
        """The job's kind of optimizer, with all its groups, over a server's pieces."""
        like, table = self._built.optimizer, self._facts.table
        held = [[p for piece, p in pieces if piece.group == group] for group in range(len(like.param_groups))]
        if table.elementwise:
            groups = [sliced_group(type(like), g, own) for g, own in zip(like.param_groups, held, strict=True)]
            return optimizer_like(like, groups)
        for group, own in zip(like.param_groups, held, strict=True):
            group["params"] = own
        return like

    def schedule(self, place: int, updater: Updater) -> Schedule:
        """The job's scheduler, over its optimizer, in the run that was taken up; ``updater`` is told the groups."""
        assert self._store is not None
        with user_code("scheduler"):
            return Schedule(self._built.job, self._built.optimizer, self._store, place, updater)

    @property
    def staleness_factor(self) -> Callable[[int], float] | None:
        """What learning rates are multiplied by for a push that comes so late; None where they do not depend on it."""
        return factor_of(self._built.optimizer)

    def plain_groups(self) -> list[Numbers]:
        """The hyperparameters of the job's optimizer that are numbers, as a schedule has left them."""
        return plain_groups(self._built.optimizer)

    @property
    def first_rows(self) -> Mapping[str, Rows]:
        """What the model's tables held when it was built, by the module's path."""
        return self._first_rows

    def use_tables(self, make: Callable[[int, TableSpec], Any]) -> nn.Module:
        """Let the model's embeddings use these tables, by number, and return the model."""
        for number, (_, module) in enumerate(embeddings(self._built.model)):
            module.use(make(number, self._facts.tables[number]))
        return self._built.model

    def _take_part(
        self, rank: int, slot: Slot, prepare: Callable[[nn.Module], None], beside: Beside | None
    ) -> tuple[Part, Team | None]:
        """Give a worker what it has of the model, and the ranks that it needs within a step where those share memory."""
        store, settings, built = self._store, self._settings, self._built
        assert store is not None and settings is not None
        plan = settings.plan
        if settings.split is None:
            part = whole_part(built, self._facts.table, store, rank)
            prepare(part.model)
            if not plan.compile:
                self._rewrites = install(part.model, rewrites_of(plan))
            else:
                compile_model(part.model, plan.threads or 1)
                # Now, and for this batch: what is compiled may depend on what comes first.
                if not self._tables:
                    samples = max(1, min(built.job.batch_size, len(built.train)) // plan.data_ways)
                    warm_up(work_of(built, samples, plan.layout, plan.precision))
            return part, None
        to_meta(built.model)
        team: Team | None = None
        if beside is None:
            # A worker that waits is alive, and says so.
            team = Team(
                store.arena, settings.grid, rank, settings.spin_s, Waiting.deadline_s,
                lambda: slot.write(Note.PHASE_SINCE, time.monotonic()),
            )  # fmt: skip
        else:
            # This process also writes the bundle, for which it needs the model as it was.
            self._built = dataclasses.replace(built, model=copy.deepcopy(built.model))
            move_buffers(built.model, store.arena.device)
        part = take_part(built, settings.split, plan, store, rank, prepare, beside.mesh if beside else None)
        self._rewrites = install(part.model, rewrites_of(plan))
        give_parameters(built.optimizer, part.parameters, store.table)
        return part, team


def _has_images(built: Built) -> bool:
    """Whether a batch holds 4-D floating tensors and the model convolves, so that the memory layout is worth choosing."""
    if not any(isinstance(m, nn.modules.conv._ConvNd) for m in built.model.modules()):
        return False
    import numpy as np

    with user_code("train_data"):
        batch = built.train.fetch(np.arange(1, dtype=np.int64), built.job.collate, None)
    tensors = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else [batch]
    return any(isinstance(t, torch.Tensor) and t.dim() == 4 and t.is_floating_point() for t in tensors)
