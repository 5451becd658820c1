"""How much work a job's step is as its author wrote it: floating-point operations and bytes, a sample.

Operations are those of matrix products, convolutions and attention (torch.utils.flop_counter); bytes are what every operator
reads and writes, each by itself: a machine that kept everything in its caches would move fewer. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers.batches import batches, mean_loss, tensors
from shoal.jobs import find


class CountBytes(TorchDispatchMode):
    """Adds up the sizes of what operators take and give; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        places = {t.untyped_storage().data_ptr() for t in given}
        if any(t.untyped_storage().data_ptr() not in places for t in made) or func._schema.is_mutable:
            self.bytes += sum(t.numel() * t.element_size() for t in (*given, *made))
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", required=True)
    options = parser.parse_args()
    job = find(options.job).job
    torch.manual_seed(job.seed)
    model = job.model()
    inputs, targets = next(batches(tensors(job), job.batch_size))
    flops, moved = FlopCounterMode(display=False), CountBytes()
    with flops, moved:
        mean_loss(job, model(inputs), targets).backward()
    count = job.batch_size
    print(json.dumps({"flop_a_sample": flops.get_total_flops() / count, "bytes_a_sample": moved.bytes / count}))


if __name__ == "__main__":
    main()
