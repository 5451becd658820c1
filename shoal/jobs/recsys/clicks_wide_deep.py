"""A wide-and-deep recommender on generated clicks: large embeddings, few multiplications, judged by AUC.

After Cheng et al., "Wide & Deep Learning for Recommender Systems" (2016): a linear model over the ids (wide)
plus a multilayer perceptron over their embeddings (deep), trained together. 25,078 ids with 16 numbers each,
hidden layers of 64 and 32: 0.43 million parameters. The clicks are made by ``shoal/jobs/recsys/clicks.py``:
1,000,000 rows to train on and 50,000 to evaluate. Two epochs reach an AUC of 0.75; knowing the planted
probabilities would give 0.807.

``sparse_job`` is the same with ``nn.Embedding(sparse=True)``: a step then touches only the rows of its batch.
"""

from __future__ import annotations

import torch
from torch import nn
from torchmetrics.classification import BinaryAUROC

from shoal.job import Job
from shoal.jobs.recsys.clicks import FIELDS, clicks

NAME = "clicks-wide-deep"


class WideDeep(nn.Module):
    """Ids (N, fields) int64, each field's from 0 -> (N,) logits of a click.

    Args:
        sizes: number of ids of each field; one table holds them all, one field after the other.
        width: numbers in an embedding.
        hidden: sizes of the perceptron's hidden layers.
        sparse: whether the tables' gradients are sparse tensors.
    """

    def __init__(
        self, sizes: tuple[int, ...], width: int = 16, hidden: tuple[int, ...] = (64, 32), sparse: bool = False
    ) -> None:
        super().__init__()
        self.wide = nn.Embedding(sum(sizes), 1, sparse=sparse)
        self.deep = nn.Embedding(sum(sizes), width, sparse=sparse)
        nn.init.zeros_(self.wide.weight)
        nn.init.normal_(self.deep.weight, std=0.05)
        layers: list[nn.Module] = []
        features = len(sizes) * width
        for size in hidden:
            layers += [nn.Linear(features, size), nn.ReLU()]
            features = size
        self.perceptron = nn.Sequential(*layers, nn.Linear(features, 1))
        starts = torch.tensor((0, *sizes[:-1])).cumsum(0)
        self.register_buffer("starts", starts)
        self.starts: torch.Tensor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = ids + self.starts
        wide = self.wide(rows).sum(dim=(1, 2))
        return wide + self.perceptron(self.deep(rows).flatten(1)).squeeze(1)


class ClickAUC(BinaryAUROC):
    """The area under the ROC curve from logits and 0.0/1.0 targets.

    torchmetrics guesses for each batch whether it holds logits, and wants whole numbers as targets. Both are known
    here, so the batch is put where it would have come to after a fourth of the time.
    """

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        self.preds.append(output.detach().sigmoid())
        self.target.append(target.int())


def model() -> nn.Module:
    """Return the recommender with dense gradients."""
    return WideDeep(tuple(FIELDS.values()))


def sparse_model() -> nn.Module:
    """Return the recommender whose embeddings have sparse gradients."""
    return WideDeep(tuple(FIELDS.values()), sparse=True)


def train_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, clicked) of 1,000,000 rows, the same every time."""
    return _tensors(1_000_000, seed=1)


def eval_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, clicked) of 50,000 other rows about the same users and items."""
    return _tensors(50_000, seed=2)


def _tensors(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = clicks(rows, seed)
    return torch.from_numpy(made.ids), torch.from_numpy(made.clicked)


def job() -> Job:
    """Return the job ``clicks-wide-deep``."""
    return Job(
        name=NAME,
        model=model,
        train_data=train_data,
        eval_data=eval_data,
        loss=nn.functional.binary_cross_entropy_with_logits,
        optimizer=lambda params: torch.optim.Adagrad(params, lr=0.05),
        metrics={"auc": ClickAUC()},
        batch_size=1024,
        epochs=2,
    )


def sparse_job() -> Job:
    """Return the same job with sparse gradients, which Adagrad takes as they are."""
    return job().replace(name=NAME + "-sparse", model=sparse_model)
