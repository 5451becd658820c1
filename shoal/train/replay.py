"""Going on from a checkpoint and the write-ahead logs behind it.

Of each session of the run in turn the pushes count that the logs of all its servers have; what one of them has beyond that was
never acknowledged, and is cut off for good. Dense parameters are read straight to where the run has them,
of each place only what came last; rows get their gradients once more. Where workers waited for nobody, some units may be
done and others before them not: the run goes on with the first step that lacks one, and the units behind it that are done are
laid into the ledger, so that nobody claims them.
"""

from __future__ import annotations

import bisect
import json
import os
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.comm.memory import Memory
from shoal.comm.store import VALUE_COLUMNS
from shoal.comm.table import ParameterTable
from shoal.errors import RequestError
from shoal.observe.events import read_events
from shoal.plan import Plan
from shoal.ps import log as logs
from shoal.ps.ledger import LOGGED, UNITS_KEPT, UnitColumns
from shoal.ps.log import Frame, Kind, Push
from shoal.tensorfile import dtype_of
from shoal.train.checkpoint import Checkpoint, Restored, layout_of
from shoal.train.pacing import PushRecorder
from shoal.train.recorder import Emit
from shoal.train.row_tables import RunTables
from shoal.train.saved import as_bytes
from shoal.train.settings import RunSettings
from shoal.train.update_log import Commit, log_name, put_lines, read_rows

FOLDER, SESSION, EPOCHS, UNITS = "push-log", "session.json", "epochs", "units"
_SUMS = 3 + VALUE_COLUMNS

Everywhere = tuple[Push, ...]
"""A push as the logs of all servers have it."""


@dataclass(frozen=True)
class SessionLog:
    """What one session has logged: the fields of its ``session.json``. It began with the step ``first``.

    ``remote``: its processes shared no memory, so its logs are of another kind (``shoal.train.remote.log``), and ``workers``
    says of how many units a step is made.
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

    def cut(self, mark: int, last: Everywhere | None) -> None:
        """Nothing behind the push ``last`` counts; where that is None, nothing from ``mark`` on."""
        for server in range(self.servers):
            logs.cut(self.path, log_name(server), mark, last[server] if last else None)


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
    """A checkpoint's tensors as the logs behind it have left them, read like ``safetensors.safe_open``'s.

    Args:
        path: the checkpoint's file.
        frames: of the logs, in the order in which they are to be put there; none is torn.
    """

    def __init__(self, path: Path, frames: Sequence[Frame] = ()) -> None:
        self._path = path
        with open(path, "rb") as file:
            length = file.read(8)
            self.header = length + file.read(*struct.unpack("<Q", length))
        self._entries: dict[str, Any] = json.loads(self.header[8:])
        self._entries.pop("__metadata__", None)
        first = len(self.header)
        self._places = {name: tuple(first + at for at in entry["data_offsets"]) for name, entry in self._entries.items()}
        self._frames: dict[str, list[Frame]] = {name: [] for name in self._entries}
        by_start = sorted((start, name) for name, (start, stop) in self._places.items() if stop > start)
        for frame in frames:
            # A frame belongs to one tensor.
            _, name = by_start[bisect.bisect_right(by_start, frame.where, key=lambda place: place[0]) - 1]
            self._frames[name].append(frame)
        self._covered = not any(True for name in self._entries for _ in self._uncovered(name))

    def __enter__(self) -> LoggedTensors:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held open."""

    def covers(self, table: ParameterTable) -> bool:
        """Whether all bytes of all tensors are the logs', so that the checkpoint's file does not matter."""
        if not self._covered:
            return False
        layout = layout_of(self, table)
        return layout.header == self.header and layout.size == self._path.stat().st_size

    def keys(self) -> Sequence[str]:
        return list(self._entries)

    def get_tensor(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        found = torch.empty(entry["shape"], dtype=dtype_of(entry["dtype"]))
        self.fill(name, found)
        return found

    def fill(self, name: str, target: torch.Tensor, memory: Memory | None = None) -> None:
        """Read a tensor into a contiguous one of its size, in ``memory`` where that is given."""
        if dtype_of(self._entries[name]["dtype"]) != target.dtype:
            target.copy_(self.get_tensor(name).view(target.shape))
            return
        place = as_bytes(target).numpy()
        base = place.ctypes.data
        start, stop = self._places[name]

        def put(at: int, data: memoryview) -> None:
            if memory is None:
                place[at : at + len(data)] = np.frombuffer(data, np.uint8)
            else:
                memory.write(base + at, data)

        if gaps := list(self._uncovered(name)):
            kept = np.memmap(self._path, np.uint8, "r")
            for low, high in gaps:
                put(low - start, kept[low:high].data)
        for frame in self._frames[name]:
            if frame.kind is Kind.LINES:
                put_lines(place, frame.where - start, frame.data)
            else:
                put(frame.where - start, frame.data)

    def _uncovered(self, name: str) -> Iterator[tuple[int, int]]:
        """Where bytes of a tensor lie in the file that no frame puts there anew: from and to."""
        at, end = self._places[name]
        covered = sorted((f.where, f.where + f.length) for f in self._frames[name] if f.kind is Kind.BYTES)
        for start, stop in [*covered, (end, end)]:
            if at < start:
                yield at, start
            at = max(at, stop)


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
        self._ahead: list[np.ndarray] = []
        self._pushed: list[dict[str, Any]] = []
        self._whole_epochs: list[dict[str, Any]] = []
        self._per_epoch = 1
        for session in old:
            pushes = session.pushes(found.step)
            whole = pushes[: _count_whole(pushes)]
            session.cut(found.step, whole[-1] if whole else None)
            if whole:
                self._parts.append((session, whole))
        dense = logs.newest(f for _, pushes in self._parts for push in pushes for f in _frames(push) if f.kind is not Kind.ROWS)
        self.tensors = LoggedTensors(found.state, dense) if dense else None
        """The checkpoint's tensors, where the logs have changed them."""

    def fill(self, tables: RunTables) -> None:
        """Give the rows of the checkpoint, which are in the tables already, their gradients."""
        for frame in (f for _, pushes in self._parts for push in pushes for f in _frames(push) if f.kind is Kind.ROWS):
            table = tables.tables[frame.where]
            change = read_rows(frame.where, frame.data, table.spec.dtype)
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


def _count_whole(pushes: Sequence[Everywhere]) -> int:
    """How many of these pushes count: all before the first of which something is torn that is needed."""
    count = len(pushes)
    while count:
        of = {id(frame): n for n, push in enumerate(pushes[:count]) for frame in _frames(push)}
        frames = [frame for push in pushes[:count] for frame in _frames(push)]
        # Of rows all are needed.
        torn = logs.first_torn([f for f in frames if f.kind is Kind.ROWS])
        torn = torn or logs.first_torn(logs.newest(f for f in frames if f.kind is not Kind.ROWS))
        if torn is None:
            break
        count = of[id(torn)]
    return count


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
