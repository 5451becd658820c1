"""The arena of a process that computes on a GPU: what is computed with lies there, what is only noted stays here.

Weights, gradients, optimizer state and buffers are in the device's memory, each region a block of its own; signals, records
and notebooks in this process's. There is no undo log: a process with memory of its own has no successor that could use it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from shoal.comm.arena import Arena, ArenaLayout
from shoal.comm.memory import PrivateMemory
from shoal.comm.native import load, torch_sum

_THERE = ("weights", "gradients", "state", "scalars", "buffers")


class DeviceArena(Arena):
    """An arena whose large regions are on ``device``."""

    def __init__(self, layout: ArenaLayout, device: torch.device) -> None:
        sizes = {name: 0 if name in _THERE else size for name, (_, size) in layout.regions.items()}
        here = ArenaLayout.plan(layout.world_size, sizes, layout.grid)
        super().__init__(PrivateMemory(here.size), here, _OnDevice())
        # What is asked of the layout is how large regions are, wherever they lie.
        own = {name: (here.regions[name][0], layout.regions[name][1]) for name in layout.regions}
        self.layout = dataclasses.replace(here, regions=own)
        self.device = device
        self._there = {
            name: torch.zeros(layout.regions[name][1], dtype=torch.uint8, device=device) for name in _THERE
        }

    def region(self, name: str) -> torch.Tensor:
        return self._there[name] if name in self._there else super().region(name)

    def view(self, name: str, offset: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        if name not in self._there:
            return super().view(name, offset, numel, dtype)
        return self._there[name][offset : offset + numel * dtype.itemsize].view(dtype)


class _OnDevice:
    """The helpers of this process's memory, but for sums, which torch does where the tensors are."""

    name = "device"

    def __init__(self) -> None:
        self._here: Any = load()

    def post(self, address: int, value: int) -> None:
        self._here.post(address, value)

    def wait_all(self, address: int, stride: int, n: int, target: int, spin_s: float, timeout_s: float) -> int:
        return int(self._here.wait_all(address, stride, n, target, spin_s, timeout_s))

    def wait_any(self, words: int, stride: int, fellows: int, fellow_stride: int, n: int, spin_s: float) -> int:
        return int(self._here.wait_any(words, stride, fellows, fellow_stride, n, spin_s))

    def sum_into(self, out: torch.Tensor, sources: Sequence[torch.Tensor], scale: float) -> None:
        torch_sum(out, sources, scale)
