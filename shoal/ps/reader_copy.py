"""A reader's copy of a run: the bytes of its tensors, its own or where the run has them, and, in tables of its own, its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from shoal.ps import wire
from shoal.ps.banks import SeenBanks
from shoal.ps.row_log import Changes, RowLog

if TYPE_CHECKING:
    from shoal.ps.embedding import Embedding
    from shoal.ps.table import Table

_SHARDS = 8
# What is kept of rows that have changed, for models that are loaded again and again.
_KEPT_BYTES = 64 << 20


class Copy:
    """What has come so far; ``number`` is 0 as long as nothing has."""

    def __init__(self, size: int, tensors: Sequence[wire.Tensor], described: Sequence[wire.Table]) -> None:
        """Raises Malformed where a tensor or a table is none."""
        if any(t.offset < 0 or t.offset + wire.nbytes(t) > size for t in tensors):
            raise wire.Malformed("a tensor lies outside of what is published")
        self.size = size
        # Takes no memory until something is written.
        self._own = np.zeros(size, np.uint8)
        # Where the run itself has the bytes, as long as it does not need the room for newer ones.
        self._seen: tuple[SeenBanks, int] | None = None
        self.tensors, self.described = tuple(tensors), tuple(described)
        self.number = 0
        self.versions: tuple[int, ...] = ()
        self.published_at = float("nan")
        self.tables: list[Table] = []
        self._logs: list[RowLog] = []
        # Whose rows are asked for next.
        self._wanted: wire.Rows | None = None

    def __del__(self) -> None:
        for table in getattr(self, "tables", ()):
            table.close()

    def is_of(self, welcome: wire.Welcome) -> bool:
        """Whether this is a copy of what is published there."""
        return (self.size, self.tensors, self.described) == (welcome.size, welcome.tensors, welcome.tables)

    def empty(self) -> Copy:
        """Another one of the same, with nothing in it."""
        found = Copy(self.size, self.tensors, self.described)
        found.tables = [_table(table) for table in self.described]
        return found

    def views(self) -> Iterator[tuple[wire.Tensor, np.ndarray]]:
        """Every tensor and its bytes, which are those of this publication if it is ``there`` still afterwards."""
        held = self._own if self._seen is None else self._seen[0].bytes_of(self._seen[1])
        for tensor in self.tensors:
            yield tensor, held[tensor.offset : tensor.offset + wire.nbytes(tensor)]

    @property
    def shared(self) -> bool:
        """Whether the bytes are where the run has them, and not here."""
        return self._seen is not None

    @property
    def there(self) -> bool:
        """Whether the run has not written anything newer where the bytes are."""
        return self._seen is None or self._seen[0].holds(self._seen[1], self.number)

    # -- taking in -----------------------------------------------------------------------------------------------

    def take(self, update: wire.Update, payload: memoryview, banks: SeenBanks | None = None) -> None:
        """Apply an update to what is here. ``banks``: what it may speak of; Malformed where it speaks of others."""
        at = 0
        self._seen = None
        if update.bank is not None:
            if banks is None or not 0 <= update.bank < banks.described.banks:
                raise wire.Malformed(f"bank {update.bank} of memory that is not shared")
            self._seen = banks, update.bank
        for first, count in update.runs:
            place = self._own[first * wire.BLOCK_BYTES : (first + count) * wire.BLOCK_BYTES]
            place[:] = np.frombuffer(payload[at : at + len(place)], np.uint8)
            at += len(place)
        self.number, self.versions, self.published_at = update.number, update.versions, update.taken_at
        if not update.base:
            self._wanted = wire.Rows(update.number, 0, 0, False, 0) if self.described else None
            most = _KEPT_BYTES // max(1, len(self.described))
            self._logs = [RowLog(t.width, np.dtype(t.dtype), update.number, most) for t in self.described]
        for changed in update.changed:
            keys, gone, rows, size = _rows(self.described[changed.table], payload[at:], changed.rows, changed.gone)
            at += size
            self._change(changed.table, keys, gone, rows)

    def trim(self, number: int) -> None:
        """No model is brought up to date from an older publication than ``number``."""
        for log in self._logs:
            log.trim(number)

    def _change(self, number: int, keys: np.ndarray, gone: np.ndarray, rows: np.ndarray) -> None:
        table, log = self.tables[number], self._logs[number]
        _put(table, keys, rows, self.number)
        if len(gone):
            table.discard(gone)
        none = np.zeros((len(gone), rows.shape[1]), rows.dtype)
        there = np.arange(len(keys) + len(gone)) < len(keys)
        log.add(self.number, Changes(np.concatenate([keys, gone]), np.concatenate([rows, none]), there))

    def take_piece(self, piece: wire.Piece, payload: memoryview, shares: bool = False) -> wire.FromReader:
        """Put the rows there that came; what is asked for next, see ``next_request``."""
        wanted = self._wanted
        if wanted is None or (piece.table, piece.shard, piece.cold) != (wanted.table, wanted.shard, wanted.cold):
            raise wire.Malformed("rows that nobody asked for")
        keys, _, rows, _ = _rows(self.described[piece.table], payload, piece.rows, 0)
        _put(self.tables[piece.table], keys, rows, self.number)
        self._wanted = self._after(piece)
        return self.next_request(shares)

    def _after(self, piece: wire.Piece) -> wire.Rows | None:
        table, shard, cold = piece.table, piece.shard, piece.cold
        if piece.after is not None:
            return wire.Rows(self.number, table, shard, cold, piece.after)
        if not cold and self.described[table].memory is not None:
            return wire.Rows(self.number, table, shard, True, 0)
        if shard + 1 < self.described[table].shards:
            return wire.Rows(self.number, table, shard + 1, False, 0)
        return wire.Rows(self.number, table + 1, 0, False, 0) if table + 1 < len(self.described) else None

    def next_request(self, shares: bool = False) -> wire.FromReader:
        """What is missing. ``shares``: whether the reader looks into the run's memory."""
        return self._wanted or wire.Next(self.number, shares)

    # -- giving out ----------------------------------------------------------------------------------------------

    def write_rows(self, number: int, module: Embedding, since: int | None) -> None:
        """Bring a module's table up to date; ``since``: the publication that it has, None where it has something else."""
        changes = None if since is None else self._logs[number].since(since)
        table = self.tables[number]
        if changes is None:
            module.begin_as(table.spec)
            for keys, rows in table.pieces():
                module.put_rows(keys, rows)
            return
        import torch

        module.put_rows(changes.keys[changes.there], torch.from_numpy(changes.rows[changes.there]))
        if not changes.there.all():
            module.table.discard(changes.keys[~changes.there])


