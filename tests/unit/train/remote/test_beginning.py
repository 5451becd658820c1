"""A server that comes in another's place reads its part of a checkpoint by itself: the bits that it was given, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shards import same
from small_store import Ranks

from shoal.errors import RequestError
from shoal.ps import Adagrad
from shoal.ps.dense import DensePart
from shoal.ps.requests import Damaged
from shoal.ps.shard import Shard
from shoal.ps.spec import TableSpec
from shoal.ps.table import Rows, Table
from shoal.train.checkpoint import PartWriter, complete, part_path
from shoal.train.remote.beginning import FromCheckpoint
from shoal.train.remote.state import StoreState, kept_of, placement_of
from shoal.train.row_tables import write_rows

SPEC = TableSpec(width=2, optimizer=Adagrad(lr=0.1), shards=16, admission=2)
KEPT = kept_of(9, (0, 3, 0), [(0, 4, 0)])
NAME = "checkpoints/step-00000003"
# How many servers share it: whoever looks across tensors has all of them.
KINDS: dict[str, tuple[type[torch.optim.Optimizer], int]] = {"AdamW": (torch.optim.AdamW, 2), "NAdam": (torch.optim.NAdam, 1)}


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_each_server_has_the_bits_that_the_lead_would_give_it(kind: str, tmp_path: Path) -> None:
    optimizer, servers = KINDS[kind]
    ranks = Ranks(lambda model: optimizer(model.parameters(), lr=0.1), 1)  # type: ignore[call-arg]
    updater = ranks.updater(0)
    # In the first step one parameter has no gradient, and after it the optimizer has nothing of it.
    ranks.give_gradients(0)
    for chunk in range(updater.count):
        updater.sum_gradients(chunk, 1.0)
        updater.apply(chunk, 1.0)
    table, tables = ranks.store.table, [SPEC]
    placement = placement_of(table, tables, range(servers))
    keys = np.arange(200, dtype=np.int64) * 7
    rows = Rows(keys, torch.randn(200, 2 + SPEC.state), np.ones(200, np.uint32), np.zeros(200, np.int64))

    def shard(server: int) -> Shard:
        def over(pieces: Any) -> torch.optim.Optimizer:
            return optimizer([p for _, p in pieces], lr=0.1)  # type: ignore[call-arg]

        return Shard(DensePart(placement.pieces_of(server), over), {0: Table.create(SPEC)})

    saved = Table.create(SPEC)
    saved.put(rows)
    # Keys that were seen once, and have no row yet.
    saved.push(np.arange(1000, 1200, dtype=np.int64), torch.ones(200, 2))
    counted = [saved.export_counted(placement.row_shards_of(server, 0)) for server in range(servers)]
    PartWriter(ranks.store, tmp_path / "checkpoints", 3).write_all()
    for server, own in enumerate(counted):
        path = part_path(tmp_path / "checkpoints", 3) / f"rows-0-{server}.safetensors"
        write_rows(path, SPEC, placement.split_rows(0, rows)[server], placement.row_shards_of(server, 0), own)
    complete(tmp_path / "checkpoints", 3, {})
    for server in range(servers):
        given, own = shard(server), shard(server)
        given.restore(StoreState(ranks.store, placement).give(server, 9, (0, 3, 0), [(0, 4, 0)]))
        given.tables[0].put(placement.split_rows(0, rows)[server])
        given.tables[0].put_sketch(counted[server].sketch, counted[server].shards)  # type: ignore[union-attr]
        FromCheckpoint(tmp_path, own, table, placement, server)(NAME, KEPT)
        assert same(given, own) and own.version == 9 and len(own.tables[0].export().keys)
        assert (own.ledger.settled, own.ledger.ids()) == ((0, 3, 0), ((0, 4, 0),))
        assert any(own.dense.state(number) for number in own.dense.pieces)
    ranks.close()

    # What was changed is found, wherever that is, before a table has any row of it.
    own = shard(0)
    begin = FromCheckpoint(tmp_path, own, table, placement, 0)
    state, rows_file = tmp_path / NAME / "state.safetensors", tmp_path / NAME / "rows-0-0.safetensors"
    for path, at in ((state, -5), (state, 3), (state, 100), (rows_file, -1), (tmp_path / NAME / "meta.json", 20)):
        damage(path, at)
        with pytest.raises(Damaged, match="is damaged: "):
            begin(NAME, KEPT)
        damage(path, at)
    assert not len(own.tables[0].export().keys)
    if servers > 1:
        # What it would not read is none of its: but which shards that has, all files have to agree on.
        other = tmp_path / NAME / "rows-0-1.safetensors"
        shards_at = other.read_bytes().index(b"\"shards\":\"") + 10
        damage(other, -1)
        begin(NAME, KEPT)
        damage(other, shards_at)
        with pytest.raises(Damaged, match="rows-0-1.safetensors is not what was written"):
            begin(NAME, KEPT)
        damage(other, shards_at)
        damage(other, -1)
    with pytest.raises(Damaged, match="is damaged"):
        begin("checkpoints/step-00000004", KEPT)
    for outside in (f"../{tmp_path.name}/{NAME}", str(tmp_path / NAME)):
        with pytest.raises(RequestError, match="no checkpoint of this run"):
            begin(outside, KEPT)
    begin(NAME, KEPT)
    assert own.version == 9
