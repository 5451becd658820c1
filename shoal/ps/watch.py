"""Watching servers that share no memory: whoever publishes a run asks each of them for what has changed since it last asked.

A server answers between two of its updates, so an answer is of one version, rows included. Which rows have changed is noted
from the first question on. An answer that got lost is no loss: the next one begins where the last one that came ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from shoal.ps import messages
from shoal.ps.endpoint import Endpoint, RunKeys
from shoal.ps.messages import Block, Refused
from shoal.ps.published_rows import PublishedRows, Taken
from shoal.ps.requests import Patience, Requests
from shoal.ps.row_log import Changes
from shoal.ps.shard import Shard
from shoal.ps.wire import Malformed, decode_head, encode

NEVER = 0
"""As the serial of an answer: there has been none."""
_MOST_GIVEN = 8


class Watch(msgspec.Struct, tag="watch", frozen=True):
    """The dense pieces, and the rows that have changed since the answer ``seen``, the last one that was taken over."""

    number: int
    seen: int


class ReadPiece(msgspec.Struct, tag="read_piece", frozen=True):
    """Some rows of one shard of a table, at whatever moment: see ``Table.piece``."""

    number: int
    table: int
    shard: int
    cold: bool
    at: int


class Changed(msgspec.Struct, frozen=True):
    """Of a table, so many rows are new or have changed, and so many are gone; ``known``: it was noted which."""

    table: int
    rows: int
    gone: int
    known: bool


class Watched(msgspec.Struct, tag="watched", frozen=True):
    """Frames: the dense pieces; then of each table that is known keys, keys that are gone, and rows."""

    number: int
    version: int
    serial: int
    dense: tuple[Block, ...]
    rows: tuple[Changed, ...]


class PieceRead(msgspec.Struct, tag="piece_read", frozen=True):
    """Two frames: keys and rows; the next ones begin at ``after``, None after the last of this kind."""

    number: int
    rows: int
    after: int | None


_asked = msgspec.msgpack.Decoder(Watch | ReadPiece)
_answered = msgspec.msgpack.Decoder(Watched | PieceRead | Refused)


@dataclass(frozen=True)
class Seen:
    """A server's answer: ``dense``: the bytes of each piece that came; ``rows``: by table, None where it is not known which."""

    version: int
    dense: Mapping[int, memoryview]
    rows: tuple[tuple[int, Changes | None], ...]


class Watching:
    """A server's side: answers whoever publishes. ``shard``'s thread uses it."""

    def __init__(self, shard: Shard, endpoint: Endpoint, when_kept: Callable[[int, Callable[[], None]], None]) -> None:
        """``when_kept``: calls a function once a version will survive: see ``shoal.ps.shard_server.Keeper``."""
        self._shard, self._endpoint, self._when_kept = shard, endpoint, when_kept
        self._rows = PublishedRows([table for _, table in sorted(shard.tables.items())], 1)
        self._tables = sorted(shard.tables)
        # Of another process there is no answer of this number.
        self._serial = int.from_bytes(np.random.default_rng().bytes(5), "little") + 1
        # The answers that may come to be seen, and the last one that was.
        self._given: dict[int, Sequence[Taken]] = {}
        self._seen = NEVER

    def take(self, identity: bytes, frames: Sequence[Any]) -> bool:
        """Answer a question; False where it is none of these. Raises Malformed."""
        try:
            message = decode_head(_asked, frames)
        except Malformed:
            return False
        if len(frames) != 1:
            raise Malformed(f"{len(frames)} frames where one belongs")
        try:
            answer, views = self._watch(message) if isinstance(message, Watch) else self._read(message)
        except OSError as error:
            answer, views = Refused(message.number, f"which rows change cannot be noted ({error.strerror})"), []
        sent = False

        def send() -> None:
            nonlocal sent
            sent = True
            self._endpoint.send(identity, encode(answer), views)

        self._when_kept(self._shard.version, send)
        if not sent:
            # Until then it has to stay as it is now.
            views = [bytes(view) for view in views]
        return True

    def _watch(self, asked: Watch) -> tuple[Watched, list[Any]]:
        shard, rows = self._shard, self._rows
        lost = asked.seen not in (NEVER, self._seen, *self._given)
        if asked.seen in self._given:
            rows.accept(self._given[asked.seen])
            self._given = {}
        elif lost or asked.seen == NEVER:
            # Whoever begins has nothing that could be older; whoever comes from another process has missed something.
            rows.listen()
        self._seen = asked.seen
        taken = rows.take((0,))
        self._serial += 1
        self._given[self._serial] = taken
        for old in list(self._given)[:-_MOST_GIVEN]:
            del self._given[old]
        pieces = shard.pull()
        _, views = messages.pack_tensors({str(piece): tensor for piece, tensor in pieces.items()})
        changed = []
        for each in taken:
            found = None if lost else each.changes
            if found is None:
                changed.append(Changed(self._tables[each.table], 0, 0, known=False))
            elif len(found.keys):
                there = found.there
                changed.append(Changed(self._tables[each.table], int(there.sum()), int((~there).sum()), known=True))
                parts = (found.keys[there], found.keys[~there], found.rows[there])
                views += [messages.raw_bytes(np.ascontiguousarray(part)) if len(part) else b"" for part in parts]
        return Watched(asked.number, shard.version, self._serial, tuple(map(Block, pieces)), tuple(changed)), views

    def _read(self, asked: ReadPiece) -> tuple[PieceRead | Refused, list[Any]]:
        table = self._shard.tables.get(asked.table)
        if table is None or not 0 <= asked.shard < table.spec.shards or not 0 <= asked.at < 1 << 64:
            return Refused(asked.number, f"there are no rows {asked.at} of shard {asked.shard} of table {asked.table} here"), []
        keys, rows, after = self._rows.piece(self._tables.index(asked.table), asked.shard, asked.cold, asked.at)
        return PieceRead(asked.number, len(keys), after), [messages.raw_bytes(keys), messages.raw_bytes(rows)]


