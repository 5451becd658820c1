"""A job, built."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from shoal.data.source import Source
from shoal.job import Job


@dataclass(frozen=True)
class Built:
    """A job's model, optimizer and data."""

    job: Job
    model: nn.Module
    optimizer: torch.optim.Optimizer
    train: Source
    evaluation: Source | None
