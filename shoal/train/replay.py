"""Going on from a checkpoint and the write-ahead logs behind it.

Of each session of the run in turn the pushes count that the logs of all its servers have; what one of them has beyond that was
never acknowledged, and is cut off for good. Dense parameters are put into a copy of the checkpoint's file in memory,
of each place only what came last; rows get their gradients once more. Where workers waited for nobody, some units may be
done and others before them not: the run goes on with the first step that lacks one, and the units behind it that are done are
laid into the ledger, so that nobody claims them.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.comm.store import VALUE_COLUMNS
from shoal.errors import RequestError
from shoal.observe.events import read_events
from shoal.plan import Plan
from shoal.ps import log as logs
from shoal.ps.ledger import LOGGED, UNITS_KEPT, UnitColumns
from shoal.ps.log import Frame, Kind, Push, TornError
from shoal.tensorfile import dtype_of
from shoal.train.checkpoint import Checkpoint, Restored
from shoal.train.pacing import PushRecorder
from shoal.train.recorder import Emit
from shoal.train.row_tables import RunTables
from shoal.train.settings import RunSettings
from shoal.train.update_log import Commit, log_name, put_lines, read_rows

FOLDER, SESSION, EPOCHS, UNITS = "push-log", "session.json", "epochs", "units"
_SUMS = 3 + VALUE_COLUMNS

Everywhere = tuple[Push, ...]
"""A push as the logs of all servers have it."""


@dataclass(frozen=True)
class SessionLog:
    """What one session has logged: the fields of its ``session.json``. It began with the step ``first``.

    ``remote``: its processes shared no memory, so its logs are of another kind (``shoal.train.remote.log``).
    """

    path: Path
    servers: int
    workers: int
    team: int
    first: int
    remote: bool = False

    def holds_beyond(self, mark: int) -> bool:
        """Whether it has pushes that a checkpoint of this step lacks."""
        return bool(logs.read(self.path, UNITS, mark) if self.remote else self.pushes(mark))

    def begin(self) -> None:
        """Say that it is there. OSError."""
        said = {key: value for key, value in vars(self).items() if key != "path"}
        part = self.path / f"{SESSION}.part"
        part.write_text(json.dumps(said))
        os.replace(part, self.path / SESSION)

    def pushes(self, mark: int) -> list[Everywhere]:
        """Those from ``mark`` on that all servers have."""
        return list(zip(*(logs.read(self.path, log_name(server), mark) for server in range(self.servers)), strict=False))

    def cut(self, mark: int, last: int | None) -> None:
        """Nothing behind the push ``last`` counts."""
        for server in range(self.servers):
            logs.cut(self.path, log_name(server), mark, last)


def sessions(run: Path) -> list[SessionLog]:
    """The sessions of a run that have logged something, in order."""
    found = []
    for path in sorted((run / FOLDER).glob("[0-9]*")):
        try:
            found.append(SessionLog(path, **json.loads((path / SESSION).read_text())))
        except (OSError, ValueError, TypeError):
            # It died before it had logged anything.
            continue
    return found


class LoggedTensors:
    """A checkpoint's tensors, to be changed in memory and read like ``safetensors.safe_open``'s.

    ``covered``: bytes from and to, that are about to be put there in any case, and so need not be read.
    """

    def __init__(self, path: Path, covered: Iterable[tuple[int, int]] = ()) -> None:
        size, at = path.stat().st_size, 0
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with open(path, "rb", buffering=0) as file:
            for start, stop in [*sorted(covered), (size, size)]:
                file.seek(at)
                while at < start and (count := file.readinto(memoryview(self._map)[at:start])):
                    at += count
                at = max(at, stop)
        self.bytes: np.ndarray = np.frombuffer(self._map, np.uint8)
        (length,) = struct.unpack_from("<Q", self._map)
        self._first = 8 + length
        self._entries: dict[str, Any] = json.loads(self._map[8 : self._first])

    def __enter__(self) -> LoggedTensors:
        return self

    def __exit__(self, *_: object) -> None:
        """The map lives as long as its tensors."""

    def keys(self) -> Sequence[str]:
        return [name for name in self._entries if name != "__metadata__"]

    def get_tensor(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        start, stop = (self._first + at for at in entry["data_offsets"])
        return torch.from_numpy(self.bytes[start:stop]).view(dtype_of(entry["dtype"])).view(entry["shape"])

    def put(self, frame: Frame) -> None:
        """Put a frame where it belongs. TornError where it is not what was written."""
        data = frame.read()
        if frame.kind is Kind.LINES:
            put_lines(self.bytes, frame.where, data)
        else:
            self.bytes[frame.where : frame.where + frame.length] = np.frombuffer(data, np.uint8)


@dataclass
class Progress:
    """How far the pushes of all sessions come: the first unfinished step, the epoch's sums before it, units done behind it."""

    step: int
    sums: np.ndarray
    units: dict[int, np.ndarray] = field(default_factory=dict)
    workers: int = 1
    notebook: Any = None

    def sync(self, push: Push, row: np.ndarray) -> None:
        self.step, self.sums = push.number + 1, row[:_SUMS].copy()

    def advance(self, per_epoch: int, edge: int) -> None:
        """Count what is complete. ``edge``: the step of the last epoch's end that is known of."""
        last = max(self.units, default=-1)
        # Units without samples, or with a gradient that was no number, are in no log; what is so old was one of them.
        known = max(last - UNITS_KEPT + 1, edge * self.workers)
        while self.units and all(unit in self.units or unit < known for unit in self._of(self.step)):
            if self.step % per_epoch == 0:
                self.sums[:] = 0.0
            for row in (self.units.pop(unit) for unit in self._of(self.step) if unit in self.units):
                self.sums[:3] += row[UnitColumns.LOSS : UnitColumns.SAMPLES + 1]
                self.sums[3:] += row[UnitColumns.VALUES : UnitColumns.VALUES + VALUE_COLUMNS]
            self.step += 1

    def _of(self, step: int) -> range:
        return range(step * self.workers, (step + 1) * self.workers)


