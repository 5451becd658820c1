"""Between what servers hold and what a run keeps: pieces and a store, row shards and tables' files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from shoal.comm.store import Store
from shoal.comm.table import ParameterTable
from shoal.errors import RequestError
from shoal.ps import messages
from shoal.ps.applied import NOTHING, PushId
from shoal.ps.checks import check_rows, parse_name, parse_number
from shoal.ps.client import Client
from shoal.ps.dense import PIECE_BYTES, Piece, cut
from shoal.ps.embedding import state_of
from shoal.ps.lbfgs import DIRECTION
from shoal.ps.placement import Placement
from shoal.ps.shard import Kept, Snapshot
from shoal.ps.spec import TableSpec
from shoal.ps.table import Counted, Rows, Table, from_tensors, sketch_shape, to_tensors
from shoal.train.checkpoint import ScalarRows
from shoal.train.row_tables import prefix_of, read_rows, write_rows

_LEAST_PIECE_BYTES = 1 << 12
_PIECES = 64


def pieces_of(table: ParameterTable) -> list[Piece]:
    """The pieces of a model's trained parameters: the same for any number of servers."""
    most = min(PIECE_BYTES, max(_LEAST_PIECE_BYTES, table.trained_bytes // _PIECES))
    found: list[Piece] = []
    for spec in table.trained:
        found += cut(spec.name, spec.shape, spec.dtype, spec.group, len(found), table.elementwise, most)
    return found


def placement_of(table: ParameterTable, tables: Sequence[TableSpec], servers: Sequence[int]) -> Placement:
    """Which server holds what of a job."""
    return Placement(servers, pieces_of(table), [spec.shards for spec in tables])


def push_id(unit: int, workers: int, steps_per_epoch: int) -> PushId:
    """A unit of the global order as (epoch, batch, shard)."""
    step, shard = divmod(unit, workers)
    return (*divmod(step, steps_per_epoch), shard)


def kept_of(
    version: int, settled: PushId, ids: Iterable[PushId], row_shards: Mapping[str, tuple[int, ...]] | None = None
) -> Kept:
    """What a server begins with that is no tensor: how many updates it counts, and which pushes are in it."""
    return Kept(version=version, settled=settled, ids=tuple(ids), groups=(), numbers={}, row_shards=dict(row_shards or {}))


Read = Callable[[str, str], torch.Tensor]
"""Reads a whole tensor by its kind (``weights``, ``state.KEY``, ``scalars``) and its parameter, as a checkpoint names them."""


def snapshot_of(
    table: ParameterTable, pieces: Iterable[Piece], read: Read, numbers: Mapping[str, dict[str, Any]], kept: Kept
) -> Snapshot:
    """Pieces as a server takes them up, as views of what is read.

    Args:
        numbers: of each parameter, what its optimizer state has that is no tensor.
        kept: the rest, but for these.
    """
    read = functools.cache(read)
    tensors: dict[str, torch.Tensor] = {}
    held: dict[str, dict[str, Any]] = {}
    keys = list(table.state_keys)
    for piece in pieces:

        def part(kind: str, of: Piece = piece) -> torch.Tensor:
            return read(kind, of.name).reshape(-1)[of.start : of.stop]

        tensors[f"weights/{piece.number}"] = part("weights")
        # In a file it may begin anywhere.
        row = read("scalars", piece.name).clone()
        # L-BFGS begins with vectors that are zero.
        if not int(row[:8].view(torch.int64)) and DIRECTION not in keys:
            continue
        if table.elementwise:
            state = {key: scalar_of(table, row, key) for key in table.scalar_keys} | {k: part(f"state.{k}") for k in keys}
        else:
            own = [s.key for s in table.states if table.parameters[s.parameter].name == piece.name]
            state = {key: read(f"state.{key}", piece.name) for key in own}
        tensors.update({f"state.{key}/{piece.number}": tensor for key, tensor in state.items()})
        if numbers.get(piece.name):
            held[str(piece.number)] = numbers[piece.name]
    return Snapshot(msgspec.structs.replace(kept, numbers=held), tensors)


def scalar_of(table: ParameterTable, row: torch.Tensor, key: str) -> torch.Tensor:
    """A scalar of the optimizer's state in the row of a parameter's scalars: a view."""
    at = 8 * (1 + table.scalar_keys.index(key))
    return row[at : at + table.scalar_dtype.itemsize].view(table.scalar_dtype)[0]


class StoreState:
    """A store's weights and optimizer state as pieces; ``numbers``: of each parameter, what its state has that is no tensor."""

    def __init__(self, store: Store, placement: Placement) -> None:
        self._store, self._placement = store, placement
        self._rows = ScalarRows(store)
        self._index = {spec.name: index for index, spec in enumerate(store.table.trained)}
        self.numbers: dict[str, dict[str, Any]] = {}

    def give(self, server: int, version: int, settled: PushId, ids: Iterable[PushId] = ()) -> Snapshot:
        """What a server begins with; ``settled``, ``ids``: what is in it."""
        kept = kept_of(version, settled, ids)
        return snapshot_of(self._store.table, self._placement.pieces_of(server), self._read, self.numbers, kept)

    def _read(self, kind: str, name: str) -> torch.Tensor:
        store, index = self._store, self._index[name]
        if kind == "weights":
            return store.weights[index]
        if kind == "scalars":
            return self._rows.of(index)[0]
        return self._tensors(index)[kind.removeprefix("state.")]

    def check(self, server: int, snapshot: Snapshot) -> None:
        """RequestError where that is not what a server holds."""
        own = {piece.number: piece for piece in self._placement.pieces_of(server)}
        weights = set()
        for name, tensor in snapshot.tensors.items():
            kind, number, more = parse_name(name)
            piece = own.get(number)
            if piece is None or more:
                raise RequestError(f"There is no {name} on server {server}.")
            if kind == "weights":
                weights.add(piece.number)
                wanted: int | None = piece.numel
            else:
                held = self._tensors(self._index[piece.name], piece).get(key := kind.removeprefix("state."))
                single = 1 if key in self._store.table.scalar_keys else None
                wanted = single if held is None else held.numel()
            if tensor.numel() != wanted:
                raise RequestError(f"Server {server} has {tensor.numel()} numbers as {name}, where {wanted} belong.")
        if weights != set(own) or not all(parse_number(n) in own for n in snapshot.kept.numbers):
            raise RequestError(f"Server {server} has given other pieces than it holds.")

    def take(self, snapshot: Snapshot) -> None:
        """Take up what a server holds."""
        pieces = self._placement.pieces
        for name, tensor in snapshot.tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "rows":
                continue
            piece = pieces[int(rest)]
            index = self._index[piece.name]
            if kind == "weights":
                self._store.weights[index].view(-1)[piece.start : piece.stop] = tensor.view(-1)
                continue
            key = kind.removeprefix("state.")
            for flag in (row[:8].view(torch.int64) for row in self._rows.of(index)):
                flag.fill_(1)
            held = self._tensors(index, piece)
            if key in held:
                held[key].copy_(tensor.view_as(held[key]))
            else:
                for row in self._rows.of(index):
                    scalar_of(self._store.table, row, key).copy_(tensor.view(()))
        for number, values in snapshot.kept.numbers.items():
            if values:
                self.numbers[pieces[int(number)].name] = dict(values)

    def pack_buffers(self) -> tuple[tuple[messages.Tensor, ...], list[bytes]]:
        """A model's buffers as heads and frames of a message."""
        store = self._store
        heads, frames = messages.pack_tensors({spec.name: store.buffer(0, k) for k, spec in enumerate(store.table.buffers)})
        return heads, [bytes(frame) for frame in frames]

    def take_buffers(self, found: Mapping[str, torch.Tensor]) -> None:
        """Take up a model's buffers."""
        for index, spec in enumerate(self._store.table.buffers):
            for parity in (0, 1):
                self._store.buffer(parity, index).copy_(found[spec.name])

    def _tensors(self, index: int, piece: Piece | None = None) -> dict[str, torch.Tensor]:
        """The optimizer's tensors of a piece, or of a whole parameter, by key: views of the store."""
        store, spec = self._store, self._store.table.trained[index]
        if store.table.elementwise:
            width = spec.dtype.itemsize
            start, stop = (0, spec.numel) if piece is None else (piece.start, piece.stop)
            low, high = spec.offset + start * width, spec.offset + stop * width
            return {key: store.state_range(k, low, high, spec.dtype) for k, key in enumerate(store.table.state_keys)}
        return {s.key: store.state_tensor(k) for k, s in enumerate(store.table.states) if s.parameter == index}


def put_rows(checkpoint: Path, placement: Placement, server: int, tables: Mapping[int, Table]) -> None:
    """Let the tables of a server hold its rows of a checkpoint, and what was counted of keys that have none."""
    for number, table in tables.items():
        shards = placement.row_shards_of(server, number)
        for saved, counted in read_rows(checkpoint, number, table.spec, shards):
            own = placement.split_rows(number, saved).get(server)
            if own is not None:
                table.put(own)
            seen = None if counted is None else counted.of(shards)
            if seen is not None:
                table.put_sketch(seen.sketch, seen.shards)


def _no_rows(spec: TableSpec) -> Rows:
    none = np.empty(0, np.int64)
    return Rows(none, torch.empty(0, spec.width + spec.state, dtype=spec.dtype), np.empty(0, np.uint32), none)


class RemoteTables:
    """The tables of a run as its lead knows them: all rows are the servers'. Stands where ``RunTables`` does."""

    fds: tuple[int, ...] = ()

    def __init__(self, specs: Sequence[TableSpec], placement: Placement) -> None:
        self._specs, self._placement = specs, placement
        self.client: Client | None = None
        self._begin: list[tuple[int, Rows, Counted | None]] = []

    def begin_with(self, first: Mapping[str, Rows]) -> None:
        """Let tables hold these rows, by the module's path."""
        for number, spec in enumerate(self._specs):
            for path, rows in first.items():
                if path == spec.name or (not path and len(self._specs) == 1):
                    self._begin.append((number, rows, None))

    def restore(self, checkpoint: Path, step: int) -> None:
        """Let tables hold what a checkpoint has. RequestError where it lacks one."""
        self._begin = []
        for number, spec in enumerate(self._specs):
            self._begin += [(number, rows, counted) for rows, counted in read_rows(checkpoint, number, spec)]

    def begin_at(self, step: int) -> None:
        """Which pushes a server has applied, its shard's ledger knows."""

    def fill(self) -> tuple[int, int]:
        """Give the servers the rows that the run begins with; how many these are, and bytes of them."""
        assert self.client is not None
        count = nbytes = 0
        placement = self._placement
        for number, rows, counted in self._begin:
            split = placement.split_rows(number, rows)
            for server in placement.servers:
                seen = None if counted is None else counted.of(placement.row_shards_of(server, number))
                if server not in split and seen is None:
                    continue
                own = split.get(server, _no_rows(self._specs[number]))
                named = to_tensors(own, None if seen is None else seen.sketch)
                tensors = {f"rows/{number}/{name}": tensor for name, tensor in named.items()}
                kept = kept_of(0, NOTHING, (), {} if seen is None else {str(number): seen.shards})
                self.client.put(server, Snapshot(kept, tensors), whole=False)
                count += len(own.keys)
                nbytes += sum(tensor.nbytes for tensor in tensors.values())
        return count, nbytes

    def begun(self) -> None:
        """The servers have them."""
        self._begin = []

    def begin_again(self, found: Sequence[tuple[int, Rows, Counted | None]]) -> None:
        """Let tables hold these rows, by the table's number, instead of those that a checkpoint had."""
        self._begin = list(found)

    def _take(self, server: int, number: int) -> tuple[Rows, Counted | None]:
        assert self.client is not None
        shards = self._placement.row_shards_of(server, number)

        def own(snapshot: Snapshot) -> dict[str, torch.Tensor]:
            return {n.rpartition("/")[2]: t for n, t in snapshot.tensors.items() if n.startswith(f"rows/{number}/")}

        spec = self._specs[number]
        shape = sketch_shape(spec, len(shards))
        taken = self.client.take(server, (), {number: shards}, lambda s: check_rows(number, spec, own(s), shape))
        rows, sketch = from_tensors(own(taken))
        return rows, None if sketch is None or shape is None else Counted(shards, sketch)

    def write(self, directory: Path) -> None:
        """Write all rows to a checkpoint that is being made; nobody is at work."""
        for number, spec in enumerate(self._specs):
            for server in self._placement.servers:
                shards = self._placement.row_shards_of(server, number)
                path = directory / f"rows-{number}-{server}.safetensors"
                rows, counted = self._take(server, number)
                write_rows(path, spec, rows, shards, counted)

    def state(self) -> dict[str, torch.Tensor]:
        """What the tables are in the model's state_dict."""
        found: dict[str, torch.Tensor] = {}
        for number, spec in enumerate(self._specs):
            parts = [self._take(server, number)[0] for server in self._placement.servers]
            keys = np.concatenate([part.keys for part in parts])
            order = np.argsort(keys, kind="stable")
            values = torch.cat([part.values for part in parts])[torch.from_numpy(order)]
            counts, last = (np.concatenate([getattr(p, n) for p in parts])[order] for n in ("counts", "last"))
            found.update(state_of(prefix_of(spec), Rows(keys[order], values, counts, last), spec))
        return found

    def close(self) -> None:
        """They are the servers'."""
