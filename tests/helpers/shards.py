"""Shards of servers with dense pieces and a table, and pushes to them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from shoal.ps import Adagrad
from shoal.ps.dense import DensePart, cut
from shoal.ps.shard import Push, RowGradients, Shard
from shoal.ps.spec import TableSpec
from shoal.ps.table import Table

PIECES = cut("w", (100,), torch.float32, 0, 0, True, most_bytes=160)


def adam(parameters):
    return torch.optim.Adam([{"params": [p for _, p in parameters]}], lr=0.1)


def a_shard(factor_of: Callable[[int], float] | None = None) -> Shard:
    table = Table.create(TableSpec(width=4, optimizer=Adagrad(lr=0.1), admission=2))
    return Shard(DensePart(PIECES, adam), {0: table}, factor_of)


def a_push(k: int) -> Push:
    stream = torch.Generator().manual_seed(k)
    keys = np.unique(np.arange(6) * (k % 4 + 1))
    rows = RowGradients(keys, np.ones(len(keys), np.uint32), torch.randn(len(keys), 4, generator=stream))
    dense = {p.number: torch.randn(p.numel, generator=stream) for p in PIECES if (p.number + k) % 3}
    return Push(ids=((0, k, 0),), step=k, dense=dense, rows={0: rows}, scale=0.5, groups=[{"lr": 0.1 / (1 + k)}])


def same(a: Shard, b: Shard) -> bool:
    left, right = a.snapshot().tensors, b.snapshot().tensors
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left) and a.version == b.version
