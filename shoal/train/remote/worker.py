"""A worker that shares no memory with anybody: the same loop as in the arena, whose words come and go as messages.

Its arena is its own. What the supervisor would write there, the lead's answers say (``Orders``); what other processes would
read there (the rows of units, buffers) goes to the lead in reports; pushes and pulls go straight to the servers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shoal.axes.server_async import PushingWorker
from shoal.axes.waiting import Aborted, Waiting
from shoal.comm.arena import Arena, Note, Order, Signal
from shoal.comm.store import VALUE_COLUMNS, Store
from shoal.errors import DeadlineError, JobFailed
from shoal.job import Job
from shoal.plan import Plan
from shoal.process.failure import user_code
from shoal.ps import messages, shard
from shoal.ps.claims import Claim, Later
from shoal.ps.client import Client, Patience
from shoal.ps.kernel import Batch, load
from shoal.ps.ledger import UnitColumns
from shoal.ps.messages import Refused
from shoal.ps.placement import Placement
from shoal.ps.requests import Ticket
from shoal.ps.row_cache import RowCache
from shoal.ps.spec import TableSpec
from shoal.ps.table import find_bad_key
from shoal.train import notes
from shoal.train.allocator import keep_freed_memory
from shoal.train.api import TrainOptions
from shoal.train.feed import Share
from shoal.train.gradients import GivenUp
from shoal.train.host import TrainHost
from shoal.train.loop import Parts
from shoal.train.metric_state import pieces_of as pieces_of_metrics
from shoal.train.passes import Surroundings
from shoal.train.pushing import PushLoop, own_copy
from shoal.train.remote import words
from shoal.train.remote.answers import check_answer
from shoal.train.remote.batch_sums import Adder
from shoal.train.remote.line import Line, Meeting, Signs
from shoal.train.remote.state import placement_of, push_id
from shoal.train.row_tables import RowGradients
from shoal.train.settings import BadPush, EpochPart, JobFacts, RunSettings, ValueNames
from shoal.train.setup import run_settings

_CACHE_BYTES = 64 << 20


class RemoteTable:
    """A table whose rows are the servers': what an embedding asks of a ``Table``; ``cache``: of rows that it has had."""

    def __init__(
        self, number: int, spec: TableSpec, client: Client, placement: Placement, cache: RowCache | None = None
    ) -> None:
        self.spec, self._number, self._client, self._placement = spec, number, client, placement
        self._cache = cache
        self.kernel = load()

    def unique(self, keys: np.ndarray, skipped: int | None = None) -> Batch:
        return self.kernel.unique(np.ascontiguousarray(keys), skipped)

    def pull(self, keys: np.ndarray, step: int = 0) -> torch.Tensor:
        if self._cache is None:
            return self._fetch(keys, step)
        return self._cache.pull(keys, step, lambda missing: self._fetch(missing, step))

    def _fetch(self, keys: np.ndarray, step: int) -> torch.Tensor:
        rows = torch.empty(len(keys), self.spec.width, dtype=self.spec.dtype)
        places = self._placement.servers_of(self._number, keys)
        asked = {server: np.ascontiguousarray(keys[at]) for server, at in places.items()}
        found = self._client.pull_rows(self._number, asked, step, self.spec.width, self.spec.dtype)
        for server, at in places.items():
            rows[torch.from_numpy(at)] = found[server]
        return rows


class RemoteRows(RowGradients):
    """The gradients of rows on their way into a push; ``found``: by table, those of the push that is being made."""

    def __init__(self, model: nn.Module, rank: int, steps_done: Callable[[], int]) -> None:
        super().__init__(model, rank, steps_done, served=True)
        self.found: dict[int, shard.RowGradients] = {}

    def publish(self) -> None:
        self.squared, self.bad, self.found = 0.0, None, {}
        for number, module in enumerate(self._modules):
            found = module.take_gathered()
            if found is not None:
                self.squared += float(torch.linalg.vector_norm(found.rows, dtype=torch.float64)) ** 2
                key = find_bad_key(found.keys, found.rows)
                self.bad = self.bad or (None if key is None else f"{module.spec.name} (key {key})")
                self.found[number] = shard.RowGradients(found.keys, found.counts.astype(np.uint32), found.rows)

    def withdraw(self) -> None:
        self.squared, self.found = 0.0, {}


