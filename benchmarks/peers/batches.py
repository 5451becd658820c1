"""The peers' data: a job's training set as tensors in memory, and shuffled batches of it.

A ``DataLoader`` over these data sets calls Python once a sample; gathering a batch by its shuffled indices, as done
here, took a third of its time for pictures and a hundredth for clicks; so the peers get the faster way. Pictures are
converted to float32 once, before the clock starts, and lie in memory in the layout that the model is given: NHWC
behind a permuted view for channels_last, so that a gathered batch is in that layout without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from shoal.job import Job


def tensors(job: Job, channels_last: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all of the job's training (inputs, targets) in memory; images in NHWC order where channels_last."""
    data = job.train_data()
    if isinstance(data, tuple):
        inputs, targets = data
        return inputs, targets
    parts = [data.batch(part) for part in np.array_split(np.arange(len(data)), max(1, len(data) // 5000))]
    shape = parts[0][0].shape[1:]
    order = (1, 2, 0) if channels_last else (0, 1, 2)
    inputs = torch.empty((len(data), *(shape[axis] for axis in order)))
    at = 0
    for part, _ in parts:
        inputs[at : at + len(part)] = part.permute(0, 2, 3, 1) if channels_last else part
        at += len(part)
    return inputs, torch.cat([targets for _, targets in parts])


def batches(
    data: tuple[torch.Tensor, torch.Tensor],
    batch_size: int,
    channels_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (inputs, targets) for ever: whole batches, reshuffled each epoch, of each the part of this rank."""
    inputs, targets = data
    share = batch_size // world_size
    epoch = 0
    while True:
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(epoch))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            mine = order[start + rank * share : start + (rank + 1) * share]
            batch = inputs.index_select(0, mine)
            yield (batch.permute(0, 3, 1, 2) if channels_last else batch), targets.index_select(0, mine)
        epoch += 1


def mean_loss(job: Job, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the job's loss as a mean; a (sum, weight) is divided within the process, as is usually written."""
    assert job.loss is not None
    loss = job.loss(output, target)
    return loss[0] / loss[1] if isinstance(loss, tuple) else loss
