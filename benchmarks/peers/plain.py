"""Peer: plain PyTorch, one process, all cores, as the loop of a tutorial, but with its data in memory.

No metrics are computed and the loss is never read: both would only slow this peer down.
Prints one JSON line with ``samples_per_s``, counted over ``--steps`` after ``--warmup`` steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time

import torch

from benchmarks.peers.batches import batches, mean_loss, tensors
from shoal.jobs import find


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile as it comes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    job = find(options.job).job
    torch.manual_seed(job.seed)
    model = job.model()
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = job.optimizer(model.parameters())
    if options.compile:
        model = torch.compile(model)
    data = tensors(job, options.channels_last)
    model.train()

    begin = 0.0
    stream = batches(data, job.batch_size, options.channels_last)
    for step, (inputs, targets) in enumerate(itertools.islice(stream, options.warmup + options.steps)):
        if step == options.warmup:
            begin = time.perf_counter()
        optimizer.zero_grad()
        loss = mean_loss(job, model(inputs), targets)
        loss.backward()
        if job.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.grad_clip)
        optimizer.step()
    seconds = time.perf_counter() - begin
    print(json.dumps({"samples_per_s": options.steps * job.batch_size / seconds, "loss": loss.item()}))


if __name__ == "__main__":
    main()
