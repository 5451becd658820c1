"""Watching a server that shares no memory: every answer is of one version, and none that gets lost is missed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
from shards import a_push, a_shard

from shoal.errors import JobFailed
from shoal.ps.client import Client, Patience
from shoal.ps.endpoint import Endpoint, RunKeys, Serving
from shoal.ps.row_log import Changes
from shoal.ps.shard import Shard
from shoal.ps.shard_server import ShardServer
from shoal.ps.watch import Seen, Watcher

QUICK = Patience(deadline_s=20.0, retry_s=5.0)


@contextlib.contextmanager
def served(keys: RunKeys, shard: Shard) -> Iterator[str]:
    endpoint = Endpoint(keys)
    with Serving(ShardServer(shard, endpoint).serve, "server"):
        yield endpoint.address
    endpoint.close()


def held(shard: Shard) -> dict[int, list[float]]:
    keys = np.arange(30)
    rows, there = shard.tables[0].read(keys)
    return {int(k): rows[k].tolist() for k in keys[there]}


class Copy:
    """What somebody has who takes over what a watcher finds."""

    def __init__(self) -> None:
        self.rows: dict[int, list[float]] = {}
        self.dense: dict[int, bytes] = {}

    def take(self, seen: Seen) -> None:
        self.dense.update({n: bytes(data) for n, data in seen.dense.items()})
        for table, changes in seen.rows:
            assert table == 0 and isinstance(changes, Changes)
            for key, row, there in zip(changes.keys.tolist(), changes.rows.tolist(), changes.there, strict=True):
                assert there
                self.rows[key] = row

    def is_of(self, shard: Shard) -> bool:
        dense = {n: t.numpy().tobytes() for n, t in shard.pull().items()}
        return self.rows == held(shard) and self.dense == dense


def test_what_has_changed_is_told_once_also_where_answers_get_lost_and_servers_are_others() -> None:
    keys, shard = RunKeys.new(), a_shard()
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(served(keys, shard))
        client = Client({0: address}, keys, QUICK)
        stack.callback(client.close)
        forms = [(4, np.dtype(np.float32))]
        watcher = Watcher({0: address}, keys, forms, QUICK, lambda: None)
        stack.callback(watcher.close)
        copy = Copy()

        def push(*ks: int) -> None:
            for k in ks:
                client.acknowledged(client.push({0: a_push(k)}))

        def watch(accepts: bool = True) -> Seen:
            (seen,) = watcher.watch([0]).values()
            if accepts:
                watcher.accept()
                copy.take(seen)
            return seen

        push(0, 1, 2)
        # What was there before the first question is read piece by piece; from then on it is what has changed.
        assert watch().rows == () and len(copy.dense) == len(shard.pull())
        (wanted, got) = held(shard), {}
        for number in range(shard.tables[0].spec.shards):
            at: int | None = 0
            while at is not None:
                named, rows, at = watcher.piece(0, 0, number, False, at)
                got.update(zip(named.tolist(), rows.tolist(), strict=True))
        assert got == wanted != {}
        copy.rows = got
        assert not watch().rows and copy.is_of(shard)
        push(3)
        # An answer that nobody has taken over, twice, and then one behind it.
        assert watch(accepts=False).version == watch(accepts=False).version == 4
        push(4, 5)
        assert watch().version == 6 and copy.is_of(shard)
        push(6)
        watch()
        assert copy.is_of(shard) and not watch().rows
        # Another process in the place of the server does not know what this one has seen.
        other = a_shard()
        other.restore(shard.snapshot())
        watcher.connect(0, stack.enter_context(served(keys, other)))
        (seen,) = watcher.watch([0]).values()
        assert seen.rows == ((0, None),)
        watcher.accept()
        assert not watch().rows


@pytest.mark.parametrize(("table", "shard"), [(1, 0), (0, 99)])
def test_rows_that_are_not_there_are_refused(table: int, shard: int) -> None:
    keys = RunKeys.new()
    with (
        served(keys, a_shard()) as address,
        contextlib.closing(Watcher({0: address}, keys, [(4, np.dtype(np.float32))], QUICK, lambda: None)) as watcher,
        pytest.raises(JobFailed, match="there are no rows"),
    ):
        watcher.piece(0, table, shard, False, 0)
