"""DeepFM on MovieLens-100K, with rows by key: will this person like this film?

After Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction" (2017): a factorization machine and a
perceptron share one embedding of the keys, beside a linear model. Data, split and metrics are those of ``wide-deep``.
"""

from __future__ import annotations

import torch
from torch import nn

from shoal import ps
from shoal.job import Job
from shoal.jobs.recsys import wide_deep
from shoal.jobs.recsys.movielens_keys import SINGLE

NAME = "deepfm"


class DeepFM(nn.Module):
    """Keys (N, single + several) int64, and if there are any numbers (N, numeric) float -> (N,) logits."""

    def __init__(
        self, width: int = 8, hidden: tuple[int, ...] = (64, 32), single: int = SINGLE, numeric: int = 0, lr: float = 0.05
    ) -> None:
        super().__init__()
        self.linear = ps.Embedding(1, optimizer=ps.Adagrad(lr=lr), init=ps.Zeros(), mode="sum", padding_key=0)
        self.fields = wide_deep.Fields(width, single, lr)
        self.numbers = nn.Linear(numeric, 1) if numeric else None
        self.deep = wide_deep.perceptron((single + 1) * width + numeric, hidden)

    def forward(self, keys: torch.Tensor, numbers: torch.Tensor | None = None) -> torch.Tensor:
        fields = self.fields(keys)
        # Rendle 2010, lemma 3.1: the sum over pairs is half the square of the sum less the sum of squares.
        pairs = (fields.sum(1).square() - fields.square().sum(1)).sum(1) / 2
        features = fields.flatten(1)
        logits = self.linear(keys)[:, 0] + pairs
        if self.numbers is not None and numbers is not None:
            features = torch.cat([features, numbers], dim=1)
            logits = logits + self.numbers(numbers)[:, 0]
        out: torch.Tensor = logits + self.deep(features)[:, 0]
        return out


def job() -> Job:
    """Return the job ``deepfm``."""
    return wide_deep.job().replace(name=NAME, model=DeepFM)
