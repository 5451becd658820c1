"""Every collective of torch.distributed, on gloo or on the shared-memory group, one thread a process.

Prints one JSON line: by collective and number of bytes the median and the 90th percentile in seconds, on rank 0. The
bytes are what a process gives: its whole input. "send" is a ring: each sends to the next and receives from the last.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from benchmarks.peers.reduce_sizes import percentiles
from shoal.comm.memory import SharedMemory
from shoal.comm.region import exchange_bytes
from shoal.comm.shared_group import init

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send", "barrier")
LIMIT_S = 60.0


def call(name: str, rank: int, n: int, size: int) -> Callable[[], object]:
    """The call to be timed, its tensors made."""
    count = max(n, size // 4 // n * n)
    given, share = torch.zeros(count), torch.zeros(count // n)
    if name == "all_gather":
        whole = torch.empty(count * n)
        return lambda: dist.all_gather_into_tensor(whole, given)
    if name == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(share, given)
    if name == "all_to_all":
        received = torch.empty(count)
        return lambda: dist.all_to_all_single(received, given)
    if name == "send":
        received = torch.empty(count)

        def ring() -> None:
            sent = dist.isend(given, (rank + 1) % n)
            dist.recv(received, (rank - 1) % n)
            if sent is not None:
                sent.wait()

        return ring
    if name == "broadcast":
        return lambda: dist.broadcast(given, 0)
    return (lambda: dist.barrier()) if name == "barrier" else (lambda: dist.all_reduce(given))


def work(rank: int, n: int, plan: list[tuple[int, int]]) -> dict[str, dict[int, dict[str, float]]]:
    """Go through all collectives and sizes with the others; what this process measured."""
    gc.disable()
    found: dict[str, dict[int, dict[str, float]]] = {}
    check = torch.full((9,), float(rank + 1))
    dist.all_reduce(check)
    assert check.tolist() == [n * (n + 1) / 2] * 9, "the sum is wrong"
    for name in COLLECTIVES:
        found[name] = {}
        for size, times in plan[:1] if name == "barrier" else plan:
            run = call(name, rank, n, size)
            run()
            taken = []
            for _ in range(times):
                began = time.perf_counter()
                run()
                taken.append(time.perf_counter() - began)
            found[name][size] = percentiles(taken)
            dist.barrier()
    return found


def join(backend: str, rank: int, n: int, memory: SharedMemory | None, folder: str) -> None:
    torch.set_num_threads(1)
    if memory is not None:
        init(memory.bytes, rank, n, deadline_s=LIMIT_S)
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    meeting, limit = f"file://{folder}/meeting", timedelta(seconds=LIMIT_S)
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=n, timeout=limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("gloo", "shoal"), required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--plan", nargs="+", required=True, help="bytes:times, one for each size")
    options = parser.parse_args()
    plan = [(int(size), int(times)) for size, times in (entry.split(":") for entry in options.plan)]
    n = options.processes
    memory = SharedMemory.create(exchange_bytes(n)) if options.backend == "shoal" else None
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(1, n):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    join(options.backend, rank, n, memory, folder)
                    work(rank, n, plan)
                    code = 0
                finally:
                    os._exit(code)
            children.append(pid)
        join(options.backend, 0, n, memory, folder)
        found = work(0, n, plan)
        codes = [os.waitpid(pid, 0)[1] for pid in children]
        assert not any(codes), f"a process failed: {codes}"
        dist.destroy_process_group()
    print(json.dumps({"times": found, "small_s": found["all_reduce"][plan[0][0]]["median_s"]}))


if __name__ == "__main__":
    main()