class Watcher(Requests):
    """The side of whoever publishes.

    Args:
        tables: of each table, how wide its rows are, and of which dtype.
        while_waiting: called several times a second while an answer is awaited; it may raise.
        sizes: of each server, its pieces and their bytes: what answers are compared with.
    """

    def __init__(
        self, addresses: Mapping[int, str], keys: RunKeys, tables: Sequence[tuple[int, np.dtype]], patience: Patience,
        while_waiting: Callable[[], None], sizes: Mapping[int, Mapping[int, int]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(addresses, keys, lambda frames: decode_head(_answered, frames), lambda n: f"server {n}", patience,
                         while_waiting)  # fmt: skip
        self._tables, self._sizes = tables, sizes
        # Of each server, the serial of the last answer that was taken over, and of the last one that came.
        self._seen: dict[int, int] = {}
        self._came: dict[int, int] = {}

    def begin(self) -> None:
        """What rows have changed counts from the next question on."""
        self._seen = {}

    def watch(self, servers: Sequence[int]) -> dict[int, Seen]:
        """What has changed at these servers; it counts as seen when ``accept`` is called. Malformed where it cannot be read."""
        tickets = [self.send(s, lambda n, s=s: Watch(n, self._seen.get(s, NEVER))) for s in servers]  # type: ignore[misc]
        self.wait(tickets, "what has changed")
        found = {}
        self._came = {}
        for ticket in tickets:
            answer = ticket.answer
            if not isinstance(answer, Watched):
                raise Malformed("another answer than was asked for")
            found[ticket.place] = self._unpack(answer, ticket.further)
            dense = {piece: data.nbytes for piece, data in found[ticket.place].dense.items()}
            if self._sizes is not None and dense != self._sizes[ticket.place]:
                raise Malformed("the weights that came are not those of that server")
            self._came[ticket.place] = answer.serial
        return found

    def accept(self) -> None:
        """What ``watch`` has found is taken over."""
        self._seen.update(self._came)

    def _unpack(self, answer: Watched, frames: Sequence[memoryview]) -> Seen:
        known = [each for each in answer.rows if each.known]
        if len(frames) != len(answer.dense) + 3 * len(known):
            raise Malformed(f"{len(frames)} frames do not make this answer")
        rows: list[tuple[int, Changes | None]] = [(each.table, None) for each in answer.rows if not each.known]
        for at, each in enumerate(known):
            keys, gone, values = frames[len(answer.dense) + 3 * at :][:3]
            present = self._rows(each.table, keys, values, each.rows)
            lost = _array(gone, np.dtype(np.int64), each.gone)
            nothing = np.zeros((each.gone, present[1].shape[1]), present[1].dtype)
            there = np.arange(each.rows + each.gone) < each.rows
            rows.append(
                (each.table, Changes(np.concatenate([present[0], lost]), np.concatenate([present[1], nothing]), there))
            )
        return Seen(answer.version, {b.piece: f for b, f in zip(answer.dense, frames, strict=False)}, tuple(rows))

    def _rows(self, table: int, keys: memoryview, values: memoryview, count: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= table < len(self._tables):
            raise Malformed(f"there is no table {table}")
        width, dtype = self._tables[table]
        return _array(keys, np.dtype(np.int64), count), _array(values, dtype, count * width).reshape(count, width)

    def piece(self, server: int, table: int, shard: int, cold: bool, at: int) -> tuple[np.ndarray, np.ndarray, int | None]:
        """Some rows of a shard that a server has: see ``Table.piece``. Malformed where they cannot be read."""
        ticket = self.send(server, lambda n: ReadPiece(n, table, shard, cold, at))
        self.wait([ticket], "rows to be published")
        answer = ticket.answer
        if not isinstance(answer, PieceRead) or len(ticket.further) != 2:
            raise Malformed("another answer than was asked for")
        named, values = ticket.further
        keys, rows = self._rows(table, named, values, answer.rows)
        return keys, rows, answer.after


def _array(frame: memoryview, dtype: np.dtype, count: int) -> np.ndarray:
    if count < 0 or frame.nbytes != count * dtype.itemsize:
        raise Malformed(f"{frame.nbytes} bytes where {count} of {dtype} belong")
    return np.frombuffer(frame.cast("B"), dtype).copy()
