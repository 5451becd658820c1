"""The data axis where a model is split, or its update is shared, among workers without shared memory.

Each worker has the parts that it computes with in memory of its own. Parts that the same workers hold are a family
(``Family``), and a step travels as in ``data_group.py`` but for the gradients, which go family by family::

    zero=0, 3    the family's gradients are summed where they lie, and each of its workers makes the same update
    zero=1       the same, and each updates a slice and holds the optimizer's state of that slice alone;
                 then all get the new weights from one another
    zero=2       only each one's slice of the sum travels to it, instead of all to all

A family of one worker (a stage's own layers, a tensor part with ``dp=1``, with ``zero=3`` all rows) moves nothing here. What
else moves within a step is the other axes': activations along ``tp`` and ``pp``, weights and gradients of ``zero=3``.
With P bytes in families of k workers, a step moves about 2 P (zero=0), 3 P (zero=1) or 2 P (zero=2) into and out of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from shoal.axes.data import Totals
from shoal.axes.data_group import GroupData
from shoal.axes.updating import Hooks
from shoal.comm.grid import Grid


class Family(Protocol):
    """Trained parts that the same ranks hold: see ``shoal.train.own``."""

    @property
    def ranks(self) -> tuple[int, ...]: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def slices(self) -> tuple[tuple[int, int], ...]: ...
    def speaks(self, rank: int) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a worker has of a model.

    Attributes:
        whole: for each of its trained parts the index of its parameter among the model's.
        parameters: how many trained ones the model has.
        zero: the plan's.
    """

    grid: Grid
    families: Sequence[Family]
    whole: Sequence[int]
    parameters: int
    zero: int


class PartsData(GroupData):
    """The data axis of a worker that has parts of a model; see the module's docstring."""

    def __init__(self, held: Held, *arguments: Any) -> None:
        """Take what the worker has, and then what GroupData takes."""
        super().__init__(*arguments)
        self._grid, self._families, self._zero = held.grid, held.families, held.zero
        self._whole, self._count = np.array(held.whole, dtype=np.int64), held.parameters
        self.own[:] = True
        # Sharded gradients are sums over the data axis already, also those of a worker without samples, who marks nothing.
        summed = [family for family in self._families if len(family.ranks) > 1 and not self._sharded(family)]
        trained = self.store.table.trained
        self._summed = np.array([any(f.start <= s.offset < f.stop for f in summed) for s in trained], dtype=bool)

    def _sharded(self, family: Family) -> bool:
        return self._grid.sharded and len({self._grid.place(rank).data for rank in family.ranks}) == 1

    def begin(self, step: int) -> None:
        super().begin(step)
        for family in self._families:
            if len(family.ranks) > 1 and self._sharded(family):
                # Rows of a weight that stages share: whichever of them has no gradient of it must add nothing.
                self.store.gradient_range(0, family.start, family.stop, torch.uint8).zero_()

    def _marks(self) -> np.ndarray:
        # A parameter that any worker's part of which has a gradient is updated by all that have one.
        marks = np.zeros(self._count)
        np.maximum.at(marks, self._whole, self.store.touched[0])
        return marks

    def _take_marks(self, marks: np.ndarray) -> None:
        self._drop_untouched(self._summed)
        self.store.touched[0] = marks[self._whole]
        self._drop_untouched()

    def update(self, step: int, totals: Totals, grad_clip: float | None, hooks: Hooks) -> None:
        what = f"the gradients of step {step + 1}"
        for family in self._families:
            if len(family.ranks) == 1:
                continue
            if self._zero == 2 and family.slices:
                sliced = zip(family.slices, family.ranks, strict=True)
                pieces = [(piece, home) for bounds, home in sliced for piece in self._runs(*bounds)]
                self._group.sum_at(pieces, family.ranks, what)
            else:
                self._group.sum_in_place(self._runs(family.start, family.stop), what, family.ranks)
        # Past the sums of the whole stripe, which is not what is needed here.
        super(GroupData, self).update(step, totals, grad_clip, hooks)
        for family in self._families:
            if family.slices:
                sliced = zip(family.slices, family.ranks, strict=True)
                updated = [
                    (self.store.weight_range(*bounds, torch.uint8), home) for bounds, home in sliced if bounds[1] > bounds[0]
                ]
                self._group.share(updated, family.ranks, f"the weights of step {step + 1}")

    def _runs(self, start: int, stop: int) -> list[torch.Tensor]:
        """The gradients in bytes ``start`` to ``stop``, flat, one tensor for each run of one dtype."""
        runs: list[tuple[int, int, torch.dtype]] = []
        for spec in self.store.table.trained:
            low, high = max(start, spec.offset), min(stop, spec.offset + spec.nbytes)
            if low >= high:
                continue
            if runs and runs[-1][2] == spec.dtype:
                runs[-1] = (runs[-1][0], high, spec.dtype)
            else:
                runs.append((low, high, spec.dtype))
        return [self.store.gradient_range(0, *run) for run in runs]

    def _clip_scale(self, step: int, totals: Totals, grad_clip: float) -> float:
        """Clip by the norm over all parts, each of which counts once."""
        squared = 0.0
        for family in self._families:
            if family.speaks(self.rank):
                own = family.slices[family.ranks.index(self.rank)] if family.slices else (family.start, family.stop)
                squared += sum(float(torch.linalg.vector_norm(run, dtype=torch.float64)) ** 2 for run in self._runs(*own))
        row = torch.tensor([squared], dtype=torch.float64)
        rows = self._group.gather_rows(row, f"the norm of the gradients of step {step + 1}")
        norm = math.sqrt(sum(rows.reshape(-1).tolist())) * totals.factor
        return min(1.0, grad_clip / (norm + 1e-6))

    def sum_small(self, values: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
        along = self._grid.along_data(self.rank)
        return super().sum_small(values, [along[replica] for replica in ranks])
