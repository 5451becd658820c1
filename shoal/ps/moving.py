"""Letting keys move while nobody works: servers come and go, and what has another place on the ring goes there, nothing else.

What moves is taken from whoever has it with all that belongs to it (weights, the optimizer's state, rows with their counts and
ages, what was counted of keys without a row), given to whoever is to have it, and only then forgotten by the first. What was
applied is settled on all servers by then, so the ledger of ids is one id, the same for every key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from shoal.errors import RequestError
from shoal.ps.applied import PushId
from shoal.ps.checks import parse_name
from shoal.ps.client import Client
from shoal.ps.placement import Placement
from shoal.ps.shard import Snapshot

_BYTES_AT_ONCE = 64 << 20


@dataclass
class Moved:
    """What has moved.

    Attributes:
        keys: pieces and shards of tables that another server has now, ``of`` so many.
        rows: rows of tables among them; nbytes: of everything that travelled, optimizer state included.
        version: how many updates every server counts.
    """

    keys: int
    of: int
    rows: int = 0
    nbytes: int = 0
    version: int = 0


def move(
    client: Client, before: Placement, after: Placement, settled: PushId, parting: Callable[[], None] = lambda: None
) -> Moved:
    """Let servers hold what ``after`` says in place of ``before``; ``client`` speaks to all of both.

    Everything before ``settled`` is applied on all servers, and nobody pushes or pulls meanwhile. Those who are new hold nothing
    but zeros; those who are left out are as they were, and may end. ``parting`` is called when everything is where it is to
    be: until then those of ``before`` have all that they had, and it may be begun once more; then they forget what they gave.
    """
    moves = before.moves(after)
    keys = sum(len(each.pieces) + sum(map(len, each.row_shards.values())) for each in moves)
    # All have counted the same pushes: each was given a part of every one.
    moved = Moved(keys, after.keys, version=max(client.ping(server) for server in before.servers))
    for server in after.servers:
        # For the time being, what it has as well.
        had = [piece.number for piece in before.pieces_of(server)]
        gets = [piece.number for piece in after.pieces_of(server)]
        shards = {t: sorted({*before.row_shards_of(server, t), *own}) for t, own in after.shards_of(server).items()}
        client.hold(server, sorted({*had, *gets}), shards)
    for each in moves:
        for pieces in _portions(before, each.pieces):
            _hand_on(client, each.source, each.target, pieces, None, moved)
        for table, own in each.row_shards.items():
            for shard in own:
                _hand_on(client, each.source, each.target, (), (table, shard), moved)
    parting()
    for server in after.servers:
        holds = [piece.number for piece in after.pieces_of(server)]
        client.hold(server, holds, after.shards_of(server), moved.version, settled)
    return moved


def _portions(placement: Placement, pieces: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Pieces in portions that are not too large for one message."""
    portion: list[int] = []
    size = 0
    for number in pieces:
        portion.append(number)
        size += placement.pieces[number].nbytes
        if size >= _BYTES_AT_ONCE:
            yield tuple(portion)
            portion, size = [], 0
    if portion:
        yield tuple(portion)


def _hand_on(
    client: Client, source: int, target: int, pieces: tuple[int, ...], shard: tuple[int, int] | None, moved: Moved
) -> None:
    """Take pieces, or a shard of a table, from one server and give it to another."""
    row_shards = {} if shard is None else {shard[0]: (shard[1],)}
    snapshot = client.take(source, pieces, row_shards, partial(_check, pieces, shard))
    client.put(target, snapshot, whole=False)
    moved.nbytes += sum(tensor.nbytes for tensor in snapshot.tensors.values())
    if shard is not None:
        moved.rows += len(snapshot.tensors[f"rows/{shard[0]}/keys"])


def _check(pieces: Sequence[int], shard: tuple[int, int] | None, snapshot: Snapshot) -> None:
    """RequestError where that is not what was asked for."""
    names = [parse_name(name) for name in snapshot.tensors]
    weights = {number for kind, number, _ in names if kind == "weights"}
    tables = {number for kind, number, _ in names if kind == "rows"}
    wanted = {shard[0]} if shard is not None else set()
    if weights != set(pieces) or tables != wanted or any(f"rows/{number}/keys" not in snapshot.tensors for number in wanted):
        raise RequestError(f"A server gave pieces {sorted(weights)[:9]} and tables {sorted(tables)}, not what was asked for.")
