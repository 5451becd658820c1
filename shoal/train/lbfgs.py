"""Sandblaster L-BFGS (Dean et al. 2012): batch optimisation whose vectors never leave the servers.

Each server has its slice of the weights and of everything that the method remembers: the pairs (s, y) of the last steps, the
last direction and gradient. In a step it computes the scalar products of all these on its slice, one small matrix; the servers
add their matrices up, and from the sum alone follow the coefficients of the new direction (Chen et al. 2014, "Large-scale
L-BFGS using MapReduce": the two-loop recursion of Nocedal 1980, in the space of the vectors' coefficients). Then each server
combines its slices by these coefficients. So nobody sees all parameters, and one exchange of some hundred numbers is enough.

The result is that of ``torch.optim.LBFGS(lr=1, max_iter=1, history_size=10)`` without a line search, one iteration a step.
Workers balance large batches as ever: each computes its share. What is remembered beside the vectors is a page of numbers, the
same on every server; it is in the notebook, too, so a run that goes on from a checkpoint, or under another plan, has its history.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from shoal.comm.store import Store, scalar_row_bytes
from shoal.comm.table import align, chunks_of
from shoal.ps.lbfgs import PAGE, SIZE, STATE_KEYS, Move, direct, move, multiply
from shoal.train.saved import Saved, as_bytes
from shoal.train.update import Updater


class LbfgsUpdater(Updater):
    """One server's slice; see the module's docstring."""

    def __init__(self, store: Store, rank: int, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(store, rank)
        table = store.table
        self._lr = float(optimizer.param_groups[0]["lr"])
        self._chunks = chunks_of(table, self.lane.start, self.lane.stop)
        row, rows = scalar_row_bytes(table), store.scalar_bytes(rank)
        self._rows = rows[: row * sum(len(chunk.pieces) for chunk in self._chunks)].view(-1, row)
        words = store.arena.region("products").numpy().view(np.float64).reshape(store.grid.servers, -1)
        self._all = words[:, : SIZE * SIZE + 2]
        self._pages = words[rank, SIZE * SIZE + 2 :].reshape(2, PAGE)
        # The step whose page was written last.
        self._next = 0
        self._sources: Sequence[int] = self.lane.sources
        self._gradient = torch.empty(0)
        self._move = Move()

    @property
    def count(self) -> int:
        return len(self._chunks)

    def take_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        self._lr = float(groups[0]["lr"])

    def take_sources(self, stripes: Sequence[int]) -> None:
        self._sources = stripes

    def sum_gradients(self, chunk: int, factor: float) -> None:
        own, table = self._chunks[chunk], self.store.table
        dtype = table.parameters[own.pieces[0].parameter].dtype
        width = dtype.itemsize
        total = torch.zeros((own.stop - own.start) // width, dtype=dtype)
        for piece in own.pieces:
            low = table.parameters[piece.parameter].offset + piece.start * width
            high = low + (piece.stop - piece.start) * width
            found = [
                self.store.gradient_range(r, low, high, dtype)
                for r in self._sources
                if self.store.touched[r, piece.parameter]
            ]
            if found:
                self._native.sum_into(total[(low - own.start) // width : (high - own.start) // width], found, factor)
        self._gradient = total

    # -- what all servers find together --------------------------------------------------------------------------

    def multiply(self, factor: float) -> None:
        """Leave the scalar products of all vectors on this slice where every server reads them."""

        def parts() -> Iterator[list[torch.Tensor]]:
            for chunk in range(self.count):
                self.sum_gradients(chunk, factor)
                yield [*self._states(chunk), self._gradient]

        self._all[self.rank] = multiply(parts())

    def direct(self, step: int) -> None:
        """From the products of all servers to this step's direction and length."""
        page = self._pages[step % 2].copy()
        self._move = direct(self._all, page, self._lr)
        self._pages[(step + 1) % 2] = page
        self._next = step + 1

    def memory(self) -> dict[str, Any]:
        page = [float(number) for number in self._pages[self._next % 2]]
        return {"state": {}, "common": {}, "lbfgs": page, "step": self._next}

    def remember(self, memory: dict[str, Any]) -> None:
        self._next = int(memory["step"])
        self._pages[self._next % 2] = memory["lbfgs"]

    # -- chunk by chunk ------------------------------------------------------------------------------------------

    def _range(self, chunk: int) -> tuple[int, int, torch.dtype]:
        own = self._chunks[chunk]
        return own.start, own.stop, self.store.table.parameters[own.pieces[0].parameter].dtype

    def _states(self, chunk: int) -> list[torch.Tensor]:
        start, stop, dtype = self._range(chunk)
        return [self.store.state_range(k, start, stop, dtype) for k in range(len(STATE_KEYS))]

    def norm_squared(self) -> float:
        return float(torch.linalg.vector_norm(self._gradient, dtype=torch.float64)) ** 2

    def apply(self, chunk: int, scale: float) -> None:
        start, stop, dtype = self._range(chunk)
        move(self.store.weight_range(start, stop, dtype), self._states(chunk), self._gradient, self._move)

    def _ranges(self, chunk: int) -> list[torch.Tensor]:
        start, stop = self._chunks[chunk].start, align(self._chunks[chunk].stop)
        held = [self.store.weight_range(start, stop, torch.uint8)]
        return held + [self.store.state_range(k, start, stop, torch.uint8) for k in range(len(STATE_KEYS))]

    def reload(self, chunk: int) -> None:
        """Everything lies in the arena."""

    def saved(self, chunk: int) -> Iterator[Saved]:
        row = sum(len(before.pieces) for before in self._chunks[:chunk])
        for number, piece in enumerate(self._chunks[chunk].pieces):
            spec = self.store.table.parameters[piece.parameter]
            width = spec.dtype.itemsize
            low, high = spec.offset + piece.start * width, spec.offset + piece.stop * width
            start = piece.start * width
            yield Saved("weights", spec.name, start, as_bytes(self.store.weight_range(low, high, spec.dtype)), spec)
            for k, key in enumerate(STATE_KEYS):
                yield Saved(f"state.{key}", spec.name, start, as_bytes(self.store.state_range(k, low, high, spec.dtype)), spec)
            if piece.start == 0:
                yield Saved("scalars", spec.name, 0, self._rows[row + number])
