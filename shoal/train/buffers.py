"""A model's buffers (BatchNorm's running statistics, counters, masks): private while a step is computed, one truth between.

The arena holds two copies, for even and odd steps. At a step's beginning every worker takes the copy of that step; one of
them, the lowest rank that has samples, writes what its forward pass made of them into the other copy before it
publishes its gradients. So a worker that has to compute a step again finds the buffers as they were.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from shoal.comm.store import Store

_ALWAYS_COPIED = 1 << 16


class Buffers:
    """The buffers of one worker's model.

    Args:
        publishes: the names of those that it computes, None for all.
        finite: one that has numbers which are none stays as it was: what a step has made of it does not count.
    """

    def __init__(
        self, model: nn.Module, store: Store, publishes: Collection[str] | None = None, finite: bool = False
    ) -> None:
        self._store, self._finite = store, finite
        count = len(store.table.buffers)
        self._copies = [[store.buffer(parity, index) for index in range(count)] for parity in (0, 1)]
        self._places: list[tuple[nn.Module, str]] = []
        owners = {name: module for name, module in model.named_modules(remove_duplicate=False)}
        for spec in store.table.buffers:
            path, _, attribute = spec.name.rpartition(".")
            self._places.append((owners[path], attribute))
        self._published = [
            index
            for index, spec in enumerate(store.table.buffers)
            if publishes is None or any(name in publishes for name in spec.names)
        ]
        # Kernels change running statistics without telling torch's version counter: those are always copied.
        self._always = [
            isinstance(owner, _NormBase) or spec.nbytes <= _ALWAYS_COPIED
            for (owner, _), spec in zip(self._places, store.table.buffers, strict=True)
        ]
        self._seen = [(0, -1)] * len(self._places)
        self._loaded = [-1.0] * len(self._places)

    def _present(self, index: int) -> torch.Tensor:
        owner, attribute = self._places[index]
        value = owner._buffers[attribute]
        assert value is not None
        return value

    def _changed(self, index: int) -> bool:
        present = self._present(index)
        return self._always[index] or self._seen[index] != (id(present), present._version)

    @torch.no_grad()
    def load(self, step: int) -> None:
        """Take the values that hold at the beginning of a step."""
        steps = self._store.buffer_steps
        for index in range(len(self._places)):
            if self._changed(index) or self._loaded[index] != steps[index]:
                present = self._present(index)
                present.copy_(self._copies[step % 2][index])
                self._seen[index] = (id(present), present._version)
                self._loaded[index] = float(steps[index])

    @torch.no_grad()
    def publish(self, step: int) -> list[int]:
        """Write what the step made of them, for the next one; return the indices of those that were written."""
        steps = self._store.buffer_steps
        written = []
        for index in self._published:
            changed = self._changed(index)
            if changed or steps[index] == step:
                found = self._present(index)
                if self._finite and found.is_floating_point() and not bool(torch.isfinite(found).all()):
                    found = self._copies[step % 2][index]
                self._copies[(step + 1) % 2][index].copy_(found)
                written.append(index)
            if changed and not self._always[index]:
                steps[index] = step + 1
        return written
