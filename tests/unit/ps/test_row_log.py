"""What is kept of rows that have changed: of a key the last change, from as long ago as memory allows."""

from __future__ import annotations

import numpy as np
import torch

from shoal.ps.optimizers import SGD
from shoal.ps.row_log import Changes, RowLog
from shoal.ps.spec import TableSpec
from shoal.ps.table import Table


def changes(rows: dict[int, float | None]) -> Changes:
    there = np.array([value is not None for value in rows.values()])
    return Changes(np.array(list(rows), np.int64), np.array([[v or 0.0] for v in rows.values()], np.float32), there)


def as_dict(found: Changes | None) -> dict[int, float | None]:
    assert found is not None
    return {int(k): float(r[0]) if t else None for k, r, t in zip(found.keys, found.rows, found.there, strict=True)}


def test_the_last_change_of_a_key_counts():
    log = RowLog(1, np.dtype(np.float32), 1, 1 << 20)
    log.add(2, changes({5: 1.0, 6: 2.0}))
    log.add(3, changes({6: None, -7: 3.0}))
    log.add(4, changes({6: 4.0}))
    assert as_dict(log.since(1)) == {5: 1.0, 6: 4.0, -7: 3.0}
    assert as_dict(log.since(2)) == {6: 4.0, -7: 3.0} and as_dict(log.since(4)) == {}
    assert log.since(0) is None
    log.trim(3)
    assert log.since(2) is None and as_dict(log.since(3)) == {6: 4.0}


def test_the_oldest_goes_where_there_is_too_much_unless_somebody_needs_it():
    each = changes({1: 1.0}).nbytes
    log = RowLog(1, np.dtype(np.float32), 1, 3 * each)
    for number in range(2, 5):
        log.add(number, changes({number: 1.0}))
    # Of the same key, so what is left fits.
    log.add(5, changes({2: 2.0}))
    assert as_dict(log.since(1)) == {2: 2.0, 3: 1.0, 4: 1.0}
    log.add(6, changes({9: 1.0}), needed=1)
    assert len(as_dict(log.since(1))) == 4
    log.add(7, changes({10: 1.0}))
    assert log.since(1) is None and log.since(log.floor) is not None and log.nbytes <= 3 * each
    log.forget(8)
    assert log.since(7) is None and as_dict(log.since(8)) == {}


def test_a_table_says_which_rows_have_changed_and_gives_all_of_them_in_pieces(tmp_path):
    spec = TableSpec(width=2, optimizer=SGD(lr=1.0), max_age=4, memory_bytes=96 * 20, shards=2)
    table = Table.create(spec, tmp_path)

    def push(keys: list[int], step: int) -> None:
        table.push(np.array(keys), torch.ones(len(keys), 2), step=step)

    push([1, 2], 0)
    counts = [table.listen(shard, 16) for shard in range(2)]
    push([2, -3], 1)
    assert table.sweep(5) == 1
    named = [table.changed(shard, counts[shard]) for shard in range(2)]
    keys = np.unique(np.concatenate([found for found, _ in named]))
    assert keys.tolist() == [-3, 1, 2]
    rows, there = table.read(keys)
    assert there.tolist() == [True, False, True]
    push(list(range(10, 60)), 6)
    assert table.changed(0, named[0][1])[0] is None
    # Most of them are on disk.
    assert len(table) < 40
    pieces = [(k, r) for k, r in table.pieces(count=7)]
    found = dict(zip(np.concatenate([k for k, _ in pieces]).tolist(), torch.cat([r for _, r in pieces]), strict=True))
    assert sorted(found) == [-3, 2, *range(10, 60)] and torch.equal(found[2], rows[2])
    state = table.export()
    assert all(torch.equal(found[int(k)], v[:2]) for k, v in zip(state.keys, state.values, strict=True))
    table.discard(np.array([2, 11, 59]))
    assert sorted(table.export().keys.tolist()) == [-3, 10, *range(12, 59)]
    table.discard(None)
    assert len(table.export().keys) == 0 and table.read(np.array([12]))[1].tolist() == [False]
    table.close()
