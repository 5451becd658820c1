"""One side of benchmarks/parameter_server.py: a server and workers of shoal's over an arena, without a model.

Each worker pulls all parameters into a tensor of its own, copies a gradient that it has into its stripe, checks it, pushes it,
and waits until the server has applied it by SGD, with the undo log: what ``ps=1,workers=2,async`` does around a model's passes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from shoal.axes.server_async import PushingWorker, PushServer, make_bells
from shoal.axes.updating import Hooks, Totals
from shoal.axes.waiting import Waiting
from shoal.comm import dense
from shoal.comm.arena import Arena, Note, Order
from shoal.comm.grid import Grid
from shoal.comm.store import Store, arena_layout
from shoal.plan import Plan
from shoal.ps.ledger import regions
from shoal.train.describe import describe
from shoal.train.gradients import find_bad
from shoal.train.update import ElementwiseUpdater
from shoal.train.update_log import Commit, UpdateLog


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--times", type=int, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--log", action="store_true", help="with the write-ahead log, until all is on disk")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(options.bytes // 4))})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    table = describe(model, optimizer)
    grid = Grid(dp=options.workers, servers=1)
    arena = Arena.create(arena_layout(table, grid, further=regions(options.workers, 1, 1)))
    store, bells = Store(arena, table), make_bells(1)
    arena.supervisor.post(Order.STEPS_ALLOWED, 1 << 30)
    # Nobody reads the units' rows here.
    arena.supervisor.write(Note.UNITS_SEEN, 1 << 40)
    plan = Plan(ps=1, workers=options.workers, mode="async")
    scratch = tempfile.TemporaryDirectory(dir=".") if options.log else None
    children = [fork(lambda: serve(store, optimizer, plan, bells[0], scratch.name if scratch else None))]
    results = [os.pipe() for _ in range(options.workers)]
    workers = [
        fork(lambda rank=rank: _work(store, rank, plan, bells, options.times, results[rank][1]))  # type: ignore[misc]
        for rank in range(options.workers)
    ]
    for pid in workers:
        os.waitpid(pid, 0)
    arena.supervisor.post(Order.OVER, 1)
    os.eventfd_write(bells[0], 1)
    os.waitpid(children[0], 0)
    found = [json.loads(os.read(read, 1 << 16)) for read, _ in results]
    moved = float(store.weights[0][0])
    expected = -1e-3 * options.times * options.workers
    assert abs(moved - expected) < 1e-3 * abs(expected), (moved, expected)
    # The server has gone, and its log is on disk.
    ended = time.monotonic() if scratch else max(f["ended"] for f in found)
    if scratch:
        scratch.cleanup()
    wall_s = ended - min(f["began"] for f in found)
    median_s = statistics.median(f["median_s"] for f in found)
    payload = 2 * options.bytes * options.times * options.workers
    print(json.dumps({"median_s": median_s, "gb_s": payload / wall_s / 1e9}))


def fork(work: Callable[[], None]) -> int:
    """Do this in a process of its own; its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def serve(store: Store, optimizer: torch.optim.Optimizer, plan: Plan, bell: int, log_dir: str | None = None) -> None:
    """A server's life; with a write-ahead log where there is a folder for it."""
    updater = ElementwiseUpdater(store, 0, optimizer)
    server = PushServer(store, 0, updater, Waiting(spin_s=0.0), plan, bell)
    log = UpdateLog(store, 0, updater, log_dir, print) if log_dir else None
    hooks = Hooks(
        reach=lambda phase, step: None, before_chunk=lambda chunk, step: None, after_chunk=log.after_chunk if log else None
    )
    while (pushed := server.next_push(server.over)) is not None:
        server.take(pushed)
        updater.take_sources((pushed.worker,))
        if log:
            log.begin(server.updates)
        server.update(0, Totals(0.0, pushed.factor), None, hooks)
        if log:
            log.commit(0, Commit(server.unit_rows(pushed), None))
        server.commit(pushed)
    if log:
        log.close()


def _work(store: Store, rank: int, plan: Plan, bells: list[int], times: int, result: int) -> None:
    worker = PushingWorker(store, rank, Waiting(spin_s=0.0), plan, bells)
    own = torch.empty(store.table.trained_bytes, dtype=torch.uint8)
    gradient = torch.ones(store.table.parameters[0].numel)
    place, finite, take = store.gradient(rank, 0), np.zeros(1, dtype=bool), dense.load().take
    seconds = []
    warm = 2
    for number in range(times):
        if number == warm:
            began = time.monotonic()
        start = time.perf_counter()
        claim = worker.claims.claim(rank)
        worker.pull(own)
        worker.empty_stripe()
        # As the hooks of a model's parameters do.
        finite[0] = take(place, gradient) is True
        store.touched[rank, 0] = 1
        assert find_bad(store, rank, worker.own, finite) is None
        worker.push(claim.unit, 1.0)  # type: ignore[union-attr]
        worker.await_applied()
        seconds.append(time.perf_counter() - start)
    ended = time.monotonic()
    scale = times / max(1, times - warm)
    said = {"median_s": statistics.median(seconds[warm:]), "began": ended - (ended - began) * scale, "ended": ended}
    os.write(result, json.dumps(said).encode())


if __name__ == "__main__":
    main()
