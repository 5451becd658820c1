"""The small ResNet has the layers and the sizes that its docstring names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shoal.jobs import find
from shoal.jobs.vision.resnet import EPOCHS, ResNet


@pytest.mark.parametrize(("blocks", "depth"), [(1, 8), (2, 14)])
def test_depth_and_output(blocks: int, depth: int) -> None:
    model = ResNet(blocks)
    main_path = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(main_path) + 1 == depth  # the linear layer counts
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_sizes() -> None:
    model = ResNet()
    assert sum(p.numel() for p in model.parameters()) == 78_042
    features = model.stages(model.stem(torch.rand(2, 3, 32, 32)))
    assert features.shape == (2, 64, 8, 8)


def test_cosine_ends_at_zero() -> None:
    job = find("cifar-resnet").job
    optimizer = job.optimizer(job.model().parameters())
    scheduler = job.scheduler(optimizer)
    rates = []
    for _ in range(EPOCHS):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 0.1
    assert scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-12)
    assert (job.scheduler_every, job.epochs) == ("epoch", EPOCHS)
