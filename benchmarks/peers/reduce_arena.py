"""Sum over processes through the arena, as a training step does it: post, wait, sum one's slice, post, wait.

Each process's values lie in its stripe already, where backward would have put them. Each sums its slice of all
stripes into one result that all of them read: what an all_reduce brings about, without the copies. (A training step
sums its slice in chunks of 1 MiB, each of which the optimizer takes up at once and writes where all read.)
Processes are forked from this one, which has run nothing on threads, as workers are from their template. Prints one
JSON line: the median and the 90th percentile in seconds by the number of bytes.
"""

from __future__ import annotations

import gc
import json
import os
import time

import torch

from benchmarks.peers.reduce_sizes import Measurement, arguments, percentiles
from shoal.comm.arena import Arena, ArenaLayout, Signal
from shoal.comm.table import slice_bounds
from shoal.plan import Plan
from shoal.train.session import spin_seconds

LIMIT_S = 60.0


class Member:
    """One process's part in the sums of one size."""

    def __init__(self, arena: Arena, rank: int, size: int, spin_s: float) -> None:
        self._arena, self._slot, self._native, self._spin_s = arena, arena.slots[rank], arena.native, spin_s
        processes = arena.world_size
        self.stripe = arena.view("stripes", rank * size, size // 4, torch.float32)
        self.result = arena.view("result", 0, size // 4, torch.float32)
        low, high = slice_bounds(size, processes)[rank]
        self._slice = arena.view("result", low, (high - low) // 4, torch.float32)
        self._sources = [
            arena.view("stripes", k * size + low, (high - low) // 4, torch.float32) for k in range(processes)
        ]

    def reduce(self, step: int) -> None:
        self._slot.post(Signal.GRADIENTS, step)
        self._arena.wait_all(Signal.GRADIENTS, step, self._spin_s, LIMIT_S)
        self._native.sum_into(self._slice, self._sources, 1.0)
        self._slot.post(Signal.UPDATED, step)
        self._arena.wait_all(Signal.UPDATED, step, self._spin_s, LIMIT_S)


def work(arena: Arena, rank: int, plan: list[Measurement], fresh: bool, spin_s: float) -> dict[int, dict[str, float]]:
    """Go through all sizes with the others; what this process measured."""
    gc.disable()
    step = 0
    found: dict[int, dict[str, float]] = {}
    for size, times in plan:
        member = Member(arena, rank, size, spin_s)
        member.stripe.fill_(rank + 1)
        step += 1
        member.reduce(step)
        expected = float(sum(range(1, arena.world_size + 1)))
        assert bool((member.result == expected).all()), "the sum is wrong"
        taken = []
        for _ in range(times):
            if fresh:
                member.stripe.fill_(rank + 1)
            step += 1
            began = time.perf_counter()
            member.reduce(step)
            taken.append(time.perf_counter() - began)
        found[size] = percentiles(taken)
    return found


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    processes, plan = options.processes, options.plan
    largest = max(size for size, _ in plan)
    arena = Arena.create(ArenaLayout.plan(processes, {"stripes": processes * largest, "result": largest}))
    spin_s = spin_seconds(Plan.parse(f"dp={processes},threads=1"))
    children = []
    for rank in range(1, processes):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work(arena, rank, plan, options.fresh, spin_s)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    found = work(arena, 0, plan, options.fresh, spin_s)
    codes = [os.waitpid(pid, 0)[1] for pid in children]
    assert not any(codes), f"a process failed: {codes}"
    print(json.dumps({"native": arena.native.name, "sizes": found, "small_s": found[plan[0][0]]["median_s"]}))


if __name__ == "__main__":
    main()
