"""A job whose weights count the pushes that they hold: every push lowers those of its samples by a known amount."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import shoal
from shoal import ps

SAMPLES, BATCH, EPOCHS, WIDTH = 96, 8, 3, 6000


class Counted(nn.Module):
    """A weight (large enough for several chunks) and a row for each sample; slow, so that it can be killed on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SAMPLES, WIDTH))
        self.rows = ps.Embedding(4, optimizer=ps.SGD(lr=1.0), init=ps.Constant(0.0))
        self.seen = nn.BatchNorm1d(4, affine=False)

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(0.03)
            self.seen(self.weight.detach()[samples, :4])
        return self.weight[samples].mean(1) * WIDTH + self.rows(samples).sum(1)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.arange(SAMPLES)
    return rows, rows


job = shoal.Job(
    name="counted", model=Counted, train_data=data, eval_data=data, loss=lambda output, target: output.mean(), batch_size=BATCH,
    epochs=EPOCHS, optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
)  # fmt: skip


def check(run: shoal.Run, acknowledged: Iterable[dict[str, Any]], workers: int = 2) -> None:
    """Each push was acknowledged once, and the weights and the rows hold each once."""
    acks = Counter((e["epoch"], e["batch"], e["shard"]) for e in acknowledged)
    expected = {
        (e, b, s) for e in range(1, EPOCHS + 1) for b in range(1, SAMPLES // BATCH + 1) for s in range(workers)
    }
    assert set(acks) == expected and set(acks.values()) == {1}
    each = -EPOCHS * workers / BATCH
    weights = run.weights()
    assert torch.equal(weights["weight"], torch.full((SAMPLES, WIDTH), each))
    assert weights["rows.keys"].tolist() == list(range(SAMPLES))
    assert torch.equal(weights["rows.rows"], torch.full((SAMPLES, 4), each))