class Replay:
    """The logs behind a checkpoint.

    Args:
        run: the run directory.
        old: its sessions that have kept a log.
        found: the checkpoint.
    """

    def __init__(self, run: Path, old: Sequence[SessionLog], found: Checkpoint) -> None:
        self._run, self._found = run, found
        self._parts: list[tuple[SessionLog, list[Everywhere]]] = []
        self.tensors: LoggedTensors | None = None
        self._ahead: list[np.ndarray] = []
        self._pushed: list[dict[str, Any]] = []
        self._whole_epochs: list[dict[str, Any]] = []
        self._per_epoch = 1
        for session in old:
            pushes = session.pushes(found.step)
            whole = self._overlay(pushes)
            session.cut(found.step, pushes[whole - 1][0].number if whole else None)
            if whole:
                self._parts.append((session, pushes[:whole]))

    def _overlay(self, pushes: Sequence[Everywhere]) -> int:
        """Put what these pushes have made of the dense parameters into ``tensors``; how many of them are whole."""
        count = len(pushes)
        while count:
            of = {id(frame): n for n, push in enumerate(pushes[:count]) for frame in _frames(push)}
            frames = [frame for push in pushes[:count] for frame in _frames(push)]
            last = logs.newest(f for f in frames if f.kind is not Kind.ROWS)
            covered = [(f.where, f.where + f.length) for f in last if f.kind is Kind.BYTES]
            tensors = self.tensors or LoggedTensors(self._found.path / "state.safetensors", covered)
            torn = None
            for frame in frames if any(f.kind is Kind.ROWS for f in frames) else ():
                # They are all needed.
                if frame.kind is Kind.ROWS and torn is None and not _is_whole(frame):
                    torn = frame
            try:
                for frame in last if torn is None else ():
                    torn = frame
                    tensors.put(frame)
                    torn = None
            except TornError:
                pass
            if torn is None:
                self.tensors = tensors
                return count
            count = of[id(torn)]
            # What was put there meanwhile may be of pushes that do not count: begin anew, with the earlier sessions'.
            self.tensors = None
            for _, earlier in self._parts:
                self._overlay(earlier)
        return 0

    def fill(self, tables: RunTables) -> None:
        """Give the rows of the checkpoint, which are in the tables already, their gradients."""
        for frame in (f for _, pushes in self._parts for push in pushes for f in _frames(push) if f.kind is Kind.ROWS):
            table = tables.tables[frame.where]
            change = read_rows(frame.where, frame.read(), table.spec.dtype)
            table.scale_lr(change.lr_factor)
            table.push(change.keys, change.rows, change.counts, step=change.step, scale=change.scale)

    def roll_forward(self, restored: Restored, plan: Plan, settings: RunSettings) -> tuple[Checkpoint, Restored]:
        """The checkpoint, and what it holds beside tensors, as if it had been written after the last push."""
        found, per_epoch = self._found, settings.steps_per_epoch
        epochs = self._whole_epochs = self._logged_epochs(int(found.meta["epochs_done"]))
        done = int(found.meta["epochs_done"]) + len(epochs)
        sums = np.zeros(_SUMS) + np.asarray(restored.sums, np.float64)
        progress = Progress(found.step, sums, notebook=restored.notebook)
        self._per_epoch = per_epoch
        for session, pushes in self._parts:
            progress.workers = session.workers
            for push in pushes:
                ends = [Commit.from_bytes(part.notes) for part in push]
                progress.notebook = _merged([end.page for end in ends]) or progress.notebook
                if ends[0].summed:
                    progress.sync(push[0], ends[0].rows[0])
                for row in ends[0].rows if not ends[0].summed else ():
                    progress.units[int(row[UnitColumns.UNIT]) - 1] = row
                self._pushed += self._acknowledged(session, push[0], ends[0])
            progress.advance(per_epoch, done * per_epoch)
        self._ahead = [row for _, row in sorted(progress.units.items())]
        check_ahead(self._run, progress, plan, settings)
        meta = {**found.meta, "epochs_done": done}
        meta["history"] = [*found.meta["history"], *(epoch["entry"] for epoch in epochs)]
        if epochs:
            meta["eval_loss"] = epochs[-1]["eval_loss"]
        metrics = [] if epochs else restored.metrics
        return Checkpoint(found.path, progress.step, meta), Restored(progress.notebook, progress.sums, metrics)

    def _logged_epochs(self, done: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for path in sorted((self._run / FOLDER).glob("[0-9]*")):
            found += logged_epochs(path, done + len(found))
        return found

    # -- what the run is told ------------------------------------------------------------------------------------

    def lay_ahead(self, recorder: PushRecorder) -> None:
        """See the function of this name."""
        lay_ahead(self._ahead, recorder)

    def tell(self, emit: Emit) -> None:
        """See ``tell_pushes`` and ``tell_epochs``."""
        tell_pushes(self._run, self._pushed, emit)
        tell_epochs(self._run, self._whole_epochs, emit)

    def _acknowledged(self, session: SessionLog, push: Push, end: Commit) -> Iterator[dict[str, Any]]:
        versions = [push.number + 1] * session.servers
        if end.summed:
            epoch, batch = divmod(push.number, self._per_epoch)
            for rank in range(0, session.workers, session.team):
                if end.rows[0][_SUMS + rank : _SUMS + rank + session.team].any():
                    yield {"rank": rank, "epoch": epoch + 1, "batch": batch + 1, "shard": rank // session.team,
                           "versions": versions, "staleness": 0}  # fmt: skip
            return
        for row in end.rows:
            step, shard = divmod(int(row[UnitColumns.UNIT]) - 1, session.workers)
            epoch, batch = divmod(step, self._per_epoch)
            pulled = row[UnitColumns.VERSIONS : UnitColumns.VERSIONS + session.servers]
            yield {"rank": int(row[UnitColumns.RANK]), "epoch": epoch + 1, "batch": batch + 1, "shard": shard,
                   "versions": versions, "staleness": int(push.number - min(pulled))}  # fmt: skip


def check_ahead(run: Path, progress: Progress, plan: Plan, settings: RunSettings) -> None:
    """RequestError where a plan cannot go on from units that are done behind the first unfinished step."""
    if not progress.units:
        return
    workers, last = progress.workers, max(progress.units)
    if not plan.waits_for_nobody or plan.workers != workers:
        raise RequestError(
            f"The log of {run} ends amid batches that {workers} workers share; go on with ps=S,workers={workers} and "
            "async or staleness until a checkpoint is written, and change the plan then."
        )
    if last // workers >= settings.total_steps:
        raise RequestError(f"{run} has come to step {last // workers + 1} already; give at least as many.")


def lay_ahead(rows: Iterable[np.ndarray], recorder: PushRecorder) -> None:
    """Write the units that are done already into the ledger: nobody is to do them again."""
    now = time.monotonic()
    for row in rows:
        unit = int(row[UnitColumns.UNIT]) - 1
        target = recorder.ledger.row(unit)
        target[: UnitColumns.VERSIONS] = row[: UnitColumns.VERSIONS]
        target[UnitColumns.PUSH] = LOGGED
        target[UnitColumns.BEGAN] = target[UnitColumns.ENDED] = now
        recorder.take_for_told(unit)


def tell_pushes(run: Path, pushed: Sequence[dict[str, Any]], emit: Emit) -> None:
    """Acknowledge the pushes that are in the log and that nobody was told of before the run was killed."""
    if not pushed:
        return
    told = {_name(event) for event in read_events(run / "events.jsonl", ["push_ack"])}
    for fields in pushed:
        if _name(fields) not in told:
            emit("push_ack", **fields)


def tell_epochs(run: Path, epochs: Sequence[dict[str, Any]], emit: Emit) -> None:
    """Say of epochs that are in the log what nobody was told before the run was killed; see ``logged_epochs``."""
    if not epochs:
        return
    told = {event["epoch"] for event in read_events(run / "events.jsonl", ["epoch"]) if not event.get("partial")}
    for epoch in epochs:
        # Logs of earlier versions do not have all that there is to say.
        if epoch["entry"]["epoch"] not in told and "beside" in epoch:
            emit("epoch", **epoch["entry"], **epoch["beside"])


def logged_epochs(path: Path, done: int) -> list[dict[str, Any]]:
    """What a session says of the epochs behind the first ``done``.

    Of each the ``entry``, its ``eval_loss``, and ``beside``: the other fields of its event.
    """
    found: list[dict[str, Any]] = []
    for push in logs.read(path, EPOCHS):
        entry = json.loads(push.notes)
        if entry["entry"]["epoch"] == done + len(found) + 1:
            found.append(entry)
    return found


def _name(event: dict[str, Any]) -> tuple[int, int, int]:
    return event["epoch"], event["batch"], event["shard"]


def _frames(push: Everywhere) -> Iterator[Frame]:
    return (frame for part in push for frame in part.frames)


def _is_whole(frame: Frame) -> bool:
    try:
        frame.read()
    except TornError:
        return False
    return True


def _merged(pages: Sequence[Any]) -> Any:
    """One notebook of those of all servers, as a checkpoint is read."""
    found: Any = None
    for page in pages:
        if found is None:
            found = page
        elif page is not None and page.get("optimizer"):
            found["optimizer"]["state"].update(page["optimizer"]["state"])
            found["optimizer"]["common"].update(page["optimizer"]["common"])
    return found
