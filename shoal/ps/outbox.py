"""What a worker has to say of a step to whoever updates the rows: keys by shard, how often each was seen, and its gradient.

It lies in the table's shared memory, so a worker that dies after it was written takes nothing with it. A worker overwrites
it in the next step only, when all of the step's updates are made.
"""

from __future__ import annotations

import numpy as np
import torch

from shoal.ps.embedding import Gathered
from shoal.ps.kernel import Kernel, Part
from shoal.ps.memory import TableMemory
from shoal.ps.spec import TableSpec


def write(memory: TableMemory, kernel: Kernel, spec: TableSpec, rank: int, found: Gathered | None) -> None:
    """Write a worker's gradients, or that it has none."""
    n = 0 if found is None else len(found.keys)
    head = np.zeros(spec.shards + 2, np.int64)
    head[0] = n
    order = np.empty(0, np.uint32)
    if found is not None:
        order, head[1:] = kernel.partition(found.keys, spec.shards)
    part = _views(memory, spec, rank, n)
    memory.outbox(rank, head.nbytes)[:] = head.view(np.uint8)
    if found is not None:
        at = order.astype(np.int64)
        part.keys[:] = found.keys[at]
        part.counts[:] = found.counts[at]
        torch.index_select(found.rows, 0, torch.from_numpy(at), out=part.rows)


def read(memory: TableMemory, spec: TableSpec, rank: int) -> Part:
    """What a worker wrote last: views of the memory."""
    head = memory.outbox(rank, 8 * (spec.shards + 2)).view(np.int64)
    return _views(memory, spec, rank, int(head[0]))


def _views(memory: TableMemory, spec: TableSpec, rank: int, n: int) -> Part:
    keys_at = 8 * (spec.shards + 2)
    counts_at = keys_at + 8 * n
    rows_at = -(-(counts_at + 4 * n) // 64) * 64
    raw = memory.outbox(rank, rows_at + n * spec.width * spec.dtype.itemsize)
    return Part(
        raw[keys_at:counts_at].view(np.int64),
        raw[counts_at : counts_at + 4 * n].view(np.uint32),
        torch.from_numpy(raw[rows_at:]).view(spec.dtype).view(n, spec.width),
        raw[8:keys_at].view(np.int64),
    )
