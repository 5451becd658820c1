"""What readers of a run see of its tables: which rows have changed is noted beside them, their values are looked up by key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal.ps import wire
from shoal.ps.row_log import Changes
from shoal.ps.spec import TableSpec
from shoal.ps.table import Table

_PIECE_BYTES = 1 << 20
# Of the ring that keys are noted in: for so many times the rows that a shard has, within these limits.
_LEAST_RING, _MOST_RING = 1 << 12, 1 << 20
_UNKNOWN = -1


@dataclass(frozen=True)
class Taken:
    """Rows of one table that were read; ``counts``: how far its shards had come; ``lost``: those where too many had changed."""

    table: int
    changes: Changes | None
    counts: dict[int, int]
    lost: tuple[int, ...]


class PublishedRows:
    """The tables of a run. Each server updates an equal range of their shards."""

    def __init__(self, tables: Sequence[Table], servers: int) -> None:
        self._tables = tables
        self._servers = servers
        self.described = tuple(described(table.spec) for table in tables)
        # Of each table, for each shard: how many changes have been read.
        self._read = [np.full(table.spec.shards, _UNKNOWN, np.int64) for table in tables]
        self._rings = [np.full(table.spec.shards, _LEAST_RING, np.int64) for table in tables]

    def listen(self) -> None:
        """Note from now on which rows change. OSError where memory has run out."""
        for table, read, rings in zip(self._tables, self._read, self._rings, strict=True):
            rings[:] = _power_of_two(len(table) // table.spec.shards)
            for shard in range(table.spec.shards):
                read[shard] = table.listen(shard, int(rings[shard]))

    def take(self, servers: Sequence[int]) -> list[Taken]:
        """Read what has changed in the shards of some servers, which update nothing meanwhile, or what is read is not used."""
        found = []
        for number, table in enumerate(self._tables):
            shards = table.spec.shards
            own = [s for k in servers for s in range(k * shards // self._servers, (k + 1) * shards // self._servers)]
            counts, lost, keys = {}, [], []
            for shard in own:
                since = int(self._read[number][shard])
                named, counts[shard] = table.changed(shard, since) if since != _UNKNOWN else (None, table.changed(shard, 0)[1])
                if named is None:
                    lost.append(shard)
                else:
                    keys.append(named)
            changes = None if lost else _read(table, np.unique(np.concatenate(keys)))
            found.append(Taken(number, changes, counts, tuple(lost)))
        return found

    def accept(self, taken: Sequence[Taken]) -> tuple[tuple[int, Changes | None], ...]:
        """Go on from what was read: it was whole."""
        for each in taken:
            table, read = self._tables[each.table], self._read[each.table]
            for shard, count in each.counts.items():
                read[shard] = count
            for shard in each.lost:
                ring = min(4 * int(self._rings[each.table][shard]), _MOST_RING)
                if ring > self._rings[each.table][shard]:
                    self._rings[each.table][shard] = ring
                    table.listen(shard, ring)
                    # What the smaller ring had noted by now is no longer where it was.
                    read[shard] = _UNKNOWN
        return tuple((each.table, each.changes) for each in taken if each.changes is None or len(each.changes.keys))

    def piece(self, table: int, shard: int, cold: bool, at: int) -> tuple[np.ndarray, np.ndarray, int | None]:
        """See ``Table.piece``."""
        count = max(256, _PIECE_BYTES // self._tables[table].spec.row_bytes)
        keys, rows, after = self._tables[table].piece(shard, cold, at, count)
        return keys, rows.numpy(), after


def _read(table: Table, keys: np.ndarray) -> Changes:
    rows, there = table.read(keys)
    return Changes(keys, rows.numpy(), there)


def _power_of_two(rows: int) -> int:
    return int(min(max(1 << max(rows, 1).bit_length(), _LEAST_RING), _MOST_RING))


def described(spec: TableSpec) -> wire.Table:
    """A table as readers are told of it."""
    dtype = str(spec.dtype).removeprefix("torch.")
    return wire.Table(spec.name, spec.width, dtype, spec.shards, spec.seed, spec.memory_bytes)
