"""A server's write-ahead log: what each of its updates has changed, in the places that it has in a checkpoint's file.

An update is written to the log chunk by chunk, while the chunk is still in the cache, and committed before the arena says that
the push is applied. So what the arena holds as applied is always in the log; a successor that finds its update in the log
already writes nothing again. It is on disk, and may be acknowledged, when the note LOGGED has come to it.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.comm.arena import Note
from shoal.comm.lines import LINE_BYTES
from shoal.comm.store import Store
from shoal.errors import RequestError, ShoalError
from shoal.ps.lock import locked
from shoal.ps.log import Kind, LogWriter
from shoal.train import notes
from shoal.train.checkpoint import FileLayout
from shoal.train.saved import Applied, Lines, Saved, as_bytes
from shoal.train.update import Updater

_LENGTHS = struct.Struct("<IIII")


class LogError(ShoalError):
    """The log could not be written."""


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LogError(error.strerror or str(error)) from None


@dataclass(frozen=True)
class LogTrouble:
    """A server's log could not be written; it takes no pushes any more. ``server`` None: the lead's, of what counts."""

    server: int | None
    reason: str


@dataclass(frozen=True)
class Commit:
    """What stands at the end of a push.

    Attributes:
        rows: of server 0, float64: of each unit in the push what the ledger says of it.
        page: what the server's schedule and its optimizer's groups are after it, or None.
        summed: under ``sync``: there is one row, the running sums of the epoch, and then the samples of each rank.
    """

    rows: np.ndarray
    page: Any
    summed: bool = False

    def to_bytes(self) -> bytes:
        page = b"" if self.page is None else bytes(notes.to_bytes(self.page))
        rows = np.ascontiguousarray(self.rows, np.float64)
        return _LENGTHS.pack(*rows.shape, len(page), self.summed) + rows.tobytes() + page

    @classmethod
    def from_bytes(cls, data: bytes) -> Commit:
        count, width, size, summed = _LENGTHS.unpack_from(data)
        end = _LENGTHS.size + 8 * count * width
        rows = np.frombuffer(data[_LENGTHS.size : end], np.float64).reshape(count, width)
        return cls(rows, notes.from_bytes(data[end : end + size]) if size else None, bool(summed))


def log_limit() -> int | None:
    """``SHOAL_PUSH_LOG_BYTES``: how many bytes all logs of a run may take; None for as many as there are."""
    text = os.environ.get("SHOAL_PUSH_LOG_BYTES")
    if text is None:
        return None
    if not text.isdigit() or not int(text):
        raise RequestError(f'SHOAL_PUSH_LOG_BYTES is "{text}"; give the bytes that the log of pushes may take, 1 or more.')
    return int(text)


def log_name(server: int) -> str:
    """What a server's log is called."""
    return f"server-{server}"


