"""The network of cifar-cnn is the one its docstring names, and it learns in a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shoal.errors import DataError
from shoal.jobs import find
from shoal.jobs.metrics import accuracy


def test_network_is_exactly_this() -> None:
    layers = list(find("cifar-cnn").job.model())
    assert [type(layer).__name__ for layer in layers] == ["Conv2d", "ReLU", "MaxPool2d", "Flatten", "Linear"]
    shapes = [tuple(p.shape) for layer in layers for p in layer.parameters()]
    assert shapes == [(32, 3, 3, 3), (32,), (10, 7200), (10,)]
    assert (layers[0].padding, layers[0].stride, layers[2].kernel_size) == ((0, 0), (1, 1), 2)


def test_settings() -> None:
    job = find("cifar-cnn").job
    optimizer = job.optimizer(job.model().parameters())
    assert (job.batch_size, job.epochs) == (100, 10)
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["lr"] == 1e-3


def test_accuracy() -> None:
    output = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    assert accuracy(output, torch.tensor([1, 0, 0, 1])).item() == 0.75


@pytest.mark.parametrize("name", ["cifar-cnn", "cifar-resnet"])
def test_learns_a_batch(name: str) -> None:
    job = find(name).job
    torch.manual_seed(0)
    inputs, targets = torch.rand(32, 3, 32, 32), torch.randint(0, 10, (32,))
    model = job.model()
    optimizer = job.optimizer(model.parameters())
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = job.loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.real_data
def test_real_images_where_they_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_OFFLINE", "1")
    job = find("cifar-cnn").job
    try:
        train, test = job.train_data(), job.eval_data()
    except DataError:
        pytest.skip("CIFAR-10 is not in the cache")
    assert (len(train), len(test)) == (50_000, 10_000)
    assert train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert train.classes[6] == "frog"
    inputs, _ = train.batch(np.arange(1000))
    assert inputs.shape == (1000, 3, 32, 32)
    assert (inputs.min().item(), inputs.max().item()) == (0.0, 1.0)
