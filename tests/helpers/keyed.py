"""A model with tables of rows: a row a sample, a bag whose keys are admitted late and dropped early, and layers behind them."""

from __future__ import annotations

import torch
from torch import nn

import shoal


class Keyed(nn.Module):
    """One row a sample, and the sum of a bag; ``memory``: bytes that the bag's rows may take, so that not all fit."""

    def __init__(self, max_age: int, memory: int) -> None:
        super().__init__()
        self.rows = shoal.ps.Embedding(6)
        self.bag = shoal.ps.Embedding(
            6, optimizer=shoal.ps.Adam(lr=0.01), mode="sum", padding_key=0, admission=2, max_age=max_age, memory=memory
        )
        self.out = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1))
        self.double()

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        first = self.rows(keys[:, 0] * (2**40 + 3) - 5)
        return self.out(torch.cat([first, self.bag(keys)], dim=1))[:, 0]


def samples(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(keys, target): a few keys are in most samples."""
    generator = torch.Generator().manual_seed(3)
    keys = (torch.rand(count, 4, generator=generator) ** 3 * 120).long()
    return keys, torch.randn(count, generator=generator, dtype=torch.float64)
