"""How a step's time grows with the table: ``python rows_growth.py ROWS`` prints one JSON line.

Rows of 16 floats with row-wise Adagrad. The keys of a batch (4,096 × 26) come from the same number of popular rows whatever the
size of the table, spread over all of it, so the hot set fits in memory; beyond the memory limit the others are on disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from shoal.ps import RowWiseAdagrad
from shoal.ps.embedding import Embedding
from shoal.ps.spec import TableSpec
from shoal.ps.table import Rows, Table

WIDTH, HOT, BATCH, FIELDS, EXPONENT, STEPS = 16, 50_000, 4096, 26, 1.2, 120
_PIECE = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int)
    parser.add_argument("--memory-gb", type=float, default=4.0)
    parser.add_argument("--directory", help="for cold rows; a temporary one by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from shoal.train.allocator import keep_freed_memory

    keep_freed_memory()
    spec = TableSpec(width=WIDTH, optimizer=RowWiseAdagrad(), memory_bytes=int(options.memory_gb * 1e9))
    with tempfile.TemporaryDirectory(dir=options.directory) as cold:
        table = Table.create(spec, Path(cold) / "rows")
        began = time.perf_counter()
        for start in range(0, options.rows, _PIECE):
            keys = np.arange(start, min(options.rows, start + _PIECE), dtype=np.int64)
            values = torch.full((len(keys), WIDTH + 1), 0.01)
            last = np.full(len(keys), start // _PIECE, np.int64)
            table.put(Rows(keys, values, np.ones(len(keys), np.uint32), last), overwrite=False)
        filled_s = time.perf_counter() - began
        module = Embedding(WIDTH, optimizer=RowWiseAdagrad())
        module.use(table)
        module.steps = options.rows
        hot = np.random.default_rng(0).choice(options.rows, min(HOT, options.rows), replace=False).astype(np.int64)
        weights = np.cumsum(np.arange(1, len(hot) + 1, dtype=np.float64) ** -EXPONENT)
        draw = np.random.default_rng(1)
        gradient = torch.randn(BATCH * FIELDS, WIDTH) * 1e-3

        def step(keys: np.ndarray) -> None:
            module(torch.from_numpy(keys)).backward(gradient)
            module.step()

        # The hot set comes into memory.
        for piece in np.array_split(hot, 8):
            module(torch.from_numpy(piece)).sum().backward()
            module.step()
        walls, cpus = [], []
        for _ in range(STEPS):
            keys = hot[np.searchsorted(weights, draw.random(BATCH * FIELDS) * weights[-1])]
            wall, cpu = time.perf_counter(), time.process_time()
            step(keys)
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
        in_memory = len(table)
        table.close()
    print(
        json.dumps(
            {
                "step_s": float(np.median(walls)), "best_s": float(np.min(walls)), "cpu_s": float(np.median(cpus)),
                "rows": options.rows, "rows_in_memory": in_memory, "filled_s": filled_s,
            }
        )  # fmt: skip
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
