"""Wide and deep on MovieLens-100K, with rows by key: will this person like this film?

After Cheng et al., "Wide & Deep Learning for Recommender Systems" (2016): a linear model over the keys, trained by FTRL, and a
perceptron over their embeddings, trained by Adagrad; the perceptron's own weights by Adam. Split by time: the first 80,000
ratings to train on, the 20,000 after them to evaluate. The data is for research only: see docs/data.md.
"""

from __future__ import annotations

import torch
from torch import nn

from shoal import ps
from shoal.job import Job
from shoal.jobs.recsys.clicks_wide_deep import ClickAUC
from shoal.jobs.recsys.movielens_keys import SINGLE, eval_data, train_data

NAME = "wide-deep"


class Fields(nn.Module):
    """Keys (N, single + several) -> (N, single + 1, width): a row for each single key, the others' summed; 0 is no key."""

    def __init__(self, width: int, single: int = SINGLE, lr: float = 0.05) -> None:
        super().__init__()
        self.single = single
        self.rows = ps.Embedding(width, optimizer=ps.Adagrad(lr=lr), init=ps.Normal(0.01), padding_key=0)

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        rows = self.rows(keys)
        return torch.cat([rows[:, : self.single], rows[:, self.single :].sum(1, keepdim=True)], dim=1)


def perceptron(features: int, hidden: tuple[int, ...], dropout: float = 0.0) -> nn.Sequential:
    """Linear layers with ReLU between them, and one number at the end."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(features, size), nn.ReLU(), nn.Dropout(dropout)]
        features = size
    return nn.Sequential(*layers, nn.Linear(features, 1))


class WideDeep(nn.Module):
    """Keys (N, single + several) int64 -> (N,) logits."""

    def __init__(self, width: int = 8, hidden: tuple[int, ...] = (64, 32), single: int = SINGLE) -> None:
        super().__init__()
        self.wide = ps.Embedding(1, optimizer=ps.FTRL(lr=0.05), init=ps.Zeros(), mode="sum", padding_key=0)
        self.fields = Fields(width, single)
        self.deep = perceptron((single + 1) * width, hidden)

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        return self.wide(keys)[:, 0] + self.deep(self.fields(keys).flatten(1))[:, 0]


def job() -> Job:
    """Return the job ``wide-deep``."""
    return Job(
        name=NAME,
        model=WideDeep,
        train_data=train_data,
        eval_data=eval_data,
        loss=nn.functional.binary_cross_entropy_with_logits,
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3),
        metrics={"auc": ClickAUC()},
        batch_size=256,
        epochs=3,
    )
