"""The supervisor's part where workers wait for nobody: reading the ledger, and how far workers may go.

Units are read out of their rows as soon as all servers hold their pushes: each becomes the events ``clock`` and ``push_ack``,
once. A step is done when all of its units are; what a step's workers would have written into their records is then written for
them, so that everything behind (means over an epoch, checkpoints) is as in the other plans.

Workers may begin units up to a step that the supervisor names: the end of the epoch, and less where it wants them to rest: for
a checkpoint, which is then written while nobody works, for an observer of each step, or because the run ends.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shoal.axes.server_async import claims_of
from shoal.comm.arena import Note, Order, Signal
from shoal.comm.store import RING_STEPS, VALUE_COLUMNS, Columns, Store, carry_sums
from shoal.ps.ledger import DROPPED, EMPTY, REJECTED, UNCOUNTED, Ledger, UnitColumns
from shoal.ps.lock import locked
from shoal.train.recorder import Emit, Recorder
from shoal.train.settings import BadPush, NotFinite, RunSettings

_SUMS = (
    (UnitColumns.LOSS, Columns.LOSS), (UnitColumns.WEIGHT, Columns.WEIGHT), (UnitColumns.SAMPLES, Columns.SAMPLES),
)  # fmt: skip
_TIMES = (
    (UnitColumns.DATA, Columns.DATA), (UnitColumns.COMPUTE, Columns.COMPUTE), (UnitColumns.REDUCE, Columns.REDUCE),
    (UnitColumns.WAIT, Columns.WAIT),
)  # fmt: skip


_LOCK_S = 0.05


class PushRecorder(Recorder):
    """Reads the ledger instead of step records."""

    def __init__(self, store: Store, emit: Emit, settings: RunSettings, first_step: int) -> None:
        super().__init__(store, emit, settings.steps_per_epoch, first_step)
        self.ledger = Ledger(store.arena)
        self._workers, self._per_step = store.arena.world_size, settings.units_per_step
        self.claims = claims_of(store, settings.plan, self._per_step)
        self._portioned = settings.portions > 0
        self._rerun = 0
        self._next = first_step * self._per_step
        self._told: set[int] = set()
        self.staleness: Counter[int] = Counter()
        self.ahead = -1

    def go_on_from(self, before: Recorder) -> None:
        super().go_on_from(before)
        if isinstance(before, PushRecorder):
            self.staleness.update(before.staleness)
            self._rerun += before._rerun

    @property
    def next_unit(self) -> int:
        """The first unit that is not known to be done."""
        return self._next

    def drain(self, until: int | None = None) -> None:
        while (last := self.committed()) > self.step:
            super().drain(last)

    def committed(self) -> int:
        """Steps of which every unit is done; reads what has been done since it was last asked."""
        last = self.claims.last()
        for unit in range(self._next, last + 1):
            if unit not in self._told and self._is_done(unit):
                self._told.add(unit)
                self._tell(unit)
        while self._next in self._told:
            self._told.remove(self._next)
            self._next += 1
        # No more than there are records.
        step = min(self._next // self._per_step, self.step + RING_STEPS)
        for done in range(self.step, step):
            self._write_records(done)
        # From here on the rows may be used again.
        self._store.arena.supervisor.write(Note.UNITS_SEEN, step * self._per_step)
        return step

    def _is_done(self, unit: int) -> bool:
        row = self.ledger.row(unit)
        if row[UnitColumns.UNIT] != unit + 1:
            return False
        push = int(row[UnitColumns.PUSH])
        if push in UNCOUNTED:
            return True
        applied = self.ledger.is_applied(int(row[UnitColumns.RANK]), push)
        return applied and (self.logged is None or max(self.ledger.made(unit)) <= self.logged())

    def take_for_told(self, unit: int) -> None:
        """An earlier session has done a unit, and told of it; no step is the last one before it."""
        self._told.add(unit)
        self.ahead = max(self.ahead, unit)

    def _tell(self, unit: int) -> None:
        row = self.ledger.row(unit)
        push, rank = int(row[UnitColumns.PUSH]), int(row[UnitColumns.RANK])
        step, shard = divmod(unit, self._per_step)
        epoch, batch = divmod(step, self._steps_per_epoch)
        named = {"rank": rank, "epoch": epoch + 1, "batch": batch + 1, "shard": shard}
        if push == DROPPED:
            self._emit("push_dropped", **named)
        if push in (EMPTY, DROPPED):
            return
        self._emit("clock", rank=rank, clock=step + 1, slowest=int(row[UnitColumns.SLOWEST]) + 1)
        if push == REJECTED:
            return
        made, pulled = self.ledger.made(unit), self.ledger.pulled(unit)
        # One that was pulled from a server which then came again may be of an update that was yet to be made once more.
        staleness = max(0, *(int(a - b) - 1 for a, b in zip(made, pulled, strict=True)))
        self.staleness[staleness] += 1
        if self._portioned and row[UnitColumns.GIVEN] > 1:
            self._rerun += int(row[UnitColumns.GIVEN]) - 1
            self._emit("portion_rerun", **named, times=int(row[UnitColumns.GIVEN]))
        self._emit("push_ack", **named, versions=[int(v) for v in made], staleness=staleness)

    def _write_records(self, step: int) -> None:
        """What the workers of another plan write themselves."""
        begins = step % self._steps_per_epoch == 0
        rows = [self.ledger.row(unit) for unit in range(step * self._per_step, (step + 1) * self._per_step)]
        for rank in range(self._workers):
            record = self._store.record(rank, step)
            before = None if begins or not step else self._store.record(rank, step - 1)
            record[:] = 0.0
            # A step begins where the first of its units does, so that the time of one never counts for another.
            record[Columns.BEGAN] = min(row[UnitColumns.BEGAN] for row in rows)
            record[Columns.ENDED] = max(row[UnitColumns.ENDED] for row in rows)
            for shard, row in enumerate(rows):
                if row[UnitColumns.PUSH] in UNCOUNTED:
                    continue
                did = row[UnitColumns.RANK] == rank
                # Portions are added up in one order, whoever has computed them.
                has = shard % self._workers == rank if self._portioned else did
                for source, target in (*(_SUMS if has else ()), *(_TIMES if did else ())):
                    record[target] += row[source]
                if has:
                    record[Columns.MEASURED] = max(record[Columns.MEASURED], row[UnitColumns.MEASURED])
                    values = row[UnitColumns.VALUES : UnitColumns.VALUES + VALUE_COLUMNS]
                    record[Columns.VALUES : Columns.VALUE_SUMS] += values
            carry_sums(record, before)
            record[Columns.STEP] = step + 1

    def _tell_pushes(self, step: int, rows: Any) -> None:
        """They were told as they came."""

    def told(self) -> dict[str, Any]:
        """Staleness -> how many pushes had it; and of portions, how many were handed out again."""
        found: dict[str, Any] = {"staleness": {str(s): self.staleness[s] for s in sorted(self.staleness)}}
        return {**found, "portions_rerun": self._rerun} if self._portioned else found

    @property
    def step_s(self) -> float | None:
        """The median step; steps overlap, so the time between the ends of two counts where that is positive."""
        times = [t for t in self.step_times_s if t > 0]
        return statistics.median(times) if times else None


def of_bad_push(push: BadPush, settings: RunSettings) -> tuple[list[dict[str, Any]], str]:
    """The fields of an event for each unit, and the sentence with which a run ends, for a push whose gradient is no number."""
    places = []
    for unit in push.units:
        step, shard = divmod(unit, settings.units_per_step)
        places.append((step // settings.steps_per_epoch + 1, step % settings.steps_per_epoch + 1, shard))
    epoch, batch, _ = places[0]
    what = "The loss" if push.parameter is None else f"The gradient of {push.parameter}"
    shown = ", ".join(map(str, push.samples[:20])) + (" …" if len(push.samples) > 20 else "")
    beside = {"rank": push.rank, "parameter": push.parameter, "samples": list(push.samples)}
    fields = [{"epoch": epoch, "batch": batch, "shard": shard, **beside} for epoch, batch, shard in places]
    return fields, (
        f"{what} is no number in the push of worker {push.rank} for epoch {epoch}, batch {batch} (samples {shown}), and the push "
        "was not applied; look at these samples, or lower the learning rate"
    )


def of_bad_loss(found: Sequence[NotFinite]) -> str:
    """The sentence with which a run ends whose workers have met a loss that is no number."""
    samples = sorted({sample for message in found for sample in message.samples})
    shown = ", ".join(map(str, samples[:20])) + (f" and {len(samples) - 20} more" if len(samples) > 20 else "")
    return (
        f"The loss became {found[0].loss} in step {found[0].step} (samples {shown}); look at these samples or lower the "
        "learning rate"
    )


class Pacer:
    """Says how far workers may go."""

    def __init__(self, store: Store, settings: RunSettings, recorder: PushRecorder, first_step: int) -> None:
        self._store = store
        self._settings = settings
        self._recorder = recorder
        self._supervisor = store.arena.supervisor
        self._held: int | None = None
        self._supervisor.write(Note.FIRST_STEP, first_step)
        self._supervisor.write(Note.UNITS_SEEN, first_step * settings.units_per_step)
        recorder.ledger.begin_at(first_step)
        self._supervisor.post(Order.STEPS_ALLOWED, first_step)

    def attend(self, stops: bool, checkpoint: Callable[[int], None] | None) -> None:
        """Let workers go on, or rest.

        Args:
            stops: the run is to end as soon as the steps that were begun are done.
            checkpoint: called with the step while nobody works, where one is due.
        """
        recorder, claims = self._recorder, self._recorder.claims
        if stops or checkpoint is not None:
            if self._held is None:
                self._held = self._hold()
            if self._held is None or recorder.step < self._held or not claims.all_finished():
                return
            if self._is_edge(recorder.step):
                # The epoch is evaluated first, and the rest is seen to there.
                self._held = None
                return
            if stops:
                self.end(recorder.step)
                return
            assert checkpoint is not None
            checkpoint(recorder.step)
        # The end of an epoch may have made what was due: from here on nobody rests.
        self._held = None
        self._allow()

    def end(self, step: int) -> None:
        """Nothing more is to be done."""
        self._supervisor.write(Note.STOP_AT, step)
        self._supervisor.post(Order.OVER, 1)

    def marks(self) -> Mapping[int, int]:
        """For each place, under which number its notes are kept now."""
        arena, recorder = self._store.arena, self._recorder
        found = {rank: slot.signal(Signal.GRADIENTS) for rank, slot in enumerate(arena.slots)}
        first = int(self._supervisor.note(Note.FIRST_STEP))
        for server in range(len(arena.servers)):
            found[arena.world_size + server] = recorder.ledger.updates(server, first)
        return found

    def _is_edge(self, step: int) -> bool:
        done = self._supervisor.signal(Order.EPOCH_DONE)
        per_epoch = self._settings.steps_per_epoch
        return step > 0 and step % per_epoch == 0 and step // per_epoch > done

    def _hold(self) -> int | None:
        """Let nobody begin a further step; the step at which all will rest. None where a worker keeps the lock."""
        with locked(self._store.arena, within_s=_LOCK_S) as held:
            if not held:
                # It may have been stopped while it had it, and has to be found out and replaced meanwhile.
                return None
            last = max(self._recorder.claims.last(), self._recorder.ahead)
            step = -(-(last + 1) // self._settings.units_per_step)
            self._supervisor.post(Order.STEPS_ALLOWED, step)
        return step

    def _allow(self) -> None:
        settings, step = self._settings, self._recorder.step
        done = self._supervisor.signal(Order.EPOCH_DONE)
        limit = min((done + 1) * settings.steps_per_epoch, settings.total_steps)
        if settings.wait_for_observer:
            limit = min(limit, step + 1)
        if step >= settings.total_steps and not self._is_edge(step):
            self.end(step)
        elif self._supervisor.signal(Order.STEPS_ALLOWED) != limit:
            self._supervisor.post(Order.STEPS_ALLOWED, limit)
