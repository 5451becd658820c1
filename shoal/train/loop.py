"""A worker's life: computing its share of every step, and standing by its peers at the edges of epochs.

The loop can be entered at any point: what was done is read from the arena, so a replacement simply begins where its
predecessor's signals say it had come to.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import nn

from shoal.axes.data import ArenaData
from shoal.axes.updating import Hooks
from shoal.comm.arena import Note, Order, Phase, Signal
from shoal.comm.journal import Journal
from shoal.comm.store import VALUE_COLUMNS, Columns, Store, carry_sums
from shoal.comm.team import StepAborted, Team
from shoal.data.source import Source
from shoal.errors import JobError
from shoal.job import Job
from shoal.process.failure import user_code
from shoal.ps.lock import locked
from shoal.train.buffers import Buffers
from shoal.train.evaluate import Metrics, Slice, Tally, evaluate
from shoal.train.faults import Faults
from shoal.train.feed import Feed, Share
from shoal.train.garbage import Garbage
from shoal.train.gradients import Gradients, find_bad
from shoal.train.metric_state import MetricNotes, read_pieces
from shoal.train.objective import Outcome
from shoal.train.passes import Passes
from shoal.train.saving import PartsSaver, StepSaver, decide
from shoal.train.schedule import NoSchedule, Schedule
from shoal.train.settings import BadPush, EpochPart, MetricPieces, NotFinite, RunSettings, ValueNames
from shoal.train.update import Updater


class Sender(Protocol):
    """Whatever takes a worker's messages to the supervisor."""

    def send(self, message: Any) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a worker works with, put together by its host.

    Attributes:
        model: what this worker has of the model.
        buffered: the module that has its buffers; ``publishes``: the names of those that it tells the others of, None for all.
        updater: what updates its slice; None where servers update.
        team: the ranks that it computes a share with; None where it computes alone, or they share no memory.
        collect: brings all parts of a model together for a checkpoint of a step; None where they lie in one arena, or each
            worker has the whole model.
    """

    job: Job
    model: nn.Module
    buffered: nn.Module
    publishes: frozenset[str] | None
    passes: Passes
    gradients: Gradients
    store: Store
    axis: ArenaData
    updater: Updater | None
    team: Team | None
    feed: Feed
    eval_source: Source | None
    schedule: Schedule | NoSchedule
    faults: Faults
    settings: RunSettings
    channel: Sender
    collect: Callable[[int], None] | None = None


@dataclass
class Sums:
    """What a worker found in a step: sums over its samples."""

    loss: float = 0.0
    weight: float = 0.0
    samples: int = 0
    measured: bool = False
    values: dict[str, float] = field(default_factory=dict)

    def add(self, outcome: Outcome, count: int) -> None:
        self.loss += outcome.loss_sum()
        self.weight += outcome.weight
        self.samples += count
        self.measured = self.measured or outcome.measured
        for name, value in outcome.values.items():
            self.values[name] = self.values.get(name, 0.0) + value * count


class Loop:
    """Runs the steps of one worker."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.rank = parts.axis.rank
        self.slot = parts.axis.slot
        # Where bad pushes are left out, so are the running statistics that they would leave.
        self._buffers = Buffers(parts.buffered, parts.store, parts.publishes, finite=parts.settings.skip_bad_pushes)
        self._metrics = Metrics(parts.job.metrics)
        self._journal = Journal(parts.store.arena, self.rank)
        self._metric_notes = MetricNotes(self._metrics.stateful, parts.job.metrics, self._journal)
        self._garbage = Garbage()
        self._names: tuple[str, ...] | None = None
        grid = parts.settings.grid
        place = grid.place(self.rank)
        self._replica = place.data
        # One rank of a replica speaks for its loss and its metrics, the first along the tensor axis for what all there have.
        self._leads = place.tensor == 0
        self._reports = parts.passes.knows_loss and self._leads
        saving = (
            parts.axis, parts.updater, parts.axis.keeps, [parts.store.arena.slots[rank] for rank in parts.axis.keeps],
            parts.settings.checkpoint_dir, parts.channel.send, parts.faults,
            (parts.job.seed, parts.store.part_of(self.rank)),
        )  # fmt: skip
        self._saver = StepSaver(*saving) if parts.collect is None else PartsSaver(parts.collect, *saving)
        self._hooks = Hooks(reach=parts.faults.reach, before_chunk=self._saver.before_chunk)

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until the last step, or until the run is stopped."""
        settings, axis = self.parts.settings, self.parts.axis
        self.parts.model.train()
        step = axis.steps_done()
        self.parts.schedule.recall(step)
        self._metric_notes.recall(step + 1 if axis.has_computed(step) else step)
        if step:
            # A predecessor may have died between its own commit and the others'. Until theirs, the weights are not those
            # of the next step, and this worker's stripe is still being read.
            self._finish(step - 1)
        while True:
            if step and step % settings.steps_per_epoch == 0 and self._epoch_ends(step):
                break
            if step >= settings.total_steps or axis.must_stop(step):
                break
            self._step(step)
            last, step = step, axis.next_step(step)
            if step > last + 1:
                self._metric_notes.keep(step)
        self.slot.enter(Phase.DONE, step)

    def _step(self, step: int) -> None:
        axis, slot, parts = self.parts.axis, self.slot, self.parts
        record = parts.store.record(self.rank, step)
        began = time.monotonic()
        axis.waited_s = 0.0
        if not axis.has_published(step):
            self._compute_together(step, record, began)
            self._decide(step)
            if parts.updater is None:
                self._examine(step, record)
            axis.publish(step)
            parts.faults.reach("published", step)
            if step + 1 < parts.settings.total_steps:
                self._look_ahead(step)
        self._garbage.between()
        slot.enter(Phase.WAITING, step)
        self._hand_over_metrics(step)
        totals = axis.gather(step)
        if axis.is_late(step):
            # What was dropped counts for no metric either.
            self._metric_notes.leave_out(step)
        slot.enter(Phase.REDUCE, step)
        parts.faults.reach("reduce", step)
        if not math.isfinite(totals.loss):
            samples = np.concatenate([share.indices for share in parts.feed.shares(step)] or [np.empty(0, int)])
            parts.channel.send(NotFinite(step + 1, self.rank, totals.loss, tuple(int(s) for s in samples)))
            axis.await_end()
        reduce_began, waited_s = time.monotonic(), axis.waited_s
        self._saver.begin(step)
        slot.enter(Phase.UPDATE, step)
        with user_code("optimizer", self.rank):
            axis.update(step, totals, parts.job.grad_clip, self._hooks)
        parts.faults.reach("updated", step)
        self._saver.end(step)
        with user_code("scheduler", self.rank):
            parts.schedule.after_step(step)
        ended = time.monotonic()
        record[Columns.REDUCE] = ended - reduce_began - (axis.waited_s - waited_s)
        record[Columns.WAIT] = axis.waited_s
        record[Columns.ENDED] = ended
        record[Columns.STEP] = step + 1
        axis.commit(step)
        parts.faults.reach("committed", step)
        self._finish(step)

    def _look_ahead(self, step: int) -> None:
        """While the others still compute, there is time to fetch what comes next."""
        self.slot.enter(Phase.DATA, step)
        with user_code("train_data", self.rank):
            self.parts.feed.prepare(step + 1)

    def _examine(self, step: int, record: np.ndarray) -> None:
        """A gradient that is no number never reaches a server, nor one of a loss that is none."""
        stripe = self.parts.store.stripe_of(self.rank)
        if self._is_good(step, stripe, float(record[Columns.LOSS]), self._replica, self.parts.feed.shares(step)):
            return
        self.parts.gradients.withdraw_rows()
        self._write_record(step, record, Sums())
        self._metric_notes.leave_out(step)

    def _is_good(self, step: int, stripe: int, loss: float, replica: int, shares: Sequence[Share]) -> bool:
        """Whether the gradients in a stripe are all numbers; where not, the run ends, or they are left out and others count."""
        parts = self.parts
        bad = find_bad(parts.store, stripe, parts.axis.own, parts.gradients.finite) or parts.gradients.bad_row
        if (bad is None and math.isfinite(loss)) or parts.axis.is_late(step):
            return True
        samples = tuple(int(s) for share in shares for s in share.indices)
        parts.channel.send(BadPush(self.rank, (step * parts.settings.grid.dp + replica,), bad, samples))
        if not parts.settings.skip_bad_pushes:
            parts.axis.await_end()
        parts.store.touched[stripe, parts.axis.own] = 0
        return False

    def _finish(self, step: int) -> None:
        """Wait until everybody's part of the step's update is done, and for an observer who must see it first."""
        axis, parts = self.parts.axis, self.parts
        self.slot.enter(Phase.WAITING, step)
        axis.finish(step)
        if not axis.has_published(step + 1):
            self._average(step)
        if parts.settings.wait_for_observer:
            axis.await_supervisor(Order.STEP_SEEN, step + 1, "the observer of events")

    # -- training alone for some steps (local_steps) -------------------------------------------------------------

    def _ends_round(self, step: int) -> bool:
        """Whether replicas are averaged after this step."""
        settings = self.parts.settings
        alone, done = settings.plan.local_steps or 1, step + 1
        return done % alone == 0 or done % settings.steps_per_epoch == 0 or done == settings.total_steps

    def _average(self, step: int) -> None:
        if not self.parts.store.local or not self._ends_round(step):
            return
        first = step
        while first and not self._ends_round(first - 1):
            first -= 1
        samples = [0] * self.parts.axis.world_size
        for at in range(first, step + 1):
            for share in self.parts.feed.shares(at):
                samples = [a + b for a, b in zip(samples, share.counts, strict=True)]
        self.parts.axis.average(step, samples)

    def _decide(self, step: int) -> None:
        """Rank 0 alone decides what happens after a step, before anybody can get past its barrier."""
        if self.rank or (self.parts.store.local and not self._ends_round(step)) or self.parts.updater is None:
            return
        decide(self.slot, self.parts.axis.arena.supervisor, step)

    # -- computing -----------------------------------------------------------------------------------------------

    def _compute_together(self, step: int, record: np.ndarray, began: float) -> None:
        """Compute a step; with a team, until all of it have done so, and again whenever one of them is lost before that."""
        axis, team = self.parts.axis, self.parts.team
        if team is None:
            self._compute(step, record, began)
            return
        while True:
            if not axis.has_computed(step):
                self._meet(team, step)
                try:
                    self._compute(step, record, began)
                    team.flush()
                except StepAborted:
                    self._forget(step)
                    continue
                axis.post_computed(step)
                self.parts.faults.reach("computed", step)
            self.slot.enter(Phase.WAITING, step)
            try:
                axis.await_computed(step, team)
                return
            except StepAborted:
                axis.take_back_computed(step)
                self._forget(step)

    def _meet(self, team: Team, step: int) -> None:
        """Where a member of the team was lost, come together with the one who has taken its place."""
        if team.apart:
            self.parts.faults.reach("meeting", step)
            self.slot.enter(Phase.WAITING, step)
            team.gather()
            # Who is new knows nothing of what the others have agreed on.
            self.parts.passes.clear()

    def _forget(self, step: int) -> None:
        """What was computed of a step is void."""
        self.parts.passes.clear()
        self._metric_notes.go_back(step)

    def _compute(self, step: int, record: np.ndarray, began: float) -> None:
        parts, faults = self.parts, self.parts.faults
        parts.axis.begin(step)
        parts.gradients.begin()
        self.slot.enter(Phase.DATA, step)
        faults.reach("data", step)
        with user_code("train_data", self.rank):
            batches = parts.feed.batches(step)
        computing = time.monotonic()
        self._buffers.load(step)
        counts = [share.counts for share, _ in batches]
        # A worker that trains alone takes the mean over its own samples.
        total = sum(c[self._replica] for c in counts) if parts.store.local else sum(map(sum, counts))
        sums = self._go_through(step, batches, total)
        parts.gradients.collect()
        faults.drag(step, time.monotonic() - computing)
        if parts.axis.meets_others:
            shares = counts[-1] if counts else ()
            publisher = next((replica for replica, count in enumerate(shares) if count), 0)
            written = self._buffers.publish(step) if publisher == self._replica and self._leads else []
            parts.axis.carry_buffers(publisher, written)
        elif not parts.axis.is_late(step):
            self.publish_buffers(step * parts.axis.world_size + self.rank)
        self._metric_notes.keep(step + 1)
        self._write_record(step, record, sums)
        record[Columns.BEGAN] = began
        record[Columns.DATA] = computing - began
        record[Columns.COMPUTE] = time.monotonic() - computing - parts.axis.waited_s

    def _go_through(self, step: int, batches: Sequence[tuple[Share, Any]], total: int) -> Sums:
        """Forward and backward over this rank's shares, the loss as the mean over ``total`` samples."""
        sums = Sums()
        for outcome, count in self.parts.passes.train(step, batches, total):
            if self._reports:
                with user_code("metrics", self.rank):
                    outcome.values.update(self._metrics.update(outcome))
                sums.add(outcome, count)
        return sums

    def publish_buffers(self, number: int) -> None:
        """Where workers do not meet, running statistics are those of whoever was last; ``number``: differs each time."""
        if self.parts.store.table.buffers:
            with locked(self.parts.store.arena, lambda: self.slot.write(Note.PHASE_SINCE, time.monotonic())):
                self._buffers.publish(2 * number)
                self._buffers.publish(2 * number + 1)

    def named_values(self, sums: Sums) -> np.ndarray:
        """What the job logs, one column for each name; the supervisor is told the names at the first time."""
        values = sums.values
        if values and self._names is None:
            self._names = tuple(values)
            if len(values) > VALUE_COLUMNS:
                raise JobError(f"The job logs {len(values)} values a step and {VALUE_COLUMNS} fit; log fewer.")
            self.parts.channel.send(ValueNames(self._names))
        own = np.zeros(VALUE_COLUMNS)
        for column, name in enumerate(self._names or ()):
            own[column] = values.get(name, 0.0)
        return own

    def _write_record(self, step: int, record: np.ndarray, sums: Sums) -> None:
        own = self.named_values(sums)
        begins = step % self.parts.settings.steps_per_epoch == 0
        before = self.parts.store.record(self.rank, step - 1) if step and not begins else None
        record[Columns.LOSS], record[Columns.WEIGHT], record[Columns.SAMPLES] = sums.loss, sums.weight, sums.samples
        record[Columns.MEASURED] = float(sums.measured)
        record[Columns.VALUES : Columns.VALUE_SUMS] = own
        carry_sums(record, before)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _hand_over_metrics(self, step: int) -> None:
        """Where another rank writes this one's notes into the checkpoint, it has to be told the metrics' state."""
        axis = self.parts.axis
        if self._metrics.stateful and axis.tells_metrics and int(axis.arena.slots[0].note(Note.CHECKPOINT_AT)) == step:
            self.parts.channel.send(MetricPieces(self.rank, step, read_pieces(self._journal, step)))

    # -- the edge of an epoch ------------------------------------------------------------------------------------

    def _epoch_ends(self, step: int) -> bool:
        """Evaluate this worker's part and wait for the supervisor's word; whether the run ends here."""
        parts, axis = self.parts, self.parts.axis
        epoch = step // parts.settings.steps_per_epoch
        supervisor = axis.arena.supervisor
        again = self.slot.signal(Signal.EVALUATED) < epoch
        while True:
            try:
                if again:
                    with self._garbage.automatic():
                        self._evaluate(step, epoch)
                self.slot.enter(Phase.WAITING, step)
                axis.await_supervisor(Order.EPOCH_DONE, epoch, "the supervisor's decision on the epoch", self._void(epoch))
                break
            except StepAborted:
                # Taken back before the others are met, so that it cannot be taken for what is found then.
                self.slot.post(Signal.EVALUATED, epoch - 1)
                parts.passes.clear()
                again = True
        # Not before: what was sent may not have left yet, or have to be sent again.
        if not axis.has_computed(step):
            self._metric_notes.begin_again(step)
        with user_code("scheduler", self.rank):
            parts.schedule.after_epoch(supervisor.note(Note.EVAL_LOSS))
        return int(supervisor.note(Note.STOP_EPOCH)) == epoch

    def _evaluate(self, step: int, epoch: int) -> None:
        """Evaluate this worker's batches and tell the supervisor."""
        parts, settings = self.parts, self.parts.settings
        if parts.team is not None:
            self._meet(parts.team, step)
        self.slot.enter(Phase.EVALUATE, step)
        began = time.monotonic()
        found: Tally | None = None
        if parts.eval_source is not None and settings.evaluate:
            self._buffers.load(step)

            part = Slice(
                self._replica, settings.grid.dp, settings.plan.layout == "channels_last", epoch, settings.grid.sharded
            )
            with user_code("evaluation", self.rank):
                found = evaluate(
                    parts.job, parts.model, parts.eval_source, part, lambda: self._begin_batch(step), parts.passes.evaluate
                )
        training = Tally(metrics=self._metrics.stateful)
        if parts.team is not None:
            parts.team.flush()
        found = found if self._reports else None
        parts.channel.send(EpochPart(epoch, self.rank, found, training, time.monotonic() - began))
        self.slot.post(Signal.EVALUATED, epoch)
        parts.faults.reach("evaluated", step)

    def _begin_batch(self, step: int) -> None:
        """Before each batch of an evaluation."""
        self.slot.enter(Phase.EVALUATE, step)
        self.parts.faults.reach("evaluate", step)

    def _void(self, epoch: int) -> Callable[[], None] | None:
        """What to ask while waiting after an evaluation: whether a member of the team was lost before it had done its part."""
        team, slots = self.parts.team, self.parts.axis.arena.slots
        if team is None:
            return None

        def check() -> None:
            if any(slots[rank].signal(Signal.EVALUATED) < epoch for rank in team.ranks):
                team.check()

        return check
