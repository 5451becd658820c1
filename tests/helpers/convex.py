"""A convex problem, badly scaled, whose whole data is the batch; and what torch's own L-BFGS makes of it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import shoal


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 12, dtype=torch.float64)
    return x, torch.randint(0, 3, (200,), generator=generator)


def build() -> nn.Module:
    return nn.Linear(12, 3).double()


def job(steps: int) -> shoal.Job:
    return shoal.Job(
        name="convex", model=build, train_data=data, loss=F.cross_entropy, batch_size=200, epochs=steps, optimizer="lbfgs"
    )


def by_torch(steps: int) -> dict[str, torch.Tensor]:
    """The weights after so many steps."""
    torch.manual_seed(0)
    model, (x, y) = build(), data()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1, max_iter=1, history_size=10)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return model.state_dict()
