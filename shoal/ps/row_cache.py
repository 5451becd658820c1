"""Rows that a worker keeps for some steps where they would have to travel from servers each time: the popular ones.

Bounded in rows and in steps (stale synchronous parallel, Ho et al. 2013): a row that was pulled at step t is read without
asking until step t + bound, with whatever pushes it had seen at t; this worker's own are no exception. It is a
set-associative cache: a key may lie in one of a few places, and takes the place of the least used there, but not of one
that is used more often than itself: a row that is asked for once drives no popular one out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

_WAYS = 8
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_MOST_USES = 255

Fetch = Callable[[np.ndarray], torch.Tensor]
"""Different keys -> their rows, (n, width), from where they are kept."""


class RowCache:
    """Rows of one table, by key.

    Args:
        rows: how many there is room for.
        width: numbers in a row.
        bound: for how many steps after the one that it was pulled at a row may be read; 0: only within that step.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, bound: int) -> None:
        assert rows > 0 and bound >= 0
        sets = max(1, rows // _WAYS)
        self.bound = bound
        self.capacity = sets * _WAYS
        # How many rows were asked for, and how many of them were here.
        self.asked = self.hits = 0
        self._keys = np.zeros((sets, _WAYS), np.int64)
        # The step of the pull, counted from 1; 0 where there is no row.
        self._pulled = np.zeros((sets, _WAYS), np.int64)
        self._uses = np.zeros((sets, _WAYS), np.uint8)
        self._rows = torch.empty(self.capacity, width, dtype=dtype)

    @property
    def hit_rate(self) -> float:
        """The share of the rows asked for that were here; 0 before any was."""
        return self.hits / self.asked if self.asked else 0.0

    @property
    def nbytes(self) -> int:
        """What it holds, full or not."""
        return self._rows.nbytes + self._keys.nbytes + self._pulled.nbytes + self._uses.nbytes

    def clear(self) -> None:
        """Forget all rows: they were replaced, as after a checkpoint was read."""
        self._pulled[:] = 0

    def pull(self, keys: np.ndarray, step: int, fetch: Fetch) -> torch.Tensor:
        """Rows of different keys (int64, 1-D) at a step, (n, width); ``fetch`` is asked for those that are not here."""
        sets = self._sets_of(keys)
        same = (self._keys[sets] == keys[:, None]) & (self._pulled[sets] > 0)
        way = same.argmax(1)
        known = same[np.arange(len(keys)), way]
        at = sets * _WAYS + way
        uses, pulled = self._uses.reshape(-1), self._pulled.reshape(-1)
        uses[at[known]] = np.minimum(uses[at[known]], _MOST_USES - 1) + 1
        # A step may be made again after a death: a row of a later one is no older for that.
        here = known & (np.abs(step + 1 - pulled[at]) <= self.bound)
        self.asked += len(keys)
        self.hits += int(here.sum())
        out = torch.empty(len(keys), self._rows.shape[1], dtype=self._rows.dtype)
        found, missing = np.flatnonzero(here), np.flatnonzero(~here)
        out[torch.from_numpy(found)] = self._rows[torch.from_numpy(at[found])]
        if len(missing):
            rows = fetch(np.ascontiguousarray(keys[missing]))
            out[torch.from_numpy(missing)] = rows
            again = known[missing]
            self._keep(keys[missing], at[missing], again, sets[missing], rows, step)
        return out

    def _keep(
        self, keys: np.ndarray, at: np.ndarray, again: np.ndarray, sets: np.ndarray, rows: torch.Tensor, step: int
    ) -> None:
        """Keep rows that were pulled: in the place that a key has (``again``), or in that of the least used of its set."""
        uses, pulled = self._uses.reshape(-1), self._pulled.reshape(-1)
        order = np.where(self._pulled[sets] > 0, self._uses[sets].astype(np.int64), -1)
        least = sets * _WAYS + order.argmin(1)
        place = np.where(again, at, least)
        takes = again | (pulled[least] == 0) | (uses[least] <= 1)
        # Whoever keeps its place has to be used again to keep it the next time.
        uses[least[~takes]] -= 1
        chosen = np.flatnonzero(takes)
        # Several may want one place: a key that had it keeps it, or else the first gets it.
        chosen = chosen[np.argsort(~again[chosen], kind="stable")]
        chosen = chosen[np.unique(place[chosen], return_index=True)[1]]
        places = place[chosen]
        self._keys.reshape(-1)[places] = keys[chosen]
        pulled[places] = step + 1
        uses[places] = np.where(again[chosen], uses[places], 1)
        self._rows[torch.from_numpy(places)] = rows[torch.from_numpy(chosen)]

    def _sets_of(self, keys: np.ndarray) -> np.ndarray:
        spread = (keys.view(np.uint64) * _SPREAD) >> np.uint64(33)
        return (spread % np.uint64(len(self._keys))).astype(np.int64)
