"""An arena with a small model in it, in one process: every rank's part of the protocol can be played by the test."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from shoal.comm.arena import Arena
from shoal.comm.grid import Grid
from shoal.comm.store import Store, arena_layout
from shoal.train.describe import bind, describe, fill, trained_parameters
from shoal.train.update import Updater, make_updater

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Net(nn.Module):
    """Two groups' worth of parameters, large enough for several chunks, one frozen, and two buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.randn(900, 401))
        self.small = nn.Linear(7, 3)
        self.late = nn.Parameter(torch.randn(33))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.norm = nn.BatchNorm1d(3)
        self.double()


class Ranks:
    """One model, its arena, and the updater of each rank."""

    def __init__(self, make: MakeOptimizer, world_size: int) -> None:
        torch.manual_seed(4)
        self.make = make
        self.model: nn.Module = Net()
        table = describe(self.model, make(self.model))
        self.store = Store(Arena.create(arena_layout(table, Grid(dp=world_size))), table)
        fill(self.store, dict(self.model.named_parameters()), dict(self.model.named_buffers()))
        bind(self.model, self.store)
        self.world_size = world_size

    def updater(self, rank: int) -> Updater:
        """A new worker of this rank."""
        parameters = trained_parameters(self.model, self.store.table)
        return make_updater(self.store, rank, self.make(self.model), lambda: parameters)

    def give_gradients(self, step: int) -> list[torch.Tensor | None]:
        """Fill every stripe; ``late`` has no gradient in step 0. Returns the sum in float64, by trained parameter."""
        generator = torch.Generator().manual_seed(step)
        sums: list[torch.Tensor | None] = []
        for index, spec in enumerate(self.store.table.trained):
            touched = step > 0 or spec.name != "late"
            self.store.touched[:, index] = touched
            total = torch.zeros(spec.shape, dtype=torch.float64)
            for rank in range(self.world_size):
                gradient = torch.randn(spec.shape[-1:], generator=generator).double().expand(spec.shape).clone()
                gradient[..., 0] = torch.randn(spec.shape[:-1], generator=generator)
                self.store.gradient(rank, index).copy_(gradient)
                total += gradient
            sums.append(total if touched else None)
        return sums

    def close(self) -> None:
        self.store.arena.memory.close()


def every_bit(store: Store) -> bytes:
    """What an update changes: weights, optimizer state and scalars."""
    regions = [store.arena.region(name) for name in ("weights", "state", "scalars")]
    return b"".join(bytes(region.numpy().tobytes()) for region in regions)