class Heads:
    """Hears of the lead's orders while a worker waits for a server, or computes, and keeps its client with those that answer
    for each shard.

    Attributes:
        orders: the last that were heard.
    """

    def __init__(self, line: Line, client: Client, servers: Mapping[str, str]) -> None:
        self._line, self._client = line, client
        self._at = {int(place): address for place, address in servers.items()}
        self.orders: words.Orders | None = None
        self._look: Ticket | None = None

    def follow(self, orders: words.Orders) -> None:
        """Speak to whom the lead names; what has had no answer yet is sent there again."""
        self.orders = orders
        for place, address in enumerate(orders.heads):
            if self._at[place] != address:
                self._at[place] = address
                self._client.connect(place, address)

    def ask(self) -> None:
        """While a server is waited for: see whether the lead names another one."""
        line = self._line
        line.receive(0.0)
        if self._look is None:
            self._look = line.look(self.orders)
        elif self._look.answer is None:
            line.again(self._look)
        else:
            answer, self._look = self._look.answer, None
            if isinstance(answer, Refused):
                raise JobFailed(answer.reason)
            self.follow(answer.orders)


class RemoteClaims:
    """The units of one worker: asked of the lead, and reported to it."""

    def __init__(self, axis: RemoteWorker) -> None:
        self._axis = axis
        self._units: list[int] = []
        # The last unit that was handed out has to be pushed by itself.
        self.alone = False

    def claim(self, worker: int, beat: Callable[[], None] = lambda: None) -> Claim | Later:
        """Take the next unit; ``Later`` where there is none for now."""
        axis = self._axis
        while True:
            beat()
            answer, frames = axis.line.ask(lambda n: words.Claim(n, worker, len(self._units)), "a unit to compute")
            axis.obey(answer.orders)
            axis.take_buffers(answer.buffers, frames)
            if isinstance(answer, words.Unit):
                axis.settled, axis.groups = answer.settled, answer.groups
                self.alone = answer.alone
                self._units.append(answer.unit)
                return Claim(answer.unit, answer.slowest)
            if self._units:
                # What is open is pushed now, and asked again whether others are done, too.
                return Later(None, answer.step - 1)
            if answer.orders.over or (answer.orders.idle and answer.orders.steps_allowed <= answer.step):
                return Later(None, answer.step)

    def give_up(self) -> None:
        """Somebody else has done what is open; nothing is told of it."""
        self._units = []

    def open(self, worker: int) -> list[int]:
        return list(self._units)

    def finish(self, worker: int) -> None:
        """Tell the lead what was found of all open units."""
        units, self._units = self._units, []
        if units:
            self._axis.report(units)