class UpdateLog:
    """The log of one server.

    Args:
        directory: of the logs of this session.
        send: tells the supervisor.
        beat: called while the arena's lock is waited for.
    """

    def __init__(
        self, store: Store, number: int, updater: Updater, directory: str, send: Callable[[Any], None],
        beat: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._store, self._number, self._updater = store, number, updater
        self._send, self._beat = send, beat
        self._slot = store.arena.servers[number]
        self._layout = FileLayout(store.table)
        self._writer = LogWriter(Path(directory), log_name(number), self._on_durable, log_limit())
        self._segment_mark = -1
        self._held = False

    def _on_durable(self, number: int) -> None:
        self._slot.write(Note.LOGGED, number + 1)

    @_writing()
    def begin(self, number: int, mark: int | None = None) -> None:
        """The update of this number begins; ``mark``: where that is not the step of the last checkpoint. LogError."""
        checkpointed = int(self._store.arena.supervisor.note(Note.CHECKPOINTED))
        # A predecessor has written it, and died before the arena said so.
        self._held = self._writer.last is not None and self._writer.last >= number
        if self._held:
            return
        cut = checkpointed > self._segment_mark
        self._writer.begin(number, checkpointed if mark is None else mark, cut)
        if cut:
            self._segment_mark = checkpointed

    @_writing()
    def after_chunk(self, chunk: int, scale: float) -> None:
        """A chunk is updated. LogError."""
        if self._held:
            return
        whole: list[tuple[int, Sequence[Any]]] = []
        for change in self._updater.changed(chunk, scale):
            if isinstance(change, Saved):
                whole += self._places(change)
            elif isinstance(change, Lines):
                self._writer.add(Kind.LINES, [self._lines(change)])
            elif len(change.keys):
                self._writer.add(Kind.ROWS, [(change.table, rows_payload(change))])
        self._writer.add(Kind.BYTES, whole)

    def _places(self, saved: Saved) -> Iterator[tuple[int, Sequence[Any]]]:
        data = saved.data.cpu().numpy()
        for part, offset in self._layout.places(saved):
            yield offset, (data[part],)

    def _lines(self, change: Lines) -> tuple[int, Sequence[Any]]:
        ((_, offset),) = self._layout.places(change.whole)
        head = np.array([len(change.numbers), change.whole.data.numel()], np.int64)
        return offset, (head, np.ascontiguousarray(change.numbers), np.ascontiguousarray(change.data))

    @_writing()
    def commit(self, step: int, end: Commit) -> None:
        """The update is whole. Server 0 also keeps the buffers that the step after ``step`` begins with. LogError."""
        if self._held:
            return
        table = self._store.table
        if self._number == 0 and table.buffers:
            with locked(self._store.arena, self._beat):
                found = [
                    Saved("buffers", spec.name, 0, as_bytes(self._store.buffer((step + 1) % 2, index)))
                    for index, spec in enumerate(table.buffers)
                ]
                self._writer.add(Kind.BYTES, [place for saved in found for place in self._places(saved)])
        self._writer.commit(end.to_bytes())

    def give_up(self, error: LogError) -> None:
        """The disk takes no more: say so."""
        self._writer.abort()
        self._send(LogTrouble(self._number, str(error)))

    @_writing()
    def check(self) -> None:
        """LogError where what was written did not get to the disk."""
        if self._writer.failure is not None:
            raise self._writer.failure

    def close(self) -> None:
        """See to it that everything is on disk."""
        self._writer.close()


def rows_payload(change: Applied) -> Sequence[Any]:
    """The bytes of gradients of rows: how many, step, width, dtype's size, scales, keys, counts, rows."""
    rows = change.rows.detach().contiguous()
    head = np.array([len(change.keys), change.step, rows.shape[1], rows.element_size()], np.int64)
    return (
        head, np.array([change.scale, change.lr_factor]), np.ascontiguousarray(change.keys),
        np.ascontiguousarray(change.counts, np.uint32),
        rows.view(torch.uint8).numpy().reshape(-1),
    )  # fmt: skip


def read_rows(table: int, data: memoryview, dtype: torch.dtype) -> Applied:
    """What ``rows_payload`` was made of."""
    count, step, width, size = (int(n) for n in np.frombuffer(data, np.int64, 4))
    scale, lr_factor = (float(n) for n in np.frombuffer(data, np.float64, 2, 32))
    at = 48
    keys = np.frombuffer(data, np.int64, count, at).copy()
    counts = np.frombuffer(data, np.uint32, count, at := at + 8 * count).copy()
    raw = np.frombuffer(data, np.uint8, count * width * size, at + 4 * count).copy()
    rows = torch.from_numpy(raw).view(dtype).view(count, width)
    return Applied(table, keys, counts, rows, step, scale, lr_factor)


def put_lines(target: np.ndarray, offset: int, data: memoryview) -> None:
    """Put the lines of a LINES frame into a checkpoint's bytes."""
    count, nbytes = (int(n) for n in np.frombuffer(data, np.int64, 2))
    numbers = np.frombuffer(data, np.int64, count, 16)
    lines = np.frombuffer(data, np.uint8, count * LINE_BYTES, 16 + 8 * count).reshape(count, LINE_BYTES)
    full = nbytes // LINE_BYTES
    place = target[offset : offset + full * LINE_BYTES].reshape(full, LINE_BYTES)
    inside = numbers < full
    place[numbers[inside]] = lines[inside]
    if count and not inside[-1]:
        target[offset + full * LINE_BYTES : offset + nbytes] = lines[-1][: nbytes - full * LINE_BYTES]
