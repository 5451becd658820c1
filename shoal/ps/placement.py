"""Which server has which pieces and which shards of tables, and cutting what goes to them accordingly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shoal.ps.applied import NOTHING, PushId
from shoal.ps.dense import Numbers, Piece
from shoal.ps.kernel import load
from shoal.ps.ring import Ring
from shoal.ps.shard import Push, RowGradients
from shoal.ps.table import Rows


@dataclass(frozen=True)
class Move:
    """What goes from one server to another: pieces by number, and shards by table."""

    source: int
    target: int
    pieces: tuple[int, ...]
    row_shards: Mapping[int, tuple[int, ...]]


class Placement:
    """What each server holds; it follows from the servers' numbers, the pieces and the tables alone."""

    def __init__(self, servers: Sequence[int], pieces: Iterable[Piece], row_shards: Sequence[int] = ()) -> None:
        """``row_shards``: into how many shards each table is cut."""
        self.servers = tuple(sorted(servers))
        ring = Ring(servers)
        self.pieces = {piece.number: piece for piece in pieces}
        by_key = ring.place({piece.key: piece.nbytes for piece in self.pieces.values()})
        self.server_of = {number: by_key[piece.key] for number, piece in self.pieces.items()}
        self._row_shards = tuple(row_shards)
        # Of each table, the server of each shard. A shard has as much as another: keys are hashed.
        names = [[f"table {t} shard {k}" for k in range(count)] for t, count in enumerate(row_shards)]
        placed = [ring.place(dict.fromkeys(own, 1)) for own in names]
        self._table_servers = [np.array([p[n] for n in own]) for p, own in zip(placed, names, strict=True)]

    def pieces_of(self, server: int) -> list[Piece]:
        """The pieces that a server holds, in order."""
        return [piece for number, piece in sorted(self.pieces.items()) if self.server_of[number] == server]

    @property
    def sizes(self) -> dict[int, dict[int, int]]:
        """Of each server, its pieces and their bytes."""
        return {server: {piece.number: piece.nbytes for piece in self.pieces_of(server)} for server in self.servers}

    def row_shards_of(self, server: int, table: int) -> tuple[int, ...]:
        """The shards of a table that a server holds, in order."""
        return tuple(int(k) for k in np.flatnonzero(self._table_servers[table] == server))

    def server_of_shard(self, table: int, shard: int) -> int:
        """Who has a shard of a table."""
        return int(self._table_servers[table][shard])

    def shards_of(self, server: int) -> dict[int, tuple[int, ...]]:
        """Of each table, the shards that a server holds."""
        return {table: self.row_shards_of(server, table) for table in range(len(self._table_servers))}

    @property
    def keys(self) -> int:
        """How many things have a place on the ring: pieces, and shards of tables."""
        return len(self.pieces) + sum(self._row_shards)

    def moves(self, after: Placement) -> list[Move]:
        """What has another place in ``after``, a placement of the same pieces and tables, by who has it and who gets it."""
        found = []
        for source in self.servers:
            held = self.shards_of(source)
            for target in after.servers:
                pieces = tuple(p.number for p in self.pieces_of(source) if after.server_of[p.number] == target)
                shards = {t: tuple(k for k in own if after.server_of_shard(t, k) == target) for t, own in held.items()}
                if source != target and (pieces or any(shards.values())):
                    found.append(Move(source, target, pieces, {t: own for t, own in shards.items() if own}))
        return found

    def servers_of(self, table: int, keys: np.ndarray) -> dict[int, np.ndarray]:
        """For each server, the positions of those keys whose rows it has; servers with none are left out."""
        if len(self.servers) == 1:
            return {self.servers[0]: np.arange(len(keys))} if len(keys) else {}
        order, starts = load().partition(np.ascontiguousarray(keys), self._row_shards[table])
        by_shard = self._table_servers[table]
        owners = np.repeat(by_shard, np.diff(starts))
        return {s: np.sort(own).astype(np.int64) for s in self.servers if len(own := order[owners == s])}

    def split_rows(self, table: int, rows: Rows) -> dict[int, Rows]:
        """Rows by the server that has them; servers with none are left out."""
        return {
            # Positions are in order: whoever has all of them has them as they are.
            server: rows if len(at) == len(rows.keys)
            else Rows(rows.keys[at], rows.values[torch.from_numpy(at)], rows.counts[at], rows.last[at])
            for server, at in self.servers_of(table, rows.keys).items()
        }  # fmt: skip

    def split(
        self, ids: tuple[PushId, ...], dense: Mapping[int, torch.Tensor], rows: Mapping[int, RowGradients], *, step: int,
        settled: PushId = NOTHING, scale: float = 1.0, groups: Sequence[Numbers] | None = None,
    ) -> dict[int, Push]:  # fmt: skip
        """A push cut into each server's part. Every server gets one, also where it has nothing of it: all count alike."""
        parts: dict[int, dict[int, RowGradients]] = {server: {} for server in self.servers}
        for table, found in rows.items():
            for server, at in self.servers_of(table, found.keys).items():
                own = found if len(at) == len(found.keys) else RowGradients(
                    found.keys[at], found.counts[at], found.gradients[torch.from_numpy(at)]
                )  # fmt: skip
                parts[server][table] = own
        return {
            server: Push(
                ids=ids, step=step, settled=settled, scale=scale, groups=groups, rows=parts[server],
                dense={number: g for number, g in dense.items() if self.server_of[number] == server},
            )
            for server in self.servers
        }  # fmt: skip
