"""The log of pushes of a run whose processes share no memory, as its lead keeps it and goes on from it.

Each server logs what it is told before it acknowledges it (``shoal.ps.logged``). A unit that all servers have acknowledged the
lead writes into a log of its own, ``units``, and only then does it count as acknowledged. So what counts is what ``units``
says: servers apply pushes in orders of their own, and may have some that others lack; of these none was acknowledged, and a
run that goes on leaves them out.

A session's folder has ``session.json``, the logs ``server-N``, ``units`` and ``epochs``, and ``base``: a checkpoint of what the
session began with, where that was more than the run's own checkpoint. With it the sessions before are not needed any more.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal.comm.store import VALUE_COLUMNS, Store
from shoal.errors import RequestError
from shoal.plan import Plan
from shoal.ps import log as logs
from shoal.ps.applied import PushId
from shoal.ps.dense import DensePart
from shoal.ps.ledger import UNCOUNTED, UnitColumns
from shoal.ps.log import Kind, LogWriter
from shoal.ps.logged import do_again, read_told
from shoal.ps.shard import Shard
from shoal.ps.staged import Staged
from shoal.ps.table import Counted, Rows, Table
from shoal.train import checkpoint as checkpoints
from shoal.train.checkpoint import Checkpoint, Restored
from shoal.train.host import TrainHost
from shoal.train.pacing import PushRecorder
from shoal.train.push_log import KeptLog, discard, full
from shoal.train.recorder import Emit
from shoal.train.remote.coordinator import went_on
from shoal.train.remote.dealing import Orphan
from shoal.train.remote.state import RemoteTables, StoreState, placement_of, push_id, put_rows
from shoal.train.replay import (
    EPOCHS,
    FOLDER,
    UNITS,
    Progress,
    SessionLog,
    check_ahead,
    lay_ahead,
    logged_epochs,
    tell_epochs,
    tell_pushes,
)
from shoal.train.row_tables import cold_path
from shoal.train.schedule import Schedule
from shoal.train.settings import RunSettings, units_of
from shoal.train.update_log import Commit, LogTrouble, log_limit, log_name

_BASE, _AHEAD = "base", "ahead"
_SUMS = 3 + VALUE_COLUMNS

WriteBase = Callable[[Path, Mapping[str, Any]], Checkpoint]
"""Writes what the run begins with as a checkpoint into a directory, with this beside what its ``meta.json`` has anyway."""


@dataclass(frozen=True)
class _Found:
    """What a session has logged behind the checkpoint that it stands on."""

    session: SessionLog
    base: Checkpoint
    ahead: Sequence[np.ndarray]
    rows: Sequence[np.ndarray]
    buffers: Mapping[int, bytes]


@dataclass(frozen=True)
class _Together:
    """Units that one push may hold; ``missing``: those that are not settled yet."""

    units: tuple[int, ...]
    missing: set[int]


class RemoteLog(KeptLog):
    """The log of a run whose processes share no memory."""

    remote = True

    def __init__(self, run: Path, plan: Plan, kept: bool, store: Store, host: TrainHost) -> None:
        super().__init__(run, plan, kept)
        self._store, self._host = store, host
        self._found: _Found | None = None
        self._ahead: list[np.ndarray] = []
        self._pushed: list[dict[str, Any]] = []
        self._whole_epochs: list[dict[str, Any]] = []
        self._eval_losses: list[float] = []
        self._per_epoch, self._per_step = 1, units_of(plan, host.facts())
        self.baselines: list[Checkpoint] = []
        """What servers that come again may begin with, the newest last: the logs have all pushes behind each of them."""
        self._units: LogWriter | None = None
        self._durable = -1
        self._mark = -1
        # Of units that were settled and not told of yet, the record that has them.
        self._record_of: dict[int, int] = {}
        # Units that count together, and that are not all settled yet.
        self._together: dict[int, _Together] = {}

    # -- going on ------------------------------------------------------------------------------------------------

    def refuse(self, found: Checkpoint) -> None:
        """RequestError where there is a log behind a checkpoint that was kept in shared memory."""
        self._refuse(self._others, found)

    def roll_forward(
        self, found: Checkpoint, restored: Restored, tables: RemoteTables, settings: RunSettings
    ) -> tuple[Checkpoint, Restored]:
        """The checkpoint and what it holds beside tensors, as if it had been written after the last push that counts."""
        self._per_epoch = settings.steps_per_epoch
        if not self._old:
            return found, restored
        session = self._old[-1]
        base = self._base_of(session, found)
        if base is not found:
            restored = checkpoints.restore(base, self._store)
            tables.restore(base.path, base.step)
        self._found = _read(session, base)
        if not (self._found.rows or self._found.ahead or base is not found):
            self._found = None
            return found, restored
        self._replay(self._found, restored, tables, settings)
        return self._progress(self._found, found, restored, settings)

    def _base_of(self, session: SessionLog, found: Checkpoint) -> Checkpoint:
        """What the log of a session stands on: the newest of the run's checkpoint and what the session began with."""
        base = checkpoints.newest(session.path / _BASE)
        if base is not None and base.step >= found.step:
            return base
        if found.step < session.first:
            raise RequestError(
                f"{session.path} stands on a checkpoint of step {session.first}, which is damaged or gone; move it away to go "
                f"on from step {found.step} without its pushes."
            )
        return found

    def _replay(self, found: _Found, restored: Restored, tables: RemoteTables, settings: RunSettings) -> None:
        """Do what the servers of the session have done and what counts, and put what comes of it where the run begins."""
        facts, host, session, store = self._host.facts(), self._host, found.session, self._store
        counts = {self._id(row, session.workers) for row in (*found.rows, *found.ahead)}
        placement = placement_of(facts.table, facts.tables, range(session.servers))
        state = StoreState(store, placement)
        state.numbers = numbers_in(restored)
        settled = push_id(found.base.step * session.workers, session.workers, self._per_epoch)
        began_with = [self._id(row, session.workers) for row in found.ahead]
        rows: list[tuple[int, Rows, Counted | None]] = []
        held_by = []
        for server in placement.servers:
            told = read_told(session.path, log_name(server), found.base.step)
            with _tables(facts.tables, settings.cold_dir) as held:
                shard = Shard(DensePart(placement.pieces_of(server), host.optimizer_over), held, host.staleness_factor)
                shard.restore(state.give(server, found.base.step, settled, began_with))
                put_rows(found.base.path, placement, server, held)
                do_again(shard, Staged(shard), told, lambda ids: counts.issuperset(ids))
                held_by.append(shard.snapshot(row_shards={}))
                for number, table in held.items():
                    own = placement.row_shards_of(server, number)
                    rows.append((number, table.export(own), table.export_counted(own)))
        # Not before all have begun: what is kept once a parameter, such as Adam's count of steps, several of them hold.
        for snapshot in held_by:
            state.take(snapshot)
        tables.begin_again(rows)
        if restored.notebook is not None and restored.notebook.get("optimizer"):
            restored.notebook["optimizer"]["state"] = state.numbers
            went_on(restored.notebook["optimizer"], held_by[0].kept.groups)
        for index, data in found.buffers.items():
            for parity in (0, 1):
                buffer = store.buffer(parity, index)
                buffer.copy_(_tensor(data, buffer))

    def _progress(
        self, found: _Found, checkpoint: Checkpoint, restored: Restored, settings: RunSettings
    ) -> tuple[Checkpoint, Restored]:
        """How far the units that count come: see ``Progress``."""
        base, session = found.base, found.session
        epochs = self._whole_epochs = logged_epochs(session.path, int(base.meta["epochs_done"]))
        done = int(base.meta["epochs_done"]) + len(epochs)
        progress = Progress(base.step, np.zeros(_SUMS) + np.asarray(restored.sums, np.float64), workers=session.workers)
        for row in (*found.ahead, *found.rows):
            progress.units[int(row[UnitColumns.UNIT]) - 1] = _of_sums(row)
        progress.advance(self._per_epoch, done * self._per_epoch)
        raw = {int(row[UnitColumns.UNIT]) - 1: row for row in (*found.ahead, *found.rows)}
        self._ahead = [raw[unit] for unit in sorted(progress.units)]
        self._pushed = [fields for row in found.rows if (fields := self._acknowledged(row, session)) is not None]
        self._eval_losses = [epoch["eval_loss"] for epoch in epochs]
        check_ahead(self._run, progress, self._plan, settings)
        meta = {**base.meta, "epochs_done": done, "history": [*base.meta["history"], *(epoch["entry"] for epoch in epochs)]}
        if epochs:
            meta["eval_loss"] = epochs[-1]["eval_loss"]
        metrics = [] if epochs else restored.metrics
        return Checkpoint(checkpoint.path, progress.step, meta), Restored(restored.notebook, progress.sums, metrics)

    def _id(self, row: np.ndarray, workers: int) -> PushId:
        return push_id(int(row[UnitColumns.UNIT]) - 1, workers, self._per_epoch)

    def _acknowledged(self, row: np.ndarray, session: SessionLog) -> dict[str, Any] | None:
        if row[UnitColumns.PUSH] in UNCOUNTED:
            return None
        epoch, batch, shard = self._id(row, session.workers)
        pulled, made = np.split(row[UnitColumns.VERSIONS :], 2)
        return {"rank": int(row[UnitColumns.RANK]), "epoch": epoch + 1, "batch": batch + 1, "shard": shard,
                "versions": [int(v) for v in made], "staleness": max(0, int(max(made - pulled)) - 1)}  # fmt: skip

    # -- keeping one ---------------------------------------------------------------------------------------------

    def take_up(self, recorder: PushRecorder, schedule: Schedule, emit: Emit) -> None:
        """Before anybody works: what earlier sessions have done is not done again."""
        lay_ahead(self._ahead, recorder)
        tell_pushes(self._run, self._pushed, emit)
        tell_epochs(self._run, self._whole_epochs, emit)
        # A schedule has been brought to the step that there is a checkpoint of.
        for eval_loss in self._eval_losses:
            schedule.after_epoch(eval_loss)

    def name_of(self, found: Checkpoint) -> str:
        """Where in the run's directory one of the ``baselines`` is."""
        beside = self.directory / _BASE
        folder = f"{FOLDER}/{self.directory.name}/{_BASE}" if found.path.parent == beside else "checkpoints"
        return f"{folder}/{found.path.name}"

    @property
    def ahead_ids(self) -> list[PushId]:
        """Pushes that the servers begin with, behind the first step."""
        return [self._id(row, self._per_step) for row in self._ahead]

    def begin(self, first: int, last: Checkpoint | None, write: WriteBase) -> None:
        """The servers have what the run begins with, at step ``first``, and nobody works yet; ``last``: the run's checkpoint."""
        self._first, self.baselines = first, [] if last is None else [last]
        if not self.kept and self._found is None:
            return
        if last is None:
            raise full(self._run, "no checkpoint could be written that it stands on")
        session = SessionLog(self.directory, self._plan.servers, self._per_step, 1, first, remote=True)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if self._found is not None:
                (self.directory / _BASE).mkdir(exist_ok=True)
                self.baselines = [write(self.directory / _BASE, {_AHEAD: [row.tolist() for row in self._ahead]})]
            session.begin()
            if self.kept:
                self._units = LogWriter(self.directory, UNITS, self._on_durable, log_limit())
                self._epochs = LogWriter(self.directory, EPOCHS)
        except OSError as error:
            raise self._full(error) from None
        if not self.kept:
            self.begun()

    def begun(self) -> None:
        """No server writes to the log of an earlier session any more: what these had is in what this one begins with."""
        discard(self._old)

    def _on_durable(self, number: int) -> None:
        self._durable = number

    def together(self, lost: Sequence[Orphan]) -> Sequence[Orphan]:
        """The units of a worker that is gone, which others do now one by one: they count together.

        Its last push had all of them, and some servers may have applied it: those say of each unit that they have it.
        Whoever goes on from the logs can only take such a push as a whole, or leave it out.
        """
        if (self._plan.push_every or 1) > 1 and lost:
            units = {orphan.unit for orphan in lost}
            # Whoever did one of them again may have died as well: what it had counted with, it still counts with.
            former = [self._together[unit] for unit in units if unit in self._together]
            missing = units.union(*(group.missing for group in former))
            group = _Together(tuple(sorted(units.union(*(group.units for group in former)))), missing)
            self._together.update(dict.fromkeys(missing, group))
        return lost

    def _complete(self, units: Sequence[int]) -> list[int]:
        """Of units that are settled now, and those that have waited for them, the ones that count from now on."""
        found = []
        for unit in units:
            group = self._together.pop(unit, None)
            if group is None:
                found.append(unit)
                continue
            group.missing.discard(unit)
            found += () if group.missing else group.units
        return found

    def settled(self, units: Sequence[int], recorder: PushRecorder, emit: Emit) -> None:
        """All servers have the pushes of these units, which count as one: they count when this is on disk."""
        log, units = self._units, self._complete(units)
        if log is None or not units:
            return
        mark = self.baselines[-1].step
        number = 0 if log.last is None else log.last + 1
        store = self._store
        try:
            log.begin(number, mark, cut=mark > self._mark)
            self._mark = mark
            buffers = [(k, (store.buffer(0, k).contiguous().numpy().tobytes(),)) for k in range(len(store.table.buffers))]
            log.add(Kind.BYTES, buffers)
            log.commit(Commit(np.stack([recorder.ledger.row(unit) for unit in units]), None).to_bytes())
        except OSError as error:
            log.abort()
            self.fail(LogTrouble(None, error.strerror or str(error)), emit)
        self._record_of.update(dict.fromkeys(units, number))

    def has(self, unit: int, emit: Emit) -> bool:
        """Whether it is on disk that a unit counts."""
        log, number = self._units, self._record_of.get(unit)
        if log is None:
            return True
        if log.failure is not None:
            self.fail(LogTrouble(None, log.failure.strerror or str(log.failure)), emit)
        if number is None or number > self._durable:
            return False
        del self._record_of[unit]
        return True

    def _let_go(self, found: Checkpoint, oldest: int) -> None:
        for name in (*(log_name(server) for server in range(self._plan.servers)), UNITS):
            logs.prune(self.directory, name, oldest)
        if oldest > self._first:
            shutil.rmtree(self.directory / _BASE, ignore_errors=True)
            discard(self._old)
        self.baselines = [*(b for b in self.baselines if b.step >= oldest and b.path != found.path), found]

    def close(self) -> None:
        if self._units is not None:
            self._units.close()
        super().close()


