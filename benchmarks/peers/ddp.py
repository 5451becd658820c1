"""Peer: hand-written DistributedDataParallel on gloo, one process a core with one thread each.

Written as PyTorch's own tutorial has it, with its data in memory and ``gradient_as_bucket_view`` (which saves a
copy); each process takes its part of the global batch. BatchNorm normalises over a process's own samples, as DDP
does. No metrics are computed and the loss is never read.
Prints one JSON line with ``samples_per_s``, counted over ``--steps`` after ``--warmup`` steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.batches import batches, mean_loss, tensors
from shoal.jobs import find


def worker(rank: int, options: argparse.Namespace, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.processes)
    job = find(options.job).job
    torch.manual_seed(job.seed)
    model = job.model()
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = job.optimizer(model.parameters())
    data = tensors(job, options.channels_last)
    model.train()

    begin = 0.0
    stream = batches(data, job.batch_size, options.channels_last, rank, options.processes)
    for step, (inputs, targets) in enumerate(itertools.islice(stream, options.warmup + options.steps)):
        if step == options.warmup:
            dist.barrier()
            begin = time.perf_counter()
        optimizer.zero_grad()
        loss = mean_loss(job, model(inputs), targets)
        loss.backward()
        if job.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.grad_clip)
        optimizer.step()
    dist.barrier()
    seconds = time.perf_counter() - begin
    if rank == 0:
        samples = options.steps * (job.batch_size // options.processes) * options.processes
        print(json.dumps({"samples_per_s": samples / seconds, "loss": loss.item()}), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--channels-last", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(options, os.path.join(folder, "meeting")), nprocs=options.processes)


if __name__ == "__main__":
    main()
