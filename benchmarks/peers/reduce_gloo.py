"""Peer: ``torch.distributed.all_reduce`` on gloo, in place on a float32 tensor, one thread a process.

Prints one JSON line: the median and the 90th percentile in seconds by the number of bytes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.peers.reduce_sizes import arguments, percentiles


def work(rank: int, options: argparse.Namespace, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.processes)
    gc.disable()
    found: dict[int, dict[str, float]] = {}
    for size, times in options.plan:
        values = torch.full((size // 4,), float(rank + 1))
        dist.all_reduce(values)
        expected = float(sum(range(1, options.processes + 1)))
        assert bool((values == expected).all()), "the sum is wrong"
        # Summing in place again and again would end in infinities; zeros stay what they are.
        values.zero_()
        taken = []
        for _ in range(times):
            if options.fresh:
                values.fill_(rank + 1)
            began = time.perf_counter()
            dist.all_reduce(values)
            taken.append(time.perf_counter() - began)
        found[size] = percentiles(taken)
    if rank == 0:
        print(json.dumps({"sizes": found, "small_s": found[options.plan[0][0]]["median_s"]}), flush=True)
    dist.destroy_process_group()


def main() -> None:
    options = arguments(__doc__)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(options, os.path.join(folder, "meeting")), nprocs=options.processes)


if __name__ == "__main__":
    main()