def _rows(described: wire.Table, payload: memoryview, count: int, gone: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(keys, keys that are gone, rows, bytes) at the beginning of a payload."""
    keys_end, gone_end = 8 * count, 8 * (count + gone)
    size = gone_end + count * wire.row_bytes(described)
    rows = np.frombuffer(payload[gone_end:size], np.dtype(described.dtype)).reshape(count, described.width)
    keys, lost = (np.frombuffer(payload[a:b], np.int64) for a, b in ((0, keys_end), (keys_end, gone_end)))
    return keys, lost, rows, size


def _put(table: Table, keys: np.ndarray, rows: np.ndarray, number: int) -> None:
    import torch

    from shoal.ps.table import Rows

    if len(keys):
        n = len(keys)
        values = torch.from_numpy(rows.copy())
        table.put(Rows(keys.copy(), values, np.ones(n, np.uint32), np.full(n, number, np.int64)))


def _table(described: wire.Table) -> Table:
    """An empty table for rows that are only read. Raises Malformed where it is described as something that cannot be."""
    import torch

    from shoal.errors import JobError
    from shoal.ps.initialisers import Zeros
    from shoal.ps.optimizers import SGD
    from shoal.ps.spec import TableSpec
    from shoal.ps.table import Table

    wire.row_bytes(described)
    try:
        spec = TableSpec(
            name=described.name, width=described.width, dtype=getattr(torch, described.dtype), optimizer=SGD(lr=0.0),
            init=Zeros(), memory_bytes=described.memory, shards=_SHARDS, seed=described.seed,
        )  # fmt: skip
    except JobError as error:
        raise wire.Malformed(str(error)) from None
    return Table.create(spec)
