"""A job whose final weights count how often each sample's push was applied."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from noisy_job import events
from torch import nn

import shoal

SAMPLES, EPOCHS = 96, 3


class Counted(nn.Module):
    """A weight for each sample, which every push that holds the sample lowers by 1/4: what is applied can be counted.

    Large enough that a server updates several chunks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SAMPLES, 6000))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.weight[rows].mean(1) * 6000


def counting_job(**changes: Any) -> shoal.Job:
    rows = torch.arange(SAMPLES)
    fields: dict[str, Any] = {
        "name": "counted", "model": Counted, "train_data": lambda: (rows, rows), "eval_data": lambda: (rows, rows),
        "loss": lambda output, target: output.mean(), "batch_size": 8, "epochs": EPOCHS,
        "optimizer": lambda params: torch.optim.SGD(params, lr=1.0), **changes,
    }  # fmt: skip
    return shoal.Job(**fields)


def check_ledger(run: shoal.Run, workers: int = 2, times: float = EPOCHS) -> None:
    """Each push is acknowledged once, and the weights hold each once."""
    batches = SAMPLES // 8
    acks = Counter((e["epoch"], e["batch"], e["shard"]) for e in events(run.path, "push_ack"))
    expected = {(e, b, s) for e in range(1, EPOCHS + 1) for b in range(1, batches + 1) for s in range(workers)}
    assert set(acks) == expected and set(acks.values()) == {1}
    assert torch.equal(run.weights()["weight"], torch.full((SAMPLES, 6000), -times * workers / 8))
