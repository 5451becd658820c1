"""Transformers that are split along an axis: what benchmarks/model_parallel.py trains, and nothing else does.

``wide`` is for the tensor axis: many large products, a small vocabulary. ``staged`` is for the pipeline: its vocabulary of
8,000 makes the last stage heavy. ``heavy`` has 200 million parameters with Adam and a tiny batch: its memory is weights and
what goes with them. Those that end in ``_small`` show that everything runs.
"""

from __future__ import annotations

import os

import torch

from benchmarks.peers.large import Model, loss
from shoal.job import Job


def _job(
    name: str,
    *,
    vocabulary: int,
    width: int,
    blocks: int,
    length: int,
    batch: int,
    adam: bool = False,
    samples: int = 1024,
) -> Job:
    def data() -> tuple[torch.Tensor, torch.Tensor]:
        words = torch.randint(vocabulary, (samples, length + 1), generator=torch.Generator().manual_seed(1))
        return words[:, :-1].clone(), words[:, 1:].clone()

    def optimizer(params: object) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=1e-4) if adam else torch.optim.SGD(params, lr=1e-3)  # type: ignore[arg-type]

    return Job(
        name=name,
        model=lambda: Model(vocabulary, width, blocks),
        train_data=data,
        loss=loss,
        optimizer=optimizer,
        batch_size=batch,
        epochs=8,
    )


def wide() -> Job:
    """12 layers, 512 wide, 38 million parameters. ``BENCHMARK_BATCH`` and ``BENCHMARK_LENGTH`` give another batch."""
    batch, length = (int(os.environ.get(f"BENCHMARK_{key}", value)) for key, value in (("BATCH", 8), ("LENGTH", 32)))
    return _job("wide", vocabulary=1_000, width=512, blocks=12, length=length, batch=batch)


def staged() -> Job:
    """6 layers, 256 wide, a vocabulary of 8,000, 32 sequences of 128 words."""
    return _job("staged", vocabulary=8_000, width=256, blocks=6, length=128, batch=32)


def heavy() -> Job:
    """200.8 million parameters with Adam."""
    return _job("heavy", vocabulary=24_000, width=1024, blocks=14, length=16, batch=4, adam=True)


def wide_small() -> Job:
    return _job("wide-small", vocabulary=500, width=128, blocks=2, length=16, batch=8)


def staged_small() -> Job:
    return _job("staged-small", vocabulary=800, width=64, blocks=4, length=16, batch=16)


def heavy_small() -> Job:
    return _job("heavy-small", vocabulary=8_000, width=512, blocks=4, length=16, batch=4, adam=True)