class RemoteWorker(PushingWorker):
    """The server axis of a worker that shares no memory. Under ``sync`` its pushes wait for those of the other workers."""

    claims: RemoteClaims  # type: ignore[assignment]

    def __init__(
        self, store: Store, rank: int, waiting: Waiting, settings: RunSettings, line: Line, client: Client, placement: Placement
    ) -> None:
        super().__init__(store, rank, waiting, settings.plan, [])
        self.claims = RemoteClaims(self)
        self.line, self.client, self.placement = line, client, placement
        self.sync = not settings.plan.waits_for_nobody
        # Whether what this worker is at may be done by another one meanwhile.
        self.shares_units = settings.portions > 0
        self._settings = settings
        self.rows: RemoteRows | None = None
        self.heads: Heads | None = None
        # Rows are kept for as long as the copy that they are used with.
        self.caches: list[RowCache] = []
        self.settled = (0, 0, 0)
        # Whether what was reported last counts.
        self.counted = True
        self.groups: Sequence[dict[str, Any]] | None = None
        self.versions: Mapping[int, int] = {}
        self.unit = 0
        self._orders: words.Orders | None = None
        self._tickets: list[Ticket] = []
        self._signs = Signs(line)
        self._made: tuple[int, ...] = ()
        self._buffers_taken = 0.0
        table = store.table
        index = {spec.name: at for at, spec in enumerate(table.trained)}
        self._adder = Adder(line, rank, self.obey)
        self._pieces = {n: (index[p.name], p) for n, p in placement.pieces.items()}
        self._sizes = placement.sizes

    @property
    def units_per_step(self) -> int:
        return self._settings.units_per_step

    # -- the lead's words ----------------------------------------------------------------------------------------

    def obey(self, orders: words.Orders) -> None:
        """Write the lead's words where a supervisor would."""
        self._orders, supervisor = orders, self.arena.supervisor
        if self.heads is not None:
            self.heads.follow(orders)
        supervisor.write(Note.STOP_EPOCH, orders.stop_epoch)
        supervisor.write(Note.STOP_AT, orders.stop_at)
        supervisor.write(Note.EVAL_LOSS, orders.eval_loss)
        for order, value in ((Order.STEPS_ALLOWED, orders.steps_allowed), (Order.EPOCH_DONE, orders.epoch_done),
                             (Order.OVER, orders.over)):  # fmt: skip
            supervisor.post(order, value)

    def begin_unit(self, unit: int) -> None:
        """A unit is computed from now on, perhaps once more."""
        self.unit = unit
        self._adder.begin()

    def sum_small(self, values: torch.Tensor, replicas: Sequence[int]) -> torch.Tensor:
        """Sum a small tensor over the shards of the step that have samples; every worker gets the same bits."""
        began = time.monotonic()
        found = self._adder.add_up(values, self.unit, self.unit // self.units_per_step, replicas)
        self.waited_s += time.monotonic() - began
        return found

    def is_void(self, unit: int) -> bool:
        """Whether what is computed of a unit counts for nothing any more, because others have done it."""
        assert self.heads is not None
        self.heads.ask()
        orders = self.heads.orders
        return orders is not None and (unit < orders.past or unit in orders.done)

    def wait_for(
        self, attempt: Callable[[tuple[float, float]], int], what: str, check: Callable[[], None] | None = None
    ) -> None:
        """Repeat an attempt, and ask the lead for its words in between."""
        began = time.monotonic()
        while attempt((0.0, 0.0)) >= 0:
            if self._orders is not None and self._orders.over:
                raise Aborted("The run was ended.")
            if check is not None:
                check()
            deadline_s = self.line.patience.deadline_s
            if time.monotonic() - began > deadline_s:
                raise DeadlineError(f"Worker {self.rank} waited {deadline_s:.0f} s for {what}, from the lead of the run.")
            ticket = self.line.look(self._orders)
            self.line.wait([ticket], what)
            self.obey(ticket.answer.orders)
        self.waited_s += time.monotonic() - began

    def give_a_sign(self) -> None:
        """Let the lead hear that this worker lives."""
        self._signs.give()

    def await_worker(self, worker: int) -> None:
        """The lead hands out units: it knows whom to wait for."""

    def await_all(self) -> None:
        """A worker is told of an edge only when all that was begun is done."""

    # -- pulling and pushing -------------------------------------------------------------------------------------

    def pull(self, own: torch.Tensor) -> list[int]:
        """Copy what has changed of the trained weights from the servers; their versions."""
        for cache in self.caches:
            cache.clear()
        raw = own.numpy()

        def write(number: int, data: memoryview) -> None:
            index, piece = self._pieces[number]
            at = self.store.table.trained[index].offset + piece.start * piece.dtype.itemsize
            raw[at : at + data.nbytes] = np.frombuffer(data, np.uint8)

        self.versions = self.client.pull(write, sizes=self._sizes)
        return [self.versions[server] for server in self.placement.servers]

    @property
    def updates(self) -> int:
        """How many updates the copy has seen: what rows age by where each push is one."""
        return self.unit // self.units_per_step if self.sync else max(self.versions.values(), default=0)

    def push(self, unit: int, factor: float) -> None:
        """Send the stripe to the servers."""
        touched = self.store.touched[self._stripe]
        dense = {
            number: self.store.gradient(self._stripe, index).view(-1)[piece.start : piece.stop]
            for number, (index, piece) in self._pieces.items()
            if touched[index]
        }
        units = self.claims.open(self.rank)
        ids = tuple(push_id(u, self.units_per_step, self._settings.steps_per_epoch) for u in units)
        rows = self.rows.found if self.rows is not None else {}
        parts = self.placement.split(
            ids, dense, rows, step=self.updates, settled=self.settled, scale=factor, groups=None if self.sync else self.groups
        )
        self._tickets = self.client.push(parts, staged=self.sync, pulled=None if self.sync else self._pulled(units))
        self.slot.post(Signal.GRADIENTS, self.pushes + 1)

    def _pulled(self, units: Sequence[int]) -> dict[int, int]:
        """Of each server, the oldest version that gradients of the push about to be made were computed from."""
        rows = [self.ledger.pulled(u) for u in units if self.ledger.row(u)[UnitColumns.PUSH] == self.pushes + 1]
        return {server: int(min(row[k] for row in rows)) for k, server in enumerate(self.placement.servers)}

    def ring(self) -> None:
        """Servers are told by the push itself."""

    def await_applied(self) -> None:
        """Wait until all servers hold the push; under ``sync``, until it is applied with the others."""
        began = time.monotonic()
        made = self.client.acknowledged(self._tickets)
        self._made = () if self.sync else tuple(made[server] for server in self.placement.servers)
        self._take_over()
        self.claims.finish(self.rank)
        self._made, self._tickets = (), []
        self.slot.post(Signal.UPDATED, self.pushes)
        self.waited_s += time.monotonic() - began

    def _take_over(self) -> None:
        """What was applied before this came, sent by a predecessor or once already, is told as it was applied."""
        for ticket in self._tickets:
            done = ticket.answer
            if isinstance(done, messages.Done) and not done.new and done.staleness is not None:
                place = self.placement.servers.index(ticket.place)
                for unit in self.claims.open(self.rank):
                    self.ledger.pulled(unit)[place] = done.version - 1 - done.staleness

    # -- reports -------------------------------------------------------------------------------------------------

    def report(self, units: Sequence[int]) -> None:
        """Tell the lead what was found of units; return when it has counted them."""
        rows = []
        for unit in units:
            row = self.ledger.row(unit)
            columns = row[: UnitColumns.VALUES + VALUE_COLUMNS].tolist()
            rows.append(words.Row(unit, tuple(columns), tuple(int(v) for v in self.ledger.pulled(unit))))
        tensors = {spec.name: self.store.buffer(0, k) for k, spec in enumerate(self.store.table.buffers)}
        heads, frames = messages.pack_tensors(tensors)
        answer, _ = self.line.ask(
            lambda n: words.Report(number=n, rank=self.rank, rows=tuple(rows), made=self._made, buffers=heads),
            "the step of its push to be done" if self.sync else "its push to be counted",
            frames,
        )
        self.counted = answer.counts
        self.obey(answer.orders)

    def take_buffers(self, heads: Sequence[messages.Tensor], frames: Sequence[memoryview]) -> None:
        """Begin with the buffers that the last worker has left, where it is said what these are."""
        found = messages.unpack_tensors(heads, frames)
        self._buffers_taken += 1.0
        for index, spec in enumerate(self.store.table.buffers):
            if spec.name in found:
                for parity in (0, 1):
                    self.store.buffer(parity, index).copy_(found[spec.name])
                self.store.buffer_steps[index] = self._buffers_taken


class RemoteLoop(PushLoop):
    """Computes units until there are none left."""

    def __init__(self, parts: Parts, around: Surroundings, copy: torch.Tensor) -> None:
        super().__init__(parts, around, copy)
        assert isinstance(parts.axis, RemoteWorker)
        self._remote: RemoteWorker = parts.axis
        # Samples that the loss of the unit in work is the mean over.
        self._total = 0

    def _work(self, unit: int, slowest: int) -> None:
        axis, gradients = self._remote, self.parts.gradients
        axis.begin_unit(unit)
        if axis.shares_units:
            gradients.is_void = partial(axis.is_void, unit)
        try:
            super()._work(unit, slowest)
            void = axis.shares_units and axis.is_void(unit)
        except GivenUp:
            void = True
        if void:
            for parameter in self.parts.model.parameters():
                parameter.grad = None
            self._gathered = []
            self._metric_notes.go_back(axis.pushes)
            axis.claims.give_up()

    def _fetch(self, step: int, shard: int) -> Sequence[tuple[Share, Any]]:
        if not self._remote.shares_units:
            return super()._fetch(step, shard)
        with user_code("train_data", self.rank):
            return self.parts.feed.portion(step, *divmod(shard, self._remote.world_size))

    def _shares(self, step: int, shard: int) -> Sequence[Share]:
        if not self._remote.shares_units:
            return super()._shares(step, shard)
        return self.parts.feed.shares_of_portion(step, *divmod(shard, self._remote.world_size))

    def _mean_over(self, shares: Sequence[Share]) -> int:
        # What BatchNorm adds up on the way back has to come of one and the same loss in all workers, whose shards may differ.
        together = self._around.batchnorm is not None
        self._total = sum(sum(share.counts) for share in shares) if together else super()._mean_over(shares)
        return self._total

    def _begin_batch(self, step: int) -> None:
        super()._begin_batch(step)
        # An evaluation may take longer than any step, and nothing else is said meanwhile.
        self._remote.give_a_sign()

    def _push_if_full(self) -> None:
        if self._remote.claims.alone:
            self._push()
        else:
            super()._push_if_full()

    @property
    def gathered(self) -> Mapping[str, Any]:
        """The training metrics that keep a state, by name."""
        return self._metrics.stateful

    def _push(self) -> None:
        before = self._remote.pushes
        super()._push()
        if self._remote.pushes > before and not self._remote.counted:
            # Others were quicker, or did without it (``backup``): then it counts for no metric either.
            self._metric_notes.leave_out(before)

    def _factor(self, rows: Sequence[np.ndarray], squared: float) -> float:
        if not self._remote.sync:
            return super()._factor(rows, squared)
        # A mean counts as often as there are samples in it; the lead divides by those of all shards.
        return 1.0 if rows[0][UnitColumns.MEASURED] else float(self._total)


class Sender:
    """Takes a worker's messages to the lead."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def send(self, message: Any) -> None:
        line = self._line
        if isinstance(message, ValueNames):
            line.ask(lambda n: words.Names(n, message.names), "the names of what it logs to be heard")
        elif isinstance(message, BadPush):
            line.ask(
                lambda n: words.Bad(n, message.rank, message.units, message.parameter, message.samples),
                "a push that is no number to be heard of",
            )
        elif isinstance(message, EpochPart):
            self._send_part(message)
        else:
            raise AssertionError(f"a worker that shares no memory sends no {type(message).__name__}")

    def _send_part(self, part: EpochPart) -> None:
        evaluation: Any = part.evaluation
        training: Any = part.training
        metrics = evaluation.metrics if evaluation is not None else {}
        frames = [notes.to_bytes(pieces_of_metrics(m)) for m in (metrics, training.metrics)]
        sums = None if evaluation is None else dict(evaluation.sums)
        self._line.ask(
            lambda n: words.Evaluated(number=n, rank=part.rank, epoch=part.epoch, sums=sums, seconds=part.seconds),
            "its part of an evaluation to be heard",
            frames,
        )


class Alone:
    """How a worker goes through a run that is one process.

    Attributes:
        address: where other processes find it.
    """

    address = ""

    def train(
        self, host: TrainHost, settings: RunSettings, line: Line, client: Client, placed: words.Placed
    ) -> Mapping[str, Any]:
        """Work until nothing is left to do; what metrics with a state have gathered in the epoch that the run is in."""
        store = host.take_up(Arena.private(settings.layout), settings, True)
        axis = make_axis(host, store, settings, line, client, placed)
        host.forget_first_weights()

        def make_rows(model: nn.Module) -> RowGradients:
            axis.rows = RemoteRows(model, line.rank, lambda: axis.updates)
            return axis.rows

        rows = make_rows if host.facts().tables else None
        parts, around, own = host.worker(line.rank, Sender(line), lambda _: axis, make_rows=rows)
        loop = RemoteLoop(parts, around, own_copy(store, own))
        loop.run()
        return loop.gathered


def work(
    make_host: Callable[[], TrainHost], options: TrainOptions, meeting: Meeting, rank: int, how: Alone | None = None
) -> tuple[Path, dict[str, Any]]:
    """A worker's whole life; the run's directory and its summary. ``make_host`` builds the job."""
    line, how = Line(meeting, "worker", rank), how or Alone()
    try:
        host = make_host()
        placed = line.join(built_as(host.facts()), how.address)
        plan = Plan.parse(placed.plan)
        settings = remote_settings(plan, host.job, host.facts(), options, placed.checkpoints)
        client = Client(
            {int(s): address for s, address in placed.servers.items()}, meeting.keys, Patience(meeting.deadline_s)
        )
        try:
            gathered = how.train(host, settings, line, client, placed)
        finally:
            client.close()
        # Whoever leaves within an epoch, because the run goes on under another plan, leaves to others what it has seen.
        return line.leave([notes.to_bytes(pieces_of_metrics(gathered))] if gathered else ())
    except BaseException as error:
        line.tell_failure(error)
        raise
    finally:
        line.close()


def make_axis(
    host: TrainHost, store: Store, settings: RunSettings, line: Line, client: Client, placed: words.Placed
) -> RemoteWorker:
    """What a worker claims, pulls and pushes by, over a store of the whole model; its process is made ready to compute."""
    plan, facts, rank = settings.plan, host.facts(), line.rank
    keep_freed_memory()
    torch.set_num_threads(plan.threads or 1)
    host.quicken()
    store.arena.supervisor.write(Note.FIRST_STEP, placed.first_step)
    placement = placement_of(facts.table, facts.tables, client.places)
    # With one unit a copy, none of its rows is asked for twice.
    keeps = plan.waits_for_nobody and (plan.pull_every or 1) > 1
    caches = [cache_of(spec) if keeps else None for spec in facts.tables]
    host.use_tables(lambda number, spec: RemoteTable(number, spec, client, placement, caches[number]))
    waiting = Waiting(spin_s=0.0, deadline_s=line.patience.deadline_s)
    axis = RemoteWorker(store, rank, waiting, settings, line, client, placement)
    axis.caches = [cache for cache in caches if cache is not None]
    if plan.replicas or placed.log or settings.portions:
        axis.heads = Heads(line, client, placed.servers)
        client.while_waiting = axis.heads.ask
    buffers = {spec.name: store.buffer(0, k) for k, spec in enumerate(store.table.buffers)}
    line.check = partial(check_answer, buffers=buffers, servers=len(client.places))
    axis.obey(placed.orders)
    store.arena.slots[rank].post(Signal.EVALUATED, placed.orders.epoch_done)
    store.arena.slots[rank].write(Note.METRICS_EPOCH, placed.orders.epoch_done)
    return axis


def cache_of(spec: TableSpec) -> RowCache:
    """Room for the rows of a table that a worker's copy of the weights goes with."""
    return RowCache(max(8, _CACHE_BYTES // (spec.width * spec.dtype.itemsize)), spec.width, spec.dtype, bound=0)


def built_as(facts: JobFacts) -> str:
    """What a process has built, to be compared with what the others have."""
    import hashlib

    shapes = [(spec.name, spec.shape, str(spec.dtype), spec.group) for spec in facts.table.parameters]
    tables = [(spec.name, spec.width) for spec in facts.tables]
    return hashlib.sha256(repr((facts.samples, facts.eval_samples, shapes, tables)).encode()).hexdigest()[:16]


def remote_settings(plan: Plan, job: Job, facts: JobFacts, options: TrainOptions, checkpoints: str) -> RunSettings:
    """What the processes of such a run have to know."""
    return run_settings(plan, job, facts, options, Path(checkpoints), private=True)
