"""What the host does aside."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

import shoal
from shoal.train.host import TrainHost


def test_a_model_is_described_aside_by_a_process_whose_threads_have_worked() -> None:
    """In a joined job it is the user's own: torch's threads are not there after a fork, and whoever waits for them hangs."""
    data = torch.randn(8, 16, 32, 32), torch.zeros(8, dtype=torch.int64)
    job = shoal.Job(
        name="threads", model=lambda: nn.Sequential(nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(14400, 2)), train_data=data,
        loss=functional.cross_entropy, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), batch_size=8, epochs=1,
    )  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        functional.conv2d(data[0], torch.randn(16, 16, 3, 3))
        assert TrainHost(job).describe_first()["inputs"][0]["shape"] == [-1, 16, 32, 32]
    finally:
        torch.set_num_threads(before)