class LoggedRecorder(PushRecorder):
    """A unit is done when it is on disk that it counts."""

    def __init__(self, store: Store, emit: Emit, settings: RunSettings, first_step: int, log: RemoteLog) -> None:
        self._log = log
        super().__init__(store, emit, settings, first_step)

    def _is_done(self, unit: int) -> bool:
        return super()._is_done(unit) and self._log.has(unit, self._emit)


def _read(session: SessionLog, base: Checkpoint) -> _Found:
    ahead = [np.array(row, np.float64) for row in base.meta.get(_AHEAD, ())]
    rows: list[np.ndarray] = []
    buffers: dict[int, bytes] = {}
    for record in logs.read(session.path, UNITS, base.step):
        rows += list(Commit.from_bytes(record.notes).rows)
        buffers = {frame.where: bytes(frame.read()) for frame in record.frames}
    return _Found(session, base, ahead, rows, buffers)


def numbers_in(restored: Restored) -> dict[str, dict[str, Any]]:
    """What of the optimizer's state is no tensor, by parameter."""
    return dict(((restored.notebook or {}).get("optimizer") or {}).get("state", {}))


def _of_sums(row: np.ndarray) -> np.ndarray:
    """A unit's row as it adds to an epoch's means: not at all where nothing of it was pushed."""
    if row[UnitColumns.PUSH] not in UNCOUNTED:
        return row
    found = row.copy()
    found[UnitColumns.LOSS : UnitColumns.SAMPLES + 1] = 0.0
    found[UnitColumns.VALUES : UnitColumns.VALUES + VALUE_COLUMNS] = 0.0
    return found


def _tensor(data: bytes, like: Any) -> Any:
    import torch

    return torch.frombuffer(bytearray(data), dtype=like.dtype).view(like.shape) if data else torch.empty_like(like)


@contextlib.contextmanager
def _tables(specs: Sequence[Any], cold_dir: str) -> Iterator[dict[int, Table]]:
    """Tables of one server, for a while."""
    place = Path(f"{cold_dir}-log")
    found = {n: Table.create(spec, cold_path(place, n)) for n, spec in enumerate(specs)}
    try:
        yield found
    finally:
        for table in found.values():
            table.close()
        shutil.rmtree(place, ignore_errors=True)
